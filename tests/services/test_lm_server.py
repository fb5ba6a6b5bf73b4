"""A real ``kvshare server``, LMCache's real messages, and clients that are nobody's friends."""

import asyncio
import importlib.util
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmcache.utils import CacheEngineKey
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode
from waiting import STUCK, until

from kvshare.core import ports, shared_memory
from kvshare.services import health, lm_server

MB = 1_000_000
LIMIT = 300 * MB
SHAPE = torch.Size([2, 3, 4, 5])


def _key(number: int) -> CacheEngineKey:
    return CacheEngineKey("qwen", 1, 0, number, torch.bfloat16)


def _request(command: ClientCommand, number: int = 0, length: int = 0) -> bytes:
    message = ClientMetaMessage(command, _key(number), length, MemoryFormat.KV_2LTD, torch.bfloat16, SHAPE)
    return message.serialize()


def _put(number: int, data: bytes, length: int | None = None) -> bytes:
    return _request(ClientCommand.PUT, number, len(data) if length is None else length) + data


class Server:
    """``kvshare server`` as a process of its own."""

    def __init__(self, processes, folder, *options: str, limit: int = LIMIT, port: int | None = None) -> None:
        self.port = port or ports.free_port()
        self.log, self.status_file = folder / "log", folder / "status.json"
        self.command = [sys.executable, "-m", "kvshare", "server", "127.0.0.1", str(self.port)]
        self.command += ["--memory", str(limit / 2**30), "--status", str(self.status_file), *options]
        self.process = processes.start(self.command, self.log)
        self.wait_for_log(f":{self.port}")
        self.base = self.rss()

    def rss(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def status(self) -> dict:
        """As of at most a second ago."""
        return json.loads(self.status_file.read_text())

    def wait_for_log(self, text: str) -> None:
        until(lambda: text in self.log.read_text(), self.process, self.log)

    def threads(self) -> int:
        return psutil.Process(self.process.pid).num_threads()

    def client(self) -> "Client":
        return Client(self.port)

    def check(self) -> None:
        """It still does all it is for, on a new connection."""
        assert self.process.poll() is None, self.log.read_text()
        number, data = random.getrandbits(60), random.randbytes(100_000)
        with closing(self.client()) as client:
            assert client.ask(_request(ClientCommand.HEALTH)).code == ServerReturnCode.SUCCESS
            client.send(_put(number, data))
            assert client.get(number) == data
        assert "Traceback" not in self.log.read_text()
        assert "Exception" not in self.log.read_text()


class Client:
    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=STUCK)
        self.close = self.socket.close

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size and (more := self.socket.recv(size - len(data))):
            data += more
        return bytes(data)

    def ask(self, request: bytes) -> ServerMetaMessage:
        self.send(request)
        return ServerMetaMessage.deserialize(self.read(ServerMetaMessage.packlength()))

    def get(self, number: int) -> bytes | None:
        reply = self.ask(_request(ClientCommand.GET, number))
        return self.read(reply.length) if reply.code == ServerReturnCode.SUCCESS else None

    def exists(self, number: int) -> bool:
        return self.ask(_request(ClientCommand.EXIST, number)).code == ServerReturnCode.SUCCESS

    def closed_by_server(self) -> bool:
        with suppress(ConnectionResetError):
            return self.socket.recv(1) == b""
        return True


