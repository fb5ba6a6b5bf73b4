"""A model of rollout servers in virtual time, for benchmarks/routing.py: vLLM's scheduler, its prefix cache, and `mp`.

The model is Qwen2.5-7B's shape on an H100. Its constants were measured there (docs/benchmarks/h100.md), or are fitted
to the makespans of batches on two of them. tests/routing/test_simulation.py compares it with all that was measured.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field

from kvshare.routing.prefixes import Prefill
from kvshare.tools.bench.steady_server import POLICY, SteadyServer

CHUNK = 256  # tokens; also the granularity of the engine's prefix cache here
BUDGET = 8192  # tokens a step, vLLM's default on an H100
SEQUENCES = 256  # running requests
TOKEN = 57_344  # bytes of KV of a token
POOL = 11 * 2**30 // TOKEN  # tokens of KV
FIRST, DEEP = 18.2e-6, 0.96e-9  # seconds to compute a token, and more for each token before it (1,024 to 16,384)
LOAD = 500_000  # tokens a second from LMCache's server, in the background
DELAY = 0.08  # seconds from the end of a prefill until others find it
STEP, CONTEXT = 0.0061, 16e-9  # seconds of a decode step, and more for each token of KV that it reads; fitted
RECEIVE, RECEIVE_TOKEN = 0.002, 0.3e-6  # seconds of the API server for a request, and for each of its tokens


@dataclass(eq=False)
class Request:
    chunks: list[str]  # digests
    prompt: int  # tokens
    answer: int  # tokens
    name: str = ""
    computed: int = 0  # tokens of the prompt that have KV here
    cached: int = 0  # of them, those that were found
    generated: int = 0
    loaded: bool = False  # what others stored has been looked up
    asked: float = 0.0
    first: float = 0.0  # time of the first token
    read: float = 0.0  # of Rates.decoding, then
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Cache:
    """vLLM's prefix cache: chunks of running requests are pinned, others are evicted, the least recently used first."""

    def __init__(self, tokens: int) -> None:
        self._capacity = tokens // CHUNK
        self._pinned: Counter[str] = Counter()
        self._free: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, chunk: str) -> bool:
        return chunk in self._pinned or chunk in self._free

    def room(self, request: Request) -> bool:
        new = sum(chunk not in self._pinned for chunk in request.chunks) + request.answer // CHUNK + 1
        return not self._pinned or len(self._pinned) + new <= self._capacity

    def pin(self, chunks: list[str]) -> None:
        for chunk in chunks:
            self._free.pop(chunk, None)
            self._pinned[chunk] += 1
        while self._free and len(self._pinned) + len(self._free) > self._capacity:
            self._free.popitem(last=False)

    def unpin(self, chunks: list[str]) -> None:
        for chunk in reversed(chunks):  # vLLM evicts the end of a prefix first
            self._pinned[chunk] -= 1
            if not self._pinned[chunk]:
                del self._pinned[chunk]
                self._free[chunk] = None


