"""LMCache's own remote backend on a real server, through kvshare's lm:// client, in this process."""

import threading

import pytest
from remote_cache import Cache
from waiting import STUCK, until

from kvshare import vllm_plugin

TIMEOUT = 1.0  # seconds, where the test is about it


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
    """What fits is loaded, by several threads; the server is not taken for one that hangs."""
    writer, numbers = open_cache(), range(1100, 1108)
    writer.put(numbers)
    reader = open_cache(room=4)
    assert 1 <= sum(reader.get(numbers)) <= 4
    assert reader.found(numbers) == 8
    assert reader.used() == 0


def test_lookup_of_a_long_prompt_is_one_operation(open_cache, backend):
    """The scheduler waits for it, with every request: not for the timeout times the number of chunks."""
    numbers = range(1200, 1220)
    open_cache().put(numbers)
    cache = open_cache(timeout=TIMEOUT)
    backend.does, backend.delay = "slow", 0.4 * TIMEOUT
    backend.asked = 0
    assert cache.found(numbers) == 0
    assert backend.asked < len(numbers)


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
    backend.does, backend.asked = "hang", 0
    storing = cache.start_put(range(1250, 1260))
    until(lambda: backend.asked)
    backend.does = "refuse"
    assert storing.result(STUCK) is False
    assert not cache.put(range(1260, 1270))
    backend.does = "serve"
    until(lambda: cache.put([1270]))
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
    return [thread for thread in threading.enumerate() if thread.name == "kvshare-remote-probe"]
