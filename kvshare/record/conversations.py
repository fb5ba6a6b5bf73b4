"""Counts what the turns of conversations computed again, given the events of a record. No I/O.

A turn's prompt repeats the whole conversation so far. An engine has computed the KV of all these tokens but the last
one. The other tokens of the prompt are *new*. What a turn computes beyond them is computed *again*: its KV had been
evicted, or was on another replica, and was not loaded. After an update of the weights all tokens are new.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field
from typing import Any

from cachetools import LRUCache

from kvshare.core import conversation
from kvshare.record.events import ABORT, Event, Load, Request
from kvshare.record.stored import Hits
from kvshare.record.token_sources import Count

REMEMBERED = 100_000  # conversations, and loads of requests that have not ended
MOST_TURNS = 64  # rows; the last one has all later turns


@dataclass
class Last:
    """The last request of a conversation.

    Args:
        context: tokens whose KV was computed.
        turn: number of the turn, from 1.
    """

    replica: int
    policy: str
    context: int
    turn: int
    aborted: bool


@dataclass
class Again:
    """Requests that continued what another one had begun under the same policy.

    Args:
        before: tokens whose KV had been computed before.
        here: those of them that the engine's own prefix cache had.
        again: those of them that were computed again. The others were loaded.
        with_kv: requests that computed less than half of them again.
    """

    requests: int = 0
    before: int = 0
    here: int = 0
    again: int = 0
    with_kv: int = 0

    def add(self, before: int, here: int, again: int) -> None:
        self.requests += 1
        self.before += before
        self.here += min(here, before)
        self.again += again
        self.with_kv += 2 * again < before


@dataclass
class Turn:
    count: Count = field(default_factory=Count)
    requests: int = 0
    new: int = 0

    def to_dict(self, number: int) -> dict[str, Any]:
        return {"turn": number, "requests": self.requests, "new": self.new, **self.count.tokens()}


class Conversations:
    def __init__(self) -> None:
        self._last: LRUCache = LRUCache(REMEMBERED)  # conversation -> Last
        self._loads: LRUCache = LRUCache(REMEMBERED)  # request -> Count of its loads
        self._turns: defaultdict[int, Turn] = defaultdict(Turn)
        self._stayed = Again()
        self._moved = Again()  # to another replica
        self._interrupted = Again()  # went on after an abort, and either stayed or moved

    def add(self, event: Event, hits: Hits | None) -> None:
        """Add an event. A request's loads come before it. ``hits`` are those of a load."""
        if isinstance(event, Load) and hits is not None and event.request:
            self._loads.setdefault(event.request, Count()).load(event, hits)
        elif isinstance(event, Request) and (talk := conversation.of(event.request)):
            count = self._loads.pop(event.request, Count())
            if event.computed:
                count.request(event)
                self._last[talk] = self._request(event, count, self._last.get(talk))
            elif talk in self._last:
                self._last[talk].aborted = True

    def _request(self, event: Request, count: Count, last: Last | None) -> Last:
        tokens, before, number = count.tokens(), 0, 1
        if last:
            number = last.turn + (not last.aborted)
            before = min(last.context, event.prompt) if last.policy == event.policy else 0
        new = event.prompt - before
        if last and before:
            went = self._stayed if last.replica == event.replica else self._moved
            for kind in (went, self._interrupted) if last.aborted else (went,):
                kind.add(before, tokens["local_hit"], max(0, tokens["computed"] - new))
        turn = self._turns[min(number, MOST_TURNS)]
        turn.count, turn.requests, turn.new = turn.count + count, turn.requests + 1, turn.new + new
        context = event.prompt + max(0, event.generated - 1)
        return Last(event.replica, event.policy, context, number, event.finish == ABORT)

    def amplification(self) -> float | None:
        """Tokens that turns after the first computed, over those that were new. 1.0 means that none came again."""
        later = [turn for number, turn in self._turns.items() if number > 1]
        new = sum(turn.new for turn in later)
        return round(sum(turn.count.tokens()["computed"] for turn in later) / new, 3) if new else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "amplification": self.amplification(),
            "stayed": asdict(self._stayed),
            "moved": asdict(self._moved),
            "interrupted": asdict(self._interrupted),
            "turn": [turn.to_dict(number) for number, turn in sorted(self._turns.items())],
        }
