"""Report the chunks that an LMCache engine has stored and loaded, from the worker process.

The counters of vLLM and LMCache count lookups, so a failed load counts as a hit. They cannot tell another replica's KV
from the replica's own. These events name the keys, so the report can:

* ``ready``: the LMCache engine of the worker with this ``rank`` in the replica has started and has its storage. In
  degraded mode, this event never comes. If a remote storage connects later, it comes with the next store.
* ``store``: the keys that a store() call has put.
* ``stored``: all these keys have arrived, and with P2P the controller lists them. Other replicas can find the
  request's first ``end`` tokens now. ``end`` is 0 if they cannot: a put has failed, local memory was lacking, or the
  controller is away. ``seconds`` is the time since store() returned.
* ``load``: the keys loaded into vLLM, the tokens of each, the tokens ``expected``, and the ``seconds`` of the load.
* ``partial``: another rank than 0 has loaded only the first ``tokens`` of a load.

``store`` and ``load`` also have the ``epoch`` and the checksum of the ``weights`` in the worker (``vllm.weights``).
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from kvshare.core import policy
from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.lmcache.p2p_controller import when_findable
from kvshare.hooks.lmcache.ranks import rank_in_replica
from kvshare.hooks.lmcache.remote_puts import Puts
from kvshare.hooks.patch import optional, wrap
from kvshare.hooks.vllm.weights import weights
from kvshare.record import worker_events

logger = LimitedLogger(logging.getLogger(__name__))

UNSEEN = "LMCache's stores and loads are not recorded, and the report calls the replicas degraded"


@optional(UNSEEN)
def patch_cache_engine(module: Any) -> None:
    wrap(module, "LMCacheEngine.store", _store, "tokens", "mask")
    wrap(module, "LMCacheEngine.retrieve", _retrieve, "tokens", "mask")


@optional(UNSEEN)
def patch_manager(module: Any) -> None:
    wrap(module, "LMCacheManager.post_init", _post_init, "self")


@optional(UNSEEN)
def patch_ascend_engine(module: Any) -> None:
    """LMCache-Ascend's engine overrides store() and retrieve(). Its store() may run on a separate thread."""
    path = "AscendLMCacheEngine._run_store_pipeline"
    wrap(module, path, _store_pipeline, *_PIPELINE)
    wrap(module, "AscendLMCacheEngine.retrieve", _retrieve, "tokens", "mask")


_PIPELINE = ("req_id", "tokens", "hashes", "offsets", "mask", "num_to_store_tokens", "kwargs")


class _Loaded:
    """The tokens loaded so far. No lock: only the worker's main thread loads."""

    tokens = 0


def take_loaded() -> int:
    """Return what this worker adds to the tokens loaded since the last call.

    Rank 0 adds the tokens that it loaded. Other ranks subtract those that they did not.
    """
    loaded, _Loaded.tokens = _Loaded.tokens, 0
    return loaded


_ready: weakref.WeakSet[Any] = weakref.WeakSet()
"""Engines whose ``ready`` has been sent."""


def _post_init(wrapped: Any, manager: Any, args: tuple, kwargs: dict) -> Any:
    """The manager's, because it puts the engine into degraded mode if anything fails, also after the engine's own."""
    result = wrapped(*args, **kwargs)
    if manager.lmcache_engine is not None:  # None in the scheduler, and if the engine could not be made
        _say_ready(manager.lmcache_engine)
    return result


def _say_ready(engine: Any) -> None:
    if engine not in _ready and _has_storage(engine):
        _ready.add(engine)
        metadata = engine.metadata
        _send("ready", rank=rank_in_replica(metadata.engine_id, metadata.world_size, metadata.worker_id))


def _has_storage(engine: Any) -> bool:
    """False in degraded mode, and if a remote backend has no connector: LMCache only logs that, and stores nothing."""
    manager = engine.storage_manager  # None in a rank that stores nothing (save_only_first_rank, MLA)
    backends = manager.storage_backends.values() if manager else ()
    return engine.is_healthy() and all(getattr(backend, "connection", backend) is not None for backend in backends)


