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

from kvshare.core import lm_protocol
from kvshare.core.lm_protocol import CHECKSUM, REPLY
from kvshare.core.shared_memory import COMMIT, FIND, PLACE, RESERVE, address, same_user
from kvshare.hooks.lmcache.remote_link import Link, left
from kvshare.hooks.lmcache.remote_tcp import GETS, Allocate, Connection, batches, checked, request

PART = 1 << 20  # bytes


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


class SharedConnection(Connection):
    def __init__(self, link: Link, memory: Memory) -> None:
        super().__init__(link)
        self._memory = memory

    def close(self) -> None:
        super().close()
        del self._memory  # what an exception holds of this connection must not keep the memory of a dead server

    @classmethod
    def open(cls, host: str, port: int, deadline: float) -> Connection | None:  # type: ignore[override]
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
                yield self._read(key, place, allocate) if found else None

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
        content, hashed = _bytes(chunk), lm_protocol.hasher(key.to_string())
        for part in _parts(len(content)):
            hashed.update(content[part])
            self._memory.write(place.offset + part.start, content[part], place.warm)
        self._memory.write(place.offset + len(content), hashed.digest(), place.warm)

    def _read(self, key: Any, place: Place, allocate: Allocate) -> Any:
        """The entry may be evicted, and another written in its place, at any time. The checksum of the copy tells."""
        chunk = allocate(place.reply)
        try:
            entry = self._memory.bytes[place.offset : place.offset + place.reply.length]
            content, hashed = _bytes(chunk), lm_protocol.hasher(key.to_string())
            for part in _parts(len(content)):
                np.copyto(content[part], entry[part])
                hashed.update(content[part])
            return checked(chunk, hashed.digest() == entry[-CHECKSUM:].tobytes())
        except BaseException:
            chunk.ref_count_down()
            raise


def _bytes(chunk: Any) -> Any:
    return np.frombuffer(chunk.byte_array, np.uint8)


def _parts(length: int) -> Iterator[slice]:
    """Each is hashed while it is in the processor's cache. numpy and xxhash let other threads run meanwhile."""
    return (slice(start, min(start + PART, length)) for start in range(0, length, PART))


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
