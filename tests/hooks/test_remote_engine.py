"""kvshare's client before LMCache's own connectors: on real Valkey and Mooncake, and on a connector that misbehaves."""

import asyncio
import threading
import time
import weakref

import numpy as np
import pytest
from engine_backends import Mooncake, Valkey
from remote_cache import CHUNK_BYTES, Cache, key
from waiting import STUCK, until

from kvshare import vllm_plugin
from kvshare.core.engines import settings
from kvshare.core.errors import UserError
from kvshare.core.lm_protocol import CHECKSUM
from kvshare.services import engines

vllm_plugin.register()

from kvshare.hooks.lmcache import remote_engine, remote_entry  # noqa: E402
from kvshare.hooks.lmcache.remote_engine import EngineClient  # noqa: E402

TIMEOUT = 1.0  # seconds, where the test is about it
BOUND = 100_000_000  # bytes


@pytest.fixture(scope="module", params=[Valkey, Mooncake])
def server(request, processes, tmp_path_factory):
    return request.param(processes, tmp_path_factory.mktemp("server") / "log", bound=BOUND)


@pytest.fixture
def open_cache():
    opened = []

    def open_one(address, room=100, timeout=STUCK):
        opened.append(Cache(address, room, timeout))
        return opened[-1]

    yield open_one
    for cache in opened:
        cache.close()


def test_what_one_stores_the_other_loads(server, open_cache):
    writer, reader, numbers = open_cache(server.address), open_cache(server.address), range(20)
    assert writer.found(numbers) == 0
    assert writer.put(numbers)
    assert reader.found(range(30)) == 20
    assert all(reader.get(numbers))
    assert reader.get([0, 25, 1]) == [True, False, True]
    assert reader.used() == writer.used() == 0


def test_killed_and_started_again(server, open_cache):
    """What it held is lost, nothing is loaded meanwhile, and it shares again by itself."""
    cache = open_cache(server.address, timeout=5 * TIMEOUT)
    until(lambda: cache.put([100]))
    server.kill()
    assert cache.found([100]) == 0
    assert cache.get([100]) == [False]
    assert not cache.put([101])
    server.start()
    assert cache.found([100]) == 0
    until(lambda: cache.put([102]))
    until(lambda: cache.get([102]) == [True])
    assert cache.get([100]) == [False]
    assert cache.used() == 0


def test_stopped_and_resumed(server, open_cache):
    cache = open_cache(server.address, timeout=TIMEOUT)
    until(lambda: cache.put([110]))
    with server.stopped():
        assert cache.found([110]) == 0
        assert not cache.put([111])
    until(lambda: cache.found([110]))
    until(lambda: cache.get([110]) == [True])
    assert cache.used() == 0


@pytest.mark.parametrize("fault", Valkey.faults)
@pytest.mark.parametrize("server", [Valkey], indirect=True)
def test_fault_between_client_and_server(server, open_cache, fault):
    """Nothing wrong is read, and what is right is read again when the fault is over."""
    direct, numbers = server.url(server._port), range(200, 208)
    writer, reader = open_cache(direct), open_cache(server.address, timeout=STUCK if fault == "slow" else 3 * TIMEOUT)
    until(lambda: writer.put(numbers))
    until(lambda: all(reader.get(numbers)))
    server.does = fault
    arrived = reader.get(numbers)
    server.does = "serve"
    assert arrived == [fault == "slow"] * len(numbers)
    until(lambda: all(reader.get(numbers)))
    assert reader.used() == 0


def test_memory_has_a_bound(server, open_cache):
    """Three times what fits; the newest are there, the oldest are not."""
    cache, count = open_cache(server.address), 3 * server.bound // CHUNK_BYTES
    for start in range(1000, 1000 + count, 20):
        cache.put(range(start, start + 20))
    until(lambda: cache.put([1000 + count]))  # Mooncake evicts later
    assert cache.get([1000 + count]) == [True]
    assert cache.found([1000]) == 0


def test_preflight_of_a_valkey_without_a_bound(processes, tmp_path):
    server = Valkey(processes, tmp_path / "log")
    command = server._command
    server._command = lambda: [*command(), "--maxmemory-policy", "noeviction"]
    server.kill()
    server.process = processes.start(server._command(), tmp_path / "log")
    with pytest.raises(UserError, match="never evicts KV"):
        until(lambda: _unbound(server))


def _unbound(server):
    try:
        server.check()
    except UserError as error:
        if "no Valkey or Redis answers" not in str(error):
            raise
    return False


def test_only_known_engines(monkeypatch):
    assert settings("s3://bucket", 2, 8) is None
    assert settings("redis://host:1", 2, 8) == {}
    assert settings("mooncakestore://10.0.0.1:5", 2, 8)["mooncake_master_server_addr"] == "10.0.0.1:5"
    monkeypatch.setitem(engines.PACKAGES, "valkey", ("no_such_module", "valkey-glide-sync"))
    with pytest.raises(UserError, match="install valkey-glide-sync"):
        engines.check("valkey://host:1")


