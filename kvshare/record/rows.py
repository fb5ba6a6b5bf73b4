"""The rows of a report about steps and policies. Their number is bounded; the counts in them are exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvshare.core.policy import is_private
from kvshare.record.events import Event, Request, Step
from kvshare.record.stored import Hits
from kvshare.record.token_sources import Count, Sharing

STEP = "training/global_step"
"""All of verl's trainers log it with a step; a validation lacks it. Fully async logs a step with the next update of the
weights, so the last ones are missing."""
PEARSON = "training/rollout_actor_probs_pearson_corr"
DIFFERENCE = "training/rollout_probs_diff_max"
SPANS = "training/off_policy/trajectory_spans/max"  # versions of the weights; of verl's default trainer
PASSED = "fully_async/partial/max_partial_span"  # updates in a trajectory; of verl's fully async trainer
BEHIND = "training/off_policy/trajectory_staleness_worst/max"
MOST_ROWS = 200  # of a table, points of a plot: more cannot be told apart
OPEN_POLICIES = 16  # whose keys are remembered: requests of older ones have ended


class Logged(msgspec.Struct):
    """The metrics of a step that the report uses, as verl's file logger names them."""

    number: float = msgspec.field(name=STEP)
    reward: float | None = msgspec.field(name="critic/score/mean", default=None)
    response_length: float | None = msgspec.field(name="response_length/mean", default=None)
    seconds: float | None = msgspec.field(name="timing_s/step", default=None)
    pearson: float | None = msgspec.field(name=PEARSON, default=None)
    probs_diff: float | None = msgspec.field(name=DIFFERENCE, default=None)
    spans: float | None = msgspec.field(name=SPANS, default=None)
    behind: float | None = msgspec.field(name=BEHIND, default=None)
    passed: float | None = msgspec.field(name=PASSED, default=None)

    def __post_init__(self) -> None:
        if self.passed is not None:
            self.spans = self.passed + 1


def mean(values: list[float]) -> float:
    return values[0] if len(values) == 1 else sum(values) / len(values)


MERGED: dict[str, Callable[[list[float]], float]] = {
    "reward": mean,
    "response_length": mean,
    "seconds": mean,
    "pearson": min,  # the worst step must not be lost
    "probs_diff": max,
}


def over(choose: Callable[[list[float]], float], steps: Iterable[Logged], name: str) -> float | None:
    known = [value for step in steps if (value := getattr(step, name)) is not None]
    return choose(known) if known else None


@dataclass
class Row:
    """A range of steps; one step, if the run has no more than MOST_ROWS."""

    logged: list[Logged] = field(default_factory=list)
    sharing: Sharing = field(default_factory=Sharing)
    server: dict[str, int] | None = None  # status of kvshare server after the last step
    policies: int = 0  # the most whose requests ended in one step

    def to_dict(self, replicas: int, prefill: float | None) -> dict[str, Any]:
        """Tokens, and seconds that were saved, are sums over the steps."""
        first, last = int(self.logged[0].number), int(self.logged[-1].number)
        return {
            "step": first if first == last else f"{first}–{last}",
            "steps": len(self.logged),
            **self.sharing.to_dict(),
            "time_saved_seconds": self.sharing.count().time_saved(prefill),
            "replica": self.sharing.by_replica(replicas),
            "server": self.server,
            "policies": self.policies,
            **{name: over(choose, self.logged, name) for name, choose in MERGED.items()},
        }


def of_requests(events: Iterable[Event]) -> set[str]:
    """The policies of the requests among events, without those that one replica or request has for itself."""
    return {event.policy for event in events if isinstance(event, Request) and not is_private(event.policy)}


class StepRows:
    """Groups a run's steps into at most MOST_ROWS ranges of equal length, and its events with them.

    Args:
        steps: what verl logged.
        ends: the steps in the order in which they ended, one for each Step event.
    """

    def __init__(self, steps: list[Logged], ends: list[int]) -> None:
        numbers = [int(step.number) for step in steps]
        self._first = min(numbers, default=0)
        self.size = math.ceil((max(numbers, default=0) - self._first + 1) / MOST_ROWS)
        self._rows: dict[int, Row] = {}
        for step in sorted(steps, key=lambda step: step.number):
            self._rows.setdefault(self._at(step.number), Row()).logged.append(step)
        self._ends = iter(ends)
        self._row = self._next()
        self._policies: set[str] = set()

    def _at(self, step: float) -> int:
        return (int(step) - self._first) // self.size

    def _next(self) -> Row | None:
        """The row of the step that ends next; None after the last one."""
        end = next(self._ends, None)
        return None if end is None else self._rows.get(self._at(end))

    def add(self, event: Event, hits: Hits | None) -> None:
        """Add an event to the step that ends after it. Events come in order of time."""
        if not isinstance(event, Step):
            if self._row:
                self._row.sharing.add(event, hits)
                self._policies |= of_requests([event])
            return
        before, self._row = self._row, self._next()
        policies, self._policies = self._policies, set()
        if before:
            before.server = event.server
            before.policies = max(before.policies, len(policies))
            if before is not self._row:
                before.sharing.forget()

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())


class PolicyRows:
    """The counts of the last MOST_ROWS policies in the order of their first event; private policies together."""

    def __init__(self) -> None:
        self._earlier = Sharing()
        self._rows: dict[str, Sharing] = {}

    def add(self, event: Event, hits: Hits | None) -> None:
        if policy := getattr(event, "policy", None):
            name = "private" if is_private(policy) else policy
            if name not in self._rows:
                self._begin(name)
            self._rows[name].add(event, hits)

    def _begin(self, name: str) -> None:
        self._rows[name] = Sharing()
        names = list(self._rows)
        for old in names[-OPEN_POLICIES - 1 : -OPEN_POLICIES]:
            self._rows[old].forget()
        if len(names) > MOST_ROWS:
            self._earlier.merge(self._rows.pop(names[0]))

    def to_list(self) -> list[dict[str, Any]]:
        earlier = {"earlier": self._earlier} if self._earlier.count() != Count() else {}
        return [{"policy": name, **row.to_dict()} for name, row in (earlier | self._rows).items()]
