"""Keeps the loads of running requests until all ranks have reported. No I/O.

Rank 0 of an engine reports each load, other ranks only those that were not whole. vLLM computes on all ranks what one
of them did not load. So a request has loaded what every rank has loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Event = dict[str, Any]


@dataclass
class _Request:
    loads: list[Event] = field(default_factory=list)
    partial: int | None = None  # tokens that the worst rank has loaded


class Loads:
    def __init__(self) -> None:
        self._running: dict[str, _Request] = {}

    def started(self, request: str) -> None:
        self._running[request] = _Request()

    def loaded(self, load: Event) -> bool:
        """Keep a load event. False if its request is not running here."""
        if running := self._running.get(load["request"]):
            running.loads.append(load)
        return running is not None

    def partial(self, event: Event) -> None:
        if running := self._running.get(event["request"]):
            running.partial = min(event["tokens"], event["tokens"] if running.partial is None else running.partial)

    def ended(self, request: str) -> list[Event]:
        """The load events of a request, each with the keys that every rank has loaded."""
        running = self._running.pop(request)
        return [_limited(load, running.partial) for load in running.loads]


def _limited(load: Event, tokens: int | None) -> Event:
    if tokens is None:
        return load
    whole, left = 0, tokens
    for size in load["tokens"]:
        if (left := left - size) < 0:
            break
        whole += 1
    return {**load, "keys": load["keys"][:whole], "tokens": load["tokens"][:whole]}
