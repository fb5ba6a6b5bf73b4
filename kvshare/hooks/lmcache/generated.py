"""Store the KV of what a request has generated, once, when the request ends.

By default LMCache stores the KV of prompts only. The next turn of a conversation has the last answer in its prompt. If
vLLM has evicted it, or the turn goes to another replica, it is computed again. LMCache's ``save_decode_cache`` stores
each chunk as soon as it is generated, of every request, also of those whose answer nobody asks for again. With these
wraps one store at the end of a request has the same chunks, and only a request that says so (``policy.STORE``) has one.

Scheduler process: the blocks of such a request are kept when it ends. The next step tells the workers to store them.
Worker process: the store is an ordinary one. After it vLLM frees the blocks.
"""

from __future__ import annotations

from typing import Any

from kvshare.core import policy
from kvshare.hooks.lmcache.keys import SKIP_SAVE, config_of, engine
from kvshare.hooks.patch import optional, wrap

LOSS = "What requests generate is not stored: turns that find it evicted compute it again"


@optional(LOSS)
def patch_adapter(module: Any) -> None:
    wrap(module, "LMCacheConnectorV1Impl.request_finished", _finished, "request", "block_ids")
    wrap(module, "LMCacheConnectorV1Impl.build_connector_meta", _build, "scheduler_output")
    wrap(module, "LMCacheConnectorV1Impl.get_finished", _get_finished, "finished_req_ids")


@optional(LOSS)
def patch_mp_connector(module: Any) -> None:
    wrap(module, "LMCacheMPConnector.request_finished", _mp_finished, "request", "block_ids")
    wrap(module, "LMCacheMPConnector.build_connector_meta", _mp_build, "scheduler_output")
    wrap(module, "LMCacheMPConnector.update_connector_output", _mp_stored, "connector_output")


def _wanted(request: Any) -> bool:
    wanted = config_of(request, policy.STORE)
    if request.status.name != "FINISHED_ABORTED":
        return wanted == policy.ALWAYS
    # vLLM may not have heard yet whether what the request loads has arrived. A first token says that it has, until the
    # request is preempted and loads again.
    arrived = request.num_output_tokens > 0 and request.num_preemptions == 0
    return arrived and wanted in (policy.ALWAYS, policy.IF_ABORTED)


def _computed(request: Any) -> int:
    """Tokens at the beginning of a request whose KV has been computed: never that of the last one."""
    return min(request.num_computed_tokens, request.num_tokens - 1)


# -- in-process connectors --------------------------------------------------------------------


def _finished(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> tuple[bool, dict | None]:
    def finished(request: Any, block_ids: list[int]) -> tuple[bool, dict | None]:
        kept, params = wrapped(request, block_ids)
        if (meta := _store(connector, request, block_ids)) is not None:
            vars(connector).setdefault("kvshare_stores", []).append((engine.resets, meta))
            return True, params
        return kept, params

    return finished(*args, **kwargs)


def _store(connector: Any, request: Any, block_ids: list[int]) -> Any:
    """LMCache's ReqMeta of the store; None if there is no whole chunk to store."""
    from lmcache.integration.vllm.vllm_v1_adapter import ReqMeta

    tracker = connector._request_trackers.get(request.request_id)
    if tracker is None or connector.kv_role == "kv_consumer" or not _wanted(request):
        return None
    configs, chunk = tracker.request_configs or {}, connector._lmcache_chunk_size
    end = _computed(request) // chunk * chunk
    if policy.is_private(configs.get(policy.TAG, "")) or tracker.skip_save or configs.get(SKIP_SAVE):
        return None
    if end - tracker.num_saved_tokens // chunk * chunk < chunk:
        return None
    tracker.token_ids, tracker.allocated_block_ids = list(request.all_token_ids[:end]), list(block_ids)
    return ReqMeta.from_request_tracker(
        tracker, connector._block_size, chunk, discard_partial_chunks=True, save_decode_cache=True
    )


def _build(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> Any:
    meta = wrapped(*args, **kwargs)
    stores, connector.kvshare_stores = vars(connector).get("kvshare_stores", []), []
    meta.kvshare_ended = [store.req_id for _, store in stores]
    for resets, store in stores:
        store.save_spec.can_save = resets == engine.resets  # else the weights may change before it is stored
        meta.add_request(store)
    return meta


def _get_finished(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> tuple[set[str] | None, set[str] | None]:
    """``wait_for_save`` has stored them."""
    sent, received = wrapped(*args, **kwargs)
    ended = getattr(connector._parent._get_connector_metadata(), "kvshare_ended", [])
    return ({*(sent or ()), *ended} or None), received


# -- multi-process connector ------------------------------------------------------------------


def _mp_finished(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> tuple[bool, dict | None]:
    """It always keeps the blocks until its worker says that all stores of the request have ended."""

    def finished(request: Any, block_ids: list[int]) -> tuple[bool, dict | None]:
        if (meta := _mp_store(connector, request)) is not None:
            vars(connector).setdefault("kvshare_stores", []).append((engine.resets, meta))
        return wrapped(request, block_ids)

    return finished(*args, **kwargs)


def _mp_store(connector: Any, request: Any) -> Any:
    from lmcache.integration.vllm.lmcache_mp_metadata import LMCacheMPRequestMetadata

    tracker = connector.request_trackers.get(request.request_id)
    if tracker is None or not connector._can_store or connector.lazy_offload or not _wanted(request):
        return None
    if policy.is_private((tracker.request_configs or {}).get(policy.TAG, "")):
        return None
    most = tracker.max_offload_tokens
    tracker.max_offload_tokens = _computed(request) if most is None else min(most, _computed(request))
    return LMCacheMPRequestMetadata.GetStoreMetadata(
        tracker,
        connector.scheduler_adapter.lmcache_tokens_per_chunk,
        connector._group_tokens_per_block,
        save_decode_cache=True,
    )


def _mp_build(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> Any:
    meta = wrapped(*args, **kwargs)
    stores, connector.kvshare_stores = vars(connector).get("kvshare_stores", []), []
    for resets, store in stores:
        if resets == engine.resets:
            meta.add_request_metadata(store)
            vars(connector).setdefault("kvshare_storing", set()).add(store.request_id)
    return meta


def _mp_stored(wrapped: Any, connector: Any, args: tuple, kwargs: dict) -> None:
    """End the server's session of a request again: the store after its end has opened another one."""
    wrapped(*args, **kwargs)
    output = args[0] if args else kwargs["connector_output"]
    storing = vars(connector).get("kvshare_storing", set())
    for request_id in storing & set(output.finished_sending or ()):
        storing.discard(request_id)
        connector.scheduler_adapter.end_session(request_id)
