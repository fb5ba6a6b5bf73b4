"""Turns a launcher's arguments into a running training: preflight, forecast, processes, and the report at the end."""
