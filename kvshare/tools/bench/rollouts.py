"""Whole rollouts over live engines, by what is compared: routers without a connector, vLLM's own offloading, ours."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

from kvshare.core.errors import UserError
from kvshare.tools.bench.endpoint import Answer, Prompt, endpoints, sample, unseen
from kvshare.tools.bench.engines import Engines
from kvshare.tools.bench.grpo import Replica, ask, following, router
from kvshare.tools.bench.workloads import Turn, Workload, tokens_of

ARMS = {  # the kind of its engines, and the router
    "verl": ("plain", "verl"),
    "affinity": ("plain", "affinity"),
    "offloading": ("offload", "verl"),
    "connector": ("shared", "verl"),
    "kvshare": ("shared", "kvshare"),
}
SETTLE = 2.0  # seconds between rollouts
COUNTED = ("stayed", "moved", "held", "longest_wait")  # by our router

Rows = list[dict[str, Any]]


def kinds(arms: list[str], replicas: int) -> list[str]:
    """The kind of each engine that the arms need.

    Raises:
        UserError: there is no such arm.
    """
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise UserError(f"--arms {unknown[0]!r} must be of {', '.join(ARMS)}")
    return [kind for kind in dict.fromkeys(ARMS[arm][0] for arm in arms) for _ in range(replicas)]


async def measure(
    engines: Engines,
    workloads: list[Workload],
    arms: list[str],
    repeat: int,
    until: float = math.inf,
    save: Callable[[Rows], None] = lambda rows: None,
) -> Rows:
    """Rows of one workload and arm each. All arms take turns; the first workload, not measured, warms up.

    Args:
        arms: of ``ARMS``.
        repeat: rounds.
        until: time after which no further round begins; monotonic clock.
        save: called with the rows so far after each measurement.
    """
    rows: dict[tuple[Workload, str], dict[str, Any]] = {
        (w, arm): {"rollout": str(w), "arm": arm, "samples": []} for w in workloads for arm in arms
    }
    async with endpoints([url for urls in engines.by_kind.values() for url in urls]) as found:
        for endpoint in found:
            await endpoint.connect()
        at = {endpoint.url: endpoint for endpoint in found}
        events = dict(zip(engines.by_kind.get("shared", ()), engines.events or (), strict=False))
        replicas = {
            kind: [Replica(at[url], engines.chunk_size, events.get(url)) for url in urls]
            for kind, urls in engines.by_kind.items()
        }
        async with following(replicas.get("shared", [])):
            for number in range(1 + repeat):
                if number > 1 and time.monotonic() > until:
                    break
                for workload in workloads if number else workloads[:1]:
                    for arm in arms[:: (-1) ** number]:
                        kind, routing = ARMS[arm]
                        got = await _measure(workload, routing, replicas[kind], engines.chunk_size, number)
                        if number:
                            rows[workload, arm]["samples"].append(got)
                        save(list(rows.values()))
                        await asyncio.sleep(SETTLE)
    return list(rows.values())


async def _measure(
    workload: Workload, routing: str, replicas: list[Replica], chunk_size: int, seed: int
) -> dict[str, Any]:
    conversations = workload.conversations(seed)
    pool = sum([await replica.endpoint.pool() for replica in replicas])
    prompts = unseen(1 + max(text for text, _ in conversations), max(turns[-1][0] for _, turns in conversations))
    answers = list[Answer]()

    with router(routing, replicas, chunk_size) as placing:

        async def converse(prompt: Prompt, turns: list[Turn]) -> None:
            name = uuid4().hex
            for tokens, answer, pause in turns:
                answers.append(await ask(placing, replicas, name, prompt[:tokens], answer))
                await asyncio.sleep(pause)

        makespan = 0.0

        async def all_of_them() -> list[Answer]:
            nonlocal makespan
            began = time.perf_counter()
            await asyncio.gather(*(converse(prompts[text], turns) for text, turns in conversations))
            makespan = time.perf_counter() - began
            return answers

        counted = (await sample([replica.endpoint for replica in replicas], all_of_them())).numbers()
        status = placing.get_status()
    firsts = sorted(answer.first for answer in answers)
    counted |= {
        "makespan": makespan,
        "first_p50": firsts[len(firsts) // 2],
        "first_p95": firsts[len(firsts) * 95 // 100],
        "of_pool": tokens_of(conversations) / pool,
    }
    return counted | {name: status[name] for name in COUNTED if name in status}
