"""What is used beside training: data and model for a try, the demo, verify, bench."""
