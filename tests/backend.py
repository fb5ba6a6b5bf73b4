"""A real, bounded server behind a proxy that can misbehave in each way a server or a network can."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

from kvshare import services
from kvshare.errors import UserError
from kvshare.processes import Processes

HEADER, REPLY = struct.Struct("9i150s"), struct.Struct("9i")
PUT, GET = 1, 2
BOUND = 300_000_000  # bytes


class Backend:
    """``does`` says how: serve, refuse, hang, slow, drop once (then slow), truncate, flip (a bit), reverse (all
    bytes), or vanish (found, but gone when loaded)."""

    def __init__(self, processes: Processes, log: Path) -> None:
        self.does = "serve"
        self.delay = 0.05  # seconds, of each answer while it is slow
        self.asked = 0  # requests that came
        self._processes, self._log = processes, log
        self._port = services.free_port()
        self.start()
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def start(self) -> None:
        command = [sys.executable, "-m", "kvshare", "server", "127.0.0.1", str(self._port)]
        command += ["--memory", str(BOUND / 2**30)]
        self.process = self._processes.start(command, self._log)
        while True:
            assert self.process.poll() is None, self._log.read_text()
            with contextlib.suppress(UserError):
                services.check_lmcache_server(f"lm://127.0.0.1:{self._port}")
                return
            time.sleep(0.2)

    def kill(self) -> None:
        self._processes.kill(self.process)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

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
        does = self.does
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
        elif data and does == "reverse":
            data.reverse()
        elif data and does == "truncate":
            client.sendall(reply + data[: len(data) // 2])
            raise EOFError
        client.sendall(reply + data)


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return bytes(data)
