"""Sends requests to vLLM servers for `kvshare bench`, and reads their counters."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import aiohttp

from kvshare.core import policy
from kvshare.core.errors import UserError
from kvshare.record import worker_events
from kvshare.tools import vllm_http
from kvshare.tools.bench.steady_server import POLICY

Prompt = list[int]

# Prompt tokens, each request once. vLLM's prefix_cache_hits would count a request again each time it has to wait.
COUNTERS = {
    "prompt": "vllm:prompt_tokens_total",
    "local": "vllm:prompt_tokens_by_source_total:local_cache_hit",
    "shared": "vllm:prompt_tokens_by_source_total:external_kv_transfer",
}


@dataclass
class Answer:
    first: float  # seconds to the first token
    end: float  # seconds to the last token
    logprob: float  # of the first token


@dataclass
class Sample:
    """The measurements of requests that were sent at the same time."""

    first: float  # seconds until all requests have their first token
    end: float  # seconds until all requests have ended
    prompt: int  # prompt tokens
    local: int  # prompt tokens from vLLM's own prefix cache
    shared: int  # prompt tokens from the connector
    logprobs: list[float]

    def numbers(self) -> dict[str, float]:
        computed = self.prompt - self.local - self.shared
        return {name: value for name, value in vars(self).items() if name != "logprobs"} | {"computed": computed}


class Endpoint:
    """A vLLM server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self._model = ""

    async def connect(self) -> dict[str, Any]:
        """Look up the server's model and return its entry in ``/v1/models``.

        Raises:
            UserError: the server does not answer, or has no metrics.
        """
        try:
            async with self._session.get(f"{self.url}/v1/models") as response:
                model = (await response.json())["data"][0]
            await self.counted()
        except (aiohttp.ClientError, OSError, KeyError, ValueError) as error:
            raise UserError(
                f"{self.url} is no vLLM server with statistics ({type(error).__name__}): start it"
            ) from None
        self._model = model["id"]
        return model

    async def ask(
        self, prompt: Prompt, tokens: int, request: str = "", heard: Callable[[], None] = lambda: None
    ) -> Answer:
        """Send one prompt. ``request`` is its id in the plugin's events. ``heard`` is called at the first token."""
        params = {policy.TAG: POLICY, worker_events.REQUEST: request}
        body = {"model": self._model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        body |= {"logprobs": 1, "stream": True, "cache_salt": POLICY, "kv_transfer_params": params}
        began, first, logprob = time.perf_counter(), 0.0, 0.0
        async with self._session.post(f"{self.url}/v1/completions", json=body) as response:
            if response.status != 200:
                raise UserError(f"{self.url} refuses a prompt of {len(prompt)} tokens: {await response.text()}")
            async for line in response.content:
                if not first and line.startswith(b"data: {"):
                    first = time.perf_counter() - began
                    heard()
                    logprob = json.loads(line[6:])["choices"][0]["logprobs"]["token_logprobs"][0]
        return Answer(first, time.perf_counter() - began, logprob)

    async def ask_all(self, prompts: Sequence[Prompt], tokens: int) -> list[Answer]:
        return await asyncio.gather(*(self.ask(prompt, tokens) for prompt in prompts))

    async def counted(self) -> dict[str, int]:
        """Value of each counter in ``COUNTERS`` so far, in tokens."""
        async with self._session.get(f"{self.url}/metrics") as response:
            found = vllm_http.metrics(await response.text())
        if COUNTERS["prompt"] not in found:
            raise ValueError("no metrics")
        return {name: round(found.get(metric, 0)) for name, metric in COUNTERS.items()}

    async def pool(self) -> int:
        """Tokens of KV that fit the engine."""
        async with self._session.get(f"{self.url}/metrics") as response:
            found, *_ = vllm_http.labels(await response.text(), "vllm:cache_config_info")
        return int(found["num_gpu_blocks"]) * int(found["block_size"])


@asynccontextmanager
async def endpoints(urls: Sequence[str]) -> AsyncIterator[list[Endpoint]]:
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)  # uvicorn closes a connection after 5 idle seconds
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        yield [Endpoint(session, url) for url in urls]


async def sample(asked: Sequence[Endpoint], answers: Coroutine[Any, Any, list[Answer]]) -> Sample:
    """Run ``answers`` and measure them. The counters are those of the ``asked`` endpoints, read before it begins."""
    before = [await endpoint.counted() for endpoint in asked]
    got = await answers
    after = [await endpoint.counted() for endpoint in asked]
    counted = {name: sum(a[name] - b[name] for a, b in zip(after, before, strict=True)) for name in COUNTERS}
    logprobs = [answer.logprob for answer in got]
    return Sample(max(a.first for a in got), max(a.end for a in got), **counted, logprobs=logprobs)


def unseen(count: int, tokens: int) -> list[Prompt]:
    """``count`` new random prompts of ``tokens`` + 1 tokens."""
    rng = random.Random(uuid4().int)
    return [rng.choices(vllm_http.IDS, k=tokens + 1) for _ in range(count)]
