"""What runs beside training: each backend's service, how it is started and checked, and the bounded lm:// server."""
