"""Keeps entries in memory up to a limit in bytes, with LRU eviction."""

from __future__ import annotations

import mmap
import threading
from collections import OrderedDict

from kvshare.services.arena import Arena, Extent

OVERHEAD = mmap.PAGESIZE + 1024  # bytes an entry takes beside its data: rest of the last page, Python objects


class Entry:
    """The data of one PUT, in an extent of the arena.

    Its memory stays its own until the last reference to it is gone. So while an evicted entry is being sent to a
    client, it counts, and no other entry can take its place. A client that maps the arena holds no reference.

    Attributes:
        data: the memory of it.
        offset: of the data in the arena, in bytes.
        size: bytes of it that the store counts.
        warm: whether its memory was there before it.
    """

    __slots__ = ("_extent", "_store", "data", "meta", "offset", "size", "warm")

    def __init__(self, store: Store, extent: Extent, length: int, meta: tuple[int, ...]) -> None:
        self._store, self._extent, self.meta = store, extent, meta
        self.size = length + OVERHEAD
        self.offset = extent.offset
        self.data = store.arena.memory[self.offset : self.offset + length]
        self.warm = extent.resident >= self.size
        store.bytes += self.size
        store.arena.fit(extent, self.size)

    def __del__(self) -> None:
        self._store.release(self, self._extent)


class Store:
    """A thread-safe LRU store.

    Args:
        limit: bytes that all entries may take, including those being received, and memory kept for the next ones.
    """

    def __init__(self, limit: int) -> None:
        self.arena = Arena(limit)
        self.limit = limit
        self.bytes = self.evicted = self.evicted_bytes = self.refused = 0
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._lock = threading.RLock()  # re-entrant: Entry.__del__ may run while the lock is held

    def reserve(self, length: int, meta: tuple[int, ...]) -> Entry | None:
        """A new entry for ``length`` bytes, if possible in the memory of an evicted one; None if there is no room."""
        size = length + OVERHEAD
        with self._lock:
            while size <= self.limit:
                extent = self.arena.take(length)
                if self.arena.resident + size - extent.resident <= self.limit:
                    return Entry(self, extent, length, meta)
                self.arena.give_back(extent)
                if not self.arena.shrink(keep=extent) and not self._evict():
                    break
            self.refused += 1
            return None

    def _evict(self) -> bool:
        if not self._entries:
            return False
        oldest = self._entries.popitem(last=False)[1]
        self.evicted += 1
        self.evicted_bytes += oldest.size
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

    def release(self, entry: Entry, extent: Extent) -> None:
        with self._lock:
            self.bytes -= entry.size
            self.arena.give_back(extent)

    def status(self) -> dict[str, int]:
        with self._lock:
            counts = ("bytes", "limit", "evicted", "evicted_bytes", "refused")
            return {"entries": len(self._entries), **{name: getattr(self, name) for name in counts}}
