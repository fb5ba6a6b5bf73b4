"""Shared memory between kvshare's client and a real `kvshare server` on this host."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from backend import Shared
from remote_cache import CHUNK_BYTES, Cache, key
from waiting import STUCK, until

from kvshare import vllm_plugin
from kvshare.core import lm_protocol, shared_memory

vllm_plugin.register()

import lmcache.v1.storage_backend.connector.lm_connector  # noqa: E402, F401  the hook makes the client importable

from kvshare.hooks.lmcache import remote_entry, remote_shm  # noqa: E402
from kvshare.hooks.lmcache.remote_shm import SharedConnection  # noqa: E402

ROOM = 40  # chunks that the server has memory for


@pytest.fixture
def server(processes, tmp_path):
    return Shared(processes, tmp_path / "log", bound=ROOM * (CHUNK_BYTES + lm_protocol.CHECKSUM + 5120))


@pytest.fixture
def open_cache(server):
    opened = []

    def open_one(room=2 * ROOM):
        opened.append(Cache(server.address, room, STUCK))
        return opened[-1]

    yield open_one
    for cache in opened:
        cache.close()


def connections(cache):
    return {type(connection) for connection in cache.remote.connection.getWrappedConnector()._idle}


def connect(server):
    return SharedConnection.open("127.0.0.1", server.port, time.monotonic() + 20)


def test_is_found_by_itself(open_cache, server):
    before = of_dev_shm()
    writer, reader, numbers = open_cache(), open_cache(), range(30)
    writer.put(numbers)
    assert reader.found(range(40)) == 30
    assert all(reader.get(numbers))
    assert connections(writer) == connections(reader) == {SharedConnection}
    assert of_dev_shm() == before
    assert mappings() == 1


def test_tcp_reads_what_was_written_through_shared_memory_and_the_other_way_round(open_cache, monkeypatch):
    local = open_cache()
    local.put([1])
    monkeypatch.setattr(SharedConnection, "open", lambda *_: None)
    remote = open_cache()
    assert remote.get([1]) == [True]
    remote.put([2])
    assert SharedConnection not in connections(remote)
    assert local.get([2]) == [True]


def test_lmcaches_own_server(lmcache_server, monkeypatch):
    cache, numbers = Cache(lmcache_server, 100, STUCK), range(5000, 5050)
    with closing(cache):
        assert cache.found(numbers) == 0
        cache.put(numbers)
        assert cache.found(numbers) == 50
        assert all(cache.get(numbers))
        assert SharedConnection not in connections(cache)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_use_tcp(server):
    child = os.fork()
    if not child:
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX) as connected:
            connected.connect(shared_memory.address("127.0.0.1", server.port))
            _, files, *_ = socket.recv_fds(connected, 1, 1)
            os._exit(1 if shared_memory.same_user(connected) or files else 0)
    assert os.waitpid(child, 0)[1] == 0
    server.check()


def test_memory_that_cannot_be_mapped(open_cache, monkeypatch):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(remote_shm.Memory, "of", refuse)
    cache = open_cache()
    cache.put([1])
    assert cache.get([1]) == [True]
    assert SharedConnection not in connections(cache)


# What must never be read as a good entry


def test_damaged_entry(open_cache, server):
    cache = open_cache()
    cache.put(range(3))
    server.damage()
    assert cache.get(range(3)) == 3 * [False]
    cache.put(range(3))
    assert cache.get(range(3)) == 3 * [True]
    assert cache.used() == 0


def test_entry_evicted_between_lookup_and_get(open_cache):
    cache = open_cache()
    cache.put([1])
    assert cache.found([1]) == 1
    cache.put(range(100, 100 + ROOM))
    assert cache.get([1]) == [False]
    assert cache.found([1]) == 0


@pytest.mark.parametrize("part", [0, 1], ids=["before it is read", "while it is read"])
def test_entry_overwritten(open_cache, server, monkeypatch, part):
    """By entries of another client, once the server has said where the entry is."""
    cache, other = open_cache(), open_cache()
    cache.put([1])
    monkeypatch.setattr(remote_entry, "PART", CHUNK_BYTES // 2)
    copied = []

    def copyto(target, source, really=remote_shm.np.copyto):
        if len(copied) == part:
            copied.append(None)
            other.put(range(100, 100 + ROOM))
        copied.append(None)
        really(target, source)

    connection = connect(server)
    monkeypatch.setattr(remote_shm.np, "copyto", copyto)
    allocate = cache.remote.connection.getWrappedConnector()._allocate
    assert list(connection.get([key(1)], allocate)) == [None]
    connection.link.close()
    assert copied
    assert cache.used() == 0


WRITER = """
import os, socket, struct, sys, time
from kvshare.core.lm_protocol import REQUEST
from kvshare.core.shared_memory import PLACE, RESERVE, address
port, length, count = map(int, sys.argv[1:])
client = socket.socket(socket.AF_UNIX)
client.connect(address("127.0.0.1", port))
_, (fd,), *_ = socket.recv_fds(client, 1, 1)
for number in range(count):
    name = b"qwen@1@0@%x@float" % (1000 + number)
    client.sendall(REQUEST.pack(RESERVE, length, 2, 4, 0, 2, 4, 256, 16, name.ljust(150)))
    code, *_, offset, warm = PLACE.unpack(client.recv(PLACE.size, socket.MSG_WAITALL))
    print(code, flush=True)
    if code == 200:
        os.pwrite(fd, bytes(length // 2), offset)
print("half", flush=True)
time.sleep(600)
"""


def write_half(server, count):
    """A client that has written half of ``count`` entries, and how many of them the server took."""
    command = [sys.executable, "-c", WRITER, str(server.port), str(CHUNK_BYTES + lm_protocol.CHECKSUM), str(count)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    codes = []
    while (line := writer.stdout.readline().strip()) != "half":
        codes.append(line)
    return writer, codes.count("200")


def test_client_killed_in_a_put(open_cache, server):
    cache = open_cache()
    writer, taken = write_half(server, 1)
    assert taken == 1
    assert cache.found([0x1000]) == 0
    writer.send_signal(signal.SIGKILL)
    writer.wait(STUCK)
    assert cache.found([0x1000]) == 0
    assert cache.get([0x1000]) == [False]
    until(lambda: cache.put(range(ROOM)) and all(cache.get(range(ROOM))))  # nothing of it takes the room of others


def test_client_that_writes_half_and_stays(open_cache, server):
    """What it may still write to is nobody else's, and counts."""
    cache = open_cache()
    writer, taken = write_half(server, ROOM // 2)
    assert taken == ROOM // 2
    cache.put(range(ROOM))
    writer.send_signal(signal.SIGSTOP)
    assert sum(cache.get(range(ROOM))) == ROOM - taken
    assert server.memory() <= server.bound
    writer.kill()
    writer.wait(STUCK)
    until(lambda: cache.put(range(ROOM)) and all(cache.get(range(ROOM))))


def test_client_killed_while_it_reads(open_cache, server):
    cache = open_cache()
    cache.put(range(ROOM))
    code = f"""
from remote_cache import Cache
from kvshare import vllm_plugin
vllm_plugin.register()
cache = Cache("{server.address}", {ROOM}, {STUCK})
while True:
    assert all(cache.get(range({ROOM})))
    print("read", flush=True)
"""
    reader = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    for _ in range(3):
        assert reader.stdout.readline()
    reader.kill()
    reader.wait(STUCK)
    cache.put(range(100, 100 + ROOM))
    assert all(cache.get(range(100, 100 + ROOM)))
    assert server.memory() <= server.bound


def test_server_killed_while_clients_map_it(open_cache, server):
    cache = open_cache()
    cache.put(range(10))
    server.kill()
    assert cache.get(range(10)) == 10 * [False]
    assert cache.found(range(10)) == 0
    server.start()
    until(lambda: cache.put(range(10)))
    assert all(cache.get(range(10)))
    assert connections(cache) == {SharedConnection}
    assert mappings() == 1  # of the server that is there
    assert cache.used() == 0


def test_server_restarted_between_two_requests(open_cache, server):
    """No request need fail for it."""
    cache = open_cache()
    cache.put(range(10))
    server.restart()
    assert cache.found(range(10)) == 0
    cache.put(range(10))
    assert all(cache.get(range(10)))


def test_memory_limit(open_cache, server):
    """Entries of two lengths, four times what the server may keep; every client still maps all of its memory."""
    cache, most = open_cache(), 0
    for first in range(0, 4 * ROOM, 10):
        cache.put(range(first, first + 10))
        most = max(most, server.memory())
    assert ROOM * CHUNK_BYTES <= most <= server.bound
    with closing(socket.create_connection(("127.0.0.1", server.port))) as client:
        for number in range(8):
            name = b"qwen@1@0@%x@float" % (1 << 20 | number)
            request = lm_protocol.REQUEST.pack(lm_protocol.PUT, 300_000, 2, 4, 0, 1, 1, 1, 1, name.ljust(150))
            client.sendall(request + bytes(300_000))
        client.sendall(lm_protocol.REQUEST.pack(lm_protocol.EXIST, 0, 2, 4, 0, 1, 1, 1, 1, name.ljust(150)))
        assert lm_protocol.REPLY.unpack(client.recv(lm_protocol.REPLY.size))[0] == lm_protocol.SUCCESS
    assert server.memory() <= server.bound
    newest = range(4 * ROOM - 10, 4 * ROOM)
    assert cache.get(newest) == [True] * 10


def of_dev_shm():
    """What this process maps of /dev/shm."""
    return sorted(re.findall(r"/dev/shm/\S+", Path("/proc/self/maps").read_text()))


def mappings():
    """Of servers' memory in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:kvshare server")
