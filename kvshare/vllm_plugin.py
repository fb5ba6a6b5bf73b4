"""vLLM plugin (entry point ``vllm.general_plugins``): register kvshare's hooks in every vLLM process.

A hook runs when the module that it patches is imported. Without LMCache, none of LMCache's hooks runs.
"""

from __future__ import annotations

from kvshare.hooks.imports import when_imported


def register() -> None:
    """vLLM calls this in the API server, engine core and worker processes. A second call does nothing."""
    if getattr(register, "done", False):
        return
    register.done = True  # type: ignore[attr-defined]
    for module, hook in _HOOKS:
        when_imported(module, hook)


# (module to wait for, "module:function" in kvshare.hooks to call with it)
_HOOKS = (
    ("lmcache.v1.token_database", "lmcache.keys:patch_token_database"),
    # Before keys, which wraps the same function: the last wrap runs first, and keys must set the policy first.
    ("lmcache.integration.vllm.vllm_v1_adapter", "lmcache.skip_local_hits:patch_adapter"),
    ("lmcache.integration.vllm.vllm_v1_adapter", "lmcache.keys:patch_adapter"),
    ("lmcache.integration.vllm.vllm_v1_adapter", "lmcache.opt_out:patch_adapter"),
    ("lmcache.integration.vllm.vllm_v1_adapter", "lmcache.reset:patch_adapter"),
    ("lmcache.integration.vllm.vllm_v1_adapter", "lmcache.generated:patch_adapter"),
    ("lmcache.integration.vllm.vllm_v1_adapter", "lmcache.failed_loads:patch_adapter"),
    ("lmcache.integration.vllm.lmcache_connector_v1", "lmcache.reset:patch_dynamic_connector"),
    ("lmcache.v1.gpu_connector", "lmcache.cpu_connector:patch_gpu_connector"),
    ("lmcache.v1.cache_engine", "lmcache.async_loading:patch_cache_engine"),
    ("lmcache.v1.lookup_client.lmcache_async_lookup_client", "lmcache.async_loading:patch_lookup_client"),
    ("lmcache.v1.cache_engine", "lmcache.events:patch_cache_engine"),
    ("lmcache.v1.manager", "lmcache.events:patch_manager"),
    ("lmcache.v1.cache_controller.worker", "lmcache.p2p_controller:patch_worker"),
    ("lmcache.v1.storage_backend.p2p_backend", "lmcache.p2p_peers:patch_backend"),
    ("lmcache.v1.transfer_channel.nixl_channel", "lmcache.nixl_agents:patch_nixl"),
    ("lmcache.v1.storage_backend.connector.lm_connector", "lmcache.remote_lm:patch_lm_connector"),
    ("lmcache.v1.storage_backend.connector", "lmcache.remote_engine:patch_connector_manager"),
    ("lmcache.v1.storage_backend.remote_backend", "lmcache.remote_puts:patch_remote_backend"),
    ("lmcache.v1.storage_backend.storage_manager", "lmcache.remote_puts:patch_storage_manager"),
    ("lmcache.integration.vllm.lmcache_mp_connector", "lmcache.mp_connector:patch_connector"),
    ("lmcache.integration.vllm.lmcache_mp_connector", "lmcache.skip_local_hits:patch_mp_connector"),
    ("lmcache.integration.vllm.lmcache_mp_connector", "lmcache.opt_out:patch_mp_connector"),
    ("lmcache.integration.vllm.lmcache_mp_connector", "lmcache.generated:patch_mp_connector"),
    ("lmcache.integration.vllm.lmcache_mp_metadata", "lmcache.mp_connector:patch_metadata"),
    ("lmcache.integration.vllm.vllm_multi_process_adapter", "lmcache.mp_connector:patch_adapter"),
    ("lmcache.integration.vllm.vllm_multi_process_adapter", "lmcache.mp_transfers:patch_adapter"),
    ("lmcache.integration.vllm.vllm_multi_process_adapter", "lmcache.mp_copies:patch_adapter"),
    ("lmcache.v1.multiprocess.transfer_context.shm", "lmcache.mp_copies:patch_places"),
    ("lmcache.v1.multiprocess.transfer_context.worker_transfer", "lmcache.mp_copies:patch_context"),
    ("lmcache.v1.multiprocess.transport.zmq_impl.mq", "lmcache.mp_transfers:patch_queue"),
    ("lmcache_ascend.v1.cache_engine", "lmcache.events:patch_ascend_engine"),
    ("lmcache_ascend.v1.storage_backend.p2p_backend", "lmcache.p2p_peers:patch_ascend_backend"),
    (
        "lmcache_ascend.integration.vllm.lmcache_ascend_connector_v1",
        "lmcache.ascend_connector:patch_connector",
    ),
    ("vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector", "lmcache.reset:patch_connector"),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector",
        "lmcache.loaded_tokens:patch_connector",
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.lmcache_mp_connector",
        "lmcache.mp_connector:check_vllm_connector",
    ),
    ("vllm.v1.worker.worker_base", "vllm.weights:patch_worker"),
    ("vllm.v1.worker.worker_base", "lmcache.mp_copies:patch_worker"),
    ("vllm.v1.engine.core", "vllm.prefix_hits:patch_core"),
    ("vllm.v1.core.block_pool", "vllm.prefix_hits:patch_block_pool"),
    ("vllm.v1.core.kv_cache_manager", "vllm.prefix_hits:patch_manager"),
    ("vllm.v1.core.sched.scheduler", "lmcache.keys:patch_scheduler"),
    ("vllm.v1.core.sched.scheduler", "vllm.prefix_cache:patch_scheduler"),
)
