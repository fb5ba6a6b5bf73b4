"""verl plugin: ``VERL_USE_EXTERNAL_MODULES=kvshare.verl_plugin``.

verl imports this at the top of ``import verl``, in the driver and in every Ray worker; nothing heavy
happens until verl itself imports the module that a hook is for.
"""

from __future__ import annotations

from typing import Any

import wrapt


def _register_replica(module: Any) -> None:
    """Replace verl's vLLM rollout replica by ours, which stamps requests with the policy."""

    def load() -> type:
        from kvshare.hooks.verl.rollout_server import KVShareReplica

        return KVShareReplica

    module.RolloutReplicaRegistry.register("vllm", load)


wrapt.register_post_import_hook(_register_replica, "verl.workers.rollout.replica")
for module, hook in (
    ("verl.plugin.platform.platform_manager", "cpu_platform:register_platform"),
    ("verl.utils.distributed", "cpu_platform:patch_process_group"),
    ("verl.utils.model", "critic_attention:patch_critic"),
    ("verl.utils.tracking", "step_metrics:patch_tracking"),
):
    wrapt.register_post_import_hook(f"kvshare.hooks.verl.{hook}", module)
