"""Patch LMCache's P2P backend: load a prefix from several replicas, and never wait long for a slow or dead one.

LMCache 0.5.6 has these errors:

* It loads only from the first replica that has the first chunk.
* It waits forever for a replica that has died, and holds a lock that every other connection needs. Or it raises an
  error, and the scheduler gets no answer.
* After a timeout it frees the memory that a replica was asked to write to. The replica may still write there, and
  overwrite the next chunk with KV of other tokens.
* Without free memory for a load, it sleeps on the event loop and serves no other request.

NIXL's progress thread uses a full core in each worker, even when idle (NIXL 1.5.1). A delay lets the thread sleep, but
not while a connection waits for the other side: UCX then polls a socket that is always writable. vLLM's worker spins
too. The two threads take two cores, and without a third core the other replica cannot answer. So on CPU there is no
progress thread, and LMCache's event loop drives NIXL.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import wrapt

from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks import check
from kvshare.hooks.patch import optional, put, replace, wrap

logger = LimitedLogger(logging.getLogger(__name__))

AVOID_SECONDS = 5.0
"""How long a replica that did not answer gets no requests. The controller drops a dead one after ten seconds."""

PROGRESS_SECONDS = 0.001
"""How often NIXL checks for messages of other replicas. The progress thread may check more often."""


def patch_backend(module: Any) -> None:
    wrap(module, "P2PBackend.__init__", _init, "config", "local_cpu_backend")
    wrap(module, "P2PBackend._ensure_peer_connection", _connect, "target_peer_init_url", "force_update")
    wrap(module, "P2PBackend.batched_async_contains", _contains, "lookup_id", "keys", "pin")
    wrap(module, "P2PBackend.batched_get_non_blocking", _get, "lookup_id", "keys", "transfer_spec")
    replace(module, "P2PBackend._cleanup_memory_objects", _set_memory_aside, {"bb84349edf3b": "0.4.4, 0.5.3, 0.5.6"})


@optional("NIXL's progress thread uses a full core in each worker")
def patch_nixl(module: Any) -> None:
    try:
        from nixl import _api
    except ImportError:
        return  # LMCache reports this itself
    # nixlAgent is compiled, so the check covers the function that calls it.
    known = {"bf0513d85ff3": "1.5.1"}
    check.source(_api, "nixl_agent.__init__", known)
    put(_api.nixlBind, "nixlAgent", wrapt.FunctionWrapper(_api.nixlBind.nixlAgent, _create_agent), known)


class SetAside(Exception):
    """A load failed, and its memory is not freed because a replica may still write to it."""


_thread: ContextVar[bool | None] = ContextVar("_thread", default=None)


@contextmanager
def nixl_agents(thread: bool) -> Iterator[None]:
    """Create NIXL agents within this context with a sleeping progress thread, or with none."""
    token = _thread.set(thread)
    try:
        yield
    finally:
        _thread.reset(token)


def _create_agent(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    if (thread := _thread.get()) is not None:
        config = args[1]
        config.useProgThread, config.pthrDelay = thread, int(PROGRESS_SECONDS * 1e6)
    return wrapped(*args, **kwargs)


async def _progress(backend: Any, agent: Any) -> None:
    while backend.running.is_set():
        pause = PROGRESS_SECONDS
        try:
            agent.get_new_notifs()  # this call drives UCX; LMCache sends no notifications
        except Exception:
            logger.exception("NIXL makes no progress: KV of other replicas is recomputed until it does")
            pause = AVOID_SECONDS
        await asyncio.sleep(pause)


class NonBlockingAllocator(wrapt.ObjectProxy):
    """LocalCPUBackend whose allocate() raises MemoryError instead of sleeping until memory is free."""

    def allocate(self, *args: Any, **kwargs: Any) -> Any:
        memory = self.__wrapped__.allocate(*args, **{**kwargs, "busy_loop": False})
        if memory is None:
            raise MemoryError("LMCache has no free memory for a load, so KV is recomputed: raise max_local_cpu_size")
        return memory


class Peers:
    """The state that one P2PBackend keeps about other replicas, by their ``p2p_init`` address."""

    def __init__(self) -> None:
        self.locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.segments: dict[str, list[tuple[int, tuple[str, str]]]] = {}  # lookup id: (chunks, (address, location))
        self.set_aside: list[Any] = []  # LMCache frees memory objects without references
        self._failed: dict[str, float] = {}

    def failed(self, address: str, error: object) -> None:
        if not self.avoids(address):
            logger.error("replica at %s does not answer (%s): not asked for %s s", address, error, AVOID_SECONDS)
        self._failed[address] = time.monotonic()

    def avoids(self, address: str) -> bool:
        return time.monotonic() < self._failed.get(address, -AVOID_SECONDS) + AVOID_SECONDS


def _init(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    from lmcache import torch_device_type

    backend._kvshare_peers = Peers()
    thread = torch_device_type != "cpu"  # a thread is faster, and hosts with accelerators have the cores
    with nixl_agents(thread):
        wrapped(*args, **kwargs)
    timeout_ms = backend.socket_recv_timeout_ms = backend.config.lookup_timeout_ms  # later, the scheduler recomputes
    # The peer may still serve a request that timed out. A retry would make it write twice.
    backend.max_retry_count = 1
    backend.local_cpu_backend = NonBlockingAllocator(backend.local_cpu_backend)
    channel, connect = backend.transfer_channel, backend.transfer_channel.async_lazy_init_peer_connection
    if not thread and hasattr(channel, "nixl_agent"):
        asyncio.run_coroutine_threadsafe(_progress(backend, channel.nixl_agent), backend.loop)
    channel.async_lazy_init_peer_connection = lambda **call: asyncio.wait_for(connect(**call), timeout_ms / 1000)


async def _connect(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    address = args[0] if args else kwargs["target_peer_init_url"]
    force = args[1] if len(args) > 1 else kwargs.get("force_update", False)
    peers = backend._kvshare_peers
    if peers.avoids(address) and not force:
        raise ConnectionError(f"{address} did not answer a moment ago")
    try:
        await wrapped(*args, **kwargs)
    except Exception as error:
        backend.target_peer_info_mapping.pop(address, None)  # so that the next load connects again
        peers.failed(address, str(error) or "no connection")
        if not force:
            raise


async def _contains(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> int:
    """Count the leading chunks that replicas hold together. Where one replica's chunks end, look for another's."""

    async def contains(lookup_id: str, keys: list[Any], pin: bool = False) -> int:
        found, segments = 0, []
        while found < len(keys) and (count := await wrapped(lookup_id, keys[found:], pin)):
            segments.append((count, backend.lookup_id_to_peer_mapping.pop(lookup_id)))
            found += count
        if segments:
            backend._kvshare_peers.segments[lookup_id] = segments
        return found

    return await contains(*args, **kwargs)


async def _get(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> list[Any]:
    peers = backend._kvshare_peers

    async def get(lookup_id: str, keys: list[Any], transfer_spec: Any = None) -> list[Any]:
        arrived: list[Any] = []
        ends = transfer_spec["cum_chunk_lengths"]
        for count, (address, location) in peers.segments.pop(lookup_id):
            begin = len(arrived)
            async with peers.locks[address]:
                if peers.avoids(address):
                    break
                backend.lookup_id_to_peer_mapping[lookup_id] = address, location
                spec = {"cum_chunk_lengths": ends[begin : begin + count + 1]}
                try:
                    arrived += await wrapped(lookup_id, keys[begin : begin + count], spec)
                except MemoryError as error:
                    logger.error("%s", error)
                except Exception as error:  # raising would leave the scheduler without an answer
                    peers.failed(address, error)
            if len(arrived) < begin + count:
                break
        return arrived

    return await get(*args, **kwargs)


def _set_memory_aside(backend: Any, mem_objs: list[Any]) -> None:
    """Keep the memory of a failed load forever, because the replica may still write to it.

    This is rare: a replica that did not answer gets no requests for AVOID_SECONDS.
    """
    backend._kvshare_peers.set_aside += mem_objs
    lost = sum(memory.get_size() for memory in mem_objs)
    raise SetAside(f"{lost / 2**20:.1f} MiB of LMCache's memory are lost, as the replica may still write there")
