"""`kvshare bench`: the time to the first token when nobody has a prompt's KV, another engine has it, the engine itself.

All cases are measured in turns in one run, on prompts nobody has seen. How many tokens were shared is
what the engines say, and how far their answers are from those of the engine without a connector.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import aiohttp

from kvshare.core.errors import UserError
from kvshare.launch.preflight.memory import kv_bytes
from kvshare.tools.bench import copy_limit, engines
from kvshare.tools.bench.asked import Asked, Shape
from kvshare.tools.bench.endpoint import Endpoint, Sample, endpoints, sample, unseen
from kvshare.tools.bench.engines import Engines
from kvshare.tools.bench.workloads import Workload

PACKAGES = ("vllm", "lmcache", "torch", "verl")
CHUNK_SIZE = 256  # tokens, LMCache's default: of servers that somebody else started


def of_config(path: Path, asked: Asked, logs: Path) -> dict[str, Any]:
    """Start what a bench config lists, measure, and end it.

    Raises:
        UserError: the config is not one.
        services.NotStarted: something did not start.
    """
    config = engines.read(path)
    copy = copy_limit.measure()
    with engines.started(config, logs) as started:
        return asyncio.run(_run(started, asked, copy, wide="float32" in config["engine"]))


def of_urls(urls: list[str], plain: str | None, asked: Asked) -> dict[str, Any]:
    """Measure two servers that share, and one with no connector, if there is one.

    Raises:
        UserError: one of them does not answer.
    """
    return asyncio.run(
        _run(
            Engines({"shared": urls, "plain": [plain] if plain else []}, None, CHUNK_SIZE),
            asked,
            copy_limit.measure(),
            wide=False,
        )
    )


@dataclass
class Rollouts:
    """What a user asks for with --rollout."""

    workloads: list[Workload]
    arms: list[str]
    replicas: int  # engines an arm
    devices: list[str]
    offload: float  # GiB
    repeat: int
    limit: float  # seconds, with the start of the engines, after which no further round begins
    arguments: list[str]  # of all engines


def rollouts(path: Path, asked: Rollouts, logs: Path, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Start the engines that the arms need, run all rollouts on all arms in turns, and end the engines.

    Args:
        path: a bench config.
        asked: what to run.
        logs: folder for the engines' logs.
        save: called with the result so far after each measurement.

    Raises:
        UserError: the config is not one, or there is no such arm.
        services.NotStarted: something did not start.
    """
    from kvshare.tools.bench.rollouts import kinds, measure  # verl need not be there where only vLLM is

    facts, until = _facts(), time.monotonic() + asked.limit
    started = engines.started(
        engines.read(path), logs, kinds(asked.arms, asked.replicas), asked.devices, asked.offload, asked.arguments
    )
    with started as running:
        rows = measure(
            running,
            asked.workloads,
            asked.arms,
            asked.repeat,
            until,
            save=lambda rows: save(facts | {"rollouts": rows}),
        )
        return facts | {"rollouts": asyncio.run(rows)}


async def _run(engines: Engines, asked: Asked, copy: tuple[str, float], wide: bool) -> dict[str, Any]:
    """Args: ``wide``: KV has 32 bits, not 16."""
    urls = [*engines.by_kind["shared"], *engines.by_kind["plain"]]
    async with _lost_is_an_error(), endpoints(urls) as found:
        models = [await endpoint.connect() for endpoint in found]
        a_token = _kv_bytes(models[0].get("root") or "", wide)
        cases = await _cases(found, asked, lambda tokens: asked.settle + tokens * (a_token or 0) / 1e9)
        patterns = []
        if asked.n:
            from kvshare.tools.bench import grpo  # verl's router need not be there where only vLLM is

            patterns = await grpo.patterns(found[:2], engines, asked)
    return _facts() | {"copy": copy, "kv_bytes_a_token": a_token, "cases": cases, "patterns": patterns}


def _facts() -> dict[str, Any]:
    return {
        "machine": copy_limit.machine(),
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
        "command": ["kvshare", *sys.argv[1:]],
    }


@asynccontextmanager
async def _lost_is_an_error() -> AsyncIterator[None]:
    try:
        yield
    except aiohttp.ClientError as error:
        raise UserError(f"a server stopped answering ({error}): see its log") from None


async def _cases(found: list[Endpoint], asked: Asked, settle: Callable[[int], float]) -> list[dict[str, Any]]:
    """Rows of one case and shape each, with all their samples; the two that share change parts after each turn."""
    one, other, *plain = found
    for endpoint in found:
        for tokens, at_once in asked.shapes:  # kernels compile and graphs load with the first of their size
            await endpoint.ask_all(unseen(at_once, tokens), asked.answer)
    rows: dict[tuple[str, Shape], dict[str, Any]] = {}
    for shape in asked.shapes * asked.repeat:
        samples = await _turn(shape, plain, one, other, asked.answer, settle(shape[0] * shape[1]))
        reference = samples.get("none", samples["miss"])
        for case, got in samples.items():
            row = {"case": case, "tokens": shape[0], "at_once": shape[1], "answer": asked.answer, "samples": []}
            off = max(abs(a - b) for a, b in zip(got.logprobs, reference.logprobs, strict=True))
            rows.setdefault((case, shape), row)["samples"].append(got.numbers() | {"logprob_difference": off})
        one, other = other, one
    return list(rows.values())


async def _turn(
    shape: Shape, plain: list[Endpoint], one: Endpoint, other: Endpoint, answer: int, settle: float
) -> dict[str, Sample]:
    """Each case once, on the same prompts: no connector, a miss, hits of what it stored."""
    tokens, at_once = shape
    prompts = unseen(at_once, tokens)
    samples = {"none": await sample(plain, plain[0].ask_all(prompts, answer))} if plain else {}
    samples["miss"] = await sample([one], one.ask_all(prompts, answer))
    await asyncio.sleep(settle)  # storing goes on after the answer
    samples["shared"] = await sample([other], other.ask_all(prompts, answer))
    samples["local"] = await sample([one], one.ask_all(prompts, answer))
    return samples


def _kv_bytes(model: str, wide: bool) -> int | None:
    """Bytes of KV of a token; None if the model's config is not on this machine."""
    try:
        return kv_bytes(json.loads((Path(model) / "config.json").read_text())) * (2 if wide else 1)
    except (OSError, ValueError, KeyError):
        return None
