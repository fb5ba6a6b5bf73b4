"""Chooses the server of a request: the one where it costs least, and whether it waits for a prefix first."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvshare.routing.cost_model import Cost, cost
from kvshare.routing.leaders import Chunk, Chunks, Leader, shares


@dataclass
class Server:
    """What the router knows of a rollout server."""

    policy: str | None = None  # of its weights; None while they change, or if unknown
    requests: int = 0
    context: int = 0  # tokens of their prompts
    ready: float = 0.0  # when the prompts that it has been sent are computed, as expected; event loop's clock
    heard: asyncio.Event = field(default_factory=asyncio.Event)


class Choice(NamedTuple):
    server: str
    cost: Cost
    has: int  # tokens of the prompt that the server has
    leader: Leader | None = None  # to wait for, before the request is sent


@dataclass
class Prompt:
    tokens: int
    digests: list[str]
    last: str | None = None  # server of the conversation's last turn
    last_tokens: int = 0  # of the last turn
    usual: float = 0.0  # other requests that a server has when all are busy
    samples: float = 0.0  # requests with the same prompt, on average; 0 until a rollout or an update has ended


def choices(
    servers: dict[str, Server],
    chunks: Chunks,
    rate: dict[str, float],
    prompt: Prompt,
    chunk_size: int,
    now: float,
    hold: bool = False,
) -> list[Choice]:
    """The best choice for each server: to send the request now, or when what is being computed is stored.

    With ``hold`` it is sent when that is stored, whatever the cost, also to the server that computes it.
    """
    found = {
        policy: _Found(chunks.find(policy, prompt.digests), chunk_size)
        for policy in {server.policy for server in servers.values()}
    }
    return [_choice(name, server, found[server.policy], rate, prompt, now, hold) for name, server in servers.items()]


class _Found:
    """The part of a prompt that servers of one policy have, in tokens."""

    def __init__(self, chunks: list[Chunk], chunk_size: int) -> None:
        self.tokens = len(chunks) * chunk_size
        self.by_server = {name: count * chunk_size for name, count in shares(chunks).items()}
        self.chunk_size = chunk_size
        computing = [i for i, chunk in enumerate(chunks) if chunk.leader]
        self.stored = computing[0] * chunk_size if computing else self.tokens
        self.leader = chunks[computing[-1]].leader if computing else None

    def on(self, name: str, prompt: Prompt) -> int:
        """Tokens that a server has."""
        has = max(self.by_server.get(name, 0), prompt.last_tokens if name == prompt.last else 0)
        # A server with all whole chunks has the rest too, because vLLM's blocks are smaller.
        return prompt.tokens if has and prompt.tokens - has < self.chunk_size else has


def _choice(
    name: str, server: Server, found: _Found, rate: dict[str, float], prompt: Prompt, now: float, hold: bool
) -> Choice:
    has = found.on(name, prompt)
    busy = max(0.0, server.ready - now)
    at_once = _cost(server, rate, prompt, busy, has, max(0, found.stored - has))
    if found.leader and (hold or (found.tokens > has and found.leader.server != name)):
        stored = max(busy, found.leader.stored_at - now, rate["delay"])
        later = _cost(server, rate, prompt, stored, has, max(0, found.tokens - has))
        if hold or later.total < at_once.total:
            return Choice(name, later, has, found.leader)
    return Choice(name, at_once, has)


def _cost(server: Server, rate: dict[str, float], prompt: Prompt, wait: float, has: int, load: int) -> Cost:
    """The cost on a server, with as many requests as usual at least.

    A rollout sends all requests at once. So a server that has few will soon have as many as usual, and counts as if it
    had them. Samples of the same prompt do not count as stalled by it, because they need it themselves.
    """
    return cost(
        rate,
        max(server.requests, prompt.usual),
        max(server.context, prompt.usual * prompt.tokens),
        stalled=max(server.requests, prompt.usual + 1 - prompt.samples),
        wait=wait,
        compute=prompt.tokens - has - load,
        load=load,
        prompt=prompt.tokens,
    )


def cheapest(options: list[Choice], prompt: Prompt, requests: dict[str, int]) -> Choice:
    """Where a request costs least, but a conversation's turn mostly stays on the server of the last one.

    It stays while that server has no more requests than usual: what it would gain elsewhere, the conversations there
    would lose. If the server has more, the turn moves if it saves more than moving there and back costs.
    """
    best = min(options, key=lambda option: option.cost.total)
    last = next((option for option in options if option.server == prompt.last), best)
    if requests[last.server] <= prompt.usual or best.cost.total + effort(best, last) > last.cost.total:
        return last
    return best


def effort(move: Choice, stay: Choice) -> float:
    """Seconds that moving a prompt takes: to compute and load it there, and of the requests stalled meanwhile."""
    return move.cost.prompt + move.cost.stall - stay.cost.prompt - stay.cost.stall


def home(options: list[Choice]) -> Choice:
    """The server that has most of the prompt."""
    return max(options, key=lambda option: (option.has, -option.cost.total))


@dataclass
class Counts:
    """What the router has decided, and why."""

    leaders: int = 0  # computed chunks that no server had
    stayed: int = 0  # went to the server that has most of the prompt
    moved: int = 0  # went to another one, because of the load
    held: int = 0
    gave_up: int = 0  # waited for hold_seconds in vain
    wait_seconds: float = 0.0
    longest_wait: float = 0.0
    move_seconds: float = 0.0  # that moving cost, as expected: waiting, loading, computing
    saved_seconds: float = 0.0  # that it saved, likewise: queues and slower steps

    def placed(self, choice: Choice, options: list[Choice], waited: float | None, saved: float) -> None:
        """Count a placement.

        Args:
            choice: one of ``options``.
            options: of all servers.
            waited: seconds it has been held; None: not at all.
            saved: seconds it would have waited at ``home()`` meanwhile.
        """
        if waited is not None:
            self.held += 1
            self.wait_seconds += waited
            self.longest_wait = max(self.longest_wait, waited)
        stay = home(options)
        if not stay.has:
            return
        if choice.has == stay.has:
            self.stayed += 1
            return
        self.moved += 1
        self.move_seconds += effort(choice, stay) + max(0.0, (waited or 0.0) - saved)
        self.saved_seconds += stay.cost.total - choice.cost.total + effort(choice, stay)

    def to_dict(self) -> dict[str, Any]:
        return {name: round(value, 3) for name, value in vars(self).items()}
