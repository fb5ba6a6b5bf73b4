"""vLLM plugin (entry point ``vllm.general_plugins``), loaded in every vLLM process.

It costs nothing where LMCache is not used: each hook runs when the module it mends is imported.
"""

from __future__ import annotations

import wrapt


def register() -> None:
    """Called by vLLM in the API server, engine core and worker processes; safe to call again."""
    if getattr(register, "done", False):
        return
    register.done = True  # type: ignore[attr-defined]
    for module, hook in _HOOKS:
        wrapt.register_post_import_hook(hook, module)


# Hook functions as "module:function" strings: wrapt imports them only when they are needed.
_HOOKS = (
    ("lmcache.v1.token_database", "kvshare.lmcache_policy:mend_token_database"),
    # Before lmcache_policy, whose wrap of the same function is then around it: also what is not looked up has a policy.
    ("lmcache.integration.vllm.vllm_v1_adapter", "kvshare.lmcache_local:mend_adapter"),
    ("lmcache.integration.vllm.vllm_v1_adapter", "kvshare.lmcache_policy:mend_adapter"),
    ("lmcache.integration.vllm.vllm_v1_adapter", "kvshare.lmcache_reset:mend_adapter"),
    ("lmcache.integration.vllm.lmcache_connector_v1", "kvshare.lmcache_reset:mend_dynamic_connector"),
    ("lmcache.v1.gpu_connector", "kvshare.lmcache_cpu:mend_gpu_connector"),
    ("lmcache.v1.cache_engine", "kvshare.lmcache_async:mend_cache_engine"),
    ("lmcache.v1.lookup_client.lmcache_async_lookup_client", "kvshare.lmcache_async:mend_lookup_client"),
    ("lmcache.v1.cache_engine", "kvshare.lmcache_events:mend_cache_engine"),
    ("lmcache.v1.cache_controller.worker", "kvshare.lmcache_worker:mend_worker"),
    ("lmcache.v1.storage_backend.p2p_backend", "kvshare.lmcache_p2p:mend_backend"),
    ("lmcache.v1.transfer_channel.nixl_channel", "kvshare.lmcache_p2p:mend_nixl"),
    ("lmcache.v1.storage_backend.connector.lm_connector", "kvshare.lm_connector:mend_lm_connector"),
    ("lmcache.v1.storage_backend.remote_backend", "kvshare.lmcache_events:mend_remote_backend"),
    ("lmcache.integration.vllm.lmcache_mp_connector", "kvshare.lmcache_mp:mend_connector"),
    ("lmcache.integration.vllm.lmcache_mp_metadata", "kvshare.lmcache_mp:mend_metadata"),
    ("lmcache.integration.vllm.vllm_multi_process_adapter", "kvshare.lmcache_mp:mend_adapter"),
    ("lmcache.integration.vllm.vllm_multi_process_adapter", "kvshare.lmcache_mp_transfers:mend_adapter"),
    ("lmcache.v1.multiprocess.transport.zmq_impl.mq", "kvshare.lmcache_mp_transfers:mend_queue"),
    ("lmcache_ascend.v1.cache_engine", "kvshare.lmcache_events:mend_ascend_engine"),
    ("lmcache_ascend.integration.vllm.lmcache_ascend_connector_v1", "kvshare.lmcache_ascend:mend_connector"),
    ("vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector", "kvshare.lmcache_reset:mend_connector"),
    ("vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector", "kvshare.lmcache_loads:mend_connector"),
    ("vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector", "kvshare.lmcache_mp:check_vllms"),
    ("vllm.v1.core.sched.scheduler", "kvshare.vllm_prefix_cache:mend_scheduler"),
)
