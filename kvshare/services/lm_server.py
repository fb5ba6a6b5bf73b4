"""An ``lm://`` server like ``lmcache_server``, with a memory limit and LRU eviction.

It does not subclass LMCache's server, for two reasons. That server stores an incomplete entry when a client dies in the
middle of a PUT. And importing it loads torch, whose 300 MB may exceed a small limit. Entries are opaque bytes here, so
the two messages of lmcache/v1/protocol.py are enough.
"""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import socketserver
import sys
import time
from pathlib import Path
from typing import Any

from kvshare.core.errors import UserError
from kvshare.core.lm_protocol import EXIST, FAIL, GET, HEALTH, NO_DATA, PUT, REPLY, REQUEST, SUCCESS
from kvshare.core.log_limit import LimitedLogger
from kvshare.core.ports import family, in_url
from kvshare.services.store import Store

FIRST = 1 << 14  # bytes of an entry that must have come before others are evicted for it
WASTE = memoryview(bytearray(1 << 16))  # all threads read refused data into this; nothing uses it

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each connection may repeat


def listen(host: str, port: int, store: Store, status: Path | None) -> Server:
    """Start to listen, without serving yet.

    Raises:
        UserError: cannot listen on the address, or cannot write ``status``.
    """
    try:
        server = Server((host, port), store, status)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {in_url(host)}:{port} ({reason}): give another HOST or PORT") from None
    try:
        server.write_status()
    except OSError as error:
        raise UserError(f"cannot write {status} ({error.strerror}): give --status another file") from None
    return server


class Listener(socketserver.ThreadingMixIn, socketserver.BaseServer):
    """Serves each connection in its own thread, and logs one line when one breaks."""

    store: Store
    daemon_threads = True
    request_queue_size = 128

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # too many open files: serve_forever ignores it and would spin
            time.sleep(0.1)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        host, *port = client_address[:2] or ["a client that shares memory"]
        often.info("closed the connection of %s%s: %s", host, "".join(f":{part}" for part in port), sys.exc_info()[1])


class Server(Listener, socketserver.TCPServer):
    allow_reuse_address = True  # the port can be used again right after a kill

    def __init__(self, address: tuple[str, int], store: Store, status: Path | None) -> None:
        self.store = store
        self._status_file = status
        self._written, self._written_at = "", 0.0
        self.address_family = family(address[0])
        super().__init__(address, Client)
        for level, option, value in (  # accepted connections inherit these options
            (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # detect dead clients,
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),  # within minutes
            (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        ):
            self.socket.setsockopt(level, option, value)

    def service_actions(self) -> None:
        """Write the status file once a second. serve_forever calls this at least twice a second."""
        if time.monotonic() >= self._written_at + 1:
            with contextlib.suppress(OSError):  # the server must survive a full disk
                self.write_status()

    def write_status(self) -> None:
        self._written_at = time.monotonic()
        if self._status_file and (status := json.dumps(self.store.status())) != self._written:
            partial = self._status_file.with_name(f"{self._status_file.name}.partial")
            partial.write_text(f"{status}\n")
            partial.replace(self._status_file)
            self._written = status


class Client(socketserver.BaseRequestHandler):
    """One connection, in its own thread. An error closes it, and Server.handle_error logs one line."""

    server: Listener
    request: socket.socket

    def handle(self) -> None:
        while header := self._header():
            command, length, kind, dtype, _, *shape, key = REQUEST.unpack(header)
            self.answer(command, key, length, (length, kind, dtype, *shape, 0))

    def answer(self, command: int, key: bytes, length: int, meta: tuple[int, ...]) -> None:
        if command == PUT and length > 0:
            self._put(key, length, meta)
        elif command == GET:
            self._get(key)
        elif command == EXIST:
            self.request.sendall(REPLY.pack(SUCCESS if self.server.store.get(key) else FAIL, *NO_DATA))
        elif command == HEALTH:
            self.request.sendall(REPLY.pack(SUCCESS, *NO_DATA))
        else:
            raise ValueError("the client does not speak LMCache's protocol")

    def _header(self) -> bytes:
        """Header of the next request; empty if the client has closed the connection."""
        header = self.request.recv(REQUEST.size)
        while 0 < len(header) < REQUEST.size:
            header += self._received(self.request.recv(REQUEST.size - len(header)))
        return header

    def _get(self, key: bytes) -> None:
        if entry := self.server.store.get(key):
            self.request.sendall(REPLY.pack(SUCCESS, *entry.meta))
            self.request.sendall(entry.data)
        else:
            self.request.sendall(REPLY.pack(FAIL, *NO_DATA))

    def _put(self, key: bytes, length: int, meta: tuple[int, ...]) -> None:
        """Receive an entry and store it once it is complete.

        PUT has no reply, so the server cannot refuse an entry. It reads one that does not fit, and drops it.
        """
        first = bytearray(min(length, FIRST))
        self._receive(memoryview(first))
        entry = self.server.store.reserve(length, meta)
        if entry:
            entry.data[: len(first)] = first
            self._receive(entry.data[len(first) :])
            self.server.store.put(key, entry)
        else:
            for left in range(length - len(first), 0, -len(WASTE)):
                self._receive(WASTE[:left])

    def _receive(self, into: memoryview) -> None:
        while into:
            into = into[self._received(self.request.recv_into(into)) :]

    @staticmethod
    def _received(some: Any) -> Any:
        if not some:
            raise EOFError("the client ended in the middle of a request, which is dropped")
        return some
