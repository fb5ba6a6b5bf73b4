"""Hooks into verl: the rollout server, metrics, and support for machines without an accelerator."""
