"""LMCache's P2P backend: what several replicas hold is found, and one that is slow or gone is in nobody's way.

LMCache 0.5.6 takes what the first replica with the first chunk has, and no more. It waits for a replica that died
without end, under a lock that every other connection needs, or raises, and then nobody answers the scheduler. And it
gives the memory that it has asked a replica to write into back when it is tired of waiting, while that replica may
still write: what is there next would be overwritten with KV of other tokens. And when there is no memory to load into
it sleeps on the event loop until there is, so it serves nobody. NIXL's thread takes a core of each worker, busy or not
(NIXL 1.5.1); told to sleep, it still does whenever a connection waits for the other's answer (its UCX polls a socket
that can always be written to). With vLLM's worker, which spins as well, that is two cores, and where there are no more
the other replica does not get to answer. So on CPU there is no such thread: NIXL works on LMCache's event loop.
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

from kvshare.hooks import check
from kvshare.hooks.patch import optional, put, replace, wrap

logger = logging.getLogger(__name__)

AVOID_SECONDS = 5.0
"""How long a replica that did not answer is left alone. The controller forgets one that is gone in ten."""

PROGRESS_SECONDS = 0.001
"""How often NIXL looks for what other replicas sent; with a thread, at least."""


def patch_backend(module: Any) -> None:
    wrap(module, "P2PBackend.__init__", _init, "config", "local_cpu_backend")
    wrap(module, "P2PBackend._ensure_peer_connection", _connect, "target_peer_init_url", "force_update")
    wrap(module, "P2PBackend.batched_async_contains", _contains, "lookup_id", "keys", "pin")
    wrap(module, "P2PBackend.batched_get_non_blocking", _get, "lookup_id", "keys", "transfer_spec")
    replace(module, "P2PBackend._cleanup_memory_objects", _keep, {"bb84349edf3b": "0.4.4, 0.5.3, 0.5.6"})


@optional("NIXL's thread takes a core of each worker")
def patch_nixl(module: Any) -> None:
    try:
        from nixl import _api
    except ImportError:
        return  # LMCache says so
    # nixlAgent is compiled: it is known by the function that calls it.
    known = {"bf0513d85ff3": "1.5.1"}
    check.source(_api, "nixl_agent.__init__", known)
    put(_api.nixlBind, "nixlAgent", wrapt.FunctionWrapper(_api.nixlBind.nixlAgent, _agent), known)


class SetAside(Exception):
    """Memory that a replica may still write into."""


_thread: ContextVar[bool | None] = ContextVar("_thread", default=None)


@contextmanager
def nixl_agents(thread: bool) -> Iterator[None]:
    """NIXL agents that are made in here have a thread that sleeps, or none; others in the process are as they are."""
    token = _thread.set(thread)
    try:
        yield
    finally:
        _thread.reset(token)


def _agent(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    if (thread := _thread.get()) is not None:
        config = args[1]
        config.useProgThread, config.pthrDelay = thread, int(PROGRESS_SECONDS * 1e6)
    return wrapped(*args, **kwargs)


async def _progress(backend: Any, agent: Any) -> None:
    while backend.running.is_set():
        pause = PROGRESS_SECONDS
        try:
            agent.get_new_notifs()  # there are none, but without a thread this is what lets UCX work
        except Exception:
            logger.exception("NIXL stands still: what other replicas have is recomputed until it does not")
            pause = AVOID_SECONDS
        await asyncio.sleep(pause)


class Local(wrapt.ObjectProxy):
    """LocalCPUBackend that never sleeps for memory."""

    def allocate(self, *args: Any, **kwargs: Any) -> Any:
        memory = self.__wrapped__.allocate(*args, **{**kwargs, "busy_loop": False})
        if memory is None:
            raise MemoryError("LMCache has no memory to load into, KV is recomputed: raise max_local_cpu_size")
        return memory


class Peers:
    """What one P2PBackend knows of the others, by ``p2p_init`` address."""

    def __init__(self) -> None:
        self.locks: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.segments: dict[str, list[tuple[int, tuple[str, str]]]] = {}  # lookup: chunks, (address, location)
        self.aside: list[Any] = []  # LMCache frees what nobody refers to
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
    thread = torch_device_type != "cpu"  # a host with accelerators has cores for it, and it moves KV faster
    with nixl_agents(thread):
        wrapped(*args, **kwargs)
    patience = backend.socket_recv_timeout_ms = backend.config.lookup_timeout_ms  # then the scheduler recomputes
    # A request that got no answer may still be served: asked again, it would write twice.
    backend.max_retry_count = 1
    backend.local_cpu_backend = Local(backend.local_cpu_backend)
    channel, connect = backend.transfer_channel, backend.transfer_channel.async_lazy_init_peer_connection
    if not thread and hasattr(channel, "nixl_agent"):
        asyncio.run_coroutine_threadsafe(_progress(backend, channel.nixl_agent), backend.loop)
    channel.async_lazy_init_peer_connection = lambda **call: asyncio.wait_for(connect(**call), patience / 1000)


async def _connect(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    address = args[0] if args else kwargs["target_peer_init_url"]
    again = args[1] if len(args) > 1 else kwargs.get("force_update", False)
    peers = backend._kvshare_peers
    if peers.avoids(address) and not again:
        raise ConnectionError(f"{address} did not answer a moment ago")
    try:
        await wrapped(*args, **kwargs)
    except Exception as error:
        backend.target_peer_info_mapping.pop(address, None)  # the next to need it connects anew
        peers.failed(address, str(error) or "no connection")
        if not again:
            raise


async def _contains(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> int:
    """As many chunks as there are anywhere: of one replica, then of one that has the next, and so on."""

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
                except Exception as error:  # without an answer the scheduler would wait
                    peers.failed(address, error)
            if len(arrived) < begin + count:
                break
        return arrived

    return await get(*args, **kwargs)


def _keep(backend: Any, mem_objs: list[Any]) -> None:
    """Never give back memory that a replica was asked to write into, and may still write into.

    It is lost; a replica that does not answer is not asked again for a while, so that is rare.
    """
    backend._kvshare_peers.aside += mem_objs
    lost = sum(memory.get_size() for memory in mem_objs)
    raise SetAside(f"{lost / 2**20:.1f} MiB of LMCache's memory are set aside, where it may still write")
