"""Memory that a request loaded is given back once, not twice.

With ``enable_async_loading``, which P2P needs, LMCache 0.5.6 lets go of what a request loaded when it has been copied
to vLLM, and again when the request ends: the page is then on the free list twice, two chunks get it, and who asks for
the first is served the second's KV.
"""

from __future__ import annotations

from typing import Any

from kvshare.upstream import wrap


def mend_cache_engine(module: Any) -> None:
    wrap(module, "LMCacheEngine._async_process_tokens_internal", _take, "tokens", "mask", "ret_mask")


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
