"""LMCache's local tier and remote backend in this process, as a vLLM worker has them."""

import asyncio
import threading
from concurrent.futures import Future

import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from waiting import STUCK

from kvshare.hooks.lmcache.remote_puts import Puts

SHAPE = torch.Size([2, 4, 256, 16])  # K and V, layers, tokens, hidden
CHUNK_BYTES = SHAPE.numel() * 4


def key(number):
    return CacheEngineKey("qwen", 1, 0, number, torch.float32)


class Cache:
    """LMCache's local CPU tier and its remote backend, with the event loop they share.

    Args:
        address: HOST:PORT of an lm:// server, or another URL.
        room: chunks that the local tier has memory for.
        timeout: seconds for an operation on the server.
    """

    def __init__(self, address, room, timeout):
        from lmcache.v1.storage_backend.remote_backend import RemoteBackend
        from lmcache.v1.storage_backend.storage_manager import StorageManager

        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=256,
            local_cpu=False,
            max_local_cpu_size=room * CHUNK_BYTES / 2**30,
            remote_url=address if "://" in address else f"lm://{address}",
            remote_serde="naive",
            blocking_timeout_secs=timeout,
        )
        metadata = LMCacheMetadata("qwen", 1, 1, 0, 0, torch.float32, (4, 2, 256, 1, 16))
        self.local = LocalCPUBackend(config, metadata, "cpu")
        self.remote = RemoteBackend(config, metadata, self.loop, self.local, "cpu")
        self.manager = StorageManager.__new__(StorageManager)
        self.manager.storage_backends, self.manager.allocator_backend = {"RemoteBackend": self.remote}, self.local
        self.manager._bypass_lock, self.manager._bypassed_backends = threading.Lock(), set()

    def put(self, numbers):
        """Returns when all is done: whether it can be found, as kvshare reports it."""
        return self.start_put(numbers).result(STUCK)

    def start_put(self, numbers):
        """As LMCache's store() does it."""
        ended, puts = Future(), Puts()
        chunks = [self.local.allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD, busy_loop=False) for _ in numbers]
        for number, chunk in zip(numbers, chunks, strict=True):
            chunk.tensor.fill_(number)
        Puts.current.value = puts
        self.manager.batched_put([key(n) for n in numbers], chunks)
        Puts.current.value = None
        puts.when_ended(ended.set_result)
        return ended

    def get(self, numbers):
        """Whether each arrived, and right."""
        chunks = self.remote.batched_get_blocking([key(n) for n in numbers])
        right = [
            chunk is not None and bool((chunk.tensor == n).all()) for n, chunk in zip(numbers, chunks, strict=True)
        ]
        for chunk in chunks:
            if chunk is not None:
                chunk.ref_count_down()
        return right

    def found(self, numbers):
        return self.remote.batched_contains([key(n) for n in numbers])

    def used(self):
        """Bytes of the local memory that somebody holds."""
        return self.local.memory_allocator.pin_allocator.total_allocated_size

    def close(self):
        self.remote.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
