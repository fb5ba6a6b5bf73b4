"""From a launcher's arguments to a training that runs: preflight, forecast, processes, the report at the end."""
