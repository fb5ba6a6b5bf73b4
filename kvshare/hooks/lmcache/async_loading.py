"""Memory that a request loaded is given back once, not twice; and a lookup without an answer ends once, too.

With ``enable_async_loading``, which P2P needs, LMCache 0.5.6 lets go of what a request loaded when it has been copied
to vLLM, and again when the request ends: the page is then on the free list twice, two chunks get it, and who asks for
the first is served the second's KV. And vLLM's engine dies of a KeyError when it asks again for a request whose lookup
has timed out, as it does if there was no room for it.
"""

from __future__ import annotations

from typing import Any

from kvshare.hooks.patch import optional, wrap


def patch_cache_engine(module: Any) -> None:
    wrap(module, "LMCacheEngine._async_process_tokens_internal", _take, "tokens", "mask", "ret_mask")


@optional("A lookup of LMCache that times out may end the engine")
def patch_lookup_client(module: Any) -> None:
    wrap(module, "LMCacheAsyncLookupClient.lookup_cache", _lookup_cache, "lookup_id")


def _lookup_cache(wrapped: Any, client: Any, args: tuple, kwargs: dict) -> int | None:
    def lookup_cache(lookup_id: str) -> int | None:
        timed_out = client.reqs_status.get(lookup_id, 0) is None and lookup_id not in client.first_lookup_time
        return 0 if timed_out else wrapped(lookup_id)

    return lookup_cache(*args, **kwargs)


def _take(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    """From here on retrieve() gives it all back; the end of the request must find nothing to."""
    from lmcache.v1.event_manager import EventStatus, EventType

    taken, size = wrapped(*args, **kwargs)
    loading = EventType.LOADING, kwargs["req_id"]
    if engine.event_manager.get_event_status(*loading) == EventStatus.DONE:
        loaded = engine.event_manager.pop_event(*loading)
        if loaded.exception() is None:
            used = {id(memory) for _, memory, _, _ in taken}
            # What vLLM had itself was let go of in there, but for the pin of its lookup.
            for memory in (memory for part in loaded.result() for _, memory in part):
                if id(memory) not in used and memory.is_pinned:
                    memory.unpin()
    return taken, size
