"""Hooks into LMCache: keys, resets, events, transfers. One module for each thing that is patched."""
