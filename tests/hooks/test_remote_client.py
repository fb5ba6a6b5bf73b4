"""LMCache's own remote backend on a real server, through kvshare's lm:// client, in this process."""

import asyncio
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
from waiting import STUCK, until

from kvshare import vllm_plugin
from kvshare.hooks.lmcache.remote_puts import Puts

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
        from lmcache.v1.storage_backend.storage_manager import StorageManager

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


def test_a_put_says_whether_it_can_be_found(open_cache, backend):
    """While the server is up, when it goes away in the middle of a store, while it is away, and again."""
    cache = open_cache()
    assert cache.put(range(1240, 1250))
    backend.does, backend.asked = "slow", 0
    storing = cache.start_put(range(1250, 1260))
    while backend.asked < 3:
        time.sleep(0.01)
    backend.does = "refuse"
    assert storing.result(STUCK) is False
    assert not cache.put(range(1260, 1270))
    backend.does = "serve"
    while not cache.put([1270]):
        time.sleep(0.1)
    assert [cache.found(range(start, start + 10)) for start in (1240, 1260)] == [10, 0]
    assert cache.found(range(1250, 1260)) < 10
    assert cache.used() == 0
    assert cache.remote.kvshare_puts == {}


def test_a_key_that_another_request_is_putting(open_cache, backend):
    cache = open_cache()
    backend.does, backend.delay = "slow", 0.2 * TIMEOUT
    first, second = cache.start_put([1280]), cache.start_put([1280])
    assert first.result(STUCK)
    assert second.result(STUCK)
    assert cache.found([1280]) == 1


def test_a_backend_that_lmcache_bypasses(open_cache):
    """Its health monitor has found the server away."""
    cache = open_cache()
    cache.manager._bypassed_backends = {"RemoteBackend"}
    assert not cache.put([1290])
    assert cache.remote.kvshare_puts == {}


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
