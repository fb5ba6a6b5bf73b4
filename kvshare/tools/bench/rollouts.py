"""Whole rollouts over two engines: batches of prompts with answers of different length, and conversations."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from kvshare.core.errors import UserError
from kvshare.tools.bench.endpoint import Answer, Prompt, endpoints, sample, unseen
from kvshare.tools.bench.engines import Engines
from kvshare.tools.bench.grpo import Replica, ask, following, router

VARIANTS = {  # engines and router
    "no connector, verl": ("plain", "verl"),
    "no connector, affinity": ("plain", "affinity"),
    "vLLM's offloading, verl": ("offload", "verl"),
    "connector, verl": ("shared", "verl"),
    "kvshare": ("shared", "kvshare"),
}
SETTLE = 2.0  # seconds between rollouts
FORMS = "batch:PROMPTS:N:TOKENS:MEDIAN:MOST or talks:COUNT:FIRST:MORE"


@dataclass(frozen=True)
class Rollout:
    """``batch``: all samples of all prompts at once, answers of ``median`` tokens and at most ``most``.

    ``talks``: conversations of two to seven turns, the first of ``first`` tokens, the next of ``more`` more each.
    """

    kind: str
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Rollout:
        kind, *numbers = text.split(":")
        fields = {"batch": 5, "talks": 3}.get(kind)
        if fields != len(numbers) or not all(number.isdecimal() and int(number) for number in numbers):
            raise UserError(f"--rollout {text!r} must be {FORMS}, in whole numbers from 1")
        return cls(kind, tuple(map(int, numbers)))

    def __str__(self) -> str:
        return ":".join([self.kind, *map(str, self.numbers)])

    def requests(self, router: Any, replicas: list[Replica], seed: int) -> list[Coroutine[Any, Any, list[Answer]]]:
        """One for each sample, or conversation. The seed decides the lengths; prompts are new each time."""
        rng = random.Random(seed)
        if self.kind == "batch":
            count, n, tokens, median, most = self.numbers
            prompts, answers = unseen(count, tokens), lengths(rng, count * n, median, most)
            return [_converse(router, replicas, [(prompts[i // n], answers[i], 0.0)]) for i in range(count * n)]
        count, first, more = self.numbers
        return [_converse(router, replicas, _talk(rng, first, more)) for _ in range(count)]


def lengths(rng: random.Random, count: int, median: int, most: int, spread: float = 0.8) -> list[int]:
    """Tokens of answers: log-normal, at least 4 and at most ``most``."""
    return [max(4, min(most, round(rng.lognormvariate(math.log(median), spread)))) for _ in range(count)]


def _talk(rng: random.Random, first: int, more: int) -> list[tuple[Prompt, int, float]]:
    turns = max(2, min(7, round(rng.lognormvariate(1.1, 0.8))))
    (prompt,) = unseen(1, first + more * turns)
    return [(prompt[: first + more * turn], lengths(rng, 1, 64, 256)[0], rng.expovariate(2.0)) for turn in range(turns)]


async def _converse(router: Any, replicas: list[Replica], turns: list[tuple[Prompt, int, float]]) -> list[Answer]:
    name, answers = uuid4().hex, []
    for prompt, tokens, pause in turns:
        answers.append(await ask(router, replicas, name, prompt, tokens))
        await asyncio.sleep(pause)
    return answers


async def measure(engines: Engines, rollouts: list[Rollout], repeat: int) -> list[dict[str, Any]]:
    """Rows of one rollout and variant each. All variants take turns; the first round, not measured, warms up."""
    urls = {"shared": engines.urls, "plain": engines.plain, "offload": engines.offload}
    rows: dict[tuple[Rollout, str], dict[str, Any]] = {}
    async with endpoints([url for pair in urls.values() for url in pair]) as found:
        for endpoint in found:
            await endpoint.connect()
        at = {endpoint.url: endpoint for endpoint in found}
        events = dict(zip(engines.urls, engines.events or (), strict=False))
        replicas = {
            kind: [Replica(at[url], engines.chunk_size, events.get(url), engines.stall) for url in pair]
            for kind, pair in urls.items()
        }
        async with following(replicas["shared"]):
            for number in range(1 + repeat):
                for rollout in rollouts:
                    for name, (kind, routing) in list(VARIANTS.items())[:: (-1) ** number]:
                        if len(replicas[kind]) < 2:
                            continue
                        got = await _measure(rollout, routing, replicas[kind], engines.chunk_size, number)
                        row = {"rollout": str(rollout), "variant": name, "samples": []}
                        rows.setdefault((rollout, name), row)["samples"] += [got] if number else []
                        await asyncio.sleep(SETTLE)
    return list(rows.values())


async def _measure(
    rollout: Rollout, routing: str, replicas: list[Replica], chunk_size: int, seed: int
) -> dict[str, Any]:
    with router(routing, replicas, chunk_size) as placing:
        requests = rollout.requests(placing, replicas, seed)
        began, answers = time.perf_counter(), list[Answer]()

        async def gathered() -> list[Answer]:
            for some in await asyncio.gather(*requests):
                answers.extend(some)
            return answers

        counted = (await sample([replica.endpoint for replica in replicas], gathered())).numbers()
        makespan = time.perf_counter() - began
        status = placing.get_status()
    firsts = sorted(answer.first for answer in answers)
    counted |= {
        "makespan": makespan,
        "first_p50": firsts[len(firsts) // 2],
        "first_p95": firsts[len(firsts) * 95 // 100],
    }
    return counted | {name: status[name] for name in ("stayed", "moved", "held", "longest_wait") if name in status}
