"""Entries in memory, at most so many bytes of them; the least recently used go first."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict

OVERHEAD = mmap.PAGESIZE + 1024  # of an entry: the rest of its last page, and what Python keeps for it


class Entry:
    """What one PUT brings, in a memory mapping of its own.

    A mapping costs what has been written to it, however long the client said it would be, and goes back to the
    system at once. malloc keeps what is freed for the next entry of that size, and a bytearray is filled when made.

    An entry counts until its memory is really free: evicted while a slow client is still being sent it, it is not.
    """

    __slots__ = ("_store", "data", "meta", "size")

    def __init__(self, store: Store, length: int, meta: tuple[int, ...]) -> None:
        self._store, self.meta = store, meta
        self.size = 0  # bytes counted for it
        self.data = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __del__(self) -> None:
        self._store.count(-self.size)


class Store:
    """Thread-safe.

    Args:
        limit: bytes that all entries may take, those that are being received included.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = self.evicted = self.evicted_bytes = self.refused = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._lock = threading.RLock()  # re-entrant: the last reference to an entry may go while it is held

    def begin(self, length: int, meta: tuple[int, ...]) -> Entry | None:
        """An entry to receive ``length`` bytes in; None if it can never fit."""
        if length + OVERHEAD > self.limit:
            return None
        entry = Entry(self, length, meta)
        return entry if self.grow(entry, OVERHEAD) else None

    def grow(self, entry: Entry, size: int) -> bool:
        """Count ``size`` more bytes for an entry, evicting others; False if all that is left is in use."""
        with self._lock:
            while self.bytes + size > self.limit and self._entries:
                oldest = self._entries.popitem(last=False)[1]
                self.evicted += 1
                self.evicted_bytes += oldest.size
                del oldest  # frees it, unless it is being sent
            if self.bytes + size > self.limit:
                return False
            entry.size += size
            self.count(size)
            return True

    def put(self, key: bytes, entry: Entry) -> None:
        with self._lock:
            self._entries[key] = entry
            self._entries.move_to_end(key)

    def get(self, key: bytes) -> Entry | None:
        with self._lock:
            if entry := self._entries.get(key):
                self._entries.move_to_end(key)
            return entry

    def refuse(self) -> None:
        with self._lock:
            self.refused += 1

    def count(self, size: int) -> None:
        with self._lock:
            self.bytes += size

    def status(self) -> dict[str, int]:
        with self._lock:
            counts = ("bytes", "limit", "evicted", "evicted_bytes", "refused")
            return {"entries": len(self._entries), **{name: getattr(self, name) for name in counts}}
