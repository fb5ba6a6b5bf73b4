"""A router for verl's ``rollout.router_config_path`` that lets one replica prefill a prompt for all.

verl sends all samples of a prompt at once and spreads them by load. So every replica prefills the same prompt at the
same time, and none finds the KV of another. With this router the first request for a chunk is its leader. The others
wait until the leader's replica has stored the chunk, then go to the replica with the least load. See docs/routing.md.
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
from kvshare.core.log_limit import LimitedLogger
from kvshare.record.event_log import RUN_DIR, EventLog
from kvshare.routing.cost_model import UNKNOWN, break_even, worth
from kvshare.routing.prefixes import Key, chunk_digests

logger = logging.getLogger(__name__)
often = LimitedLogger(logger)  # for what each entry or request may repeat

REMEMBERED = 100_000  # chunks
AFTER_RELEASE = 1.0  # seconds after which a leader that was released, but not reported as stored, is given up
FIRST_RESPONSE = 256  # assumed tokens of an answer, until a mean is known
FIRST_WORTH = 0.01  # assumed cost of a prompt token in generated tokens, likewise


@dataclass
class Server:
    """What the router knows of a rollout server."""

    policy: str | None = None  # of its weights; None while they change, or if unknown
    load: float = 0.0  # tokens left to generate; prompt tokens are converted by cost
    heard: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class Leader:
    """A request that computes chunks which others wait for."""

    server: str
    keys: list[Key]
    outcome: asyncio.Future[bool]  # whether the chunks can be found now

    @property
    def policy(self) -> str:
        return self.keys[0][0]


@dataclass
class Placed:
    """A running request, and the load that its prompt and its answer add to its server."""

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
    """Places requests by load and stored prefixes, and holds a request while another computes its prefix.

    Args:
        servers: actor handle of each rollout server (``KVShareServer``) by address.
        config: the router YAML. ``hold_seconds`` is the longest time to hold a request. With ``full_determinism`` only
            the request id decides the placement, as in verl's own router.
    """

    def __init__(self, servers: dict[str, Any], config: dict[str, Any]) -> None:
        super().__init__(servers, full_determinism=bool(config.get("full_determinism")))
        self._hold_seconds = float(config.get("hold_seconds", 30))
        self._chunk_size = int(config.get("chunk_size") or _chunk_size())
        self._state = {name: Server() for name in servers}
        self._computing: dict[Key, Leader] = {}
        self._stored: LRUCache = LRUCache(maxsize=REMEMBERED)  # Key -> names of servers that hold the chunk locally
        self._placed: dict[tuple[str, str], list[Placed]] = {}  # by server and request id, oldest first
        self._pace = UNKNOWN
        self._tasks: dict[str, asyncio.Task] = {}
        self._watchers: set[asyncio.Task] = set()
        self._counts = Counts()
        self._event_log = EventLog("router", os.environ.get(RUN_DIR))

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
            self._event_log.write("routing", **self._counters())

    def add_servers(self, servers: dict[str, Any]) -> None:
        self.remove_servers([name for name in servers if name in self._state])  # a server that comes back is a new one
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
        """The server with the least load, including the cost of this prompt there; and that cost."""
        last = self._request_id_to_server.get(request_id)
        missing = self._missing(chunks, tokens)
        if last in missing:
            missing[last] = 0.0  # next turn of a conversation: this server has all earlier turns
        if self._full_determinism:
            names = list(self._servers)
            name = names[zlib.crc32(request_id.encode()) % len(names)]
        else:
            name = min(missing, key=lambda name: self._state[name].load + missing[name])
        self._counts.moved += last is not None and last != name
        self._request_id_to_server[request_id] = name
        return name, missing[name]

    def _missing(self, chunks: list[str], tokens: int) -> dict[str, float]:
        """Cost of the prompt by server: the tokens a request would generate in the time it takes."""
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
        """Servers that hold each leading chunk, up to the first chunk that is not stored."""
        found = []
        for chunk in chunks:
            holding = self._stored.get((policy, chunk))
            if holding is None:
                break
            found.append(holding)
        return found

    # -- leading and holding ------------------------------------------------------------------

    async def _hold(self, chunks: list[str], until: float) -> None:
        """Wait until all chunks that others compute are stored. Stop waiting if one will not be, or at ``until``."""
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
        """Record the chunks that this request's server will hold, and make the request leader of the new ones."""
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
        except Exception as error:  # a server that died will not store it either
            often.warning("router: %s did not report whether a prefix is stored: %s", leader.server, error)
        finally:
            self._settle(leader, stored)
            placed.server.load -= placed.prefill  # the prefill is done
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

    # -- what servers report ------------------------------------------------------------------

    async def _hear_from_all(self, until: float) -> None:
        """Start following each server's policy. Wait until each has reported once, or until ``until``."""
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
            logger.warning("router: %s does not report its policy, no request waits for its prefixes: %s", name, error)
        finally:  # the server is gone or was removed
            server.policy = None
            server.heard.set()
            self._release([leader for leader in self._leaders() if leader.server == name])

    def _start(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)


def _token_ids(prompt_ids: Any) -> list[int]:
    """Token ids as a list. They mostly are one already; checking the first id avoids a pass over all of them."""
    if prompt_ids is None or (isinstance(prompt_ids, list) and isinstance(next(iter(prompt_ids), 0), int)):
        return prompt_ids or []
    return normalize_token_ids(prompt_ids)


def _chunk_size() -> int:
    return lmcache_settings.effective(os.environ.get("LMCACHE_CONFIG_FILE")).chunk_size


# Each held request is a pending call of this actor. With Ray's default of 1,000 calls releases would block.
Router = ray.remote(max_concurrency=1_000_000)(PrefillOnceRouter)  # type: ignore[call-overload]
