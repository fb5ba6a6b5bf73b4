"""GRPO's pattern on live engines: n samples of one prompt at once, placed by verl's router, by prompt, and by ours."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from verl.workers.rollout.router import GlobalRequestLoadBalancer

from kvshare.record import worker_events
from kvshare.routing.cost_model import Pace, Rates
from kvshare.routing.prefixes import Prefill, StoredPrefixes, chunk_digests
from kvshare.routing.router import PrefillOnceRouter
from kvshare.tools.bench.asked import Asked
from kvshare.tools.bench.endpoint import POLICY, Answer, Endpoint, Prompt, sample, unseen
from kvshare.tools.bench.engines import Engines


class Replica:
    """An endpoint as a rollout server the router can ask (``KVShareServer``)."""

    def __init__(self, endpoint: Endpoint, chunk_size: int, receiver: worker_events.Receiver | None) -> None:
        self.endpoint = endpoint
        self._chunk_size, self._receiver = chunk_size, receiver
        self._prefixes, self._rates = StoredPrefixes(), Rates()

    async def wait_policy_change(self, known: str | None) -> tuple[str, Pace]:
        if known == POLICY:
            await asyncio.Event().wait()  # never
        return POLICY, self._rates.pace()

    async def wait_prefix_stored(self, policy: str, prefix: str, seconds: float) -> tuple[bool, Pace]:
        return await self._prefixes.wait((policy, prefix), seconds), self._rates.pace()

    async def ask(self, request: str, prompt: Prompt, answer: int) -> Answer:
        chunks = chunk_digests(prompt, self._chunk_size)
        self._prefixes.started(request, Prefill(POLICY, chunks[-1] if chunks else "", len(chunks) * self._chunk_size))
        try:
            return await self.endpoint.ask(prompt, answer, request, lambda: self._heard(request))
        finally:
            self._prefixes.ended(request)

    def _heard(self, request: str) -> None:
        self._prefixes.first_token(request, 0 if self._receiver else sys.maxsize)

    async def follow(self) -> None:
        """What the engine stores; without its events a prefix counts as stored at the first token."""
        while self._receiver:
            event = await self._receiver.receive()
            request = event.get("request") or ""
            if event["op"] == "store":
                self._prefixes.storing(request)
            elif event["op"] == "stored":
                self._rates.stored(event["seconds"])
                self._prefixes.stored(request, event["end"])
            elif event["op"] == "load" and event["tokens"]:
                self._rates.loaded(sum(event["tokens"]), event["seconds"])


class _Handle:
    """``handle.method.remote(…)``, as of a Ray actor."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._replica, name))


class Affinity(GlobalRequestLoadBalancer):
    """All samples of a prompt to one replica; here there is one prompt."""

    def acquire_server(self, request_id: str) -> tuple[str, Any]:
        name = next(iter(self._servers))
        self._inflight_requests[name] += 1
        return name, self._servers[name]


ROUTERS = {
    "verl": lambda handles, chunk: GlobalRequestLoadBalancer(handles),
    "affinity": lambda handles, chunk: Affinity(handles),
    "kvshare": lambda handles, chunk: PrefillOnceRouter(handles, {"chunk_size": chunk}),
}


@asynccontextmanager
async def _following(replicas: list[Replica]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(replica.follow()) for replica in replicas]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


async def patterns(found: list[Endpoint], engines: Engines, asked: Asked) -> list[dict[str, Any]]:
    """Rows of one routing and prompt length each; ``computed`` over ``tokens`` is the prefill amplification."""
    rows: dict[tuple[str, int], Any] = {}
    receivers = engines.events or (None, None)
    replicas = [Replica(e, engines.chunk_size, r) for e, r in zip(found, receivers, strict=True)]
    lengths = list(dict.fromkeys(tokens for tokens, _ in asked.shapes))
    async with _following(replicas):
        for tokens in lengths * (1 + asked.repeat):  # the first round warms up
            for name, router in ROUTERS.items():
                balancer = router({replica.endpoint.url: _Handle(replica) for replica in replicas}, engines.chunk_size)
                got = await sample(found, _together(balancer, replicas, tokens, asked))
                balancer.remove_servers([replica.endpoint.url for replica in replicas])  # ends what it follows
                row = {"routing": name, "tokens": tokens, "n": asked.n, "answer": asked.answer, "samples": []}
                rows.setdefault((name, tokens), row)["samples"].append(got.numbers())
                await asyncio.sleep(asked.settle)
    for row in rows.values():
        del row["samples"][0]
    return list(rows.values())


async def _together(balancer: Any, replicas: list[Replica], tokens: int, asked: Asked) -> list[Answer]:
    (prompt,) = unseen(1, tokens)
    by_url = {replica.endpoint.url: replica for replica in replicas}

    async def one() -> Answer:
        request, began = uuid4().hex, time.perf_counter()
        fields = {"prompt_ids": prompt} if "prompt_ids" in balancer.require_acquire_fields() else {}
        placed = balancer.acquire_server(request, **fields)
        name, _ = await placed if asyncio.iscoroutine(placed) else placed
        held = time.perf_counter() - began
        try:
            got = await by_url[name].ask(request, prompt, asked.answer)
        finally:
            balancer.release_server(name, request)
        return Answer(held + got.first, held + got.end, got.logprob)

    return await asyncio.gather(*(one() for _ in range(asked.n)))
