"""Report hits in vLLM's own prefix cache on blocks that were computed before a weight update.

The scheduler process does not hold the weights, but each update passes through its engine core. A block is marked with
the number of updates so far when it enters the prefix cache. Neither the policy nor vLLM's ``cache_salt`` matters here.
"""

from __future__ import annotations

from typing import Any

from kvshare.core import policy
from kvshare.hooks.patch import optional, wrap
from kvshare.record import worker_events

LOSS = "Hits of vLLM's own prefix cache are not compared with weight updates"


class Updates:
    """The number of weight updates that this engine core has passed on to its workers."""

    seen = 0


@optional(LOSS)
def patch_core(module: Any) -> None:
    wrap(module, "EngineCore.collective_rpc", _collective_rpc, "method")


@optional(LOSS)
def patch_block_pool(module: Any) -> None:
    wrap(module, "BlockPool.cache_full_blocks", _cache, "blocks", "num_cached_blocks", "num_full_blocks")


@optional(LOSS)
def patch_manager(module: Any) -> None:
    wrap(module, "KVCacheManager.get_computed_blocks", _hit, "request")


def _collective_rpc(wrapped: Any, core: Any, args: tuple, kwargs: dict) -> Any:
    try:
        return wrapped(*args, **kwargs)
    finally:
        if policy.touches_weights(args[0] if args else kwargs["method"]):
            Updates.seen += 1


def _cache(wrapped: Any, pool: Any, args: tuple, kwargs: dict) -> None:
    def cache(
        request: Any, blocks: list, num_cached_blocks: int, num_full_blocks: int, *more: Any, **named: Any
    ) -> None:
        wrapped(request, blocks, num_cached_blocks, num_full_blocks, *more, **named)
        marks = vars(pool).setdefault("kvshare_marks", {})
        marks.update((block.block_id, Updates.seen) for block in blocks[num_cached_blocks:num_full_blocks])

    cache(*args, **kwargs)


def _hit(wrapped: Any, caches: Any, args: tuple, kwargs: dict) -> Any:
    found = wrapped(*args, **kwargs)
    request = args[0] if args else kwargs["request"]
    blocks, tokens = found[0].blocks[0], found[1]
    marks = vars(caches.block_pool).get("kvshare_marks", {})
    stale = sum(marks.get(block.block_id, Updates.seen) != Updates.seen for block in blocks)
    if stale and not hasattr(request, "kvshare_stale"):  # vLLM looks again while the request waits
        request.kvshare_stale = True
        _report(request, tokens * stale // len(blocks))
    return found


def _report(request: Any, tokens: int) -> None:
    params = (getattr(request.sampling_params, "extra_args", None) or {}).get("kv_transfer_params") or {}
    if sender := worker_events.sender():
        caller, name = params.get(worker_events.REQUEST), params.get(policy.TAG, "")
        sender.send({"op": "staleprefix", "request": caller, "policy": name, "tokens": tokens})
