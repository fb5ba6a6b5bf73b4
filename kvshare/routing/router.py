"""Prefill once, decode anywhere: a router for verl's ``rollout.router_config_path``.

verl sends all samples of a prompt at once and spreads them by load, so every replica prefills the
same prompt at the same moment and none finds the other's KV. Here the first request for a chunk of
prompt leads; the others wait until its replica says that it is stored, then go where there is room.
docs/routing.md says why and when.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import zlib
from dataclasses import dataclass, field
from typing import Any

import ray
from cachetools import LRUCache
from verl.utils.tokenizer import normalize_token_ids
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from kvshare.core import lmcache_settings
from kvshare.record.event_log import RUN_DIR, Ledger
from kvshare.routing.cost_model import UNKNOWN, break_even, worth
from kvshare.routing.prefixes import Key, chunk_digests

logger = logging.getLogger(__name__)

REMEMBERED = 100_000  # chunks
AFTER_RELEASE = 1.0  # seconds until a leader that ended without its server's knowing is given up
FIRST_RESPONSE = 256  # tokens of an answer, until the run has shown its own
FIRST_WORTH = 0.01  # a prompt token in generated ones, likewise


@dataclass
class Server:
    policy: str | None = None  # of its weights; None while they change, or if it does not tell
    load: float = 0.0  # tokens left to generate; those of prompts count as what their time is worth
    heard: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Leader:
    """A request that computes chunks others wait for."""

    server: str
    keys: list[Key]
    outcome: asyncio.Future[bool]  # whether they can be found now

    @property
    def policy(self) -> str:
        return self.keys[0][0]


@dataclass
class Placed:
    """A request under way, and what it adds to its server's load: its prompt and its answer."""

    server: Server
    prefill: float
    response: float
    leader: Leader | None = None


@dataclass
class Counts:
    leaders: int = 0
    held: int = 0
    gave_up: int = 0
    moved: int = 0
    wait_seconds: float = 0.0
    longest_wait: float = 0.0


