"""What changes vLLM, LMCache and verl while they run: one folder for each of them, one module for each change.

vllm_plugin.py and verl_plugin.py list which hook runs when which of their modules is imported.
"""
