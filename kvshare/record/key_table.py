"""Maps that are small enough to remember every key of a run: millions."""

from __future__ import annotations

from array import array

MASK = 2**64 - 1
SLOTS = 2**6  # of a new table; a power of two


class KeyTable:
    """Maps 64-bit hashes to integers from 1 to 2**64 - 1; a missing one is 0.

    Two arrays with open addressing: 16 bytes a slot, 24 to 48 bytes a key. A dict takes 130.
    """

    def __init__(self) -> None:
        self._keys = array("Q", bytes(8 * SLOTS))
        self._values = array("Q", bytes(8 * SLOTS))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def get(self, key: int) -> int:
        return self._values[self._slot(key)]

    def put(self, key: int, value: int) -> None:
        slot = self._slot(key)
        if not self._values[slot]:
            self._count += 1
        self._keys[slot], self._values[slot] = key, value
        if 3 * self._count > 2 * len(self._keys):
            self._grow()

    def _slot(self, key: int) -> int:
        """Where ``key`` is, or the empty slot where it would be."""
        keys, values, last = self._keys, self._values, len(self._keys) - 1
        slot = (key ^ key >> 32) & last
        while values[slot] and keys[slot] != key:
            slot = (slot + 1) & last
        return slot

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        self._keys, self._values = array("Q", bytes(16 * len(keys))), array("Q", bytes(16 * len(keys)))
        for key, value in zip(keys, values, strict=True):
            if value:
                slot = self._slot(key)
                self._keys[slot], self._values[slot] = key, value


class RecentKeys:
    """A KeyTable that remembers the last ``most`` keys put, and up to as many older ones."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._new, self._old = KeyTable(), KeyTable()

    def get(self, key: int) -> int:
        return self._new.get(key) or self._old.get(key)

    def put(self, key: int, value: int) -> None:
        if len(self._new) >= self._most:
            self._new, self._old = KeyTable(), self._new
        self._new.put(key, value)
