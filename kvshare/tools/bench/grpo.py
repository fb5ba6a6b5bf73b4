"""GRPO's pattern on live engines: n samples of one prompt at once, placed by verl's router, by prompt, and by ours."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import uuid4

from verl.workers.rollout.router import GlobalRequestLoadBalancer

from kvshare.record import worker_events
from kvshare.routing.affinity import AffinityRouter
from kvshare.routing.digests import chunk_digests
from kvshare.routing.prefixes import Prefill
from kvshare.routing.router import PrefillOnceRouter
from kvshare.tools.bench.asked import Asked
from kvshare.tools.bench.endpoint import Answer, Endpoint, Prompt, sample, unseen
from kvshare.tools.bench.engines import Engines
from kvshare.tools.bench.steady_server import POLICY, Handle, SteadyServer


class Replica(SteadyServer):
    """An endpoint as a rollout server that the router can ask.

    Args:
        endpoint: the vLLM server.
        chunk_size: tokens.
        receiver: events of its engine, if it sends any.
    """

    def __init__(self, endpoint: Endpoint, chunk_size: int, receiver: worker_events.Receiver | None) -> None:
        super().__init__()
        self.endpoint = endpoint
        self._chunk_size, self._receiver = chunk_size, receiver
        self._computed: set[str] = set()  # digests
        self._cached: dict[str, int] = {}  # tokens, by running request

    async def ask(self, request: str, prompt: Prompt, answer: int) -> Answer:
        chunks = chunk_digests(prompt, self._chunk_size)
        self._prefixes.started(request, Prefill(POLICY, chunks[-1] if chunks else "", len(chunks) * self._chunk_size))
        self._cached[request] = self._chunk_size * sum(chunk in self._computed for chunk in chunks)
        self._computed |= set(chunks)
        asked, heard = time.monotonic(), list[tuple[float, float]]()

        def first_token() -> None:
            now = time.monotonic()
            self._prefixes.first_token(request, 0 if self._receiver else sys.maxsize)
            self._rates.prefilled(max(0, len(prompt) - self._cached[request]), asked, now)
            heard.append((now, self._rates.decoding(len(prompt), now)))

        try:
            return await self.endpoint.ask(prompt, answer, request, first_token)
        finally:
            self._prefixes.ended(request)
            del self._cached[request]
            for first, read in heard:
                now = time.monotonic()
                self._rates.answered(answer, now - first, self._rates.decoding(-len(prompt), now) - read)

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
                if request in self._cached:
                    self._cached[request] += sum(event["tokens"])


ROUTERS = {
    "verl": lambda handles, chunk: GlobalRequestLoadBalancer(handles),
    "affinity": lambda handles, chunk: AffinityRouter(handles),
    "kvshare": lambda handles, chunk: PrefillOnceRouter(handles, {"chunk_size": chunk}),
}


@contextmanager
def router(name: str, replicas: list[Replica], chunk_size: int) -> Iterator[Any]:
    """A router of replicas, which ends with the context what it has started."""
    handles = {replica.endpoint.url: Handle(replica) for replica in replicas}
    made = ROUTERS[name](handles, chunk_size)
    try:
        yield made
    finally:
        made.remove_servers(list(handles))


async def ask(router: Any, replicas: list[Replica], request: str, prompt: Prompt, tokens: int) -> Answer:
    """Send a request where a router places it. Times in the answer include the time that the router holds it."""
    began = time.perf_counter()
    fields = {"prompt_ids": prompt} if "prompt_ids" in router.require_acquire_fields() else {}
    placed = router.acquire_server(request, **fields)
    name, _ = await placed if asyncio.iscoroutine(placed) else placed
    held = time.perf_counter() - began
    (replica,) = (replica for replica in replicas if replica.endpoint.url == name)
    try:
        got = await replica.ask(uuid4().hex, prompt, tokens)
    finally:
        router.release_server(name, request)
    return Answer(held + got.first, held + got.end, got.logprob)


async def ask_together(router: Any, replicas: list[Replica], prompt: Prompt, asked: Asked) -> list[Answer]:
    return await asyncio.gather(*(ask(router, replicas, uuid4().hex, prompt, asked.answer) for _ in range(asked.n)))


@asynccontextmanager
async def following(replicas: list[Replica]) -> AsyncIterator[None]:
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
    async with following(replicas):
        for tokens in lengths * (1 + asked.repeat):  # the first round warms up
            for name in ROUTERS:
                (prompt,) = unseen(1, tokens)
                with router(name, replicas, engines.chunk_size) as placing:
                    got = await sample(found, ask_together(placing, replicas, prompt, asked))
                row = {"routing": name, "tokens": tokens, "n": asked.n, "answer": asked.answer, "samples": []}
                rows.setdefault((name, tokens), row)["samples"].append(got.numbers())
                await asyncio.sleep(asked.settle)
    for row in rows.values():
        del row["samples"][0]
    return list(rows.values())
