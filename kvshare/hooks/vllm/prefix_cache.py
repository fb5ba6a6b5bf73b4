"""Makes vLLM's own ``reset_prefix_cache(reset_connector=True)`` hold while requests are running.

vLLM refuses to reset its prefix cache as long as one request holds a block: it warns, returns False,
and the next request finds KV of the old weights (vLLM 0.28.0, BlockPool.reset_prefix_cache). With
the wrap nothing older can be found afterwards, whoever is running. Requests under way go on, and
what they computed and will compute is theirs alone. Scheduler process.
"""

from __future__ import annotations

from typing import Any

from kvshare.core import policy
from kvshare.hooks.patch import wrap


def patch_scheduler(module: Any) -> None:
    wrap(module, "Scheduler.reset_prefix_cache", _reset, "reset_running_requests", "reset_connector")


def _reset(wrapped: Any, scheduler: Any, args: tuple, kwargs: dict) -> bool:
    def reset(reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if not reset_connector or reset_running_requests or scheduler.connector is None:
            return wrapped(reset_running_requests, reset_connector)
        caches = scheduler.kv_cache_manager
        if caches.enable_caching and not caches.reset_prefix_cache():
            for request in scheduler.requests.values():
                _make_private(request)
            caches.evict_blocks(set(range(caches.block_pool.num_gpu_blocks)))
        return scheduler.reset_connector_cache()

    return reset(*args, **kwargs)


def _make_private(request: Any) -> None:
    """Hash a request's blocks under a salt that no other request has."""
    request.cache_salt = policy.private_policy()
    request.block_hashes = []
    request.update_block_hashes()
