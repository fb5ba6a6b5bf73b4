"""The events of a run's record, as a line of an event log holds them.

Each has ``time`` (Unix seconds at which it was written) and ``replica`` (its rank; "router" or "trainer" for theirs).
Keys are LMCache chunk hashes. A line that is none of these counts as one lost event.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import msgspec


class Event(msgspec.Struct, tag_field="op", tag=str.lower, gc=False, kw_only=True):
    time: float
    replica: int | str


class OfReplica(Event):
    replica: Annotated[int, msgspec.Meta(ge=0, lt=2**16)]


class Ready(OfReplica):
    """LMCache has started in the replica."""


class Degraded(OfReplica):
    """LMCache did not start in the replica."""


class Store(OfReplica):
    """``weights``: checksum of those that computed the KV, the worker's ``epoch``-th."""

    policy: str
    keys: list[int]
    epoch: int = 0
    weights: str = ""


class Load(OfReplica):
    """``tokens`` of each key, the tokens that the lookup ``expected``, and the ``seconds`` that the load took.

    ``weights``: checksum of those that use the KV. ``kept``: whether a conversation loads KV of the policy under which
    it began.
    """

    policy: str
    keys: list[int]
    tokens: list[int]
    expected: int
    seconds: float = 0.0
    request: str | None = None
    epoch: int = 0
    weights: str = ""
    kept: bool = False

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.tokens):
            raise ValueError("keys and tokens differ in length")


class StalePrefix(OfReplica):
    """Tokens that vLLM's prefix cache had, and that were computed before an update of the weights."""

    policy: str
    tokens: int


ABORT = "abort"


class Request(OfReplica):
    """A request that has ended.

    Args:
        prompt: tokens.
        cached: tokens of the prompt that vLLM did not schedule.
        prefill: the engine's rate up to the first token, in tokens per second; None if it is not known.
        generated: tokens.
        versions: how many versions of the weights the request's KV may come from.
        request: the caller's id (core/conversation.py).
        finish: why it ended: "stop", "length", ABORT.
    """

    policy: str
    prompt: int
    cached: int
    prefill: float | None = None
    generated: int = 0
    versions: int = 1
    request: str = ""
    finish: str | None = None

    @property
    def computed(self) -> bool:
        """False if it was aborted before the engine computed anything."""
        return self.generated > 0 or self.finish != ABORT


class Lost(Event):
    """``events`` are missing here: a queue was full, or the disk."""

    events: int


class Routing(Event):
    """The router's counters so far."""

    leaders: int = 0
    stayed: int = 0
    moved: int = 0
    held: int = 0
    gave_up: int = 0
    wait_seconds: float = 0.0
    longest_wait: float = 0.0
    move_seconds: float = 0.0
    saved_seconds: float = 0.0
    break_even_tokens: int | None = None
    silent: list[str] = []  # addresses of replicas that the router hears nothing of


class Step(Event):
    """verl has logged a step. ``server`` is the status of kvshare server then, if there is one."""

    step: int
    server: dict[str, int] | None = None


_ANY = Ready | Degraded | Store | Load | StalePrefix | Request | Lost | Routing | Step
_decoder = msgspec.json.Decoder(_ANY)


def decode(line: bytes) -> Event:
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return Lost(time=0.0, replica="", events=1)


def convert(events: Iterable[dict[str, Any]]) -> list[Event]:
    """Events from dicts. Raises msgspec.ValidationError for what is no event."""
    return msgspec.convert(list(events), list[_ANY])
