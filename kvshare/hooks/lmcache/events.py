"""Report the chunks that an LMCache engine has stored and loaded, from the worker process.

The counters of vLLM and LMCache count lookups, so a failed load counts as a hit. They cannot tell another replica's KV
from the replica's own. These events name the keys, so the report can:

* ``ready``: the LMCache engine of this worker has started. In degraded mode, this event never comes.
* ``store``: the keys of a store() call.
* ``stored``: all these keys have arrived, and with P2P the controller lists them. Other replicas can find the request's
  first ``end`` tokens now. ``end`` is 0 if the store has failed. ``seconds`` is the time since store() returned.
* ``load``: the keys loaded into vLLM, the tokens of each, the tokens ``expected``, and the ``seconds`` of the load.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from kvshare.core import policy
from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.lmcache.p2p_controller import when_findable
from kvshare.hooks.patch import optional, wrap
from kvshare.record import worker_events

logger = LimitedLogger(logging.getLogger(__name__))

UNSEEN = "LMCache's stores and loads are not recorded, and the report calls the replicas degraded"


@optional(UNSEEN)
def patch_cache_engine(module: Any) -> None:
    wrap(module, "LMCacheEngine.post_init", _post_init, "self")
    wrap(module, "LMCacheEngine.store", _store, "tokens", "mask")
    wrap(module, "LMCacheEngine.retrieve", _retrieve, "tokens", "mask")


@optional(UNSEEN)
def patch_ascend_engine(module: Any) -> None:
    """LMCache-Ascend's engine overrides store() and retrieve(). Its store() may run on a separate thread."""
    path = "AscendLMCacheEngine._run_store_pipeline"
    wrap(module, path, _store_pipeline, *_PIPELINE)
    wrap(module, "AscendLMCacheEngine.retrieve", _retrieve, "tokens", "mask")


_PIPELINE = ("req_id", "tokens", "hashes", "offsets", "mask", "num_to_store_tokens", "kwargs")


@optional(UNSEEN)
def patch_remote_backend(module: Any) -> None:
    path = "RemoteBackend.batched_submit_put_task"
    wrap(module, path, _submit_put, "keys", "memory_objs", "transfer_spec", "on_complete_callback")


class _Loaded:
    """The tokens loaded so far. No lock: only the worker's main thread loads."""

    tokens = 0


def take_loaded() -> int:
    """Return the number of tokens loaded in this worker since the last call."""
    loaded, _Loaded.tokens = _Loaded.tokens, 0
    return loaded


class Puts:
    """The remote puts of one ``store()`` call that have not finished yet."""

    current = threading.local()  # .value: the Puts of the store() call that this thread runs

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: set[Any] = set()
        self._then: Callable[[], None] | None = None

    def started(self, keys: set[Any]) -> None:
        with self._lock:
            self._pending |= keys

    def finished(self, key: Any) -> None:
        with self._lock:
            self._pending.discard(key)
            then, self._then = (None, self._then) if self._pending else (self._then, None)
        if then:
            then()

    def when_finished(self, then: Callable[[], None]) -> None:
        with self._lock:
            self._then = then if self._pending else None
            finished = not self._pending
        if finished:
            then()


def _post_init(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    result = wrapped(*args, **kwargs)
    _send(engine, "ready")
    return result


def _store(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    return _report_store(engine, lambda: wrapped(*args, **kwargs), args, kwargs)


def _store_pipeline(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    call = {**dict(zip(_PIPELINE, args, strict=False)), **kwargs}
    store = {**call["kwargs"], "tokens": call["tokens"], "mask": call["mask"]}
    return _report_store(engine, lambda: wrapped(*args, **kwargs), (), store)


def _report_store(engine: Any, store: Callable[[], Any], args: tuple, kwargs: dict) -> Any:
    if not _reports(engine):
        return store()
    puts = Puts.current.value = Puts()
    try:
        result = store()
    finally:
        Puts.current.value = None
    try:
        request, chunks = _request(kwargs), list(_chunks(engine, args, kwargs))
        _send(engine, "store", **request, keys=[key.chunk_hash for _, _, key in chunks])
        end = max((end for _, end, _ in chunks), default=0)
        began = time.monotonic()

        def stored() -> None:
            _send(engine, "stored", **request, end=end, seconds=time.monotonic() - began)

        report = partial(when_findable, engine, chunks[-1][2], stored) if chunks else stored
        puts.when_finished(report)
    except Exception:
        logger.exception("kvshare could not report a store; the store itself is unaffected")
    return result


def _submit_put(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> Any:
    puts = getattr(Puts.current, "value", None)
    if puts is None or kwargs.get("on_complete_callback"):
        return wrapped(*args, **kwargs)
    # LMCache skips the keys of another request's pending puts, without a callback.
    keys = [key for key in (args[0] if args else kwargs["keys"]) if not backend.exists_in_put_tasks(key)]

    puts.started(set(keys))
    result = wrapped(*args, **kwargs, on_complete_callback=puts.finished)
    # Without a connection, LMCache drops the puts without a callback.
    for key in keys:
        if not backend.exists_in_put_tasks(key):
            puts.finished(key)
    return result


def _retrieve(wrapped: Any, engine: Any, args: tuple, kwargs: dict) -> Any:
    began = time.monotonic()
    mask = wrapped(*args, **kwargs)
    seconds = time.monotonic() - began
    if engine.metadata.worker_id == 0:
        try:
            _Loaded.tokens += int(mask[kwargs.get("vllm_cached_tokens", 0) :].sum())
            if _reports(engine):
                _send(engine, "load", **_request(kwargs), **_loaded(engine, mask, args, kwargs), seconds=seconds)
        except Exception:
            logger.exception("kvshare could not report a load; the load itself is unaffected")
    return mask


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
    return {"request": configs.get(worker_events.REQUEST), "policy": configs.get(policy.TAG, "")}


def _reports(engine: Any) -> bool:
    """Only rank 0 reports: every rank of a replica holds a slice of the same tokens."""
    return worker_events.sender() is not None and engine.metadata.worker_id == 0


def _send(engine: Any, op: str, **fields: Any) -> None:
    sender = worker_events.sender()
    if sender is not None and engine.metadata.worker_id == 0:
        sender.send({"op": op, **fields})
