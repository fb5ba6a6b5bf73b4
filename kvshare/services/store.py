"""Keeps entries in memory up to a limit in bytes, with LRU eviction."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict

OVERHEAD = mmap.PAGESIZE + 1024  # bytes an entry takes beside its data: rest of the last page, Python objects


class Entry:
    """The data of one PUT, in its own memory mapping.

    A mapping only takes memory for the bytes written to it, and returns it to the system at once. A bytearray would
    take its full length from the start, and malloc may keep freed memory.

    An entry counts until its memory is free. An evicted entry that is still being sent to a client still counts.
    """

    __slots__ = ("_store", "data", "meta", "size")

    def __init__(self, store: Store, length: int, meta: tuple[int, ...]) -> None:
        self._store, self.meta = store, meta
        self.size = 0  # bytes of it that the store counts
        self.data = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    def __del__(self) -> None:
        self._store.count(-self.size)


class Store:
    """A thread-safe LRU store.

    Args:
        limit: bytes that all entries may take, including those being received.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = self.evicted = self.evicted_bytes = self.refused = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._lock = threading.RLock()  # re-entrant: Entry.__del__ may run while the lock is held

    def begin(self, length: int, meta: tuple[int, ...]) -> Entry | None:
        """A new entry that can receive ``length`` bytes; None if there is no room for it."""
        if length + OVERHEAD > self.limit:
            return None
        entry = Entry(self, length, meta)
        return entry if self.grow(entry, OVERHEAD) else None

    def grow(self, entry: Entry, size: int) -> bool:
        """Count ``size`` more bytes for an entry and evict others if needed; False if nothing more can be evicted."""
        with self._lock:
            while self.bytes + size > self.limit and self._entries:
                oldest = self._entries.popitem(last=False)[1]
                self.evicted += 1
                self.evicted_bytes += oldest.size
                del oldest  # frees its memory, unless it is being sent
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
