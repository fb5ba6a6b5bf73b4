"""What engines share through in tests: a real, bounded server that can be killed, stopped and started again."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from waiting import stopped, until

from kvshare.core import ports
from kvshare.core.errors import UserError
from kvshare.core.lm_protocol import CHECKSUM
from kvshare.services import backends, health
from kvshare.services.processes import Processes

HEADER, REPLY = struct.Struct("9i150s"), struct.Struct("9i")
PUT, GET = 1, 2
BOUND = 300_000_000  # bytes
CONFIG = Path(__file__).resolve().parents[2] / "config"


class Backend:
    """A server process on a port of its own.

    ``does`` says how a proxy before it behaves, if the backend has one: serve, refuse, hang, slow, drop once (then
    slow), truncate, flip (a bit), swap (its halves), or vanish (found, but gone when loaded).
    """

    connector: str  # vLLM's name for it
    faults: tuple[str, ...] = ()  # that ``does`` knows
    local_tier = True  # LMCache keeps KV in the engine's processes, too

    def __init__(self, processes: Processes, log: Path) -> None:
        self.does = "serve"
        self.delay = 0.05  # seconds, of each answer while it is slow
        self.asked = 0  # requests that came
        self.of = b""  # part of the keys that it misbehaves for
        self._processes, self._log = processes, log
        self._port = ports.free_port()
        self.start()

    @property
    def environment(self) -> dict[str, str]:
        """For engines."""
        raise NotImplementedError

    def start(self) -> None:
        self.process = self._processes.start(self._command(), self._log)
        until(self._healthy, self.process, self._log)

    def _healthy(self) -> bool:
        with contextlib.suppress(UserError):
            self.check()
            return True
        return False

    def kill(self) -> None:
        self._processes.kill(self.process)

    def restart(self) -> None:
        """So fast that no engine need notice."""
        self.kill()
        self.start()

    def stopped(self) -> contextlib.AbstractContextManager[None]:
        return stopped(self.process.pid)

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        """Not there, as far as engines can see."""
        self.kill()
        try:
            yield
        finally:
            self.start()


class BehindProxy(Backend):
    """A server that goes on while its proxy refuses."""

    @contextlib.contextmanager
    def absent(self) -> Iterator[None]:
        self.does = "refuse"
        try:
            yield
        finally:
            self.does = "serve"


class KVShareServer(Backend):
    """``kvshare server``.

    Args:
        bound: bytes of its memory.
    """

    connector = "LMCacheConnectorV1"
    address: str

    def __init__(self, processes: Processes, log: Path, bound: int = BOUND) -> None:
        self.bound = bound
        super().__init__(processes, log)

    @property
    def environment(self) -> dict[str, str]:
        return {
            "LMCACHE_CONFIG_FILE": str(CONFIG / "remote_backend_config.yaml"),
            "LMCACHE_REMOTE_URL": f"lm://{self.address}",
        }

    def _command(self) -> list[str]:
        command = [sys.executable, "-m", "kvshare", "server", "127.0.0.1", str(self._port)]
        return [*command, "--memory", str(self.bound / 2**30)]

    def check(self) -> None:
        health.check_lmcache_server(f"lm://127.0.0.1:{self._port}")


class Remote(BehindProxy, KVShareServer):
    """``kvshare server`` behind a proxy that can misbehave in each way a server or a network can."""

    faults = ("refuse", "hang", "slow", "truncate", "flip", "vanish")

    def __init__(self, processes: Processes, log: Path) -> None:
        super().__init__(processes, log)
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            client = listener.accept()[0]
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, EOFError):
            if self.does == "refuse":
                return
            with socket.create_connection(("127.0.0.1", self._port)) as server:
                while True:
                    self._exchange(client, server)

    def _exchange(self, client: socket.socket, server: socket.socket) -> None:
        header = _read(client, HEADER.size)
        command, length, *_ = HEADER.unpack(header)
        does = self.does if self.of in header else "serve"
        self.asked += 1
        if does == "refuse":
            raise EOFError
        while self.does == "hang":
            time.sleep(0.05)
        if does in ("slow", "drop once"):
            time.sleep(self.delay)
        if does == "drop once":
            self.does = "slow"
            raise EOFError
        server.sendall(header + (_read(client, length) if command == PUT else b""))
        if command == PUT:
            return
        reply = _read(server, REPLY.size)
        code, length, *_ = REPLY.unpack(reply)
        data = bytearray(_read(server, length)) if command == GET and code == 200 else b""
        if data and does == "vanish":
            reply, data = REPLY.pack(400, 0, 1, 2, 0, 0, 0, 0, 0), b""
        elif data and does == "flip":
            data[len(data) // 2] ^= 1
        elif data and does == "swap":
            half = (length - CHECKSUM) // 2
            data[:half], data[half : 2 * half] = data[half : 2 * half], data[:half]
        elif data and does == "truncate":
            client.sendall(reply + data[: len(data) // 2])
            raise EOFError
        client.sendall(reply + data)


class Shared(KVShareServer):
    """``kvshare server`` without a proxy: engines share its memory."""

    faults = ("damaged",)

    def __init__(self, processes: Processes, log: Path, bound: int = BOUND) -> None:
        super().__init__(processes, log, bound)
        self.port, self.address = self._port, f"127.0.0.1:{self._port}"

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if (name, value) == ("does", "damaged"):
            self.damage()

    def damage(self) -> None:
        """Flip a bit in every page of its memory."""
        with self._memory() as file:
            end = 0
            with contextlib.suppress(OSError):  # no more data
                while True:
                    start = os.lseek(file, end, os.SEEK_DATA)
                    end = os.lseek(file, start, os.SEEK_HOLE)
                    for offset in range(start, end, mmap.PAGESIZE):
                        os.pwrite(file, bytes([os.pread(file, 1, offset)[0] ^ 1]), offset)

    def memory(self) -> int:
        """Bytes that the system has allocated for its entries."""
        with self._memory() as file:
            return os.fstat(file).st_blocks * 512

    @contextlib.contextmanager
    def _memory(self) -> Iterator[int]:
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            if "memfd:kvshare server" in os.readlink(link):
                file = os.open(link, os.O_RDWR)
                try:
                    yield file
                finally:
                    os.close(file)
                return
        raise AssertionError("the server has no memory")


class MP(Backend):
    """``lmcache server``, without a proxy."""

    connector = "LMCacheMPConnector"
    local_tier = False

    @property
    def environment(self) -> dict[str, str]:
        return {"LMCACHE_CONFIG_FILE": str(CONFIG / "mp_backend_config.yaml"), "LMCACHE_REMOTE_URL": self._url}

    @property
    def _url(self) -> str:
        return f"tcp://127.0.0.1:{self._port}"

    def _command(self) -> list[str]:
        with mock.patch.dict(os.environ, {"LMCACHE_MAX_LOCAL_CPU_SIZE": str(BOUND / 2**30)}):
            return backends.BACKENDS["mp"].command("127.0.0.1", {"server": self._port, "http": 0}, self._log.parent)

    def check(self) -> None:
        health.check_mp_server(self._url)


BACKENDS = {"remote": Remote, "shared": Shared, "mp": MP}


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)
