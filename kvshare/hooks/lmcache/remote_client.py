"""A client of the remote backend that copes with a slow, hung, faulty, restarted or dead server.

It is the same for all servers. What differs is the Connection: remote_lm.py has those to an ``lm://`` server,
remote_engine.py one that uses LMCache's own connector to Valkey, Redis or Mooncake.

* No operation takes longer than ``blocking_timeout_secs`` of the LMCache config. An operation is the lookup or the load
  of a whole prompt. After a failure the client sends nothing until a background probe finds the server healthy. Until
  then lookups miss, and vLLM recomputes.
* The chunks of a prompt go over several connections at once.
* A put returns when its entry can be found, and raises if it cannot.
* An entry ends with a checksum of its key and content. A wrong checksum is a miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

from kvshare.core.log_limit import LimitedLogger

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each entry or request may repeat

THREADS = 4  # for gets, and as many for puts
PUTS = 8  # entries that one thread stores before it asks for them
PROBE_EVERY = 1.0  # seconds
OF_TIMEOUT = 0.9  # when the timeout is over, LMCache drops what has arrived

Allocate = Callable[[Any], Any]
"""Returns memory for an entry, given what the connection knows of it. Raises MemoryError if there is none."""


class Connection(Protocol):
    """To a server. Used by one thread at a time, and closed after an exception.

    Each method raises OSError if the server has gone, or does not answer before ``deadline``.
    """

    deadline: float

    def check(self) -> None:
        """Return when the server has answered that it is healthy."""

    def has(self, keys: Sequence[Any]) -> list[bool]:
        """Whether the server has each entry."""

    def get(self, keys: Sequence[Any], allocate: Allocate) -> Iterator[Any]:
        """The memory object of each entry; None for those that the server lacks or whose checksum is wrong."""

    def put(self, keys: Sequence[Any], chunks: Sequence[Any]) -> list[bool]:
        """Whether the server keeps each entry."""

    def close(self) -> None: ...


class Client(RemoteConnector):
    """Does what is the same for all servers.

    Args:
        name: of the server, for log lines.
        local_cpu_backend: LMCache's local memory, which takes the chunks that arrive.
    """

    def __init__(self, name: str, local_cpu_backend: Any) -> None:
        super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
        self._name = name
        self._timeout = OF_TIMEOUT * float(local_cpu_backend.config.blocking_timeout_secs)
        self._memory = local_cpu_backend
        self._idle: deque[Connection] = deque()
        self._down, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._getting = ThreadPoolExecutor(THREADS, "kvshare-remote-get")
        self._putting = ThreadPoolExecutor(THREADS, "kvshare-remote-put")
        self._puts: deque[tuple[Any, Any, Future[None]]] = deque()

    @property
    def down(self) -> bool:
        return self._down.is_set()

    # Lookups. LMCache calls batched_contains, or, with asynchronous loading, batched_async_contains.

    def support_batched_contains(self) -> bool:
        return True

    def batched_contains(self, keys: Sequence[Any]) -> int:
        """Number of leading keys that the server has."""
        if self.down:
            return 0
        found = self._do(lambda connection: connection.has(keys))
        return found.index(False) if False in found else len(found)

    async def batched_async_contains(self, lookup_id: str, keys: Sequence[Any], pin: bool = False) -> int:
        return await asyncio.to_thread(self.batched_contains, keys)

    def exists_sync(self, key: Any) -> bool:
        return self.batched_contains([key]) == 1

    async def exists(self, key: Any) -> bool:
        return await asyncio.to_thread(self.exists_sync, key)

    # Gets. LMCache calls batched_get, or, with asynchronous loading, batched_get_non_blocking.

    def support_batched_get(self) -> bool:
        return True

    async def batched_get(self, keys: Sequence[Any]) -> list[Any]:
        """The memory object of each entry, None for each that has not arrived in time or is not right."""
        parts = [self._getting.submit(self._get, keys[start::THREADS]) for start in range(min(THREADS, len(keys)))]
        chunks: list[Any] = [None] * len(keys)
        try:
            for start, part in enumerate(parts):
                arrived = await asyncio.shield(asyncio.wrap_future(part))
                chunks[start::THREADS] = arrived
        except asyncio.CancelledError:  # LMCache waits no longer
            for part in parts:
                part.cancel()
                part.add_done_callback(_free)
            raise
        return chunks

    async def batched_get_non_blocking(self, lookup_id: str, keys: Sequence[Any]) -> list[Any]:
        """The memory objects of the leading entries that have arrived."""
        chunks = await self.batched_get(keys)
        count = chunks.index(None) if None in chunks else len(chunks)
        _release(chunks[count:])
        return chunks[:count]

    async def get(self, key: Any) -> Any:
        return (await self.batched_get([key]))[0]

    def _get(self, keys: Sequence[Any]) -> list[Any]:
        chunks: list[Any] = []

        def receive(connection: Connection) -> None:
            for chunk in connection.get(keys[len(chunks) :], self._allocate):
                chunks.append(chunk)

        if not self.down:
            try:
                self._do(receive)
            except OSError:
                pass  # _do has logged it
            except Exception as error:
                often.error("%s: %s", self._name, error)
        return chunks + [None] * (len(keys) - len(chunks))

    def _allocate(self, entry: Any) -> Any:
        """Memory for an entry, of which the connection tells the client ``entry``."""
        raise NotImplementedError

    def _chunk(self, shape: Any, dtype: Any, kind: Any) -> Any:
        # LMCache's default waits for free memory. The owner of that memory may be waiting for this call.
        chunk = self._memory.allocate(shape, dtype, kind, busy_loop=False)
        if chunk is None:
            raise MemoryError("LMCache has no free local memory for an entry")
        return chunk

    # Puts. LMCache's batched_put has no result for each entry, so puts that come together are batched here.

    async def put(self, key: Any, memory_obj: Any) -> None:
        # LMCache's local memory holds the queued entries, so its size bounds the queue.
        stored: Future[None] = Future()
        self._puts.append((key, memory_obj, stored))
        self._putting.submit(self._put_some)
        await asyncio.shield(asyncio.wrap_future(stored))

    def _put_some(self) -> None:
        puts: list[tuple[Any, Any, Future[None]]] = []
        with contextlib.suppress(IndexError):
            while len(puts) < PUTS:
                puts.append(self._puts.popleft())
        if not puts:
            return  # another call has taken them
        keys, chunks, futures = zip(*puts, strict=True)
        try:
            if self.down:
                raise ConnectionError(f"{self._name} is down")
            kept = self._do(lambda connection: connection.put(keys, chunks))
        except Exception as error:
            for future in futures:
                future.set_exception(error)
            return
        for future, is_kept in zip(futures, kept, strict=True):
            if is_kept:
                future.set_result(None)
            else:
                future.set_exception(MemoryError(f"{self._name} did not keep an entry. Is its memory too small?"))

    async def list(self) -> list[str]:
        return []

    async def close(self) -> None:
        self._closed.set()
        for pool in (self._getting, self._putting):
            pool.shutdown(wait=False, cancel_futures=True)
        while self._puts:
            self._puts.popleft()[2].cancel()
        self._close_idle()

    # Connections

    def _do(self, operation: Callable[[Connection], Any]) -> Any:
        """Call ``operation`` with a connection. After an OSError the server counts as down."""
        deadline = time.monotonic() + self._timeout
        try:
            try:
                return self._call(operation, self._take_idle() or self._open(deadline), deadline)
            except ConnectionError:  # perhaps the server was restarted
                self._close_idle()
                return self._call(operation, self._open(deadline), deadline)
        except OSError as error:
            self._mark_down(error)
            raise

    def _call(self, operation: Callable[[Connection], Any], connection: Connection, deadline: float) -> Any:
        connection.deadline = deadline
        try:
            result = operation(connection)
        except BaseException:
            connection.close()
            raise
        self._idle.append(connection)
        if self._closed.is_set():
            self._close_idle()
        return result

    def _open(self, deadline: float) -> Connection:
        raise NotImplementedError

    def _take_idle(self) -> Connection | None:
        try:
            return self._idle.pop()
        except IndexError:
            return None

    def _close_idle(self) -> None:
        while connection := self._take_idle():
            connection.close()

    def _mark_down(self, error: BaseException) -> None:
        with self._lock:
            if self._down.is_set():
                return
            self._down.set()
        logger.error("%s: %s; nothing is asked of it until it is healthy, KV is recomputed", self._name, error)
        threading.Thread(target=self._probe, name="kvshare-remote-probe", daemon=True).start()

    def _probe(self) -> None:
        while not self._closed.wait(PROBE_EVERY):
            with contextlib.suppress(OSError):
                deadline = time.monotonic() + self._timeout
                self._call(lambda connection: connection.check(), self._open(deadline), deadline)
                logger.error("%s is back: KV is shared again", self._name)
                self._down.clear()
                return


def _free(part: Future) -> None:
    if not part.cancelled():
        _release(part.result())


def _release(chunks: Sequence[Any]) -> None:
    for chunk in chunks:
        if chunk is not None:
            chunk.ref_count_down()
