"""Make vLLM's ``reset_prefix_cache(reset_connector=True)`` reset its prefix cache while requests are running.

vLLM does not reset its prefix cache while a request holds a block: it warns and returns False. The next request
then finds KV of the old weights (vLLM 0.31.0, BlockPool.reset_prefix_cache). With this wrap no later request finds
that KV. Running requests continue, and no other request finds the blocks that they computed or will compute.

The wrap runs in the scheduler process. vLLM still does the rest of the reset. vLLM may keep other data under the block
hashes, e.g. routed experts. Neither vLLM nor kvshare can drop that data while requests run. The reset then logs an
error and returns False, as it does without kvshare. Requests with a policy have block hashes of their own for each
policy, so they never find old data.
"""

from __future__ import annotations

import logging
from typing import Any

from kvshare.core import policy
from kvshare.hooks.patch import optional, wrap

logger = logging.getLogger(__name__)


# Optional: LMCache's connectors refuse an unknown vLLM, and without a connector this wrap does nothing.
@optional("vLLM does not reset its prefix cache while requests are running")
def patch_scheduler(module: Any) -> None:
    wrap(module, "Scheduler.reset_prefix_cache", _reset, "reset_running_requests", "reset_connector")


def _reset(wrapped: Any, scheduler: Any, args: tuple, kwargs: dict) -> bool:
    def reset(reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if not reset_connector or reset_running_requests or scheduler.connector is None:
            return wrapped(reset_running_requests, reset_connector)
        caches = scheduler.kv_cache_manager
        vllm_reset = caches.reset_prefix_cache
        caches.reset_prefix_cache = lambda: not caches.enable_caching or vllm_reset() or _invalidate(scheduler)
        try:
            return wrapped(reset_running_requests, reset_connector)
        finally:
            del caches.reset_prefix_cache  # uncovers the class's method

    return reset(*args, **kwargs)


def _invalidate(scheduler: Any) -> bool:
    """Drop all cached blocks from the prefix cache. False if vLLM keeps other data under the block hashes."""
    for request in scheduler.requests.values():
        _make_private(request)
    pools = _pools(scheduler.kv_cache_manager)
    for pool in pools:
        pool.evict_blocks(set(range(pool.num_gpu_blocks)))
    kept = ["its other block pools"] if len(pools) > 1 else []  # HiSparse: copies in host memory and unpublished blocks
    if getattr(scheduler, "aux_output_connector", None) is not None:  # vLLM 0.31
        kept.append("routed experts")
    if kept:
        logger.error(
            "requests are running, so vLLM could not reset %s: requests without a policy may get old data from there. "
            "Reset while no request runs, or pause with mode='keep' and set reset_running_requests=True",
            " and ".join(kept),
        )
    return not kept


def _pools(caches: Any) -> list[Any]:
    """The distinct block pools. All layer groups share one, except those that HiSparse keeps in host memory."""
    return list(dict.fromkeys(manager.block_pool for manager in caches.coordinator.single_type_managers))


def _make_private(request: Any) -> None:
    """Rehash a request's blocks with a salt that no other request has."""
    request.cache_salt = policy.private_policy()
    request.block_hashes = []
    request.update_block_hashes()
