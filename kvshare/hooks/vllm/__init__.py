"""Hooks into vLLM itself."""
