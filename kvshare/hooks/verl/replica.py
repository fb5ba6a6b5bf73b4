"""Register kvshare's vLLM rollout replica, which stamps requests with the policy, with verl."""

from __future__ import annotations

from typing import Any

from kvshare.hooks import check


def register_replica(module: Any) -> None:
    check.parameters(module, "RolloutReplicaRegistry.register", "name", "loader")
    module.RolloutReplicaRegistry.register(name="vllm", loader=_load)


def _load() -> type:
    from kvshare.hooks.verl.rollout_server import KVShareReplica  # imports vLLM

    return KVShareReplica
