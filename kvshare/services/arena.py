"""The memory of the store: one file in memory, which clients of this host can map.

The file is sparse and far larger than any store. It takes memory for the pages that were written, and no others.
"""

from __future__ import annotations

import mmap
import os
from collections import defaultdict

SPACE = 64
"""Bytes of addresses for each byte of the limit.

They cannot run out. There are fewer than 32 capacities, and the extents of one capacity have at most twice the limit,
since more than half of each was once in use.
"""


class Extent:
    """A part of the file for one entry at a time.

    Attributes:
        offset: in bytes.
        capacity: bytes, a power of two, so that entries of similar length can follow each other in it.
        resident: bytes of memory that it takes at most.
    """

    __slots__ = ("capacity", "offset", "resident")

    def __init__(self, offset: int, capacity: int) -> None:
        self.offset, self.capacity, self.resident = offset, capacity, 0


class Arena:
    """Extents, used and unused. Not thread-safe: the store has a lock.

    The memory of an evicted entry is best given to the next one as it is. The first write to a page takes five times as
    long as later ones: the system allocates the page, clears it, and maps it into each process that uses it.
    """

    def __init__(self, limit: int) -> None:
        self.fd = os.memfd_create("kvshare server")
        space = SPACE * max(limit, mmap.PAGESIZE)
        os.ftruncate(self.fd, space)
        self._map = mmap.mmap(self.fd, space)
        self.memory = memoryview(self._map)
        self.resident = 0  # bytes of all extents, also of those that nobody uses
        self._end = 0
        self._spare: defaultdict[int, list[Extent]] = defaultdict(list)  # by capacity
        self._empty: defaultdict[int, list[Extent]] = defaultdict(list)  # those of them that take no memory

    def take(self, length: int) -> Extent:
        """An extent for ``length`` bytes, if possible one that has memory."""
        capacity = _capacity(length)
        for extents in (self._spare[capacity], self._empty[capacity]):
            if extents:
                return extents.pop()
        self._end += capacity
        return Extent(self._end - capacity, capacity)

    def give_back(self, extent: Extent) -> None:
        (self._spare if extent.resident else self._empty)[extent.capacity].append(extent)

    def fit(self, extent: Extent, size: int) -> None:
        """Count ``size`` bytes for ``extent``, and give what it has more of back to the system."""
        end = size // mmap.PAGESIZE * mmap.PAGESIZE
        if size < extent.resident and end < extent.capacity:
            self._map.madvise(mmap.MADV_REMOVE, extent.offset + end, extent.capacity - end)
        self.resident += size - extent.resident
        extent.resident = size

    def shrink(self, keep: Extent) -> bool:
        """Give the memory of an unused extent other than ``keep`` back to the system; False if there is none."""
        for extents in self._spare.values():
            for extent in extents:
                if extent is not keep:
                    extents.remove(extent)
                    self.fit(extent, 0)
                    self.give_back(extent)
                    return True
        return False


def _capacity(length: int) -> int:
    return 1 << (max(length, mmap.PAGESIZE) - 1).bit_length()
