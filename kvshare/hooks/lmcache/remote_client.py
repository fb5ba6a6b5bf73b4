"""Replace LMCache's ``lm://`` client with one that copes with a slow, hung, faulty, restarted or dead server.

LMCache 0.5.6's client (LMCServerConnector) never reconnects to a restarted server and waits forever for a hung one. It
accepts part of a reply as the whole, and loads entries that a dying client left incomplete. This client uses the same
protocol, URL and settings.

* No operation takes longer than ``blocking_timeout_secs`` of the LMCache config. The lookup of a whole prompt is one
  operation. After a failure the client sends nothing until a background probe finds the server healthy. Until then
  lookups miss, and vLLM recomputes.
* Puts have their own connection and thread. A put asks for its entry before it returns, so lookups find the entry, or
  it raises.
* An entry ends with a checksum of its key and content. A wrong checksum is a miss.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from kvshare.core.lm_protocol import HEALTH_REQUEST
from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.patch import replace

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each entry or request may repeat

CHECKSUM = 8  # bytes after each entry
PROBE_EVERY = 1.0  # seconds


def patch_lm_connector(module: Any) -> None:
    """Replace the class in its module: LMCache looks it up there for each new connector."""
    known = {"18e408041daf": "0.4.4, 0.5.3", "7b81d568062d": "0.5.6"}
    replace(module, "LMCServerConnector", _connector_class(), known)


class Link:
    """One connection to the server. ``with`` opens it if needed, and closes it after an error."""

    def __init__(self, address: tuple[str, int], timeout: float) -> None:
        self._address, self._timeout = address, timeout
        self._socket: socket.socket | None = None
        self.start()

    def start(self) -> None:
        """Start an operation, which must end within ``timeout`` seconds."""
        self._deadline = time.monotonic() + self._timeout

    def __enter__(self) -> Link:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=self._left())
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is not None:
            self.close()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def send(self, data: Any) -> None:
        self._ready().sendall(data)

    def receive(self, into: Any) -> None:
        view = memoryview(into)
        while view:
            count = self._ready().recv_into(view)
            if not count:
                raise ConnectionError("the server closed the connection")
            view = view[count:]

    def _ready(self) -> socket.socket:
        assert self._socket is not None
        self._socket.settimeout(self._left())
        return self._socket

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no answer within {self._timeout} s")
        return left


def _connector_class() -> type:
    import torch
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode
    from lmcache.v1.storage_backend.connector.base_connector import RemoteConnector

    class LMConnector(RemoteConnector):
        def __init__(self, host: str, port: int, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> None:
            super().__init__(local_cpu_backend.config, local_cpu_backend.metadata)
            timeout = float(local_cpu_backend.config.blocking_timeout_secs)
            self._new_link = lambda: Link((host, port), timeout)
            self._reads, self._writes = self._new_link(), self._new_link()
            self._name = f"lm://{host}:{port}"
            self._loop, self._memory = loop, local_cpu_backend
            self._down, self._closed = threading.Event(), threading.Event()
            self._lock = threading.Lock()
            self._putting = ThreadPoolExecutor(1, "kvshare-lm-put")

        async def exists(self, key: Any) -> bool:
            return not self.down and self._do(self._reads, self._has, key)

        def exists_sync(self, key: Any) -> bool:
            return asyncio.run_coroutine_threadsafe(self.exists(key), self._loop).result()

        def support_batched_contains(self) -> bool:
            return True

        def batched_contains(self, keys: Sequence[Any]) -> int:
            """Number of leading keys that the server has."""
            return asyncio.run_coroutine_threadsafe(self._leading(keys), self._loop).result()

        async def _leading(self, keys: Sequence[Any]) -> int:
            return 0 if self.down else self._do(self._reads, self._count, keys)

        async def get(self, key: Any) -> Any:
            return None if self.down else self._do(self._reads, self._get, key)

        async def put(self, key: Any, memory_obj: Any) -> None:
            # LMCache's local memory holds the queued entries, so its size bounds the queue.
            await asyncio.get_running_loop().run_in_executor(self._putting, self._put, key, memory_obj)

        async def list(self) -> list[str]:
            return []

        async def close(self) -> None:
            self._closed.set()
            self._putting.shutdown(wait=False, cancel_futures=True)
            self._reads.close()
            self._writes.close()

        @property
        def down(self) -> bool:
            return self._down.is_set()

        def _put(self, key: Any, memory_obj: Any) -> None:
            """Return once the server has the entry. Raise otherwise: LMCache then frees and counts the put."""
            if self.down:
                raise ConnectionError(f"{self._name} is down")
            if not self._do(self._writes, self._put_and_confirm, key, memory_obj):
                size = len(memory_obj.byte_array)
                raise OSError(f"{self._name} did not keep an entry of {size} bytes. Is its memory too small?")

        def _put_and_confirm(self, link: Link, key: Any, memory_obj: Any) -> bool:
            """Put an entry, and return whether the server has it. Sending to a dead connection may not fail."""
            data = memory_obj.byte_array
            meta = memory_obj.get_memory_format(), memory_obj.get_dtype(), memory_obj.get_shape()
            link.send(ClientMetaMessage(ClientCommand.PUT, key, len(data) + CHECKSUM, *meta).serialize())
            link.send(data)
            link.send(_checksum(key, data))
            return self._has(link, key)

        def _count(self, link: Link, keys: Sequence[Any]) -> int:
            return next((i for i, key in enumerate(keys) if not self._has(link, key)), len(keys))

        def _has(self, link: Link, key: Any) -> bool:
            return self._request(link, ClientCommand.EXIST, key).code == ServerReturnCode.SUCCESS

        def _get(self, link: Link, key: Any) -> Any:
            meta = self._request(link, ClientCommand.GET, key)
            return self._receive(link, key, meta) if meta.code == ServerReturnCode.SUCCESS else None

        def _request(self, link: Link, command: Any, key: Any) -> Any:
            no_data = MemoryFormat(1), torch.float16, torch.Size([0, 0, 0, 0])
            link.send(ClientMetaMessage(command, key, 0, *no_data).serialize())
            reply = bytearray(ServerMetaMessage.packlength())
            link.receive(reply)
            return ServerMetaMessage.deserialize(reply)

        def _receive(self, link: Link, key: Any, meta: Any) -> Any:
            """Receive the entry that a reply announces. None if its checksum is wrong or if memory is lacking."""
            size = meta.length - CHECKSUM
            if not meta.dtype or size != meta.shape.numel() * meta.dtype.itemsize or size > self.full_chunk_size_bytes:
                raise ValueError(f"{self._name} sent an entry of {meta.length} bytes, which kvshare did not store")
            # LMCache's default waits for free memory. The owner of that memory may be waiting for this call.
            memory_obj = self._memory.allocate(meta.shape, meta.dtype, meta.fmt, busy_loop=False)
            if memory_obj is None:
                often.error("LMCache has no free local memory for an entry of %s", self._name)
                link.close()  # drops the rest of the reply
                return None
            checksum = bytearray(CHECKSUM)
            try:
                link.receive(memory_obj.byte_array)
                link.receive(checksum)
            except BaseException:
                memory_obj.ref_count_down()
                raise
            if checksum == _checksum(key, memory_obj.byte_array):
                return memory_obj
            often.error("%s sent an entry with a wrong checksum: its KV is recomputed", self._name)
            memory_obj.ref_count_down()
            return None

        def _do(self, link: Link, operation: Callable[..., Any], *args: Any) -> Any:
            link.start()
            try:
                try:
                    with link:
                        return operation(link, *args)
                except ConnectionError:  # perhaps the server was restarted: try a new connection
                    with link:
                        return operation(link, *args)
            except OSError as error:
                self._mark_down(error)
                raise

        def _mark_down(self, error: BaseException) -> None:
            with self._lock:
                if self._down.is_set():
                    return
                self._down.set()
            logger.error("%s: %s; nothing is asked of it until it is healthy, KV is recomputed", self._name, error)
            threading.Thread(target=self._probe, name="kvshare-lm-probe", daemon=True).start()

        def _probe(self) -> None:
            while not self._closed.wait(PROBE_EVERY):
                with contextlib.suppress(OSError), self._new_link() as link:
                    link.send(HEALTH_REQUEST)
                    link.receive(bytearray(ServerMetaMessage.packlength()))
                    link.close()
                    logger.error("%s is back: KV is shared again", self._name)
                    self._down.clear()
                    return

    return LMConnector


def _checksum(key: Any, data: Any) -> bytes:
    seed = xxhash.xxh3_64_intdigest(key.to_string().encode())
    return xxhash.xxh3_64(data, seed=seed).digest()
