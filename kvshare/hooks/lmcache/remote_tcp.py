"""Requests for many entries at a time over one ``lm://`` connection.

A server answers the requests of a connection in order, LMCache's own, too. So requests are sent ahead of their answers:
a lookup of a prompt takes one round trip, and while one entry is checked, the next one is on its way.
"""

from __future__ import annotations

import logging
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lmcache.v1.memory_management import MemoryFormat
from lmcache.v1.protocol import ClientCommand, ClientMetaMessage, ServerMetaMessage, ServerReturnCode

from kvshare.core import lm_protocol
from kvshare.core.lm_protocol import CHECKSUM, EXIST, GET, HEALTH_REQUEST, PUT
from kvshare.core.log_limit import LimitedLogger
from kvshare.hooks.lmcache.remote_link import Link, left

often = LimitedLogger(logging.getLogger(__name__))  # for what each entry may repeat

Allocate = Callable[[ServerMetaMessage], Any]
"""Returns memory for the entry of a reply. Raises MemoryError if there is none."""

LOOKUPS = 256  # requests ahead of their answers: both must fit into the buffers of the sockets
GETS = 16

_COMMAND = struct.Struct("i")
_NO_DATA = MemoryFormat(1), torch.float16, torch.Size([0, 0, 0, 0])


class Connection:
    """Used by one thread at a time. After an exception it must be closed.

    Each method raises OSError if the server has gone, or does not answer before ``link.deadline``.
    """

    def __init__(self, link: Link) -> None:
        self.link = link

    @classmethod
    def open(cls, host: str, port: int, deadline: float) -> Connection:
        connected = socket.create_connection((host, port), timeout=left(deadline))
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(Link(connected, deadline))

    def close(self) -> None:
        self.link.close()

    def check(self) -> None:
        """Return when the server has answered that it is healthy."""
        self.link.send(HEALTH_REQUEST)
        self._replies(1)

    def has(self, keys: Sequence[Any]) -> list[bool]:
        """Whether the server has each entry."""
        found = []
        for some in batches(keys, LOOKUPS):
            self.link.send(b"".join(request(EXIST, key) for key in some))
            self._expect_small_replies()
            found += [reply.code == ServerReturnCode.SUCCESS for reply in self._replies(len(some))]
        return found

    def get(self, keys: Sequence[Any], allocate: Allocate) -> Iterator[Any]:
        """The memory object of each entry; None for those that the server lacks or whose checksum is wrong."""
        for some in batches(keys, GETS):
            self.link.send(b"".join(request(GET, key) for key in some))
            for key in some:
                (reply,) = self._replies(1)
                yield self._receive(key, reply, allocate) if reply.code == ServerReturnCode.SUCCESS else None

    def put(self, keys: Sequence[Any], chunks: Sequence[Any]) -> list[bool]:
        """Whether the server keeps each entry. It does not answer a PUT, so it is asked after all of them."""
        for key, chunk in zip(keys, chunks, strict=True):
            data = chunk.byte_array
            self.link.send(request(PUT, key, chunk))
            self.link.send(data)
            self.link.send(lm_protocol.checksum(key.to_string(), data))
        return self.has(keys)

    def _expect_small_replies(self) -> None:
        """LMCache's server waits for the acknowledgement of one before it sends the next: acknowledge at once."""
        self.link.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)

    def _replies(self, count: int) -> list[ServerMetaMessage]:
        size = ServerMetaMessage.packlength()
        data = bytearray(count * size)
        self.link.receive(data)
        return [ServerMetaMessage.deserialize(data[start : start + size]) for start in range(0, len(data), size)]

    def _receive(self, key: Any, reply: ServerMetaMessage, allocate: Allocate) -> Any:
        chunk = allocate(reply)
        checksum = bytearray(CHECKSUM)
        try:
            self.link.receive(chunk.byte_array)
            self.link.receive(checksum)
        except BaseException:
            chunk.ref_count_down()
            raise
        return checked(chunk, checksum == lm_protocol.checksum(key.to_string(), chunk.byte_array))


def checked(chunk: Any, is_right: bool) -> Any:
    """``chunk`` if its checksum is right. If not, it is freed, and the result is None."""
    if is_right:
        return chunk
    often.error("an entry is not what was stored (damaged, or evicted while it was read): its KV is recomputed")
    chunk.ref_count_down()
    return None


def request(command: int, key: Any, chunk: Any = None) -> bytes:
    """A request for an entry; ``chunk`` is the memory object to store, if any."""
    length, meta = 0, _NO_DATA
    if chunk is not None:
        length = len(chunk.byte_array) + CHECKSUM
        meta = chunk.get_memory_format(), chunk.get_dtype(), chunk.get_shape()
    message = ClientMetaMessage(ClientCommand.PUT, key, length, *meta).serialize()
    return _COMMAND.pack(command) + message[_COMMAND.size :]


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[start : start + size] for start in range(0, len(items), size))
