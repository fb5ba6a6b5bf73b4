"""Hooks that patch vLLM, LMCache and verl at run time: one folder for each project, one module for each change.

vllm_plugin.py and verl_plugin.py list the hooks and the upstream module whose import runs each of them.
"""
