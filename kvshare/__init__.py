"""KV cache sharing between vLLM rollout replicas in verl RL training, through LMCache."""

__version__ = "0.1.0"