class PrefillOnceRouter(GlobalRequestLoadBalancer):
    """Places requests by load and by who has their prefix, and holds those whose prefix is on its way.

    Args:
        servers: actor handle of each rollout server (``KVShareServer``) by its address.
        config: the router YAML; ``hold_seconds`` is the longest a request may be held, and
            ``full_determinism`` places by request id alone, as verl's own router does.
    """

    def __init__(self, servers: dict[str, Any], config: dict[str, Any]) -> None:
        super().__init__(servers, full_determinism=bool(config.get("full_determinism")))
        self._hold_seconds = float(config.get("hold_seconds", 30))
        self._chunk_size = int(config.get("chunk_size") or _chunk_size())
        self._state = {name: Server() for name in servers}
        self._computing: dict[Key, Leader] = {}
        self._stored: LRUCache = LRUCache(maxsize=REMEMBERED)  # Key -> names of servers that hold it themselves
        self._placed: dict[tuple[str, str], list[Placed]] = {}  # by server and request id, in order
        self._pace = UNKNOWN
        self._tasks: dict[str, asyncio.Task] = {}
        self._watchers: set[asyncio.Task] = set()
        self._counts = Counts()
        self._ledger = Ledger("router", os.environ.get(RUN_DIR))

    def require_acquire_fields(self) -> list[str]:
        return ["prompt_ids"]

    def require_release_fields(self) -> list[str]:
        return ["request_id"]

    # -- verl's protocol ----------------------------------------------------------------------

    async def acquire_server(self, request_id: str, prompt_ids: Any = None) -> tuple[str, Any]:  # type: ignore[override]
        tokens = _token_ids(prompt_ids)
        chunks = chunk_digests(tokens, self._chunk_size)
        until = asyncio.get_running_loop().time() + self._hold_seconds
        await self._hear_from_all(until)
        shares = len(self._servers) > 1 and len(chunks) * self._chunk_size > break_even(self._pace)
        if shares:
            await self._hold(chunks, until)
        if not self._servers:
            raise RuntimeError("No available servers in load balancer")
        name, missing = self._choose(request_id, chunks, len(tokens))
        placed = Placed(self._state[name], missing, self._pace["response"] or FIRST_RESPONSE)
        self._placed.setdefault((name, request_id), []).append(placed)
        self._inflight_requests[name] += 1
        placed.server.load += placed.prefill + placed.response
        if shares:
            self._lead(name, placed, chunks)
        return name, self._servers[name]

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        super().release_server(server_id, request_id)
        key = server_id, request_id or ""
        if key not in self._placed:
            return
        placed = self._placed[key].pop(0)
        if not self._placed[key]:
            del self._placed[key]
        placed.server.load -= placed.prefill + placed.response
        placed.prefill = 0.0
        if placed.leader and not placed.leader.outcome.done():
            asyncio.get_running_loop().call_later(AFTER_RELEASE, self._settle, placed.leader, False)
        if not self._placed:
            self._ledger.write("routing", **self._counters())

    def add_servers(self, servers: dict[str, Any]) -> None:
        self.remove_servers([name for name in servers if name in self._state])  # come back, it is another
        super().add_servers(servers)
        self._state |= {name: Server() for name in servers}

    def remove_servers(self, server_ids: list[str]) -> None:
        super().remove_servers(server_ids)
        for name in server_ids:
            self._state.pop(name, None)
            if task := self._tasks.pop(name, None):
                task.cancel()
        self._release([leader for leader in self._leaders() if leader.server in server_ids])

    def get_status(self) -> dict:
        loads = {name: server.load for name, server in self._state.items()}
        return {**super().get_status(), **self._counters(), **self._pace, "tokens_left": loads}

    def _counters(self) -> dict[str, Any]:
        even = break_even(self._pace)
        counts = {name: round(count, 3) for name, count in vars(self._counts).items()}
        return {**counts, "break_even_tokens": round(even) if math.isfinite(even) else None}

    # -- placing ------------------------------------------------------------------------------

    def _choose(self, request_id: str, chunks: list[str], tokens: int) -> tuple[str, float]:
        """The server with the least to do, this request's prompt included; and what the prompt costs there."""
        last = self._request_id_to_server.get(request_id)
        missing = self._missing(chunks, tokens)
        if last in missing:
            missing[last] = 0.0  # the next turn of a conversation: its server has what it generated, too
        if self._full_determinism:
            names = list(self._servers)
            name = names[zlib.crc32(request_id.encode()) % len(names)]
        else:
            name = min(missing, key=lambda name: self._state[name].load + missing[name])
        self._counts.moved += last is not None and last != name
        self._request_id_to_server[request_id] = name
        return name, missing[name]

    def _missing(self, chunks: list[str], tokens: int) -> dict[str, float]:
        """By server: what the prompt would cost there, in tokens generated in that time."""
        decode = self._pace["decode"]
        prefill, load = worth(self._pace["prefill"], decode, FIRST_WORTH), worth(self._pace["load"], decode, 0.0)
        policies = {server.policy for server in self._state.values()}
        holders = {policy: self._holders(policy, chunks) for policy in policies}
        missing = {}
        for name, server in self._state.items():
            stored = holders[server.policy]
            others = sum(name not in holding for holding in stored)
            computed = tokens - len(stored) * self._chunk_size
            missing[name] = computed * prefill + others * self._chunk_size * load
        return missing

    def _holders(self, policy: str | None, chunks: list[str]) -> list[set[str]]:
        """Who holds each of the leading chunks that are stored."""
        found = []
        for chunk in chunks:
            holding = self._stored.get((policy, chunk))
            if holding is None:
                break
            found.append(holding)
        return found

    # -- leading and holding ------------------------------------------------------------------

    async def _hold(self, chunks: list[str], until: float) -> None:
        """Wait for whoever computes a part of this prompt; go at once when that comes to nothing."""
        clock = asyncio.get_running_loop().time
        began, held = clock(), False
        while leader := self._leader_of(chunks):
            self._counts.held += not held
            held = True
            done, _ = await asyncio.wait([leader.outcome], timeout=max(0.0, until - clock()))
            if not done:
                self._counts.gave_up += 1
            if not done or not leader.outcome.result():
                break
        if held:
            waited = clock() - began
            self._counts.wait_seconds += waited
            self._counts.longest_wait = max(self._counts.longest_wait, waited)

    def _leader_of(self, chunks: list[str]) -> Leader | None:
        policies = {server.policy for server in self._state.values() if server.policy}
        found = (self._computing.get((policy, chunk)) for chunk in reversed(chunks) for policy in policies)
        return next(filter(None, found), None)

    def _lead(self, name: str, placed: Placed, chunks: list[str]) -> None:
        """Note what this request's server will have, and let others wait for what nobody has yet."""
        policy = placed.server.policy
        if not policy:
            return
        fresh = []
        for key in ((policy, chunk) for chunk in chunks):
            if key in self._stored:
                self._stored[key].add(name)
            elif key not in self._computing:
                fresh.append(key)
        if not fresh:
            return
        self._counts.leaders += 1
        leader = placed.leader = Leader(name, fresh, asyncio.get_running_loop().create_future())
        self._computing |= dict.fromkeys(fresh, leader)
        self._start(self._watch(placed, leader, (policy, chunks[-1])))

    async def _watch(self, placed: Placed, leader: Leader, key: Key) -> None:
        stored = False
        try:
            handle = self._servers[leader.server]
            stored, self._pace = await handle.wait_prefix_stored.remote(*key, self._hold_seconds)
        except Exception as error:  # a server that died stores nothing either
            logger.warning("router: %s did not say whether a prefix is stored: %s", leader.server, error)
        finally:
            self._settle(leader, stored)
            placed.server.load -= placed.prefill  # that much is done
            placed.prefill = 0.0

    def _settle(self, leader: Leader, stored: bool) -> None:
        if leader.outcome.done():
            return
        leader.outcome.set_result(stored)
        for key in leader.keys:
            self._computing.pop(key, None)
            if stored:
                self._stored[key] = {leader.server}

    def _leaders(self) -> list[Leader]:
        return list({id(leader): leader for leader in self._computing.values()}.values())

    def _release(self, leaders: list[Leader]) -> None:
        for leader in leaders:
            self._settle(leader, False)

    # -- what servers tell --------------------------------------------------------------------

    async def _hear_from_all(self, until: float) -> None:
        """Follow each server's policy; the first time, wait for it."""
        for name in self._servers:
            if name not in self._tasks:
                self._tasks[name] = asyncio.ensure_future(self._follow(name))
        silent = [server for server in self._state.values() if not server.heard.is_set()]
        if silent:
            hearing = asyncio.gather(*(server.heard.wait() for server in silent))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(hearing, until - asyncio.get_running_loop().time())
            for server in silent:
                server.heard.set()

    async def _follow(self, name: str) -> None:
        handle, server = self._servers[name], self._state[name]
        known: str | None = ""
        try:
            while True:
                known, self._pace = await handle.wait_policy_change.remote(known)
                server.policy = known
                server.heard.set()
                policies = {other.policy for other in self._state.values()}
                self._release([leader for leader in self._leaders() if leader.policy not in policies])
        except Exception as error:
            logger.warning("router: %s does not tell its policy, nobody waits for its prefixes: %s", name, error)
        finally:  # gone, or removed
            server.policy = None
            server.heard.set()
            self._release([leader for leader in self._leaders() if leader.server == name])

    def _start(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)


def _token_ids(prompt_ids: Any) -> list[int]:
    """In whatever verl's servers take them; mostly a list already, which need not be looked through."""
    if prompt_ids is None or (isinstance(prompt_ids, list) and isinstance(next(iter(prompt_ids), 0), int)):
        return prompt_ids or []
    return normalize_token_ids(prompt_ids)


def _chunk_size() -> int:
    return lmcache_settings.effective(os.environ.get("LMCACHE_CONFIG_FILE")).chunk_size


# Held requests are pending calls of this actor: Ray's default of 1,000 at once would block releases.
Router = ray.remote(max_concurrency=1_000_000)(PrefillOnceRouter)  # type: ignore[call-overload]
