"""Patch two errors of LMCache's ``enable_async_loading``, which P2P needs (LMCache 0.5.6).

LMCache frees the memory of a loaded chunk twice: after the copy to vLLM, and again when the request ends. The page is
then on the free list twice. Two chunks get the same page, and a load of the first returns the KV of the second.

A lookup that has timed out fails with a KeyError when vLLM repeats it, and vLLM's engine dies. vLLM repeats a lookup
when it had no room for the request.
"""

from __future__ import annotations

from typing import Any

from kvshare.hooks.patch import optional, wrap


def patch_cache_engine(module: Any) -> None:
    wrap(module, "LMCacheEngine._async_process_tokens_internal", _free_once, "tokens", "mask", "ret_mask")


@optional("An LMCache lookup that times out may end the engine")
def patch_lookup_client(module: Any) -> None:
    wrap(module, "LMCacheAsyncLookupClient.lookup_cache", _lookup_cache, "lookup_id")


def _lookup_cache(wrapped: Any, client: Any, args: tuple, kwargs: dict) -> int | None:
    def lookup_cache(lookup_id: str) -> int | None:
        timed_out = client.reqs_status.get(lookup_id, 0) is None and lookup_id not in client.first_lookup_time
        return 0 if timed_out else wrapped(lookup_id)

    return lookup_cache(*args, **kwargs)


def _free_once(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    """Remove a finished load from LMCache's events: retrieve() frees its memory, so the end of the request must not."""
    from lmcache.v1.event_manager import EventStatus, EventType

    chunks, size = wrapped(*args, **kwargs)
    loading = EventType.LOADING, kwargs["req_id"]
    if engine.event_manager.get_event_status(*loading) == EventStatus.DONE:
        loaded = engine.event_manager.pop_event(*loading)
        if loaded.exception() is None:
            used = {id(memory) for _, memory, _, _ in chunks}
            # The wrapped function has freed the chunks that vLLM had itself, except for the pin of their lookup.
            for memory in (memory for part in loaded.result() for _, memory in part):
                if id(memory) not in used and memory.is_pinned:
                    memory.unpin()
    return chunks, size
