"""Makes the forecast, and checks that the KV of a step fits into memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kvshare.core import server_status
from kvshare.core.job import Job
from kvshare.launch.forecast import Recipe, kv_bytes
from kvshare.launch.forecast import forecast as predict
from kvshare.launch.preflight import prompts
from kvshare.launch.preflight.engine import block_size, dtype, kv_dtype
from kvshare.launch.preflight.recipe import router_settings
from kvshare.launch.working_set import WorkingSet

FEW = 0.01
"""A smaller fraction of shareable prompt tokens gives a warning."""


def forecast(job: Job) -> Iterator[str]:
    steps, total = prompts.steps(job)
    job.forecast = predict(steps, recipe(job), total)
    if job.rollout.multi_turn.enable:
        job.forecast = replace(job.forecast, working_set=working_set(job, len(steps[0])))
    job.facts["forecast"] = job.forecast.verdict
    if job.shares and job.forecast.share < FEW:
        yield job.forecast.verdict


def recipe(job: Job) -> Recipe:
    router = router_settings(job)
    return Recipe(
        replicas=job.serving,
        samples=job.rollout.n,
        chunk_size=job.lmcache.chunk_size,
        block_size=block_size(job),
        token_bytes=kv_bytes(job.model.hf_config.get_text_config().to_dict(), kv_dtype(job).itemsize),
        routed=job.shares and bool(router),
        spread=router.get("placement") == "spread",
    )


def working_set(job: Job, batch: int) -> WorkingSet:
    recipe, lengths = job.forecast.recipe, job.forecast.lengths
    return WorkingSet(
        prompts=batch,
        samples=recipe.samples,
        copies=min(recipe.replicas, recipe.samples) if recipe.spread or not recipe.routed else 1,
        prompt_tokens=lengths.mean,
        answer_tokens=job.config.data.max_response_length,
        turns=job.rollout.multi_turn.max_assistant_turns,
        token_bytes=recipe.token_bytes,
        pool_bytes=kv_pool(job, recipe.token_bytes),
    )


def kv_pool(job: Job, token_bytes: int) -> int | None:
    """Bytes for KV on the serving replicas; None if that depends on a device which is not here.

    On a GPU the result is too large by the activations: vLLM measures them when it starts, they are not known here.
    """
    engine = job.engine
    if engine.num_gpu_blocks_override is not None:
        return job.serving * engine.num_gpu_blocks_override * block_size(job) * token_bytes
    if job.device == "cpu" and (space := os.environ.get("VLLM_CPU_KVCACHE_SPACE")):
        return job.serving * job.world_size * int(float(space) * 2**30)
    if engine.kv_cache_memory_bytes is not None:
        return job.serving * job.world_size * engine.kv_cache_memory_bytes
    import torch

    if job.device != "cuda" or not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0).total_memory * engine.gpu_memory_utilization
    return max(0, round(job.serving * (job.world_size * device - weight_bytes(job))))


def weight_bytes(job: Job) -> int:
    """Bytes of the weights of a replica."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):  # shapes without memory
        model = AutoModelForCausalLM.from_config(job.model.hf_config)
    return sum(weight.numel() for weight in model.parameters()) * dtype(job).itemsize


MP_FULL = 0.8
"""Fraction of its memory at which LMCache's multi-process server evicts (--eviction-trigger-watermark)."""


def needed(job: Job) -> str:
    """Memory that sharing takes, in one line. ``forecast`` must have run."""
    assert job.forecast is not None
    settings, step = job.lmcache, f"a step stores {job.forecast.stored_bytes_a_step / 2**30:.2f} GiB"
    if job.backend == "mp":
        return f"{settings.max_local_cpu_size:g} GiB a host (lmcache server); {step}"
    workers, size = job.workers_a_node, settings.max_local_cpu_size
    server = ", and the server's bound" if job.backend == "remote" else ""
    return f"{workers * size:g} GiB a node ({workers} workers, {size:g} each){server}; {step}"


def memory(job: Job) -> Iterator[str]:
    """Check that there is room for the KV that a step stores."""
    if job.forecast is None or not job.shares:
        return
    stored = job.forecast.stored_bytes_a_step
    job.facts["memory"] = needed(job)
    if job.backend != "mp":  # with mp the server holds this memory
        yield from _local_tier(job)
    status = os.environ.get(server_status.VARIABLE)
    if job.backend == "remote" and status and Path(status).is_file():
        limit = json.loads(Path(status).read_text())["limit"]
        yield from _too_small("kvshare server", limit, stored, f"--memory {math.ceil(stored / 2**30 * 1.2)}")
    if job.backend == "mp":
        limit = int(job.lmcache.max_local_cpu_size * MP_FULL * 2**30)
        room = math.ceil(stored / 2**30 / MP_FULL)
        yield from _too_small("lmcache server", limit, stored, f"max_local_cpu_size: {room}")


def _too_small(server: str, limit: int, stored: int, start: str) -> Iterator[str]:
    if limit < stored:
        yield (
            f"{server} keeps {limit / 2**30:.2f} GiB, a step stores {stored / 2**30:.2f} GiB: prefixes may be evicted "
            f"before others read them: start it with {start}"
        )


def _local_tier(job: Job) -> Iterator[str]:
    """Check the local tier, which LMCache allocates in full at start, once per worker, with local_cpu: false too."""
    import psutil

    size, workers = job.lmcache.max_local_cpu_size, job.workers_a_node
    free = psutil.virtual_memory().available / 2**30
    if workers * size > free:
        yield (
            f"max_local_cpu_size {size:g} GiB for each of {workers} workers is {workers * size:g} GiB, this machine "
            f"has {free:.1f} free: make it less than {free / workers:.1f}"
        )
