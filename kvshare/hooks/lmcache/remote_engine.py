"""Put kvshare's client (remote_client.py) before LMCache's own connectors to Valkey, Redis and Mooncake Store.

LMCache's connectors have no deadline on a lookup, go on asking a server that is away, and believe what they read. Some
block the event loop that all of LMCache's transfers share. Here each runs on an event loop and in memory of its own. An
entry goes through that memory, so what arrives after its deadline is written into nobody's KV.

Entries are whole chunks: of these connectors only Redis' keeps an entry's shape.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future, wait
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lmcache.utils import CacheEngineKey

from kvshare.core.engines import settings
from kvshare.core.lm_protocol import CHECKSUM
from kvshare.core.secrets import redacted
from kvshare.hooks import check
from kvshare.hooks.lmcache import remote_client, remote_entry
from kvshare.hooks.lmcache.remote_client import Allocate, Client, Connection
from kvshare.hooks.lmcache.remote_link import left
from kvshare.hooks.patch import optional, wrap

NOBODY = CacheEngineKey("kvshare", 1, 0, 0, torch.float16)
"""A key that no entry has."""


@optional("Valkey, Redis and Mooncake are used as LMCache does: without a deadline and a checksum")
def patch_connector_manager(module: Any) -> None:
    from lmcache.v1 import metadata

    check.source(metadata, "LMCacheMetadata.get_shapes", {"2b7a54bf43f4": "0.5.6"})  # Memory gives it an entry's shape
    wrap(module, "ConnectorManager.create_connector", _create_connector, "self")


def _create_connector(wrapped: Any, manager: Any, args: tuple, kwargs: dict) -> Any:
    given = manager.context
    extra = settings(given.url, given.config.blocking_timeout_secs, 2 * remote_client.THREADS)
    if extra is None:
        return wrapped(*args, **kwargs)

    def connect(loop: asyncio.AbstractEventLoop, memory: Memory) -> Any:
        manager.context = copy.copy(given)
        manager.context.loop, manager.context.local_cpu_backend = loop, memory
        manager.context.config, manager.context.metadata = memory.config, memory.metadata
        return wrapped(*args, **kwargs)

    return EngineClient(given.url, extra, connect, given.local_cpu_backend)


class Memory:
    """What a connector takes for LMCache's local memory. It has room for one entry of each thread.

    Args:
        local: LMCache's local memory.
        length: bytes of a chunk.
        extra: for the ``extra_config`` of LMCache's config.
    """

    def __init__(self, local: Any, length: int, extra: dict[str, Any]) -> None:
        from lmcache.v1.memory_allocators.tensor_memory_allocator import TensorMemoryAllocator

        tokens = local.metadata.chunk_size
        self.length = length + tokens * -(-CHECKSUM // tokens)  # LMCache asserts whole bytes a token
        self.config, self.metadata = copy.copy(local.config), copy.copy(local.metadata)
        self.config.extra_config = {**extra, **(local.config.extra_config or {}), "save_chunk_meta": False}
        self.metadata.use_mla = False
        self.metadata.kv_layer_groups_manager = None
        self.metadata.kv_dtype = torch.uint8
        self.metadata.kv_shape = (1, 1, tokens, 1, self.length // tokens)
        count, room = 2 * remote_client.THREADS, -(-self.length // 4096) * 4096
        allocator = TensorMemoryAllocator(torch.empty(count * room, dtype=torch.uint8))
        self.memory_allocator = SimpleNamespace(pin_allocator=allocator, numa_mapping=None)  # as Mooncake looks for it

    def allocate(self, *_: Any, **__: Any) -> Any:
        """A memory object for an entry; None if all are in use."""
        return self.memory_allocator.pin_allocator.allocate(self.metadata.get_shapes(), self.metadata.get_dtypes())


class Engine:
    """One of LMCache's connectors, on an event loop of its own. Thread-safe.

    Args:
        connect: makes the connector, given the loop and the memory.

    Attributes:
        failed: whether an operation has failed or was given up.
    """

    def __init__(self, connect: Callable[[Any, Memory], Any], memory: Memory) -> None:
        self.memory, self.failed = memory, False
        self._loop = asyncio.new_event_loop()
        self._under_way: set[Future] = set()
        threading.Thread(target=self._loop.run_forever, name="kvshare-remote-engine", daemon=True).start()
        try:
            self.connector = connect(self._loop, memory)
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise

    def call(self, operation: Coroutine[Any, Any, Any], deadline: float) -> Any:
        """The result of ``operation``. One that is given up goes on, and may write to the memory until it ends.

        Raises:
            ConnectionError: it failed.
            TimeoutError: it has not ended in time.
        """
        if self.failed:  # another one makes the next operations
            operation.close()
            raise ConnectionError("the connection has failed")
        future = asyncio.run_coroutine_threadsafe(operation, self._loop)
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        future.add_done_callback(_clear_frames)
        try:
            return future.result(left(deadline))
        except TimeoutError:
            self.failed = True
            raise TimeoutError("no answer in time") from None
        except Exception as error:
            self.failed = True
            raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Wait for all operations, also for those that were given up, and close the connector."""
        self.failed = True
        wait(list(self._under_way))
        closing = asyncio.run_coroutine_threadsafe(self.connector.close(), self._loop)
        with contextlib.suppress(Exception):
            closing.result(remote_client.PROBE_EVERY)
        self._loop.call_soon_threadsafe(self._loop.stop)