class LocalClient(Client):
    """On the Unix socket of the server."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(shared_memory.address("127.0.0.1", port))
        self.socket.settimeout(STUCK)
        _, (file,), *_ = socket.recv_fds(self.socket, 1, 1)
        self.socket.settimeout(2)
        os.close(file)
        self.close = self.socket.close


@pytest.fixture(scope="module")
def running(processes, tmp_path_factory) -> Server:
    return Server(processes, tmp_path_factory.mktemp("server"))


@pytest.fixture
def small(processes, tmp_path) -> Server:
    return Server(processes, tmp_path, limit=20 * MB)


@pytest.fixture
def client(running):
    with closing(running.client()) as client:
        yield client


# The protocol


def test_messages_are_lmcaches():
    assert lm_server.REQUEST.size == ClientMetaMessage.packlength()
    assert lm_server.REPLY.size == ServerMetaMessage.packlength()
    values = (ClientCommand.PUT, ClientCommand.GET, ClientCommand.EXIST, ClientCommand.HEALTH)
    assert values == (lm_server.PUT, lm_server.GET, lm_server.EXIST, lm_server.HEALTH)
    empty = ServerMetaMessage(ServerReturnCode.FAIL, 0, MemoryFormat(1), torch.float16, torch.Size((0, 0, 0, 0)))
    assert lm_server.REPLY.pack(lm_server.FAIL, *lm_server.NO_DATA) == empty.serialize()


def test_entry_comes_back_as_it_was(client):
    data = os.urandom(3 * MB)
    assert client.get(1) is None
    assert not client.exists(1)
    client.send(_put(1, data))
    reply = client.ask(_request(ClientCommand.GET, 1))
    assert (reply.fmt, reply.dtype, reply.shape) == (MemoryFormat.KV_2LTD, torch.bfloat16, SHAPE)
    assert client.read(reply.length) == data
    assert client.exists(1)
    client.send(_put(1, b"new"))
    assert client.get(1) == b"new"


def _lmcaches_own_connector() -> type:
    """The class as LMCache has it: kvshare's replaces it in its module."""
    from lmcache.v1.storage_backend.connector import lm_connector

    spec = importlib.util.spec_from_file_location("lmcaches_own", lm_connector.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LMCServerConnector


def test_lmcaches_own_connector(running):
    """What a vLLM replica without the plugin uses; its buffers are the only thing made up here."""
    tensor = torch.arange(2 * 3 * 4 * 5, dtype=torch.bfloat16).reshape(SHAPE)

    def memory(content: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(
            byte_array=memoryview(content.view(torch.uint8).numpy().reshape(-1)),
            get_shape=lambda: SHAPE,
            get_dtype=lambda: torch.bfloat16,
            get_memory_format=lambda: MemoryFormat.KV_2LTD,
        )

    metadata = SimpleNamespace(
        get_shapes=lambda: [SHAPE],
        get_dtypes=lambda: [torch.bfloat16],
        get_num_groups=lambda: 1,
        use_mla=False,
        chunk_size=4,
    )
    arrived = torch.zeros_like(tensor)
    backend = SimpleNamespace(
        config=SimpleNamespace(extra_config=None, use_layerwise=False),
        metadata=metadata,
        allocate=lambda *_: memory(arrived),
    )

    async def use() -> None:
        connector = _lmcaches_own_connector()("127.0.0.1", running.port, asyncio.get_running_loop(), backend)
        assert not await connector.exists(_key(77))
        assert await connector.get(_key(77)) is None
        await connector.put(_key(77), memory(tensor))
        assert await connector.exists(_key(77))
        assert await connector.get(_key(77))
        await connector.close()

    asyncio.run(use())
    assert torch.equal(arrived, tensor)


def test_ipv6(processes, tmp_path):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    port, log = ports.free_ports("::1", {"server": 0})["server"], tmp_path / "log"
    process = processes.start([sys.executable, "-m", "kvshare", "server", "::1", str(port)], log)
    check = partial(health.check_lmcache_server, f"lm://[::1]:{port}")
    assert health.wait_healthy("server", process, check, log) == f"[::1]:{port}"
    with socket.create_connection(("::1", port)) as client, suppress(ConnectionResetError):
        client.sendall(b"no header" * 100)
        client.recv(1)
    until(lambda: "closed the connection of ::1:" in log.read_text(), process)
    processes.kill(process)


def test_preflight_takes_it_for_lmcache_server(running):
    assert health.check_lmcache_server(f"lm://127.0.0.1:{running.port}") == f"127.0.0.1:{running.port}"


# Clients that break it


def _raw(command: int, length: int, rest: bytes = b"k@1@0@1@half") -> bytes:
    return struct.pack("9i150s", command, length, 1, 2, 0, 1, 1, 1, 1, rest.ljust(150))


HEADER = _request(ClientCommand.PUT, 5, 1000)
MALFORMED = {
    "nothing": b"",
    "one byte": b"\0",
    "zeros": bytes(186),
    "ones": b"\xff" * 186,
    "many zeros": bytes(1 * MB),
    "many ones": b"\xff" * MB,
    "text": b"hello, server\n" * 50,
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"Accept: text/html\r\n" * 20 + b"\r\n",
    "tls": bytes.fromhex("16030100f8010000f40303") + os.urandom(300),
    "redis": b"*2\r\n$3\r\nGET\r\n$200\r\n" + b"k" * 200 + b"\r\n",
    "zmq greeting": b"\xff\0\0\0\0\0\0\0\1\x7f\3\1NULL" + bytes(200),
    "pickle": b"\x80\x04\x95" + b"\0" * 200,
    "command 0": _raw(0, 0),
    "command 4, LIST": _raw(4, 0),
    "command 6": _raw(6, 0),
    "command -1": _raw(-1, 0),
    "command of the largest number": _raw(2**31 - 1, 0),
    "big-endian header": struct.pack(">9i150s", 1, 10, 1, 2, 0, 1, 1, 1, 1, b"k") + b"0123456789",
    "PUT of nothing": _raw(1, 0),
    "PUT of -1": _raw(1, -1),
    "PUT of the smallest number": _raw(1, -(2**31)) + b"data",
    "PUT of the largest number": _raw(1, 2**31 - 1) + b"data",
    "PUT of all memory": _raw(1, LIMIT) + bytes(MB),
    "PUT just too large": _raw(1, LIMIT - 100) + bytes(MB),
    "PUT of half the memory": _raw(1, LIMIT // 2) + bytes(MB),
    "PUT, header only": HEADER,
    "PUT, half a header": HEADER[:100],
    "PUT, header without its last byte": HEADER[:-1],
    "PUT without its last byte": HEADER + bytes(999),
    "PUT, then a truncated one": HEADER + bytes(1000) + HEADER + bytes(10),
    "PUT, then garbage": HEADER + bytes(1000) + b"\xee" * 500,
    "PUT of one byte more than said": HEADER + bytes(1001),
    "GET with a length": _raw(2, 2**31 - 1),
    "GET, key not text": _raw(2, 0, b"\xff\xfe" * 75),
    "GET, key without @": _raw(2, 0, b"key"),
    "GET, empty key": _raw(2, 0, b""),
    "EXIST, key of zeros": _raw(3, 0, bytes(150)),
    "many GETs, replies unread": _raw(2, 0) * 5000,
    "HEALTH, then garbage": _request(ClientCommand.HEALTH) + b"\xaa" * 186,
}


def _throw(client: "Client", stream: bytes, how: str) -> None:
    with suppress(OSError):  # it may close the connection before all is sent
        client.send(stream)
        if how == "half-closed":
            client.socket.shutdown(socket.SHUT_WR)
            while client.socket.recv(1 << 16):
                pass
    if how == "reset":
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.parametrize("how", ["closed", "half-closed", "reset"])
@pytest.mark.parametrize("stream", MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_stream(running, stream, how):
    _throw(running.client(), stream, how)
    running.check()


LOCAL = {
    "RESERVE of nothing": _raw(102, 0),
    "RESERVE of -1": _raw(102, -1),
    "RESERVE of the largest number": _raw(102, 2**31 - 1),
    "RESERVE of the same key, twice": 2 * _raw(102, 1000),
    "RESERVE of half the memory, often": b"".join(_raw(102, LIMIT // 2, b"%d@" % number) for number in range(9)),
    "COMMIT of what is not reserved": _raw(103, 0),
    "COMMIT, twice": _raw(102, 1000, b"committed") + 2 * _raw(103, 0, b"committed"),
    "FIND with a length": _raw(101, 2**31 - 1),
    "FIND, key not text": _raw(101, 0, b"\xff\xfe" * 75),
    "many FINDs, replies unread": _raw(101, 0) * 5000,
}


@pytest.mark.parametrize("stream", [*MALFORMED.values(), *LOCAL.values()], ids=[*MALFORMED, *LOCAL])
def test_malformed_stream_of_a_client_that_shares_memory(running, stream):
    _throw(LocalClient(running.port), stream, "closed")
    running.check()


def test_commands_for_shared_memory_are_not_for_tcp(client):
    client.send(_raw(102, 1000))
    assert client.closed_by_server()


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([_put(9, b"data"), _raw(2, 0), _request(ClientCommand.HEALTH)]), max_size=3),
    st.binary(max_size=400) | st.tuples(st.integers(-2, 6), st.integers(-9, 999)).map(lambda pair: _raw(*pair)),
)
def test_any_stream(running, good, bad):
    _throw(running.client(), b"".join(good) + bad, "half-closed")
    running.check()


def test_a_malformed_stream_is_one_line_in_the_log(small):
    before = small.log.read_text()
    client = small.client()
    client.send(bytes(10_000))
    assert client.closed_by_server()  # it logs before it closes
    (line,) = small.log.read_text().removeprefix(before).splitlines()
    assert "does not speak LMCache's protocol" in line


@pytest.mark.parametrize("how", ["closed", "half-closed", "reset"])
def test_client_that_dies_in_a_put_stores_nothing(running, client, how):
    client.send(_put(20, b"old"))
    assert client.get(20) == b"old"
    before = running.threads()
    for number in (20, 21):
        _throw(running.client(), _put(number, bytes(5 * MB), length=6 * MB), how)
    until(lambda: running.threads() <= before)
    assert client.get(20) == b"old"
    assert not client.exists(21)
    assert client.get(21) is None


def test_too_large_is_refused_and_the_connection_goes_on(small):
    with closing(small.client()) as client:
        client.send(_put(1, b"kept"))
        client.send(_put(2, bytes(21 * MB)))
        assert not client.exists(2)
        assert client.get(1) == b"kept"
    assert small.rss() < small.base + 5 * MB
    until(lambda: small.status()["refused"] == 1)


def test_a_length_alone_costs_no_memory_and_evicts_nothing(running, client):
    client.send(_put(30, b"kept"))
    assert client.exists(30)
    before = running.rss()
    with ExitStack() as stack:
        for number in range(200):
            half_open = stack.enter_context(closing(running.client()))
            half_open.send(_put(1000 + number, b"x", length=LIMIT // 2))
        until(lambda: running.threads() > 200)  # one for each
        assert running.rss() < before + 15 * MB
        assert client.exists(30)
        running.check()


def test_slow_readers_do_not_hold_more_than_the_bound(small):
    """Each asks for an entry, and never reads it, while others push it out."""
    with ExitStack() as stack:
        writer = stack.enter_context(closing(small.client()))
        for number in range(40):
            writer.send(_put(number, bytes(6 * MB)))
            if writer.exists(number):
                stack.enter_context(closing(small.client())).send(_request(ClientCommand.GET, number))
        assert small.rss() < small.base + 20 * MB * 1.2
    until(lambda: small.threads() == 2)  # nobody holds an entry any longer
    small.check()


def test_many_clients_come_and_go(running):
    before = running.rss()
    for _ in range(3):
        with ExitStack() as stack:
            clients = [stack.enter_context(closing(running.client())) for _ in range(300)]
            for client in clients:
                client.exists(1)
    until(lambda: running.threads() < 20)
    assert running.rss() < before + 15 * MB
    running.check()


def test_more_clients_than_open_files(small):
    psutil.Process(small.process.pid).rlimit(psutil.RLIMIT_NOFILE, (40, 40))
    with ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(closing(small.client()))
        busy = psutil.Process(small.process.pid).cpu_percent(1)
        assert busy < 20, "it spins"
    small.check()


# Memory


def test_memory_stays_within_the_bound(processes, tmp_path):
    """Over 2,000 distinct entries of mixed sizes, from four clients at a time."""
    bounded = Server(processes, tmp_path)
    sizes = [64 << 10, 100_001, 512 << 10, 512 << 10, 1 * MB, 3 * MB]
    data = os.urandom(max(sizes))
    peak, wrong = 0, []

    def churn(first: int) -> None:
        pick = random.Random(first)
        with closing(bounded.client()) as client:
            for number in range(first, first + 550):
                size = pick.choice(sizes)
                client.send(_put(number, data[:size]))
                if number % 10 == 0 and client.get(number) not in (data[:size], None):  # others may have evicted it
                    wrong.append(number)

    threads = [threading.Thread(target=churn, args=(10_000 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        peak = max(peak, bounded.rss())
        time.sleep(0.02)
    until(lambda: bounded.status()["evicted"] + bounded.status()["entries"] == 2200)
    status = bounded.status()
    assert peak < bounded.base + LIMIT * 1.05
    assert wrong == []
    assert status["bytes"] <= status["limit"]
    assert status["evicted_bytes"] > 2 * LIMIT
    with closing(bounded.client()) as client:
        assert not any(client.exists(10_000 * n) for n in range(4))
    bounded.check()


def test_what_is_asked_for_stays(small):
    with closing(small.client()) as client:
        for number in range(100):
            client.send(_put(number, bytes(MB)))
            assert client.exists(0)
        assert client.get(0)
        assert not client.exists(50)


# Starting and ending


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_it(small, number):
    with closing(small.client()) as idle, closing(small.client()) as half:
        idle.send(_put(2, b"data"))
        assert idle.exists(2)
        half.send(_put(1, bytes(MB), length=2 * MB))
        small.process.send_signal(number)
        assert small.process.wait(STUCK) == 0  # while its clients stay connected
    assert "Traceback" not in small.log.read_text()
    assert small.log.read_text().splitlines()[-1].startswith("kvshare server: ended, ")
    assert json.loads(small.status_file.read_text())["entries"] == 1


def test_starts_again_on_the_same_port_at_once(processes, tmp_path, small):
    with closing(small.client()) as client:
        assert not client.exists(1)
        small.process.kill()
        small.process.wait(STUCK)
        again = Server(processes, tmp_path, limit=20 * MB, port=small.port)
        again.check()


def _start(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "kvshare", "server", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=STUCK)


BAD = {
    ("--memory", "0"): "--memory '0' must be a number of GiB",
    ("--memory", "-1"): "--memory '-1' must be",
    ("--memory", "much"): "--memory 'much' must be",
    ("--memory", "nan"): "--memory 'nan' must be",
    ("--memory", "inf"): "--memory 'inf' must be",
    ("--memory", "1e9"): "at most this machine's",
    ("localhost", "0"): "PORT '0' must be a number from 1 to 65535",
    ("localhost", "70000"): "PORT '70000' must be",
    ("localhost", "http"): "PORT 'http' must be",
    ("no.such.host.invalid", "6543"): "cannot listen on no.such.host.invalid:6543",
    ("a..b", "6543"): "cannot listen on a..b:6543",
    ("192.0.2.1", "6543"): "cannot listen on 192.0.2.1:6543 (Cannot assign requested address)",
    ("localhost", "{free}", "--status", "/no/such/status.json"): "cannot write /no/such/status.json",
}


@pytest.mark.parametrize(("arguments", "message"), BAD.items(), ids=[" ".join(a) for a in BAD])
def test_user_error_is_one_line(arguments, message):
    ended = _start(*(a.format(free=ports.free_port()) for a in arguments))
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_taken_port(running):
    ended = _start("127.0.0.1", str(running.port))
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    assert f"cannot listen on 127.0.0.1:{running.port} (Address already in use)" in ended.stderr


@pytest.mark.parametrize(("host", "lines"), [("0.0.0.0", 2), ("127.0.0.1", 1), ("localhost", 1)])
def test_warns_when_others_can_reach_it(processes, tmp_path, host, lines):
    port = ports.free_port()
    command = [sys.executable, "-m", "kvshare", "server", host, str(port), "--memory", "0.1"]
    process = processes.start(command, tmp_path / "log")
    until(lambda: len((tmp_path / "log").read_text().splitlines()) == lines, process)
    health.check_lmcache_server(f"lm://127.0.0.1:{port}")
    process.terminate()
    assert process.wait(STUCK) == 0
    text = (tmp_path / "log").read_text()
    assert ("warning" in text) == (lines == 2)
    assert len(text.splitlines()) == lines + 1
