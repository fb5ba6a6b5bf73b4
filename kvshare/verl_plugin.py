"""verl plugin: ``VERL_USE_EXTERNAL_MODULES=kvshare.verl_plugin``.

verl imports this at the top of ``import verl``, in the driver and in every Ray worker; nothing heavy
happens until verl itself imports the module that a hook is for.
"""

from __future__ import annotations

from kvshare.hooks.imports import when_imported

for module, hook in (
    ("verl.workers.rollout.replica", "replica:register_replica"),
    ("verl.plugin.platform.platform_manager", "cpu_platform:register_platform"),
    ("verl.utils.distributed", "cpu_platform:patch_process_group"),
    ("verl.utils.model", "critic_attention:patch_critic"),
    ("verl.utils.tracking", "step_metrics:patch_tracking"),
):
    when_imported(module, f"verl.{hook}")
