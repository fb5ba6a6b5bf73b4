"""What vLLM's own prefix cache has, or is about to have, is neither looked up, nor loaded, nor stored again.

LMCache 0.5.6 looks up the whole prompt of every request and, with ``enable_async_loading`` (P2P), loads what it finds,
also what the engine has. Of n samples that come together each loads the prompt if another replica has it, and each
stores it if none has: on an H100 each spent 300 ms on 16,384 tokens that the first had loaded (docs/benchmarks.md).
"""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

from kvshare.upstream import wrap


def mend_adapter(module: Any) -> None:
    wrap(module, "LMCacheConnectorV1Impl.get_num_new_matched_tokens", _matched, "request", "num_computed_tokens")


looking_up: WeakValueDictionary[bytes, Any] = WeakValueDictionary()
"""Requests whose lookup, and load into LMCache's memory, is under way, by the hash of their last whole chunk."""


def _matched(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> int | None:
    def matched(request: Any, num_computed_tokens: int) -> int | None:
        if connector.lookup_client is None or getattr(request, "kvshare_looked_up", False):
            return wrapped(request, num_computed_tokens)
        chunk = connector._lmcache_chunk_size
        whole = request.num_tokens // chunk * chunk
        if num_computed_tokens and whole - num_computed_tokens < chunk:
            # As after a lookup that found no more than vLLM has: who computed these chunks has stored them.
            connector.load_specs[request.request_id] = _spec(num_computed_tokens, num_computed_tokens // chunk * chunk)
            return 0
        last = request.block_hashes[: whole // connector._block_size][-1:]
        if last and _waits(looking_up.get(last[0])):
            return None  # vLLM asks again, and has it then
        request.kvshare_looked_up = True
        found = wrapped(request, num_computed_tokens)
        if found is None and last:
            looking_up[last[0]] = request
        return found

    return matched(*args, **kwargs)


def _waits(request: Any) -> bool:
    """It leaves this state when its tokens are found or not; when it is aborted, too."""
    return request is not None and request.status.name == "WAITING"


def _spec(in_vllm: int, in_lmcache: int) -> Any:
    from lmcache.integration.vllm.vllm_v1_adapter import LoadSpec

    return LoadSpec(vllm_cached_tokens=in_vllm, lmcache_cached_tokens=in_lmcache, can_load=False)