class EngineConnection:
    """A Connection of remote_client.py; all of a client's use one Engine."""

    def __init__(self, engine: Engine, deadline: float) -> None:
        self._engine, self.deadline = engine, deadline

    def close(self) -> None:
        """The engine is closed when the next one is made."""

    def check(self) -> None:
        self.has([NOBODY])

    def has(self, keys: Sequence[Any]) -> list[bool]:
        exists = self._engine.connector.exists

        async def ask() -> list[Any]:
            return await asyncio.gather(*(exists(key) for key in keys))

        answers = self._do(ask())
        if any(answer < 0 for answer in answers):
            raise ConnectionError(f"error {min(answers)}")  # Mooncake's, which LMCache takes for a hit
        return [bool(answer) for answer in answers]

    def get(self, keys: Sequence[Any], allocate: Allocate) -> Iterator[Any]:
        connector = self._engine.connector
        for key in keys:
            if connector.support_batched_get():
                (entry,) = self._do(connector.batched_get([key]))
            else:
                entry = self._do(connector.get(key))
            yield self._copy(key, entry, allocate) if entry else None

    def put(self, keys: Sequence[Any], chunks: Sequence[Any]) -> list[bool]:
        """LMCache's connectors do not say whether a put has arrived, so it is asked after all of them."""
        for key, chunk in zip(keys, chunks, strict=True):
            entry = self._engine.memory.allocate()
            if entry is None:
                raise MemoryError("all memory for entries is in use")
            remote_entry.write(key, chunk, partial(_write, remote_entry.array(entry)))
            self._do(self._engine.connector.put(key, entry))
            entry.ref_count_down()
        return self.has(keys)

    def _copy(self, key: Any, entry: Any, allocate: Allocate) -> Any:
        try:
            return remote_entry.read(key, allocate(None), partial(_read, remote_entry.array(entry)))
        finally:
            entry.ref_count_down()

    def _do(self, operation: Coroutine[Any, Any, Any]) -> Any:
        return self._engine.call(operation, self.deadline)


def _clear_frames(operation: Future) -> None:
    """Drop what the frames of an operation that has failed still hold: memoryviews of which GLIDE has made buffers.

    Errors of futures end up in reference cycles. If Python 3.11 collects such a memoryview in one, it crashes, and
    vLLM's worker with it. (``RdmaRegion.__init__`` in glide_sync has a comment on it.)
    """
    error = None if operation.cancelled() else operation.exception()
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _write(memory: Any, start: int, part: Any) -> None:
    memory[start : start + len(part)] = part


def _read(memory: Any, start: int, part: Any) -> None:
    part[:] = memory[start : start + len(part)]


class EngineClient(Client):
    def __init__(self, url: str, extra: dict[str, Any], connect: Callable[[Any, Memory], Any], local: Any) -> None:
        super().__init__(redacted(url), local)
        self._extra, self._connect = extra, connect
        self._opening: Future[Engine] | None = None

    async def put(self, key: Any, memory_obj: Any) -> None:
        if len(memory_obj.byte_array) != self.full_chunk_size_bytes:
            raise ValueError(f"{self._name}: only whole chunks can be stored: set save_unfull_chunk: false")
        await super().put(key, memory_obj)

    async def close(self) -> None:
        await super().close()
        if engine := self._engine():
            threading.Thread(target=engine.close, daemon=True).start()

    def _allocate(self, entry: Any) -> Any:
        return self._chunk(self.meta_shapes, self.meta_dtypes, self.meta_fmt)

    def _open(self, deadline: float) -> Connection:
        with self._lock:
            engine = self._engine()
            if self._opening is None or (self._opening.done() and (engine is None or engine.failed)):
                self._opening = Future()
                threading.Thread(target=self._make, args=(self._opening, engine), daemon=True).start()
        try:
            return EngineConnection(self._opening.result(left(deadline)), deadline)
        except TimeoutError:
            raise TimeoutError("no connection in time") from None
        except Exception as error:
            raise ConnectionError(f"{type(error).__name__}: {error}") from error

    def _engine(self) -> Engine | None:
        opening = self._opening
        made = opening is not None and opening.done() and not opening.exception()
        return opening.result() if opening and made else None

    def _make(self, opening: Future[Engine], old: Engine | None) -> None:
        """There is one engine at a time: the operations of the old one hold threads and memory until they end."""
        try:
            if old:
                old.close()
            opening.set_result(Engine(self._connect, Memory(self._memory, self.full_chunk_size_bytes, self._extra)))
        except BaseException as error:
            opening.set_exception(error)