class Misbehaving:
    """A RemoteConnector's methods on a dict. ``fault`` is called with the name of the operation, on its event loop."""

    def __init__(self, memory):
        self.memory, self.entries, self.closed = memory, {}, threading.Event()

    fault = staticmethod(lambda name: asyncio.sleep(0))

    def support_batched_get(self):
        return False

    async def exists(self, key):
        await self.fault("exists")
        return key in self.entries

    async def get(self, key):
        entry = self.memory.allocate()
        await self.fault("get")
        remote_entry.array(entry)[:] = np.frombuffer(self.entries[key], np.uint8)
        return entry

    async def put(self, key, entry):
        await self.fault("put")
        self.entries[key] = bytes(entry.byte_array)

    async def close(self):
        self.closed.set()


@pytest.fixture
def misbehaving(open_cache):
    """A cache, and the connectors that its client has made, which have the same entries."""
    cache, made = open_cache("redis://127.0.0.1:1"), []

    def connect(loop, memory):
        made.append(Misbehaving(memory))
        made[-1].entries = made[0].entries
        return made[-1]

    client = EngineClient("test://host", {}, connect, cache.local)
    cache.remote.connection._connector = client
    return cache, made


def be_impatient(cache):
    """From here on its client's operations have a short deadline."""
    cache.remote.connection._connector._timeout = TIMEOUT


def test_damaged_entry(misbehaving):
    cache, made = misbehaving
    assert cache.put([1, 2])
    damaged = bytearray(made[0].entries[key(1)])
    damaged[CHUNK_BYTES // 2] ^= 1
    made[0].entries[key(1)] = bytes(damaged)
    assert cache.get([1, 2]) == [False, True]
    made[0].entries[key(2)] = made[0].entries[key(1)]  # of another key
    assert cache.get([2]) == [False]
    assert len(made[0].entries[key(1)]) >= CHUNK_BYTES + CHECKSUM
    assert cache.used() == 0


def test_a_load_that_ends_after_its_deadline_writes_into_nobodys_kv(misbehaving):
    cache, made = misbehaving
    assert cache.put([1, 2])
    be_impatient(cache)
    going_on = threading.Event()

    async def late(name):
        if name == "get":
            await asyncio.get_running_loop().run_in_executor(None, going_on.wait, STUCK)

    made[0].fault = late
    assert cache.get([1]) == [False]
    assert cache.used() == 0
    assert cache.found([1]) == 0  # it is down: nothing is asked
    time.sleep(2 * TIMEOUT)
    assert len(made) == 1  # the old one may still write: no new one yet
    going_on.set()
    until(lambda: len(made) == 2 and cache.found([1]))
    until(made[0].closed.is_set)
    until(lambda: cache.get([1, 2]) == [True, True])


def test_what_a_failed_operation_held_is_freed_at_once(misbehaving):
    """However long its error is kept: Python crashes when it collects a memoryview of which GLIDE has made a buffer."""
    cache, made = misbehaving
    assert cache.put([1])
    buffers, errors = [], []

    class Buffer:
        pass

    async def fail(name):
        buffer = Buffer()
        buffers.append(weakref.ref(buffer))
        errors.append(ConnectionError("failed"))
        raise errors[-1]

    made[0].fault = fail
    cache.get([1])
    assert errors
    until(lambda: not any(buffer() for buffer in buffers))


def test_a_connector_that_blocks_its_event_loop(misbehaving):
    """As Mooncake's lookups do: LMCache's own loop goes on."""
    cache, made = misbehaving
    assert cache.put([1])
    be_impatient(cache)
    going_on = threading.Event()

    async def block(name):
        going_on.wait(STUCK)

    made[0].fault = block
    assert cache.found([1]) == 0
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), cache.loop).result(STUCK / 2)
    going_on.set()
    made[0].fault = Misbehaving.fault
    until(lambda: cache.found([1]))


def test_an_error_is_a_miss_and_not_a_hit(misbehaving, monkeypatch):
    """Mooncake's lookup answers an error with a negative number, which LMCache takes for a hit."""
    cache, _ = misbehaving
    assert cache.put([1])
    monkeypatch.setattr(Misbehaving, "exists", lambda *_: asyncio.sleep(0, -5))
    assert cache.found([1]) == 0
    monkeypatch.undo()
    until(lambda: cache.found([1]) == 1)


def test_an_error_is_tried_again_with_a_new_connector(misbehaving):
    """Valkey may have been started again, and not all client libraries connect again."""
    cache, made = misbehaving
    assert cache.put([1])

    async def fail(name):
        raise RuntimeError("socket recv failed")

    made[0].fault = fail
    assert cache.found([1]) == 1
    assert len(made) == 2
    until(made[0].closed.is_set)


def test_part_of_a_chunk_is_not_stored(misbehaving):
    cache, _ = misbehaving
    cache.remote.connection._connector.full_chunk_size_bytes += 1
    assert not cache.put([1])


def test_lmcaches_connector_is_the_one_behind(open_cache, tmp_path):
    """Other schemes are LMCache's own."""
    cache = open_cache("redis://127.0.0.1:1", timeout=TIMEOUT)
    assert isinstance(cache.remote.connection._connector, remote_engine.EngineClient)
    other = open_cache(f"fs://localhost:1/{tmp_path}", timeout=TIMEOUT)
    assert not isinstance(other.remote.connection._connector, remote_engine.EngineClient)