def _store(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    return _report_store(engine, lambda: wrapped(*args, **kwargs), args, kwargs)


def _store_pipeline(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    call = {**dict(zip(_PIPELINE, args, strict=False)), **kwargs}
    store = {**call["kwargs"], "tokens": call["tokens"], "mask": call["mask"]}
    return _report_store(engine, lambda: wrapped(*args, **kwargs), (), store)


def _report_store(engine: Any, store: Callable[[], Any], args: tuple, kwargs: dict) -> Any:
    _say_ready(engine)
    if not _reports(engine):
        return store()
    puts = Puts.current.value = Puts()
    try:
        result = store()
    finally:
        Puts.current.value = None
    try:
        request, chunks = _request(kwargs), list(_chunks(engine, args, kwargs))
        put = chunks[: len(puts.keys)]
        _send("store", **request, keys=[key.chunk_hash for _, _, key in put], **weights.now())
        began = time.monotonic()

        def stored(found: bool) -> None:
            end = chunks[-1][1] if found else 0
            _send("stored", **request, end=end, seconds=time.monotonic() - began)

        def ended(arrived: bool) -> None:
            if arrived:
                when_findable(engine, chunks[-1][2], stored)
            else:
                stored(False)

        if chunks and len(put) == len(chunks):
            puts.when_ended(ended)
        else:
            stored(False)
    except Exception:
        logger.exception("kvshare could not report a store; the store itself is unaffected")
    return result


def _retrieve(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    began = time.monotonic()
    mask = wrapped(*args, **kwargs)
    seconds = time.monotonic() - began
    try:
        _report_load(engine, mask, args, kwargs, seconds)
    except Exception:
        logger.exception("kvshare could not report a load; the load itself is unaffected")
    return mask


def _report_load(engine: Any, mask: Any, args: tuple, kwargs: dict, seconds: float) -> None:
    """Rank 0 reports each load. Another rank reports one that is not whole: vLLM computes the rest on all ranks."""
    cached = kwargs.get("vllm_cached_tokens", 0)
    tokens, expected = int(mask[cached:].sum()), len(mask) - cached
    if engine.metadata.worker_id == 0:
        _Loaded.tokens += tokens
        if _reports(engine):
            loaded = _loaded(engine, mask, args, kwargs)
            _send("load", **_request(kwargs), **loaded, seconds=seconds, **weights.now())
    elif tokens < expected:
        _Loaded.tokens -= expected - tokens
        _send("partial", **_request(kwargs), tokens=tokens)


def _loaded(engine: Any, mask: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    cached = kwargs.get("vllm_cached_tokens", 0)
    arrived = [chunk for chunk in _chunks(engine, args, kwargs) if bool(mask[chunk[0] : chunk[1]].all())]
    return {
        "keys": [key.chunk_hash for _, _, key in arrived],
        "tokens": [end - max(start, cached) for start, end, _ in arrived],
        "expected": len(mask) - cached,
    }


def _chunks(engine: Any, args: tuple, kwargs: dict) -> Iterable[tuple[int, int, Any]]:
    """(start, end, key) of each chunk of a store() or retrieve() call; start and end in tokens."""
    call = {**dict(zip(("tokens", "mask"), args, strict=False)), **kwargs}
    return engine.token_database.process_tokens(
        tokens=call["tokens"], mask=call.get("mask"), request_configs=call.get("request_configs")
    )


def _request(kwargs: dict) -> dict[str, Any]:
    configs = kwargs.get("request_configs") or {}
    named = {"request": configs.get(worker_events.REQUEST), "policy": configs.get(policy.TAG, "")}
    return named | ({"kept": True} if policy.KEPT in configs else {})


def _reports(engine: Any) -> bool:
    """Only rank 0 reports stores: every rank of an engine holds a slice of the same tokens."""
    return worker_events.sender() is not None and engine.metadata.worker_id == 0


def _send(op: str, **fields: Any) -> None:
    if (sender := worker_events.sender()) is not None:
        sender.send({"op": op, **fields})
