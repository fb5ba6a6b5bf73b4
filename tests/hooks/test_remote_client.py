"""LMCache's own remote backend on a real server, through kvshare's lm:// client, in this process."""

import asyncio
import threading

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from waiting import STUCK, until

from kvshare import vllm_plugin

SHAPE = torch.Size([2, 4, 256, 16])  # K and V, layers, tokens, hidden
CHUNK_BYTES = SHAPE.numel() * 4
TIMEOUT = 1.0  # seconds, where the test is about it


def key(number):
    return CacheEngineKey("qwen", 1, 0, number, torch.float32)


class Cache:
    """LMCache's local CPU tier and its remote backend, with the event loop they share.

    Args:
        room: chunks that the local tier has memory for.
        timeout: seconds for an operation on the server.
    """

    def __init__(self, address, room, timeout):
        from lmcache.v1.storage_backend.remote_backend import RemoteBackend

        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=256,
            local_cpu=False,
            max_local_cpu_size=room * CHUNK_BYTES / 2**30,
            remote_url=f"lm://{address}",
            remote_serde="naive",
            blocking_timeout_secs=timeout,
        )
        metadata = LMCacheMetadata("qwen", 1, 1, 0, 0, torch.float32, (4, 2, 256, 1, 16))
        self.local = LocalCPUBackend(config, metadata, "cpu")
        self.remote = RemoteBackend(config, metadata, self.loop, self.local, "cpu")

    def put(self, numbers):
        """Returns when all is done, as LMCache reports it."""
        done = threading.Semaphore(0)
        chunks = [self.local.allocate(SHAPE, torch.float32, MemoryFormat.KV_2LTD, busy_loop=False) for _ in numbers]
        for number, chunk in zip(numbers, chunks, strict=True):
            chunk.tensor.fill_(number)
        self.remote.batched_submit_put_task(
            [key(n) for n in numbers], chunks, on_complete_callback=lambda _: done.release()
        )
        for chunk in chunks:
            chunk.ref_count_down()
        for _ in numbers:
            assert done.acquire(timeout=STUCK)

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


@pytest.fixture
def open_cache(backend):
    vllm_plugin.register()
    opened = []

    def open_one(room=200, timeout=STUCK):
        opened.append(Cache(backend.address, room, timeout))
        return opened[-1]

    yield open_one
    backend.does, backend.delay = "serve", 0.05
    for cache in opened:
        cache.close()


def test_a_long_prompt_is_stored_whole(open_cache):
    """Its chunks come all at once, more than the server has taken when the last one comes."""
    cache, numbers = open_cache(), range(1000, 1100)
    cache.put(numbers)
    assert cache.found(numbers) == 100
    assert all(cache.get(numbers))


def test_prompt_that_does_not_fit_into_local_memory(open_cache):
    """What fits is loaded; the server is not taken for one that hangs."""
    writer, numbers = open_cache(), range(1100, 1108)
    writer.put(numbers)
    reader = open_cache(room=4)
    assert reader.get(numbers) == 4 * [True] + 4 * [False]
    assert reader.found(numbers) == 8
    assert reader.used() == 0


def test_lookup_of_a_long_prompt_is_one_operation(open_cache, backend):
    """The scheduler waits for it, with every request: not for the timeout times the number of chunks."""
    numbers = range(1200, 1206)
    open_cache().put(numbers)
    cache = open_cache(timeout=TIMEOUT)
    backend.does, backend.delay = "slow", 0.4 * TIMEOUT
    backend.asked = 0
    assert cache.found(numbers) == 0
    assert backend.asked < 4


def test_retry_has_no_time_of_its_own(open_cache, backend):
    writer = open_cache()
    writer.put([1210])
    assert writer.found([1210]) == 1
    cache = open_cache(timeout=TIMEOUT)
    backend.does, backend.delay = "drop once", 0.7 * TIMEOUT
    assert cache.found([1210]) == 0


def test_closed_while_the_server_is_away(open_cache, backend):
    """No thread of ours goes on asking for it."""
    cache = open_cache()
    backend.does = "refuse"
    assert cache.found([1230]) == 0
    assert _probes()
    cache.remote.close()
    until(lambda: not _probes())


def _probes():
    return [thread for thread in threading.enumerate() if thread.name == "kvshare-lm-probe"]
