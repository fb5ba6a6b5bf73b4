"""Lets clients of this host and user read and write entries in the server's memory (kvshare/core/shared_memory.py)."""

from __future__ import annotations

import socket
import socketserver
from typing import Any

from kvshare.core.lm_protocol import FAIL, NO_DATA, REPLY, SUCCESS
from kvshare.core.shared_memory import COMMIT, FIND, PLACE, RESERVE, address, same_user
from kvshare.services.lm_server import Client, Listener
from kvshare.services.store import Entry, Store


class SharedServer(Listener, socketserver.ThreadingUnixStreamServer):
    def __init__(self, host: str, port: int, store: Store) -> None:
        self.store = store
        super().__init__(address(host, port), SharedClient)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return same_user(request)


class SharedClient(Client):
    """One connection. When it ends, entries that it has reserved and not committed are dropped."""

    def setup(self) -> None:
        self._reserved: dict[bytes, Entry] = {}
        socket.send_fds(self.request, [b"\0"], [self.server.store.arena.fd])

    def answer(self, command: int, key: bytes, length: int, meta: tuple[int, ...]) -> None:
        store = self.server.store
        if command == FIND:
            self._send_place(store.get(key))
        elif command == RESERVE and length > 0:
            self._reserve(key, length, meta)
        elif command == COMMIT:
            entry = self._reserved.pop(key, None)
            if entry:
                store.put(key, entry)
            self.request.sendall(REPLY.pack(SUCCESS if entry else FAIL, *NO_DATA))
        else:
            super().answer(command, key, length, meta)

    def _reserve(self, key: bytes, length: int, meta: tuple[int, ...]) -> None:
        # While a client may write to an entry, no other may get its memory: so not a second one under the same key.
        entry = None if key in self._reserved else self.server.store.reserve(length, meta)
        if entry:
            self._reserved[key] = entry
        self._send_place(entry)

    def _send_place(self, entry: Entry | None) -> None:
        if entry:
            self.request.sendall(PLACE.pack(SUCCESS, *entry.meta, entry.offset, entry.warm))
        else:
            self.request.sendall(PLACE.pack(FAIL, *NO_DATA, 0, False))
