"""Copies entries from and to the memory of a ``kvshare server`` on this host (kvshare/core/shared_memory.py)."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
from lmcache.v1.protocol import ServerMetaMessage, ServerReturnCode

from kvshare.core.lm_protocol import REPLY
from kvshare.core.shared_memory import COMMIT, FIND, PLACE, RESERVE, address, same_user
from kvshare.hooks.lmcache import remote_entry
from kvshare.hooks.lmcache.remote_client import Allocate
from kvshare.hooks.lmcache.remote_entry import batches
from kvshare.hooks.lmcache.remote_link import Link, left
from kvshare.hooks.lmcache.remote_tcp import GETS, TCPConnection, request


class Memory:
    """The server's memory, mapped into this process. All connections to a server use one mapping of it."""

    _mapped: ClassVar[WeakValueDictionary[tuple[int, int], Memory]] = WeakValueDictionary()  # by device and inode

    @classmethod
    def of(cls, fd: int) -> Memory:
        """Takes ``fd`` over."""
        status = os.fstat(fd)
        file = status.st_dev, status.st_ino
        memory = cls._mapped.get(file)
        if memory:
            os.close(fd)
        else:
            memory = cls._mapped[file] = cls(fd, status.st_size)
        return memory

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.bytes = np.frombuffer(mmap.mmap(fd, size), np.uint8)

    def __del__(self) -> None:
        os.close(self._fd)

    def write(self, offset: int, data: Any, warm: bool) -> None:
        """``warm``: the pages are allocated. If they are not, a system call is twice as fast as the mapping."""
        if warm:
            np.copyto(self.bytes[offset : offset + len(data)], np.frombuffer(data, np.uint8))
        else:
            os.pwrite(self._fd, data, offset)


class Place(NamedTuple):
    """Where an entry is.

    Attributes:
        reply: the server's reply; its code says whether there is such an entry.
        offset: bytes.
        warm: whether its pages are allocated.
    """

    reply: ServerMetaMessage
    offset: int
    warm: bool


class SharedConnection(TCPConnection):
    def __init__(self, link: Link, memory: Memory) -> None:
        super().__init__(link)
        self._memory = memory

    def close(self) -> None:
        super().close()
        del self._memory  # what an exception holds of this connection must not keep the memory of a dead server

    @classmethod
    def open(cls, host: str, port: int, deadline: float) -> SharedConnection | None:  # type: ignore[override]
        """None if no server of this host and user listens on ``host:port``, or its memory cannot be mapped."""
        connected = _connect(host, port, deadline)
        if connected is None:
            return None
        _, fds, _, _ = socket.recv_fds(connected, 1, 1)
        if not fds:
            raise ConnectionError("the server closed the connection")
        try:
            return cls(Link(connected, deadline), Memory.of(fds[0]))
        except OSError:  # e.g. a limit of the address space (ulimit -v)
            return None

    def get(self, keys: Sequence[Any], allocate: Allocate) -> Iterator[Any]:
        for some in batches(keys, GETS):
            self.link.send(b"".join(request(FIND, key) for key in some))
            for key, place in zip(some, self._places(len(some)), strict=True):
                left(self.link.deadline)
                found = place.reply.code == ServerReturnCode.SUCCESS
                yield self._copy(key, allocate(place.reply), place) if found else None

    def put(self, keys: Sequence[Any], chunks: Sequence[Any]) -> list[bool]:
        self.link.send(b"".join(request(RESERVE, key, chunk) for key, chunk in zip(keys, chunks, strict=True)))
        for key, chunk, place in zip(keys, chunks, self._places(len(keys)), strict=True):
            if place.reply.code == ServerReturnCode.SUCCESS:
                self._write(key, chunk, place)
        self.link.send(b"".join(request(COMMIT, key) for key in keys))
        return [reply.code == ServerReturnCode.SUCCESS for reply in self._replies(len(keys))]

    def _expect_small_replies(self) -> None:
        """A Unix socket acknowledges nothing."""

    def _places(self, count: int) -> list[Place]:
        data = bytearray(count * PLACE.size)
        self.link.receive(data)
        return [
            Place(ServerMetaMessage.deserialize(data[start : start + REPLY.size]), *PLACE.unpack_from(data, start)[-2:])
            for start in range(0, len(data), PLACE.size)
        ]

    def _write(self, key: Any, chunk: Any, place: Place) -> None:
        remote_entry.write(key, chunk, lambda start, part: self._memory.write(place.offset + start, part, place.warm))

    def _copy(self, key: Any, chunk: Any, place: Place) -> Any:
        """The entry may be evicted, and another written in its place, at any time. The checksum of the copy tells."""
        entry = self._memory.bytes[place.offset : place.offset + place.reply.length]
        return remote_entry.read(key, chunk, lambda start, part: np.copyto(part, entry[start : start + len(part)]))


def _connect(host: str, port: int, deadline: float) -> socket.socket | None:
    for family, *_, (resolved, *_) in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        if not _is_this_host(family, str(resolved)):
            continue
        for listens_on in (str(resolved), "::" if family == socket.AF_INET6 else "0.0.0.0"):
            connected = socket.socket(socket.AF_UNIX)
            connected.settimeout(left(deadline))
            with contextlib.suppress(ConnectionRefusedError):
                connected.connect(address(listens_on, port))
                return connected if same_user(connected) else None
    return None


def _is_this_host(family: int, host: str) -> bool:
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
        return True
