"""Records which servers have the chunks of prompts, and which request computes a chunk that others may wait for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from kvshare.routing.prefixes import Key

REMEMBERED = 100_000  # chunks


@dataclass(eq=False)
class Leader:
    """A request that computes chunks which no server has."""

    server: str
    keys: list[Key]
    stored_at: float  # when other servers can find the chunks, as expected; seconds of the event loop's clock
    outcome: asyncio.Future[bool]  # whether they can

    @property
    def policy(self) -> str:
        return self.keys[0][0]


@dataclass
class Chunk:
    servers: set[str]  # those that have it in vLLM's prefix cache, or compute it now
    leader: Leader | None  # None once it is stored


class Chunks:
    """The chunks of prompts that a server has or computes, by policy and digest."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[Key, Chunk] = OrderedDict()  # oldest first
        self._leaders: set[Leader] = set()

    def find(self, policy: str | None, digests: list[str]) -> list[Chunk]:
        """The leading chunks of a prompt that there are."""
        found = []
        for digest in digests:
            chunk = self._chunks.get((policy or "", digest))
            if chunk is None:
                break
            found.append(chunk)
        return found

    def add(self, server: str, policy: str, digests: list[str], stored_at: float) -> Leader | None:
        """Record that a server will have a prompt. Returns its leader if some of the chunks are new."""
        keys = []
        for key in ((policy, digest) for digest in digests):
            if chunk := self._chunks.get(key):
                chunk.servers.add(server)
            else:
                keys.append(key)
        if not keys:
            return None
        leader = Leader(server, keys, stored_at, asyncio.get_running_loop().create_future())
        for key in keys:
            self._chunks[key] = Chunk({server}, leader)
        while len(self._chunks) > REMEMBERED:
            self._chunks.popitem(last=False)
        self._leaders.add(leader)
        return leader

    def settle(self, leader: Leader, stored: bool) -> None:
        """End the wait for a leader's chunks, which others can find now, or which are forgotten."""
        if leader.outcome.done():
            return
        self._leaders.remove(leader)
        for key in leader.keys:
            chunk = self._chunks.get(key)
            if chunk and chunk.leader is leader:
                chunk.leader = None
                if not stored:
                    del self._chunks[key]
        leader.outcome.set_result(stored)

    def give_up(self, server: str) -> None:
        """The server is gone, or its weights change."""
        for leader in [leader for leader in self._leaders if leader.server == server]:
            self.settle(leader, False)

    def keep_policies(self, policies: Iterable[str | None]) -> None:
        """Give up the leaders of policies that no server has any more."""
        for leader in [leader for leader in self._leaders if leader.policy not in policies]:
            self.settle(leader, False)


def shares(chunks: list[Chunk]) -> dict[str, int]:
    """How many leading chunks each server has, if it has any."""
    found: dict[str, int] = {}
    for count in range(len(chunks), 0, -1):  # a server that has a chunk has those before it
        for name in chunks[count - 1].servers.difference(found):
            found[name] = count
    return found
