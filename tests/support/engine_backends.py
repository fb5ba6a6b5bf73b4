"""Valkey and Mooncake Store, as engines share through them in tests."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from pathlib import Path

import pytest
from backend import BOUND, CONFIG, Backend, BehindProxy

from kvshare.core import ports
from kvshare.core.errors import UserError
from kvshare.services import engines
from kvshare.services.backends.engines import ENGINES
from kvshare.services.processes import Processes

PIECE = 1 << 16  # bytes; an entry of the tests is larger


def skip_if_missing(engine: str, folder: Path) -> None:
    """Skip the test where this machine lacks the engine's server or its client."""
    try:
        ENGINES[engine].command("127.0.0.1", {"server": 0, "metrics": 0}, folder)
    except UserError as missing:
        pytest.skip(str(missing))


class Proxy:
    """Passes bytes on between clients and a server, or does what ``does`` says, whatever the protocol is.

    refuse; hang; slow; truncate: half of a large piece, then the connection closes; flip: a bit of a large piece.
    """

    def __init__(self, port: int) -> None:
        self.does, self._port = "serve", port
        listener = socket.create_server(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            client = listener.accept()[0]
            try:
                assert self.does != "refuse"
                server = socket.create_connection(("127.0.0.1", self._port))
            except (AssertionError, OSError):
                client.close()
                continue
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(*pair, pair[0] is server), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, replies: bool) -> None:
        with contextlib.suppress(OSError):
            while piece := bytearray(source.recv(PIECE)):
                while self.does == "hang":
                    time.sleep(0.05)
                if self.does == "refuse":
                    break
                if self.does == "slow" and replies:
                    time.sleep(0.02)
                if replies and len(piece) > PIECE // 2:
                    if self.does == "flip":
                        piece[len(piece) // 2] ^= 1
                    if self.does == "truncate":
                        target.sendall(piece[: len(piece) // 2])
                        break
                target.sendall(piece)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Engine(Backend):
    """A server of ENGINES, as ``kvshare services`` starts it.

    Args:
        bound: bytes of its memory.
    """

    connector = "LMCacheConnectorV1"
    engine: str

    def __init__(self, processes: Processes, log: Path, bound: int = BOUND) -> None:
        skip_if_missing(self.engine, log.parent)
        self.bound = bound
        super().__init__(processes, log)

    def url(self, port: int) -> str:
        return ENGINES[self.engine].exports("127.0.0.1", {"server": port}, self._log.parent)["LMCACHE_REMOTE_URL"]

    @property
    def address(self) -> str:
        return self.url(self._port)

    @property
    def environment(self) -> dict[str, str]:
        return {"LMCACHE_CONFIG_FILE": str(CONFIG / "remote_backend_config.yaml"), "LMCACHE_REMOTE_URL": self.address}

    def _command(self) -> list[str]:
        found = {"server": self._port, "metrics": ports.free_port()}
        return [*ENGINES[self.engine].command("127.0.0.1", found, self._log.parent), *self._memory()]

    def check(self) -> None:
        engines.check(self.url(self._port))


class Valkey(BehindProxy, Engine):
    """``valkey-server`` or ``redis-server`` behind a proxy."""

    engine = "valkey"
    faults = ("refuse", "hang", "slow", "truncate", "flip")

    def start(self) -> None:
        super().start()
        if "proxy" not in vars(self):
            self.proxy = Proxy(self._port)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "does" and "proxy" in vars(self):
            self.proxy.does = value

    @property
    def address(self) -> str:
        return self.url(self.proxy.port)

    def _memory(self) -> list[str]:
        return ["--maxmemory", str(self.bound)]


class Mooncake(Engine):
    """``mooncake_master`` and the process that gives it memory: both are killed and stopped together."""

    engine = "mooncake"

    def _memory(self) -> list[str]:
        return ["--memory", str(self.bound / 2**30)]
