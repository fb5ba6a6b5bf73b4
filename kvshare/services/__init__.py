"""The services that run beside training: one for each backend, how it is started and checked, the lm:// server."""
