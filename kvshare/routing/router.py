"""A router for verl's ``rollout.router_config_path`` that computes a prompt once and moves its KV where that pays.

verl sends all samples of a prompt at once and spreads them by load. So every replica prefills the same prompt at the
same time, and none finds the KV of another. With this router a request goes where it costs least: mostly to the replica
that has its prompt, or computes it now, and to another one when that is later ready with it. See docs/routing.md.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import zlib
from dataclasses import dataclass
from typing import Any

import ray
from cachetools import FIFOCache, LRUCache
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from kvshare.core import freshness, lmcache_settings
from kvshare.core.log_limit import LimitedLogger
from kvshare.record.event_log import RUN_DIR, EventLog
from kvshare.routing.cost_model import break_even
from kvshare.routing.digests import Conversations, before_images, token_ids
from kvshare.routing.leaders import Chunks, Leader
from kvshare.routing.listener import Listener
from kvshare.routing.placement import Choice, Counts, Prompt, Server, cheapest, choices, home

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each entry or request may repeat

AFTER_RELEASE = 1.0  # seconds after which a leader that was released, but not reported as stored, is given up
CONVERSATIONS = 10_000  # whose last turn is remembered
POLICIES = 4  # whose most requests are remembered: a rollout may be much larger than those that follow, e.g. validation


@dataclass
class Placed:
    """A running request."""

    server: Server
    context: int  # tokens of its prompt
    leader: Leader | None = None


class PrefillOnceRouter(GlobalRequestLoadBalancer):
    """Places requests by cost, and holds a request where it costs least to wait for what another one computes.

    Args:
        servers: actor handle of each rollout server (``KVShareServer``) by address.
        config: the router YAML. ``hold_seconds`` is the longest time to hold a request. With ``placement`` "spread"
            each sample is held until its prompt is stored and goes where the fewest requests are, whatever that costs;
            the turns of a conversation stay together.
            With ``full_determinism`` only the request id decides the placement, as in verl's own router.
    """

    def __init__(self, servers: dict[str, Any], config: dict[str, Any]) -> None:
        super().__init__(servers, full_determinism=bool(config.get("full_determinism")))
        self._hold_seconds = float(config.get("hold_seconds", 30))
        self._spread = config.get("placement") == "spread"
        self._keeps = freshness.of(os.environ).mode == freshness.TRAJECTORY  # only the last server can
        self._chunk_size = int(config.get("chunk_size") or _chunk_size())
        self._state = {name: Server() for name in servers}
        self._listener = Listener(self._state, self._policy_changed)
        self._chunks = Chunks()
        self._conversations = Conversations(self._chunk_size)
        self._turns: LRUCache = LRUCache(CONVERSATIONS)  # request id -> policy, tokens
        self._placed: dict[tuple[str, str], list[Placed]] = {}  # by server and request id, oldest first
        self._most: FIFOCache = FIFOCache(POLICIES)  # policy -> the most requests that ran at the same time
        self._requests = 0  # so far
        self._samples = 0.0  # requests with the same prompt, on average until the last rollout or update ended
        self._watchers: set[asyncio.Task] = set()
        self._counts = Counts()
        self._event_log = EventLog("router", os.environ.get(RUN_DIR))

    def require_acquire_fields(self) -> list[str]:
        return ["prompt_ids"]

    def require_release_fields(self) -> list[str]:
        return ["request_id"]

    # -- verl's protocol ----------------------------------------------------------------------

    async def acquire_server(self, request_id: str, prompt_ids: Any = None) -> tuple[str, Any]:  # type: ignore[override]
        clock = asyncio.get_running_loop().time
        until = clock() + self._hold_seconds
        await self._listener.hear_all(self._servers, until)
        await self._listener.wait_resumed(until)
        ids = token_ids(prompt_ids)
        digests = self._conversations.digests(request_id, before_images(ids, self._listener.placeholders))
        began, may_wait, held = clock(), True, False
        prompt, options = self._options(request_id, len(ids), digests)
        at_home = home(options).cost.wait
        while (choice := self._choose(request_id, prompt, options)).leader and may_wait:
            held, may_wait = True, await self._wait(choice.leader, until)
            prompt, options = self._options(request_id, len(ids), digests)
        self._counts.placed(choice, options, clock() - began if held else None, at_home)
        self._place(request_id, choice, len(ids), digests)
        return choice.server, self._servers[choice.server]

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        super().release_server(server_id, request_id)
        key = server_id, request_id or ""
        if key not in self._placed:
            return
        placed = self._placed[key].pop(0)
        if not self._placed[key]:
            del self._placed[key]
        placed.server.requests -= 1
        placed.server.context -= placed.context
        if placed.leader and not placed.leader.outcome.done():
            asyncio.get_running_loop().call_later(AFTER_RELEASE, self._chunks.settle, placed.leader, False)
        if not self._placed:
            self._take_stock()

    def add_servers(self, servers: dict[str, Any]) -> None:
        self.remove_servers([name for name in servers if name in self._state])  # a server that comes back is a new one
        super().add_servers(servers)
        self._state |= {name: Server() for name in servers}

    def remove_servers(self, server_ids: list[str]) -> None:
        super().remove_servers(server_ids)
        for name in server_ids:
            self._listener.forget(name)
            self._state.pop(name, None)
            self._chunks.give_up(name)

    def get_status(self) -> dict:
        requests = {name: server.requests for name, server in self._state.items()}
        return {**super().get_status(), **self._counters(), **self._listener.pace, "requests": requests}

    def _counters(self) -> dict[str, Any]:
        even = break_even(self._listener.pace)
        return self._counts.to_dict() | {
            "break_even_tokens": round(even) if math.isfinite(even) else None,
            "silent": sorted(self._listener.silent.intersection(self._servers)),
        }

    def _take_stock(self) -> None:
        self._samples = self._requests / max(1, self._counts.leaders)
        self._event_log.write("routing", **self._counters())

    # -- placing ------------------------------------------------------------------------------

    def _options(self, request_id: str, tokens: int, digests: list[str]) -> tuple[Prompt, list[Choice]]:
        if not self._servers:
            raise RuntimeError("No available servers in load balancer")
        last = self._request_id_to_server.get(request_id)
        policy, last_tokens = self._turns.get(request_id, (None, 0))
        if last not in self._state or (self._state[last].policy != policy and not self._keeps):
            last, last_tokens = None, 0
        most = max([self.get_total_inflight() + 1, *self._most.values()])
        usual = most / len(self._servers) - 1
        prompt = Prompt(tokens, digests, last, min(last_tokens, tokens), usual, self._samples)
        now = asyncio.get_running_loop().time()
        rate = self._listener.rate
        return prompt, choices(self._state, self._chunks, rate, prompt, self._chunk_size, now, hold=self._spread)

    def _choose(self, request_id: str, prompt: Prompt, options: list[Choice]) -> Choice:
        if self._full_determinism:
            return options[zlib.crc32(request_id.encode()) % len(options)]
        last, requests = self._request_id_to_server.get(request_id), {n: s.requests for n, s in self._state.items()}
        if self._spread:
            return min(options, key=lambda c: (requests[c.server], c.server != last, c.cost.total))
        if not any(server.policy for server in self._state.values()):  # as verl's own: others of its prompt stay too
            return min(options, key=lambda c: (c.server != last, c.cost.total))
        return cheapest(options, prompt, requests)

    def _place(self, request_id: str, choice: Choice, tokens: int, digests: list[str]) -> None:
        name, server = choice.server, self._state[choice.server]
        placed = Placed(server, tokens)
        self._placed.setdefault((name, request_id), []).append(placed)
        self._inflight_requests[name] += 1
        self._requests += 1
        self._request_id_to_server[request_id] = name
        self._turns[request_id] = server.policy, tokens
        server.ready = asyncio.get_running_loop().time() + choice.cost.wait + choice.cost.prompt
        server.requests += 1
        server.context += placed.context
        if server.policy:
            self._most[server.policy] = max(self._most.get(server.policy, 0), self.get_total_inflight())
        if server.policy and len(self._servers) > 1:
            stored_at = server.ready + self._listener.rate["delay"]
            placed.leader = self._chunks.add(name, server.policy, digests, stored_at)
        if placed.leader:
            self._counts.leaders += 1
            watching = asyncio.ensure_future(self._watch(placed.leader, digests[-1]))
            self._watchers.add(watching)
            watching.add_done_callback(self._watchers.discard)

    # -- leading and holding ------------------------------------------------------------------

    async def _wait(self, leader: Leader, until: float) -> bool:
        """Hold a request until a leader's chunks are stored. False if they will not be, or at ``until``."""
        done, _ = await asyncio.wait([leader.outcome], timeout=max(0.0, until - asyncio.get_running_loop().time()))
        self._counts.gave_up += not done
        return bool(done) and leader.outcome.result()

    async def _watch(self, leader: Leader, prefix: str) -> None:
        stored = False
        seconds = self._hold_seconds + AFTER_RELEASE  # longer than those that are held, which then count as given up
        try:
            handle = self._servers[leader.server]
            stored, pace = await handle.wait_prefix_stored.remote(leader.policy, prefix, seconds)
            self._listener.heard(leader.server, pace)
        except Exception as error:  # a server that died will not store it either
            often.warning("router: %s did not report whether a prefix is stored: %s", leader.server, error)
        finally:
            self._chunks.settle(leader, stored)

    def _policy_changed(self, name: str) -> None:
        if self._state[name].policy is None:
            self._chunks.give_up(name)
        self._chunks.keep_policies({server.policy for server in self._state.values()})
        self._take_stock()  # an async trainer may never have a moment without requests


def _chunk_size() -> int:
    return lmcache_settings.effective(os.environ.get("LMCACHE_CONFIG_FILE")).chunk_size


# Each held request is a pending call of this actor. With Ray's default of 1,000 calls releases would block.
Router = ray.remote(max_concurrency=1_000_000)(PrefillOnceRouter)  # type: ignore[call-overload]
