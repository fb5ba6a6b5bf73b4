"""Routing rollouts, simulated with the project's own routers: `python benchmarks/routing.py` (docs/routing.md).

The routers, the servers' record of stored prefixes and their rates are the real classes. Time is virtual, and an engine
is the model in engine.py.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import random
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from engine import CHUNK, POOL, SEQUENCES, Engine, prefill_seconds
from verl.workers.rollout.router import GlobalRequestLoadBalancer
from virtual_time import run

from kvshare.routing.affinity import AffinityRouter
from kvshare.routing.digests import chunk_digests
from kvshare.routing.router import PrefillOnceRouter
from kvshare.tools.bench.steady_server import Handle
from kvshare.tools.bench.workloads import Conversation, batch, lengths, talk


@dataclass
class Outcome:
    makespan: float  # seconds
    amplification: float
    firsts: list[float]  # seconds to the first token of each request
    holds: list[float]  # seconds until each request was sent to a replica
    counts: dict[str, Any]


# Makes a router of the replicas' handles.
ROUTERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "verl": GlobalRequestLoadBalancer,
    "affinity": AffinityRouter,
    "kvshare": lambda handles: PrefillOnceRouter(handles, {"chunk_size": CHUNK}),
}


async def _simulate(
    make: Callable[[dict[str, Any]], Any],
    steps: list[list[Conversation]],
    replicas: int,
    seed: int = 0,
    store: str = "shared",
    pool: int = POOL,
    sequences: int = SEQUENCES,
    warm: bool = False,
) -> Outcome:
    """The last of several steps, each of which begins when all conversations of the one before it have ended.

    Args:
        store: where computed KV goes: "shared", "own" (vLLM's offloading) or "none".
        warm: prompts are in every replica's prefix cache from the start.
    """
    random.seed(seed)  # verl's own router breaks ties with it
    shared = set[str]()
    stores = {"shared": lambda: shared, "own": set[str], "none": lambda: None}
    engines = {str(i): Engine(stores[store](), pool, sequences) for i in range(replicas)}
    router = make({name: Handle(engine) for name, engine in engines.items()})
    now, outcome = asyncio.get_running_loop().time, Outcome(0.0, 0.0, [], [], {})

    longest = dict[int, int]()
    for text, turns in itertools.chain(*steps):
        longest[text] = max(longest.get(text, 0), turns[-1][0])

    @cache
    def all_digests(text: int) -> list[str]:
        return chunk_digests([text] * longest[text], CHUNK)

    def digests(text: int, tokens: int) -> list[str]:
        return all_digests(text)[: tokens // CHUNK]

    @lru_cache(maxsize=1)  # samples come one after the other
    def prompt(text: int, tokens: int) -> list[int]:
        return [text] * tokens

    async def ask(name: str, text: int, tokens: int, answer: int) -> None:
        began = now()
        fields = {"prompt_ids": prompt(text, tokens)} if router.require_acquire_fields() else {}
        placed = router.acquire_server(name, **fields)
        server, _ = await placed if asyncio.iscoroutine(placed) else placed
        outcome.holds.append(now() - began)
        try:
            first = await engines[server].generate(f"{name}/{tokens}", tokens, digests(text, tokens), answer)
            outcome.firsts.append(first - began)
        finally:
            router.release_server(server, name)

    async def converse(name: str, conversation: Conversation) -> None:
        text, turns = conversation
        for tokens, answer, pause in turns:
            await ask(name, text, tokens, answer)
            await asyncio.sleep(pause)

    for number, step in enumerate(steps):
        begun, computed = now(), sum(engine.computed for engine in engines.values())
        outcome.firsts, outcome.holds = [], []
        if warm:
            for engine in engines.values():
                engine.know(chunk for text, turns in step for chunk in digests(text, turns[-1][0]))
        await asyncio.gather(*(converse(f"{number}/{i}", conversation) for i, conversation in enumerate(step)))
    outcome.makespan = now() - begun
    distinct = {text: turns[-1][0] for text, turns in steps[-1]}
    outcome.amplification = (sum(e.computed for e in engines.values()) - computed) / sum(distinct.values())
    outcome.counts = router.get_status()
    return outcome


def simulate(*args: Any, **kwargs: Any) -> Outcome:
    return run(_simulate(*args, **kwargs))


# -- the cells of docs/routing.md ---------------------------------------------------------------

SAMPLES = {"fewest": 16, "few": 16, "many": 8}
WARM_UP = 2  # steps, in which the router learns the rates


@dataclass(frozen=True)
class Cell:
    replicas: int
    prompts: str  # fewest: half as many as replicas; few: one and a half times; many: four times; or "turns"
    tokens: int  # of a prompt; of the first turn
    answers: str = "even"  # all of 256 tokens; or "long-tailed": median 256, up to 2,048

    def steps(self, seed: int) -> list[list[Conversation]]:
        rng = random.Random(seed)
        if self.prompts == "turns":
            count = 20 * self.replicas
            return [[(k * count + i, talk(rng, self.tokens, 2048)) for i in range(count)] for k in range(WARM_UP + 1)]
        n, prompts = SAMPLES[self.prompts], round(self.replicas * {"fewest": 0.5, "few": 1.5, "many": 4}[self.prompts])
        spread = {"even": 0.0, "long-tailed": 1.0}[self.answers]
        return [
            batch(prompts, n, self.tokens, lengths(rng, prompts * n, 256, 2048, spread), k * prompts)
            for k in range(WARM_UP + 1)
        ]

    def makespan(self, router: str) -> float:
        """Mean over several seeds. "bound": all replicas have the prompts as soon as one can be computed."""
        bound = router == "bound"
        takes = [
            simulate(
                ROUTERS["verl" if bound else router],
                self.steps(seed)[WARM_UP if bound else 0 :],
                self.replicas,
                seed,
                store="shared" if router == "kvshare" else "own",
                pool=POOL if self.prompts == "turns" else 2 * POOL,
                warm=bound,
            ).makespan
            for seed in range({2: 8, 8: 4, 64: 2}[self.replicas])
        ]
        return statistics.fmean(takes) + (prefill_seconds(0, self.tokens) if bound else 0.0)


LENGTHS = (512, 4096, 16384, 65536)
CELLS = [
    *(
        Cell(*cell)
        for cell in itertools.product((2, 8, 64), ("fewest", "few", "many"), LENGTHS, ("even", "long-tailed"))
    ),
    *(Cell(*cell) for cell in itertools.product((2, 8, 64), ("turns",), (512, 4096))),
]


def compare(cell: Cell) -> dict[str, float]:
    """Makespans by router, how far kvshare is ahead of the best other one, and how far any router could be."""
    routers = [*ROUTERS, *([] if cell.prompts == "turns" else ["bound"])]
    found = {router: cell.makespan(router) for router in routers}
    best = min(found["verl"], found["affinity"])
    return found | {"ahead": best / found["kvshare"] - 1, "possible": best / found.get("bound", math.nan) - 1}


def table(found: dict[Cell, dict[str, float]]) -> str:
    head = ["replicas", "prompts", "tokens", "answers", *ROUTERS, "ahead", "at most"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell, row in found.items():
        shape = [cell.replicas, cell.prompts, f"{cell.tokens:,}", "" if cell.prompts == "turns" else cell.answers]
        ahead = [f"{row[name]:+.1%}" if row[name] == row[name] else "" for name in ("ahead", "possible")]
        lines.append("| " + " | ".join(map(str, [*shape, *(f"{row[name]:.2f}" for name in ROUTERS), *ahead])) + " |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    with ProcessPoolExecutor() as pool:
        print(table(dict(zip(CELLS, pool.map(compare, CELLS), strict=True))))


if __name__ == "__main__":
    main()
