"""Patch LMCache's P2P backend: load a prefix from several replicas, and never wait long for a slow or dead one.

LMCache 0.5.6 has these errors:

* It loads only from the first replica that has the first chunk.
* It does not keep what it has loaded, as its other loads do, and then finds nothing of its own behind it.
* It waits forever for a replica that has died, and holds a lock that every other connection needs. Or it raises an
  error, and the scheduler gets no answer.
* After a timeout it frees the memory that a replica was asked to write to (``p2p_memory``).
* Without free memory for a load, it sleeps on the event loop and serves no other request.

LMCache-Ascend's backend is a subclass with a constructor, connections and loads of its own. It has its own timeouts.
The last two errors are its own as well, and are patched there.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from weakref import WeakValueDictionary

import wrapt
from cachetools import LRUCache, TTLCache

from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.lmcache import p2p_memory
from kvshare.hooks.lmcache.nixl_agents import nixl_agents, progress
from kvshare.hooks.lmcache.p2p_memory import Held, Unanswered
from kvshare.hooks.patch import wrap
from kvshare.record import ucx

logger = LimitedLogger(logging.getLogger(__name__))

AVOID_SECONDS = 5.0
"""How long a replica that did not answer gets no requests. The controller drops a dead one after ten seconds."""

LOOKUPS = 10_000
"""Lookups that are remembered until their load. An error of another backend between the two leaves one behind."""

REPLICAS = 10_000  # that have failed within AVOID_SECONDS


def patch_backend(module: Any) -> None:
    wrap(module, "P2PBackend.__init__", _init, "config", "local_cpu_backend")
    wrap(module, "P2PBackend._ensure_peer_connection", _connect, "target_peer_init_url", "force_update")
    wrap(module, "P2PBackend.batched_async_contains", _contains, "lookup_id", "keys", "pin")
    wrap(module, "P2PBackend.batched_get_non_blocking", _get, "lookup_id", "keys", "transfer_spec")
    wrap(module, "P2PBackend._cleanup_memory_objects", _do_not_free, "mem_objs")


def patch_ascend_backend(module: Any) -> None:
    wrap(module, "AscendP2PBackend.__init__", _init_ascend, "config", "local_cpu_backend")
    wrap(module, "AscendP2PBackend.batched_get_non_blocking", _get_ascend, "lookup_id", "keys", "transfer_spec")


class NonBlockingAllocator(wrapt.ObjectProxy):
    """LocalCPUBackend whose allocate() raises MemoryError instead of sleeping until memory is free."""

    def allocate(self, *args: Any, **kwargs: Any) -> Any:
        memory = self.__wrapped__.allocate(*args, **{**kwargs, "busy_loop": False})
        if memory is None:
            raise MemoryError("LMCache has no free memory for a load, so KV is recomputed: raise max_local_cpu_size")
        return memory


class Peers:
    """The state that one P2PBackend keeps about other replicas, by their ``p2p_init`` address."""

    def __init__(self, held: Held) -> None:
        # By lookup id: [(chunks, (address, location))]
        self.segments: LRUCache = LRUCache(maxsize=LOOKUPS)
        self.held = held
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._failed: TTLCache = TTLCache(maxsize=REPLICAS, ttl=AVOID_SECONDS)

    def lock(self, address: str) -> asyncio.Lock:
        return self._locks.setdefault(address, asyncio.Lock())

    def failed(self, address: str, error: object) -> None:
        if not self.avoids(address):
            logger.error("replica at %s does not answer (%s): not asked for %s s", address, error, AVOID_SECONDS)
        self._failed[address] = True

    def avoids(self, address: str) -> bool:
        return address in self._failed or address in self.held or self.held.full()


def _hold_memory(backend: Any) -> None:
    backend._kvshare_held = Held(p2p_memory.SHARE * backend.config.max_local_cpu_size * 2**30)
    backend.local_cpu_backend = NonBlockingAllocator(backend.local_cpu_backend)


def _init(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    from lmcache import torch_device_type

    thread = torch_device_type != "cpu"  # a thread is faster, and hosts with accelerators have the cores
    ucx.ask()
    with nixl_agents(thread):
        wrapped(*args, **kwargs)
    _hold_memory(backend)
    backend._kvshare_peers = Peers(backend._kvshare_held)
    timeout_ms = backend.socket_recv_timeout_ms = backend.config.lookup_timeout_ms  # later, the scheduler recomputes
    # The peer may still serve a request that timed out. A retry would make it write twice.
    backend.max_retry_count = 1
    channel, connect = backend.transfer_channel, backend.transfer_channel.async_lazy_init_peer_connection
    if not thread and hasattr(channel, "nixl_agent"):
        asyncio.run_coroutine_threadsafe(progress(channel.nixl_agent, backend.running), backend.loop)
    channel.async_lazy_init_peer_connection = lambda **call: asyncio.wait_for(connect(**call), timeout_ms / 1000)


def _init_ascend(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    wrapped(*args, **kwargs)
    _hold_memory(backend)


async def _connect(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    """Connect to a replica, unless it has failed a moment ago.

    ``force_update`` follows a load that failed. The connection is then only dropped, and the next lookup makes a new
    one: the load may still be answered through the old one.
    """
    address = args[0] if args else kwargs["target_peer_init_url"]
    force = args[1] if len(args) > 1 else kwargs.get("force_update", False)
    peers = backend._kvshare_peers
    if force:
        backend.target_peer_info_mapping.pop(address, None)
        return
    if peers.avoids(address):
        raise ConnectionError(f"{address} did not answer a moment ago")
    try:
        await wrapped(*args, **kwargs)
    except Exception as error:
        peers.failed(address, str(error) or "no connection")
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
        for count, (address, location) in peers.segments.pop(lookup_id, ()):
            begin = len(arrived)
            async with peers.lock(address):
                peer = backend.target_peer_info_mapping.get(address)
                if peer is None or peers.avoids(address):
                    break
                backend.lookup_id_to_peer_mapping[lookup_id] = address, location
                spec = {"cum_chunk_lengths": ends[begin : begin + count + 1]}
                arrived += await load(peer, lookup_id, keys[begin : begin + count], spec)
            if len(arrived) < begin + count:
                break
        # The next lookup then begins in the local tier. LMCache looks there first, and for the rest at other replicas.
        # So it would not find what this replica itself stored after a beginning that only another one has.
        backend.local_cpu_backend.batched_submit_put_task(keys[: len(arrived)], arrived)
        return arrived

    async def load(peer: Any, lookup_id: str, keys: list[Any], spec: Any) -> list[Any]:
        """Load from one replica. An exception would leave the scheduler without an answer."""
        address, socket, arrived = peer.peer_init_url, peer.lookup_socket, []
        p2p_memory.watch(socket)
        try:
            arrived = await wrapped(lookup_id, keys, spec)
        except MemoryError as error:
            logger.error("%s", error)
        except Unanswered as failed:
            peers.failed(address, failed)
            backend.target_peer_info_mapping.pop(address, None)
            peers.held.hold_until_over(address, failed.memory, socket)
            return []
        except Exception as error:
            peers.failed(address, error)
        if backend.target_peer_info_mapping.get(address) is not peer:  # dropped by _connect
            p2p_memory.close(socket)
        return arrived

    return await get(*args, **kwargs)


async def _get_ascend(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> list[Any]:
    """Hold the memory of a failed load forever: a late answer is not seen, because requests share a connection."""
    if backend._kvshare_held.full():
        return []
    try:
        return await wrapped(*args, **kwargs)
    except MemoryError as error:
        logger.error("%s", error)
    except Unanswered as failed:
        backend._kvshare_held.hold("unknown", failed.memory)
    return []


def _do_not_free(wrapped: Any, backend: Any, args: tuple, kwargs: dict) -> None:
    if not hasattr(backend, "_kvshare_held"):  # a subclass that kvshare does not know: its loads are not wrapped
        return wrapped(*args, **kwargs)
    raise Unanswered(args[0] if args else kwargs["mem_objs"])
