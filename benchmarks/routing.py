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
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from engine import CHUNK, CONTEXT, POOL, SEQUENCES, STEP, TOKEN, Engine, prefill_seconds
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
    counts: dict[str, Any]  # of the router
    traffic: Counter[str]  # of the engines


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
) -> Outcome:
    """The last of several steps, each of which begins when all conversations of the one before it have ended.

    Args:
        store: where computed KV goes: "shared", "own" (vLLM's offloading) or "none".
    """
    random.seed(seed)  # verl's own router breaks ties with it
    shared = set[str]()
    stores = {"shared": lambda: shared, "own": set[str], "none": lambda: None}
    engines = {str(i): Engine(stores[store](), pool, sequences) for i in range(replicas)}
    router = make({name: Handle(engine) for name, engine in engines.items()})
    now, outcome = asyncio.get_running_loop().time, Outcome(0.0, 0.0, [], [], {}, Counter())

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
        begun, before = now(), _sum(engines)
        outcome.firsts, outcome.holds = [], []
        await asyncio.gather(*(converse(f"{number}/{i}", conversation) for i, conversation in enumerate(step)))
    outcome.makespan = now() - begun
    distinct = {text: turns[-1][0] for text, turns in steps[-1]}
    outcome.traffic = _sum(engines) - before
    outcome.amplification = outcome.traffic["computed"] / sum(distinct.values())
    outcome.counts = router.get_status()
    return outcome


def _sum(engines: dict[str, Engine]) -> Counter[str]:
    return sum((engine.counts for engine in engines.values()), Counter[str]())


def simulate(*args: Any, **kwargs: Any) -> Outcome:
    return run(_simulate(*args, **kwargs))


def least(step: list[Conversation], replicas: int) -> float:
    """A lower bound for the makespan of a batch, in seconds: the router knows all answers, and moving KV costs nothing.

    A replica needs time for its prompts' prefill, for the steps of its longest answer, and to read the KV of all its
    answers. The bound is the least time in which all answers fit. Replicas are filled one after the other with the
    longest answers that are left. An answer may be cut in two, which makes the bound lower.
    """
    prompts = {text: tokens for text, [(tokens, *_)] in step}
    one = min(prefill_seconds(0, tokens) for tokens in prompts.values())
    rest = sum(prefill_seconds(0, tokens) for tokens in prompts.values()) - replicas * one
    work = [(answer, CONTEXT * sum(range(tokens + 1, tokens + answer))) for _, [(tokens, answer, _)] in step]
    work = [*sorted(work, reverse=True), (1, max(0.0, rest))]  # further prefills fit anywhere

    def enough(seconds: float) -> bool:
        left = work[::-1]
        for _ in range(replicas):
            room = seconds - one - STEP * (left[-1][0] - 1)
            while left and left[-1][1] <= room:
                room -= left.pop()[1]
            if not left:
                return True
            left[-1] = left[-1][0], left[-1][1] - max(0.0, room)
        return False

    low, high = 0.0, one + rest + sum(STEP * answer + reads for answer, reads in work)
    while high - low > 0.001:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return low


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

    def run(self, router: str, seed: int) -> Outcome:
        return simulate(
            ROUTERS[router],
            self.steps(seed),
            self.replicas,
            seed,
            store="shared" if router == "kvshare" else "own",
            pool=POOL if self.prompts == "turns" else 2 * POOL,
        )

    def makespan(self, router: str) -> float:
        """Mean over several seeds, in seconds."""
        return statistics.fmean(self.run(router, seed).makespan for seed in self._seeds())

    def traffic(self) -> dict[str, float]:
        """What all replicas together ask of LMCache, a second, with kvshare's router: GB stored, GB loaded, lookups.

        Averages over the rollout of one seed. Every request is looked up once.
        """
        done = self.run("kvshare", seed=0)
        rates = {name: done.traffic[name] * TOKEN / 1e9 / done.makespan for name in ("stored", "loaded")}
        return rates | {"lookups": len(done.firsts) / done.makespan}

    def least(self) -> float:
        """Seconds that no router can be faster than, whatever it knows of the answers; mean over the same seeds."""
        return statistics.fmean(least(self.steps(seed)[-1], self.replicas) for seed in self._seeds())

    def _seeds(self) -> range:
        return range({2: 8, 8: 4, 64: 2}[self.replicas])


LENGTHS = (512, 4096, 16384, 65536)
CELLS = [
    *(
        Cell(*cell)
        for cell in itertools.product((2, 8, 64), ("fewest", "few", "many"), LENGTHS, ("even", "long-tailed"))
    ),
    *(Cell(*cell) for cell in itertools.product((2, 8, 64), ("turns",), (512, 4096))),
]


BUSY = [cell for cell in CELLS if cell.replicas > 2 and cell.tokens in (4096, 16384) and cell.answers == "even"]


def compare(cell: Cell) -> dict[str, float]:
    """Makespans by router, how far kvshare is ahead of the best other one, and how far any router could be at most."""
    found = {router: cell.makespan(router) for router in ROUTERS}
    best, bound = min(found["verl"], found["affinity"]), math.nan if cell.prompts == "turns" else cell.least()
    return found | {"ahead": best / found["kvshare"] - 1, "possible": best / bound - 1}


def table(found: dict[Cell, dict[str, float]]) -> str:
    head = ["replicas", "prompts", "tokens", "answers", *ROUTERS, "ahead", "at most"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for cell, row in found.items():
        shape = [cell.replicas, cell.prompts, f"{cell.tokens:,}", "" if cell.prompts == "turns" else cell.answers]
        ahead = [f"{row[name]:+.1%}" if row[name] == row[name] else "" for name in ("ahead", "possible")]
        lines.append("| " + " | ".join(map(str, [*shape, *(f"{row[name]:.2f}" for name in ROUTERS), *ahead])) + " |")
    return "\n".join(lines)


def traffic_table(found: dict[Cell, dict[str, float]]) -> str:
    lines = ["| replicas | prompts | tokens | stored, GB/s | loaded, GB/s | lookups a second |", "|---" * 6 + "|"]
    for cell, row in found.items():
        shape = f"| {cell.replicas} | {cell.prompts} | {cell.tokens:,} |"
        lines.append(f"{shape} {row['stored']:.1f} | {row['loaded']:.1f} | {row['lookups']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--traffic", action="store_true", help="what the replicas ask of LMCache (docs/multi-node.md)")
    traffic = parser.parse_args().traffic
    cells, measure, show = (BUSY, Cell.traffic, traffic_table) if traffic else (CELLS, compare, table)
    with ProcessPoolExecutor() as pool:
        print(show(dict(zip(cells, pool.map(measure, cells), strict=True))))


if __name__ == "__main__":
    main()
