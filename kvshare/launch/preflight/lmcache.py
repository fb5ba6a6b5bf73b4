"""Checks LMCache's settings in YAML and environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kvshare.core import ascend, lmcache_settings
from kvshare.core.job import Job
from kvshare.services.backends import BACKENDS

BLOCK_SIZE = {"cuda": 16, "cpu": 128, "npu": 128}
"""vLLM's default tokens per block of its KV cache."""


def block_size(job: Job) -> int:
    """Tokens per block that the engines will have."""
    return job.rollout.engine_kwargs.vllm.get("block_size") or BLOCK_SIZE[job.device]


def settings(job: Job) -> Iterator[str]:
    path = os.environ.get("LMCACHE_CONFIG_FILE")
    keys = lmcache_settings.read(path)
    if job.device == "npu":
        ascend.load_lmcache()
    definitions = lmcache_settings.definitions()
    mistakes = [
        *lmcache_settings.mistakes(keys, definitions, Path(path or "").name),
        *lmcache_settings.environment_mistakes(os.environ, definitions),
    ]
    if mistakes:
        yield from mistakes
        return
    job.lmcache = lmcache_settings.effective(path)
    job.facts["settings"] = f"{path}, chunk_size {job.lmcache.chunk_size}"
    if (job.device == "cpu" or job.backend == "mp") and job.lmcache.chunk_size % block_size(job):
        # Whole blocks are copied; the first request would end the engine.
        yield f"chunk_size {job.lmcache.chunk_size} is not a multiple of {block_size(job)}, the engines' block size"
    if job.lmcache.local_disk and job.backend != "mp":
        # Each LMCache takes the folder for its own: it evicts what others read, and has no checksum on disk.
        yield f"{path}: local_disk {job.lmcache.local_disk} would be one folder for all workers: remove it"
    for option in ("use_layerwise", "enable_blending"):
        if getattr(job.lmcache, option):
            yield f"{path}: {option}: true makes LMCache drop the policy of a request: set it to false"
    if job.device == "npu" and job.lmcache.store_async:
        # vLLM frees the blocks of a preempted request, and the connector of vLLM 0.23 does not wait for the store.
        yield f"{path}: store_async: true may store KV that vLLM has overwritten: set it to false"
    yield from BACKENDS[job.backend].settings(job, path)
    if job.config.trainer.nnodes > 1 and job.backend != "mp":  # mp has one server per node
        yield from _localhost(job)


def _localhost(job: Job) -> Iterator[str]:
    for key in BACKENDS[job.backend].addresses:
        value = str(getattr(job.lmcache, key))
        if "localhost" in value or "127.0.0.1" in value:
            yield f"{key} {value} is this machine only, the job has {job.config.trainer.nnodes} nodes: set its address"
