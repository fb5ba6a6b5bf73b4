"""An ``lm://`` server like ``lmcache_server``, with a memory limit and LRU eviction.

It does not subclass LMCache's server, for two reasons. That server stores an incomplete entry when a client dies in the
middle of a PUT. And importing it loads torch, whose 300 MB may exceed a small limit. Entries are opaque bytes here, so
the two messages of lmcache/v1/protocol.py are enough.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import os
import signal
import socket
import socketserver
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from kvshare.core.errors import UserError
from kvshare.core.lm_protocol import EXIST, FAIL, GET, HEALTH, NO_DATA, PUT, REPLY, REQUEST, SUCCESS
from kvshare.core.log_limit import LimitedLogger
from kvshare.core.ports import family, in_url
from kvshare.services.store import Store

PIECE = 1 << 20  # bytes received before they are added to the store's count
WASTE = memoryview(bytearray(1 << 16))  # all threads read refused data into this; nothing uses it

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each connection may repeat


def serve(host: str, port: int, limit: int, status: Path | None) -> NoReturn:
    """Serve until SIGINT or SIGTERM, then exit with code 0.

    Raises:
        UserError: cannot listen on the address, or cannot write ``status``.
    """
    logging.basicConfig(format="kvshare server: %(message)s", level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    server = _listen(host, port, Store(limit), status)
    address, port = server.socket.getsockname()[:2]
    logger.info("listening on %s:%s, keeps at most %.2f GiB", in_url(address), port, limit / 2**30)
    if not ipaddress.ip_address(address).is_loopback:
        logger.warning("warning: other hosts can reach %s, and lm:// has no authentication", address)
    with contextlib.suppress(SystemExit):
        server.serve_forever()
    with contextlib.suppress(OSError):
        server.write_status()
    logger.info("ended, %s", ", ".join(f"{name} {count}" for name, count in server.store.status().items()))
    sys.stderr.flush()
    os._exit(0)  # a normal exit could wait forever for locks that client threads hold


def _listen(host: str, port: int, store: Store, status: Path | None) -> Server:
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


def _end(*_: Any) -> NoReturn:
    raise SystemExit


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True  # the port can be used again right after a kill
    request_queue_size = 128

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

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # too many open files: serve_forever ignores it and would spin
            time.sleep(0.1)
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        often.info("closed the connection of %s:%s: %s", *client_address[:2], sys.exc_info()[1])

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

    server: Server
    request: socket.socket

    def handle(self) -> None:
        store = self.server.store
        while header := self._header():
            command, length, kind, dtype, _, *shape, key = REQUEST.unpack(header)
            if command == PUT and length > 0:
                self._put(key, length, (length, kind, dtype, *shape, 0))
            elif command == GET:
                self._get(key)
            elif command == EXIST:
                self.request.sendall(REPLY.pack(SUCCESS if store.get(key) else FAIL, *NO_DATA))
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
        store = self.server.store
        entry = store.begin(length, meta)
        left = length
        while left:
            into = memoryview(entry.data)[length - left :][:PIECE] if entry else WASTE[:left]
            count = self._received(self.request.recv_into(into))
            left -= count
            if entry and not store.grow(entry, count):
                entry = None
        if entry:
            store.put(key, entry)
        else:
            store.refuse()

    @staticmethod
    def _received(some: Any) -> Any:
        if not some:
            raise EOFError("the client ended in the middle of a request, which is dropped")
        return some
