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
        from kvshare.verl_server import KVShareReplica

        return KVShareReplica

    module.RolloutReplicaRegistry.register("vllm", load)


wrapt.register_post_import_hook(_register_replica, "verl.workers.rollout.replica")
wrapt.register_post_import_hook("kvshare.verl_cpu:register_platform", "verl.plugin.platform.platform_manager")
wrapt.register_post_import_hook("kvshare.verl_cpu:mend_process_group", "verl.utils.distributed")
wrapt.register_post_import_hook("kvshare.verl_cpu:mend_critic", "verl.utils.model")
wrapt.register_post_import_hook("kvshare.verl_tracking:mend_tracking", "verl.utils.tracking")
