"""Routing GRPO rollouts, simulated with the project's own router: `python benchmarks/routing.py` (about a minute).

The router, the servers' record of stored prefixes and their rates are the real classes; time is
virtual, and an engine is a model: one prefill at a time, decode steps that slow down with the batch.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import selectors
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verl.workers.rollout.router import GlobalRequestLoadBalancer

from kvshare.routing.cost_model import Pace, Rates
from kvshare.routing.prefixes import Prefill, StoredPrefixes, chunk_digests
from kvshare.routing.router import PrefillOnceRouter

CHUNK = 256
PREFILL = 39_000  # tokens a second: 7B on an H100, 4,096 tokens in 104 ms (docs/benchmarks.md)
LOAD = 84_000  # tokens a second from LMCache's multi-process server: 4,096 in 49 ms
STORE = 0.01  # seconds from the end of a prefill until others find it; assumed
STEP, STEP_EACH = 0.008, 0.00005  # seconds of a decode step, and more for each request in it; assumed
POLICY = "run-1"


class VirtualTime(asyncio.SelectorEventLoop):
    """Jumps to the next timer instead of waiting for it; raises if there is none: somebody waits forever."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_Jump(self))

    def time(self) -> float:
        return self._now


class _Jump(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    def __init__(self, loop: VirtualTime) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list:
        if timeout is None:
            raise RuntimeError("everybody waits and nothing will happen")
        self._loop._now += max(0.0, timeout)
        return super().select(0)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=VirtualTime) as runner:
        return runner.run(coroutine)


class Engine:
    """A rollout server with its engine."""

    def __init__(self, stored: set[str]) -> None:
        self.computed = 0  # chunks
        self._stored, self._local = stored, set[str]()
        self._prefilling, self._batch = asyncio.Lock(), 0
        self._prefixes, self._rates = StoredPrefixes(), Rates()
        self._never = asyncio.Event()

    async def wait_policy_change(self, known: str | None) -> tuple[str, Pace]:
        if known == POLICY:
            await self._never.wait()
        return POLICY, self._rates.pace()

    async def wait_prefix_stored(self, policy: str, prefix: str, seconds: float) -> tuple[bool, Pace]:
        return await self._prefixes.wait((policy, prefix), seconds), self._rates.pace()

    async def generate(self, request: str, prompt: list[int], response: int) -> None:
        chunks = chunk_digests(prompt, CHUNK)
        self._prefixes.started(request, Prefill(POLICY, chunks[-1], len(chunks) * CHUNK))
        async with self._prefilling:
            await self._prefill(request, prompt, chunks)
        self._batch += 1
        began = asyncio.get_running_loop().time()
        for left in range(response, 0, -32):
            await asyncio.sleep(min(32, left) * (STEP + STEP_EACH * self._batch))
        self._batch -= 1
        self._rates.answered(response, asyncio.get_running_loop().time() - began)
        self._prefixes.ended(request)

    async def _prefill(self, request: str, prompt: list[int], chunks: list[str]) -> None:
        known = list(itertools.takewhile(lambda c: c in self._local or c in self._stored, chunks))
        remote = sum(c not in self._local for c in known) * CHUNK
        if remote:
            await asyncio.sleep(remote / LOAD)
            self._rates.loaded(remote, remote / LOAD)
        missing = len(prompt) - len(known) * CHUNK
        asked = asyncio.get_running_loop().time()
        await asyncio.sleep(missing / PREFILL)
        if missing:
            self._rates.prefilled(missing, asked, asked + missing / PREFILL)
        self.computed += len(chunks) - len(known)
        self._local |= set(chunks)
        self._prefixes.first_token(request, len(known) * CHUNK)
        if len(known) < len(chunks):
            self._prefixes.storing(request)
            asyncio.get_running_loop().call_later(STORE, self._store, request, chunks)

    def _store(self, request: str, chunks: list[str]) -> None:
        self._stored |= set(chunks)
        self._rates.stored(STORE)
        self._prefixes.stored(request, len(chunks) * CHUNK)


class Affinity(GlobalRequestLoadBalancer):
    """All samples of a prompt to one replica, round robin over prompts."""

    def __init__(self, servers: dict[str, Any]) -> None:
        super().__init__(servers)
        self._next, self._of = itertools.cycle(servers), dict[str, str]()

    def acquire_server(self, request_id: str, prompt_ids: list[int] | None = None) -> tuple[str, Any]:
        prompt = request_id.partition("/")[0]
        name = self._of.setdefault(prompt, next(self._next))
        self._inflight_requests[name] += 1
        return name, self._servers[name]


