"""Requests for many entries at a time over one ``lm://`` connection.

A server answers the requests of a connection in order, LMCache's own, too. So requests are sent ahead of their answers:
a lookup of a prompt takes one round trip, and while one entry is checked, the next one is on its way.

The content of an entry is sent and received whole. In parts of 1 MB, hashed in between, puts and gets were a fifth to a
third slower on a busy machine.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode

from kvshare.core.lm_protocol import CHECKSUM, EXIST, GET, HEALTH_REQUEST, PUT
from kvshare.hooks.lmcache import remote_entry
from kvshare.hooks.lmcache.remote_client import Allocate
from kvshare.hooks.lmcache.remote_entry import batches
from kvshare.hooks.lmcache.remote_link import Link, left

LOOKUPS = 256  # requests ahead of their answers: both must fit into the buffers of the sockets
GETS = 16

_COMMAND = struct.Struct("i")
_NO_DATA = MemoryFormat(1), torch.float16, torch.Size([0, 0, 0, 0])


class TCPConnection:
    """A Connection of remote_client.py."""

    def __init__(self, link: Link) -> None:
        self.link = link

    @classmethod
    def open(cls, host: str, port: int, deadline: float) -> TCPConnection:
        connected = socket.create_connection((host, port), timeout=left(deadline))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(Link(connected, deadline))

    @property
    def deadline(self) -> float:
        return self.link.deadline

    @deadline.setter
    def deadline(self, deadline: float) -> None:
        self.link.deadline = deadline

    def close(self) -> None:
        self.link.close()

    def check(self) -> None:
        self.link.send(HEALTH_REQUEST)
        self._replies(1)

    def has(self, keys: Sequence[Any]) -> list[bool]:
        found = []
        for some in batches(keys, LOOKUPS):
            self.link.send(b"".join(request(EXIST, key) for key in some))
            self._expect_small_replies()
            found += [reply.code == ServerReturnCode.SUCCESS for reply in self._replies(len(some))]
        return found

    def get(self, keys: Sequence[Any], allocate: Allocate) -> Iterator[Any]:
        for some in batches(keys, GETS):
            self.link.send(b"".join(request(GET, key) for key in some))
            for key in some:
                (reply,) = self._replies(1)
                yield self._read(key, allocate(reply)) if reply.code == ServerReturnCode.SUCCESS else None

    def put(self, keys: Sequence[Any], chunks: Sequence[Any]) -> list[bool]:
        """The server does not answer a PUT, so it is asked after all of them."""
        for key, chunk in zip(keys, chunks, strict=True):
            self.link.send(request(PUT, key, chunk))
            remote_entry.write(key, chunk, lambda _, part: self.link.send(part), whole=True)
        return self.has(keys)

    def _read(self, key: Any, chunk: Any) -> Any:
        return remote_entry.read(key, chunk, lambda _, part: self.link.receive(part), whole=True)

    def _expect_small_replies(self) -> None:
        """LMCache's server waits for the acknowledgement of one before it sends the next: acknowledge at once."""
        self.link.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _replies(self, count: int) -> list[ServerMetaMessage]:
        size = ServerMetaMessage.packlength()
        data = bytearray(count * size)
        self.link.receive(data)
        return [ServerMetaMessage.deserialize(data[start : start + size]) for start in range(0, len(data), size)]


def request(command: int, key: Any, chunk: Any = None) -> bytes:
    """A request for an entry; ``chunk`` is the memory object to store, if any."""
    length, meta = 0, _NO_DATA
    if chunk is not None:
        length = len(chunk.byte_array) + CHECKSUM
        meta = chunk.get_memory_format(), chunk.get_dtype(), chunk.get_shape()
    message = ClientMetaMessage(ClientCommand.PUT, key, length, *meta).serialize()
    return _COMMAND.pack(command) + message[_COMMAND.size :]
