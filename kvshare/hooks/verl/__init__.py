"""Hooks into verl: the rollout server, metrics, and verl on a machine with no accelerator."""
