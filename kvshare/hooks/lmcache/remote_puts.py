"""Follow the remote puts of each store() call: when the last has ended, and whether all of them arrived.

LMCache 0.5.6 calls back when a put has ended, but not whether it arrived, and not at all for a put that it skips: while
there is no connection, while the backend is bypassed, and if another request is putting the same key.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from typing import Any

from kvshare.hooks.patch import optional, wrap

UNSEEN = "Puts are not followed, so no KV counts as stored: no request waits for the prefix of another"


@optional(UNSEEN)
def patch_storage_manager(module: Any) -> None:
    wrap(module, "StorageManager.batched_put", _batched_put, *_BATCHED_PUT)


@optional(UNSEEN)
def patch_remote_backend(module: Any) -> None:
    wrap(module, "RemoteBackend.put_callback", _put_ended, "future", "key")
    wrap(module, "RemoteBackend.batched_put_callback", _batched_put_ended, "future", "keys")
    wrap(module, "RemoteBackend.batched_submit_put_task", _submit, "keys", "memory_objs")


_BATCHED_PUT = ("keys", "memory_objs", "transfer_spec", "location")
_lock = threading.Lock()  # LMCache completes puts on another thread


class Puts:
    """The puts of one store() call."""

    current = threading.local()  # .value: the Puts of the store() call that this thread runs

    def __init__(self) -> None:
        self.keys: list[Any] = []  # what store() has put: fewer than its chunks if local memory was lacking
        self._pending: set[tuple[int, Any]] = set()  # remote puts: id of the backend, key
        self._arrived = True
        self._then: Callable[[bool], None] | None = None

    def when_ended(self, then: Callable[[bool], None]) -> None:
        """Call ``then`` once all remote puts have ended, with whether all have arrived."""
        with _lock:
            self._then = then
        self._report()

    def start(self, backend: Any, keys: Iterable[Any]) -> None:
        with _lock:
            for key in keys:
                self._pending.add((id(backend), key))
                _waiting(backend).setdefault(key, []).append(self)

    def end(self, backend: Any, key: Any, arrived: bool) -> None:
        with _lock:
            self._pending.discard((id(backend), key))
            self._arrived &= arrived
        self._report()

    def _report(self) -> None:
        with _lock:
            then, self._then = (None, self._then) if self._pending else (self._then, None)
        if then:
            then(self._arrived)


def _waiting(backend: Any) -> dict[Any, list[Puts]]:
    """Who waits for the put of a key. A put that has ended has no entry."""
    return vars(backend).setdefault("kvshare_puts", {})


def _end(backend: Any, keys: Iterable[Any], arrived: bool) -> None:
    for key in keys:
        with _lock:
            waiting = _waiting(backend).pop(key, [])
        for puts in waiting:
            puts.end(backend, key, arrived)


def _batched_put(wrapped: Any, manager: Any, args: tuple, kwargs: dict) -> None:
    from lmcache.v1.storage_backend.remote_backend import RemoteBackend

    puts = getattr(Puts.current, "value", None)
    if puts is None:
        return wrapped(*args, **kwargs)
    call = {**dict(zip(_BATCHED_PUT, args, strict=False)), **kwargs}
    puts.keys = list(call["keys"])
    at = call.get("location")
    remote = {
        name: backend
        for name, backend in manager.storage_backends.items()
        if isinstance(backend, RemoteBackend) and at in (None, "", name)
    }
    for backend in remote.values():
        puts.start(backend, puts.keys)
    try:
        return wrapped(*args, **kwargs)
    finally:
        for name, backend in remote.items():
            if not _in_batch(backend) or name in manager._bypassed_backends:
                _end(backend, [key for key in puts.keys if not backend.exists_in_put_tasks(key)], False)


def _in_batch(backend: Any) -> bool:
    """Whether all keys of a call are one put, which LMCache does not keep in its put tasks."""
    return backend.connection is not None and backend.connection.support_batched_put()


def _put_ended(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    def put_ended(future: Any, key: Any) -> None:
        # Before LMCache removes the key from its put tasks: a key that is not there has ended, or was not put.
        _end(backend, [key], not future.cancelled() and future.exception() is None)
        wrapped(future, key)

    put_ended(*args, **kwargs)


def _batched_put_ended(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    """Look for the last key: LMCache logs the error of a batch, and its future succeeds."""

    def batched_put_ended(future: Any, keys: list[Any]) -> None:
        wrapped(future, keys)
        found = asyncio.run_coroutine_threadsafe(backend.connection.exists(keys[-1]), backend.loop)
        found.add_done_callback(lambda done: _end(backend, keys, done.exception() is None and done.result()))

    batched_put_ended(*args, **kwargs)


def _submit(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    """Put nothing while the server is down: LMCache would queue each entry and log an error for it."""
    connector = getattr(backend.connection, "_connector", backend.connection)
    if not getattr(connector, "down", False):
        wrapped(*args, **kwargs)
