"""Tools beside training: data and a tiny model to try it, the demo, verify and bench."""
