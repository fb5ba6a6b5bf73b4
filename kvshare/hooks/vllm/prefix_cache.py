"""Makes vLLM's own ``reset_prefix_cache(reset_connector=True)`` hold while requests are running.

vLLM refuses to reset its prefix cache as long as one request holds a block: it warns, returns False,
and the next request finds KV of the old weights (vLLM 0.31.0, BlockPool.reset_prefix_cache). With
the wrap nothing older can be found afterwards, whoever is running. Requests under way go on, and
what they computed and will compute is theirs alone. Scheduler process.

All else that a reset does is vLLM's: it is told that the blocks are reset, and goes on. What it keeps under the
blocks' hashes besides, it cannot give up while requests are under way, and we cannot for it: then the reset says so and
returns False, as it does without us. Stamped requests have hashes of their own for each policy, and are fresh anyway.
"""

from __future__ import annotations

import logging
from typing import Any

from kvshare.core import policy
from kvshare.hooks.patch import optional, wrap

logger = logging.getLogger(__name__)


# LMCache's connectors refuse a vLLM that we do not know; without one there is nothing here to lose.
@optional("vLLM's reset_prefix_cache refuses while requests run, as it is")
def patch_scheduler(module: Any) -> None:
    wrap(module, "Scheduler.reset_prefix_cache", _reset, "reset_running_requests", "reset_connector")


def _reset(wrapped: Any, scheduler: Any, args: tuple, kwargs: dict) -> bool:
    def reset(reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if not reset_connector or reset_running_requests or scheduler.connector is None:
            return wrapped(reset_running_requests, reset_connector)
        caches = scheduler.kv_cache_manager
        vllms = caches.reset_prefix_cache
        caches.reset_prefix_cache = lambda: not caches.enable_caching or vllms() or _forget(scheduler)
        try:
            return wrapped(reset_running_requests, reset_connector)
        finally:
            del caches.reset_prefix_cache  # the class's is there again

    return reset(*args, **kwargs)


def _forget(scheduler: Any) -> bool:
    """Make what is cached impossible to find; returns whether that is all vLLM keeps under the blocks' hashes."""
    for request in scheduler.requests.values():
        _make_private(request)
    pools = _pools(scheduler.kv_cache_manager)
    for pool in pools:
        pool.evict_blocks(set(range(pool.num_gpu_blocks)))
    kept = ["its other block pools"] if len(pools) > 1 else []  # HiSparse: copies, and blocks yet to be published
    if getattr(scheduler, "aux_output_connector", None) is not None:  # vLLM 0.31
        kept.append("routed experts")
    if kept:
        logger.error(
            "requests are under way, so vLLM keeps what it has in %s: unstamped requests may find what is of older "
            "weights there. Reset when none are, or pause with mode='keep' and reset with reset_running_requests=True",
            " and ".join(kept),
        )
    return not kept


def _pools(caches: Any) -> list[Any]:
    """Each once; all groups of layers share one but for those that HiSparse keeps in the host's memory."""
    return list(dict.fromkeys(manager.block_pool for manager in caches.coordinator.single_type_managers))


def _make_private(request: Any) -> None:
    """Hash a request's blocks under a salt that no other request has."""
    request.cache_salt = policy.private_policy()
    request.block_hashes = []
    request.update_block_hashes()