class Engine(SteadyServer):
    """A rollout server (``KVShareServer``) with its engine.

    Args:
        stored: what LMCache's server has; None: no connector. A set of its own is vLLM's offloading.
        pool: tokens of KV.
        sequences: requests that may run at the same time.
    """

    def __init__(self, stored: set[str] | None, pool: int = POOL, sequences: int = SEQUENCES) -> None:
        super().__init__()
        self._rates.stall = 0.0  # by CUDA IPC, as on the H100s that it is compared with, `mp` loads in the background
        self.counts: Counter[str] = Counter()  # tokens computed, loaded, and sent to be stored
        self._stored, self._cache, self._sequences = stored, Cache(pool), sequences
        self._waiting, self._running = deque[Request](), list[Request]()
        self._arrived, self._received = asyncio.Event(), 0.0
        self._task = asyncio.ensure_future(self._loop())

    async def generate(self, name: str, prompt: int, chunks: list[str], answer: int) -> float:
        """Returns when the first token came."""
        now = asyncio.get_running_loop().time
        request = Request(chunks, prompt, answer, name, asked=now())
        self._prefixes.started(name, Prefill(POLICY, chunks[-1] if chunks else "", len(chunks) * CHUNK))
        self._received = max(self._received, now()) + RECEIVE + RECEIVE_TOKEN * prompt
        await asyncio.sleep(self._received - now())
        self._waiting.append(request)
        self._arrived.set()
        await request.ended.wait()
        self._prefixes.ended(name)
        return request.first

    async def _loop(self) -> None:
        while True:
            if not self._waiting and not self._running:
                await self._wait(None)
            elif not await self._step():
                await self._wait(None)  # for a load

    async def _wait(self, seconds: float | None) -> None:
        self._arrived.clear()
        try:
            await asyncio.wait_for(self._arrived.wait(), seconds)
        except TimeoutError:
            return

    async def _step(self) -> bool:
        """Schedule a step and let its time pass; only decode steps up to the next event at once. False: none to do."""
        now = asyncio.get_running_loop().time
        decoding = [request for request in self._running if request.computed == request.prompt]
        parts = self._schedule(BUDGET - len(decoding))
        if not parts and not decoding:
            return False
        reads = sum(request.prompt + request.generated for request in decoding)
        step = STEP + CONTEXT * reads
        if parts:
            await asyncio.sleep(step + sum(prefill_seconds(begin, end) for _, begin, end in parts))
            done = 1
        else:
            most = min(request.answer - request.generated for request in decoding)
            step += CONTEXT * len(decoding) * most / 2
            began = now()
            await self._wait(most * step)
            done = min(most, round((now() - began) / step))
        for request in decoding:
            request.generated += done
        for request, begin, end in parts:
            self.counts["computed"] += end - begin
            if end == request.prompt:
                self._first_token(request)
        for request in [request for request in self._running if request.generated >= request.answer]:
            self._end(request)
        return True

    def _schedule(self, budget: int) -> list[tuple[Request, int, int]]:
        """Parts of prompts to compute in this step: request, first and last token."""
        parts = []

        def take(request: Request) -> None:
            nonlocal budget
            tokens = min(budget, request.prompt - request.computed)
            parts.append((request, request.computed, request.computed + tokens))
            request.computed += tokens
            budget -= tokens

        for request in self._running:
            if request.computed < request.prompt and budget:
                take(request)
        for request in list(self._waiting):
            if not budget or len(self._running) >= self._sequences:
                break
            if self._look_up(request):
                continue
            if not self._cache.room(request):
                break
            self._waiting.remove(request)
            self._running.append(request)
            self._cache.pin(request.chunks)  # a request that is scheduled after this one finds them
            take(request)
        return parts

    def _look_up(self, request: Request) -> bool:
        """Find what is cached. True while a load has been started, which ends in the background."""
        local = sum(1 for _ in itertools.takewhile(lambda chunk: chunk in self._cache, request.chunks))
        found = local
        if self._stored is not None and not request.loaded:
            found += sum(1 for _ in itertools.takewhile(lambda c: c in self._stored, request.chunks[local:]))
            if found > local:
                self._waiting.remove(request)
                seconds = (found - local) * CHUNK / LOAD
                asyncio.get_running_loop().call_later(seconds, self._loaded, request, found, seconds)
                return True
        request.computed = request.cached = max(request.cached, min(found * CHUNK, request.prompt - 1))
        return False

    def _loaded(self, request: Request, found: int, seconds: float) -> None:
        self._rates.loaded(round(seconds * LOAD), seconds)
        self.counts["loaded"] += round(seconds * LOAD)
        request.loaded, request.cached = True, min(found * CHUNK, request.prompt - 1)
        self._cache.pin(request.chunks[:found])
        self._cache.unpin(request.chunks[:found])
        self._waiting.appendleft(request)
        self._arrived.set()

    def _first_token(self, request: Request) -> None:
        now = asyncio.get_running_loop().time()
        request.first, request.generated = now, 1
        request.read = self._rates.decoding(request.prompt, now)
        self._rates.prefilled(request.prompt - request.cached, request.asked, now)
        self._prefixes.first_token(request.name, request.cached if self._stored is not None else request.prompt)
        if self._stored is not None and request.cached < len(request.chunks) * CHUNK:
            self._prefixes.storing(request.name)
            asyncio.get_running_loop().call_later(DELAY, self._store, request)

    def _store(self, request: Request) -> None:
        assert self._stored is not None
        self.counts["stored"] += CHUNK * len(request.chunks) - request.cached // CHUNK * CHUNK
        self._stored |= set(request.chunks)
        self._rates.stored(DELAY)
        self._prefixes.stored(request.name, len(request.chunks) * CHUNK)

    def _end(self, request: Request) -> None:
        self._running.remove(request)
        self._cache.unpin(request.chunks)
        now = asyncio.get_running_loop().time()
        read = self._rates.decoding(-request.prompt, now) - request.read
        self._rates.answered(request.answer, now - request.first, read)
        request.ended.set()


def prefill_seconds(begin: int, end: int) -> float:
    """Seconds to compute a prompt's tokens from ``begin`` to ``end``."""
    return FIRST * (end - begin) + DEEP * (end**2 - begin**2) / 2