ROUTERS = {
    "verl": GlobalRequestLoadBalancer,
    "affinity": Affinity,
    "kvshare": lambda servers: PrefillOnceRouter(servers, {"chunk_size": CHUNK}),
}


@dataclass
class Outcome:
    amplification: float
    makespan: float
    waits: list[float]  # seconds until a request was sent to a replica
    counts: dict[str, Any]


async def rollout(router: str, replicas: int, n: int, prompts: int, tokens: int = 4096, seed: int = 0) -> Outcome:
    """One step of GRPO: ``prompts`` times ``n`` requests at once; lengths of answers have a heavy tail."""
    rng = random.Random(seed)
    random.seed(seed)  # verl's own router breaks ties with it
    stored: set[str] = set()
    engines = {f"{i}": Engine(stored) for i in range(replicas)}
    handles = {name: _Handle(engine) for name, engine in engines.items()}
    balancer = ROUTERS[router](handles)
    texts = [[rng.randrange(150_000) for _ in range(tokens)] for _ in range(prompts)]
    loop, waits = asyncio.get_running_loop(), []

    async def ask(prompt: int, sample: int, response: int) -> None:
        request = f"{prompt}/{sample}"
        fields = {} if router == "verl" else {"prompt_ids": texts[prompt]}
        placed = balancer.acquire_server(request, **fields)
        name, _ = await placed if asyncio.iscoroutine(placed) else placed
        waits.append(loop.time())
        try:
            await engines[name].generate(request, texts[prompt], response)
        finally:
            balancer.release_server(name, request)

    lengths = [min(8192, int(rng.lognormvariate(5.8, 1.0)) + 1) for _ in range(prompts * n)]
    await asyncio.gather(*(ask(i // n, i % n, length) for i, length in enumerate(lengths)))
    computed = sum(engine.computed for engine in engines.values())
    distinct = prompts * (tokens // CHUNK)
    return Outcome(computed / distinct, loop.time(), waits, balancer.get_status())


class _Handle:
    """``handle.method.remote(…)``, as of a Ray actor."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._engine, name))


SHAPES = [  # replicas, samples a prompt, prompt tokens; 32 requests a replica
    *((2, 4, 4096), (2, 16, 4096), (8, 8, 4096), (8, 64, 4096), (32, 16, 4096), (64, 4, 4096), (64, 64, 4096)),
    *((8, 8, 512), (8, 8, 16384), (64, 16, 16384)),
]


def simulate(shapes: list[tuple[int, int, int]]) -> dict[tuple[int, int, int], dict[str, Outcome]]:
    return {
        (replicas, n, tokens): {
            router: run(rollout(router, replicas, n, max(1, replicas * 32 // n), tokens)) for router in ROUTERS
        }
        for replicas, n, tokens in shapes
    }


def table(found: dict[tuple[int, int, int], dict[str, Outcome]]) -> str:
    lines = [
        "| replicas | n | prompt tokens | routing | prefill amplification | makespan, s | longest wait, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for shape, outcomes in found.items():
        for router, out in outcomes.items():
            cells = (*shape, router, f"{out.amplification:.2f}", f"{out.makespan:.1f}", f"{max(out.waits):.2f}")
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot(found: dict[tuple[int, int, int], dict[str, Outcome]], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "routing"  # the same file for the same numbers
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for at, router in enumerate(ROUTERS):
        where = [i + (at - 1) * 0.27 for i in range(len(found))]
        left.bar(where, [out[router].amplification for out in found.values()], 0.27, label=router)
        slower = [out[router].makespan / out["kvshare"].makespan for out in found.values()]
        right.bar(where, slower, 0.27, label=router)
    left.set(title="prefill amplification (1 is perfect)", yscale="log")
    right.set(title="makespan, kvshare = 1", ylim=(0.9, None))
    for axes in (left, right):
        axes.set_xticks(range(len(found)), [f"{r} x {n}\n{t:,}" for r, n, t in found], fontsize=7)
        axes.set_xlabel("replicas x n, prompt tokens")
        axes.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plot", type=Path, help="also draw it, to this SVG file")
    path = parser.parse_args().plot
    found = simulate(SHAPES)
    print(table(found))
    if path:
        plot(found, path)


if __name__ == "__main__":
    main()
