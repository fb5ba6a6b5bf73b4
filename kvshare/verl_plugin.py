"""verl plugin: ``VERL_USE_EXTERNAL_MODULES=kvshare.verl_plugin``.

``import verl`` imports this module first, in the driver and in every Ray worker. It only registers hooks. A hook runs
when verl imports the module that the hook patches.
"""

from __future__ import annotations

from kvshare.hooks.imports import when_imported

for module, hook in (
    ("verl.workers.rollout.replica", "replica:register_replica"),
    ("verl.plugin.platform.platform_manager", "cpu_platform:register_platform"),
    ("verl.utils.distributed", "cpu_platform:patch_process_group"),
    ("verl.utils.model", "critic_attention:patch_critic"),
    ("verl.workers.rollout.llm_server", "conversation_ids:patch_client"),
    ("verl.utils.tracking", "step_metrics:patch_tracking"),
    ("verl.trainer.constants_ppo", "watch:watch_driver"),
):
    when_imported(module, f"verl.{hook}")
