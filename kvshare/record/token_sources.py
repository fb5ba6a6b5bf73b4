"""Counts where prompt tokens came from, given the events of a record (see events.py). No I/O.

``prompt`` = ``computed`` + ``local_hit`` + ``restored_hit`` + ``shared_hit`` + ``unknown_hit``:

* ``local_hit``: from vLLM's prefix cache;
* ``restored_hit``: loaded after the same replica stored them, because vLLM's prefix cache had evicted them;
* ``shared_hit``: loaded after another replica stored them;
* ``unknown_hit``: loaded, with no store in the record.

Stale tokens are counted twice, in ways that do not know of each other:

* ``stale_hit``: loaded tokens whose key was also stored under another policy id;
* ``stale_hit_by_weights``: loaded tokens whose key was also stored by weights with another checksum, and tokens of
  vLLM's prefix cache that were computed before a weight update.

``kept_hit`` counts the loaded tokens that a conversation keeps of an earlier policy (``core.freshness``, trajectory).
They are not stale.

Events are read twice, first for what was stored, then for the counts: the clocks of hosts differ, so the time of a load
may be before that of its store. The metrics of a step and the report use the same classes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from kvshare.record.events import Event, Load, Request, StalePrefix, Store
from kvshare.record.stored import Hits, Stored

SOURCES = ("computed", "local_hit", "restored_hit", "shared_hit", "unknown_hit")
REMEMBERED_LOADS = 50_000


@dataclass(slots=True)
class Count:
    """Sums over events: of a step, a replica or a policy."""

    prompt: int = 0
    cached: int = 0
    expected: int = 0
    local: int = 0
    shared: int = 0
    unknown: int = 0
    stale: int = 0
    by_weights: int = 0
    kept: int = 0
    seconds: float = 0.0  # of loads

    def request(self, request: Request) -> None:
        if request.computed:
            self.prompt += request.prompt
            self.cached += request.cached

    def load(self, load: Load, hits: Hits) -> None:
        self.expected += load.expected
        self.seconds += load.seconds
        self.local += hits.local
        self.shared += hits.shared
        self.unknown += hits.unknown
        self.stale += hits.stale
        self.by_weights += hits.by_weights
        self.kept += hits.kept

    def __add__(self, other: Count) -> Count:
        return Count(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(Count)))

    def tokens(self) -> dict[str, int]:
        """Prompt tokens by source, and stale ones."""
        # vLLM's cached tokens include those it expected LMCache to load, even if the load failed.
        local = max(0, self.cached - self.expected)
        return {
            "prompt": self.prompt,
            "computed": max(0, self.prompt - local - self.local - self.shared - self.unknown),
            "local_hit": local,
            "restored_hit": self.local,
            "shared_hit": self.shared,
            "unknown_hit": self.unknown,
            "stale_hit": self.stale,
            "stale_hit_by_weights": self.by_weights,
            "kept_hit": self.kept,
        }

    def hit_rate(self) -> float | None:
        """Fraction of prompt tokens that were not computed, 0 to 1; None without prompts."""
        return 1 - self.tokens()["computed"] / self.prompt if self.prompt else None

    def time_saved(self, prefill: float | None) -> float | None:
        """Seconds that loading saved, added up over all engines; negative if loading was slower than computing.

        This is the time to compute the loaded tokens at ``prefill``, minus the time to load them. Replicas load at the
        same time, so the makespan shrinks by at most this sum divided by the number of replicas that loaded together.

        Args:
            prefill: prefill rate in tokens per second; None if it is not known. The fastest seen makes the result a
                lower bound.
        """
        return (self.local + self.shared + self.unknown) / prefill - self.seconds if prefill else None


def stale(tokens: dict[str, int]) -> int:
    """Stale tokens by whichever count saw more."""
    return max(tokens["stale_hit"], tokens["stale_hit_by_weights"])


class Counts:
    """The counts of each replica."""

    def __init__(self) -> None:
        self._counts: defaultdict[int, Count] = defaultdict(Count)
        self._generated: defaultdict[int, int] = defaultdict(int)  # tokens by versions of the weights

    def add(self, event: Event, hits: Hits | None) -> None:
        """``hits``: those of a load, as ``Stored.hits`` found them."""
        if isinstance(event, Request):
            self._counts[event.replica].request(event)
            self._generated[event.versions] += event.generated
        elif isinstance(event, StalePrefix):
            self._counts[event.replica].by_weights += event.tokens
        elif isinstance(event, Load) and hits is not None:
            self._counts[event.replica].load(event, hits)

    def count(self) -> Count:
        """Of all replicas."""
        return sum(self._counts.values(), Count())

    def generated(self) -> dict[str, int]:
        """Generated tokens by the number of versions of the weights that their KV may come from."""
        return {str(versions): tokens for versions, tokens in sorted(self._generated.items())}

    def by_replica(self, replicas: int) -> list[dict[str, int]]:
        return [{"rank": rank, **self._counts.get(rank, Count()).tokens()} for rank in range(replicas)]


class Sharing(Counts):
    """The counts of each replica, and the chunks that were stored: of a step or a policy."""

    def __init__(self) -> None:
        super().__init__()
        self._stored = Stored()

    def add(self, event: Event, hits: Hits | None) -> None:
        if isinstance(event, Store):
            self._stored.add(event)
        else:
            super().add(event, hits)

    def ratios(self) -> dict[str, float | None]:
        return {"hit_rate": self.count().hit_rate(), "prefill_amplification": self._stored.amplification()}

    def to_dict(self) -> dict[str, Any]:
        return {**self.count().tokens(), **self.ratios()}

    def forget(self) -> None:
        """Keep the counts only. No more events are expected, and the keys take memory."""
        self._stored.forget()

    def merge(self, other: Sharing) -> None:
        self._stored.merge(other._stored)
        for rank, count in other._counts.items():
            self._counts[rank] += count


def with_hits(events: Iterable[Event], stored: Stored) -> Iterator[tuple[Event, Hits | None]]:
    """Each event, and the hits of a load. Repeated loads of a request are left out.

    A preempted request loads again, but vLLM counts its prompt once. It does so before many others have loaded, so the
    last REMEMBERED_LOADS are enough.
    """
    recent: set[int] = set()
    older: set[int] = set()
    for event in events:
        if not isinstance(event, Load):
            yield event, None
            continue
        if event.request:
            load = hash((event.replica, event.request))
            if load in recent or load in older:
                continue
            recent.add(load)
            if len(recent) >= REMEMBERED_LOADS:
                recent, older = set(), recent
        yield event, stored.hits(event)
