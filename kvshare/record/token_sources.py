"""Where prompt tokens came from: arithmetic on ledger lines (see event_log.py), no I/O.

``prompt`` = ``computed`` + ``local_hit`` + ``shared_hit`` + ``unknown_hit``. ``local_hit``: from
vLLM's prefix cache, or loaded and stored by the same replica; ``shared_hit``: loaded, and stored by
another replica; ``unknown_hit``: loaded, and nobody in the ledger stored it. ``stale_hit``: those of
the loaded tokens whose key was also stored under another policy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, MutableMapping
from typing import Any

Event = dict[str, Any]
Stored = MutableMapping[int, set[tuple[int, str]]]
"""Who stored each key, under which policy: replica and policy id."""

SOURCES = ("computed", "local_hit", "shared_hit", "unknown_hit")
NOTHING = dict.fromkeys(("prompt", *SOURCES, "stale_hit"), 0)


def of_replicas(events: Iterable[Event]) -> list[Event]:
    """Not those of the router and the trainer; each request's load once."""
    return list(_first_loads(e for e in events if e["op"] not in ("routing", "step")))


def _first_loads(events: Iterable[Event]) -> Iterable[Event]:
    """A preempted request loads again; vLLM counts its prompt once."""
    seen = set()
    for event in events:
        if event["op"] == "load" and event.get("request"):
            load = event["replica"], event["request"]
            if load in seen:
                continue
            seen.add(load)
        yield event


def remember(stored: Stored, events: Iterable[Event]) -> None:
    """Add who stored what to ``stored``."""
    for event in events:
        if event["op"] == "store":
            for key in event["keys"]:
                stored[key] = stored.get(key, set()) | {(event["replica"], event["policy"])}


def stored_by(events: Iterable[Event]) -> Stored:
    stored: Stored = {}
    remember(stored, events)
    return stored


def tokens(events: Iterable[Event], stored: Stored) -> dict[str, int]:
    """Prompt tokens by source, of ``events``."""
    count = dict(NOTHING)
    expected = 0
    for event in events:
        if event["op"] == "request":
            count["prompt"] += event["prompt"]
            count["local_hit"] += event["cached"]
        elif event["op"] == "load":
            expected += event["expected"]
            for key, size in zip(event["keys"], event["tokens"], strict=True):
                who = stored.get(key, set())
                count[_origin(who, event["replica"])] += size
                if any(policy != event["policy"] for _, policy in who):
                    count["stale_hit"] += size
    # vLLM counts as cached what it expected LMCache to load, whether that arrived or not.
    count["local_hit"] = max(0, count["local_hit"] - expected)
    count["computed"] = count["prompt"] - count["local_hit"] - count["shared_hit"] - count["unknown_hit"]
    return count


def _origin(who: set[tuple[int, str]], replica: int) -> str:
    if not who:
        return "unknown_hit"
    return "local_hit" if any(r == replica for r, _ in who) else "shared_hit"


def by_replica(events: Iterable[Event], stored: Stored, replicas: int) -> list[dict[str, int]]:
    groups: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        groups[event["replica"]].append(event)
    return [{"rank": rank, **tokens(groups[rank], stored)} for rank in range(replicas)]


def amplification(stored: Stored) -> float | None:
    """Prefill amplification: chunks that replicas computed over distinct chunks computed.

    1.0 is perfect sharing, the number of replicas is none; None if no prompt filled a chunk.
    """
    distinct = sum(len({policy for _, policy in who}) for who in stored.values())
    return round(sum(map(len, stored.values())) / distinct, 3) if distinct else None


def hit_rate(count: dict[str, int]) -> float | None:
    """Prompt tokens that were not computed, 0 to 1."""
    return 1 - count["computed"] / count["prompt"] if count["prompt"] else None


def fastest_prefill(events: Iterable[Event]) -> float | None:
    """Tokens a second that an engine was seen to compute; None: not known."""
    return max((e["prefill"] for e in events if e["op"] == "request" and e.get("prefill")), default=None)


def time_saved(events: Iterable[Event], prefill: float | None) -> float | None:
    """Seconds that LMCache saved the engines, all of them added up; negative if it cost them time.

    That is: what computing the loaded tokens takes at ``prefill``, less what loading them took. The
    run is shorter by at most that, divided by the replicas that loaded at the same time.

    Args:
        prefill: ``fastest_prefill``, so that this is a lower bound.
    """
    if prefill is None:
        return None
    loads = [e for e in events if e["op"] == "load"]
    return sum(sum(e["tokens"]) / prefill - e.get("seconds", 0.0) for e in loads)


def metrics(events: list[Event], stored: Stored, prefill: float | None) -> dict[str, float]:
    """What verl's logger gets of a step; what is not known is left out."""
    count = tokens(events, stored)
    others = {
        "hit_rate": hit_rate(count),
        "prefill_amplification": amplification(stored_by(events)),
        "time_saved_s": time_saved(events, prefill),
    }
    known = {name: value for name, value in others.items() if value is not None}
    return {f"{name}_tokens": value for name, value in count.items()} | known
