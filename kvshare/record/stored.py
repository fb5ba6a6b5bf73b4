"""Remembers who stored each key of a run, in little memory, and tells from where a load came. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kvshare.record.events import Load, Store
from kvshare.record.key_table import MASK, KeyTable

POLICY = 2**32 - 2  # bits of a policy's hash
SEVERAL = 2**32 - 1  # in place of a policy
SET = 2**32 - 1  # bits of a set's index


@dataclass(slots=True)
class Hits:
    """Loaded tokens by where their KV came from."""

    local: int = 0
    shared: int = 0
    unknown: int = 0
    stale: int = 0
    by_weights: int = 0  # stale, seen by the checksum of the weights
    kept: int = 0


class Table(Protocol):
    def get(self, key: int) -> int: ...
    def put(self, key: int, value: int) -> None: ...


class Stored:
    """Remembers who stored each key: which replicas, under which policies, with which weights.

    A value of the table is a policy's hash of 32 bits, and the index of a set of replicas with a hash of their weights.
    A key that was stored under several policies has SEVERAL there and all its replicas. Each of its policies then has
    an entry at a key of its own. Several weights are SEVERAL, too.

    Args:
        table: KeyTable to remember all keys, RecentKeys to remember some.
    """

    def __init__(self, table: Table | None = None) -> None:
        self._table = table if table is not None else KeyTable()
        self._sets = [(0, 0)]  # bit r of the first: replica r; the second: hash of the weights
        self._index = {(0, 0): 0}
        self._stored = self._distinct = 0  # chunks; the same chunk under another policy is another one

    def add(self, store: Store) -> None:
        policy, weights, replica = hash(store.policy) & POLICY, hash(store.weights) & POLICY, 1 << store.replica
        for key in store.keys:
            self._add(key & MASK, policy, weights, replica)

    def _add(self, key: int, policy: int, weights: int, replica: int) -> None:
        value = self._table.get(key)
        known, (replicas, by) = value >> 32, self._sets[value & SET]
        if replicas and known != policy:
            if known != SEVERAL:
                self._table.put(_key_of(key, known), value)
            self._put(key, SEVERAL, replicas | replica, weights if by == weights else SEVERAL)
            key = _key_of(key, policy)
            replicas, by = self._sets[self._table.get(key) & SET]
        self._distinct += not replicas
        self._stored += not replicas & replica
        self._put(key, policy, replicas | replica, weights if by == weights or not replicas else SEVERAL)

    def _put(self, key: int, policy: int, replicas: int, weights: int) -> None:
        if (index := self._index.setdefault((replicas, weights), len(self._sets))) == len(self._sets):
            self._sets.append((replicas, weights))
        self._table.put(key, policy << 32 | index)

    def hits(self, load: Load) -> Hits:
        found = Hits()
        own, weights, replica = hash(load.policy) & POLICY, hash(load.weights) & POLICY, 1 << load.replica
        for key, tokens in zip(load.keys, load.tokens, strict=True):
            value = self._table.get(key & MASK)
            replicas, by = self._sets[value & SET]
            if replicas & replica:
                found.local += tokens
            elif replicas:
                found.shared += tokens
            else:
                found.unknown += tokens
            if replicas and value >> 32 != own:
                found.stale += tokens
            if load.kept:
                found.kept += tokens
            elif replicas and by != weights:
                found.by_weights += tokens
        return found

    def amplification(self) -> float | None:
        """Prefill amplification: chunks computed by all replicas, divided by distinct chunks.

        1.0 means perfect sharing, R with R replicas means none. None if no prompt filled a chunk.
        """
        return round(self._stored / self._distinct, 3) if self._distinct else None

    def forget(self) -> None:
        """Forget the keys; the counts of chunks stay."""
        self._table = KeyTable()

    def merge(self, other: Stored) -> None:
        """Add the counts of chunks of another one, whose keys are different ones."""
        self._stored += other._stored
        self._distinct += other._distinct


def _key_of(key: int, policy: int) -> int:
    """A key for one policy of a key that has several."""
    return (key ^ (policy + 1) * 0x9E3779B97F4A7C15) & MASK
