"""Counts where prompt tokens came from, given the lines of an event log (see event_log.py). No I/O.

``prompt`` = ``computed`` + ``local_hit`` + ``shared_hit`` + ``unknown_hit``:

* ``local_hit``: from vLLM's prefix cache, or loaded after the same replica stored them;
* ``shared_hit``: loaded after another replica stored them;
* ``unknown_hit``: loaded, with no store in the event log.

``stale_hit`` counts the loaded tokens whose key was also stored under another policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, MutableMapping
from typing import Any

Event = dict[str, Any]
Stored = MutableMapping[int, set[tuple[int, str]]]
"""By key: each (replica, policy id) that stored it."""

SOURCES = ("computed", "local_hit", "shared_hit", "unknown_hit")
NOTHING = dict.fromkeys(("prompt", *SOURCES, "stale_hit"), 0)


def of_replicas(events: Iterable[Event]) -> list[Event]:
    """The events of replicas, without those of router and trainer, and with at most one load per request."""
    return list(_first_loads(e for e in events if e["op"] not in ("routing", "step")))


def _first_loads(events: Iterable[Event]) -> Iterable[Event]:
    """Drop repeated loads of a request. A preempted request loads again, but vLLM counts its prompt once."""
    seen = set()
    for event in events:
        if event["op"] == "load" and event.get("request"):
            load = event["replica"], event["request"]
            if load in seen:
                continue
            seen.add(load)
        yield event


def remember(stored: Stored, events: Iterable[Event]) -> None:
    """Add the store events to ``stored``."""
    for event in events:
        if event["op"] == "store":
            for key in event["keys"]:
                stored[key] = stored.get(key, set()) | {(event["replica"], event["policy"])}


def stored_by(events: Iterable[Event]) -> Stored:
    stored: Stored = {}
    remember(stored, events)
    return stored


def tokens(events: Iterable[Event], stored: Stored) -> dict[str, int]:
    """Prompt tokens of ``events`` by source; keys as in NOTHING."""
    count = dict(NOTHING)
    expected = 0
    for event in events:
        if event["op"] == "request":
            count["prompt"] += event["prompt"]
            count["local_hit"] += event["cached"]
        elif event["op"] == "load":
            expected += event["expected"]
            for key, size in zip(event["keys"], event["tokens"], strict=True):
                stores = stored.get(key, set())
                count[_origin(stores, event["replica"])] += size
                if any(policy != event["policy"] for _, policy in stores):
                    count["stale_hit"] += size
    # vLLM's cached tokens include those it expected LMCache to load, even if the load failed.
    count["local_hit"] = max(0, count["local_hit"] - expected)
    count["computed"] = count["prompt"] - count["local_hit"] - count["shared_hit"] - count["unknown_hit"]
    return count


def _origin(stores: set[tuple[int, str]], replica: int) -> str:
    if not stores:
        return "unknown_hit"
    return "local_hit" if any(r == replica for r, _ in stores) else "shared_hit"


def by_replica(events: Iterable[Event], stored: Stored, replicas: int) -> list[dict[str, int]]:
    groups: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        groups[event["replica"]].append(event)
    return [{"rank": rank, **tokens(groups[rank], stored)} for rank in range(replicas)]


def amplification(stored: Stored) -> float | None:
    """Prefill amplification: chunks computed by all replicas, divided by distinct chunks.

    1.0 means perfect sharing, R with R replicas means none. None if no prompt filled a chunk.
    """
    distinct = sum(len({policy for _, policy in stores}) for stores in stored.values())
    return round(sum(map(len, stored.values())) / distinct, 3) if distinct else None


def hit_rate(count: dict[str, int]) -> float | None:
    """Fraction of prompt tokens that were not computed, 0 to 1; None without prompts."""
    return 1 - count["computed"] / count["prompt"] if count["prompt"] else None


def fastest_prefill(events: Iterable[Event]) -> float | None:
    """Best prefill rate of an engine, in tokens per second; None if unknown."""
    return max((e["prefill"] for e in events if e["op"] == "request" and e.get("prefill")), default=None)


def time_saved(events: Iterable[Event], prefill: float | None) -> float | None:
    """Seconds that loading saved, added up over all engines; negative if loading was slower than computing.

    This is the time to compute the loaded tokens at ``prefill``, minus the time to load them. Replicas load at the same
    time, so the makespan shrinks by at most this sum divided by the number of replicas that loaded together.

    Args:
        prefill: prefill rate in tokens per second. ``fastest_prefill`` makes the result a lower bound.
    """
    if prefill is None:
        return None
    loads = [e for e in events if e["op"] == "load"]
    return sum(sum(e["tokens"]) / prefill - e.get("seconds", 0.0) for e in loads)


def metrics(events: list[Event], stored: Stored, prefill: float | None) -> dict[str, float]:
    """Metrics of a step for verl's logger. Unknown ones are left out."""
    count = tokens(events, stored)
    others = {
        "hit_rate": hit_rate(count),
        "prefill_amplification": amplification(stored_by(events)),
        "time_saved_s": time_saved(events, prefill),
    }
    known = {name: value for name, value in others.items() if value is not None}
    return {f"{name}_tokens": value for name, value in count.items()} | known
