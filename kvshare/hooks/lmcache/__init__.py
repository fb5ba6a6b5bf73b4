"""Hooks into LMCache: keys, resets, events, transfers. One module for each change."""
