"""Checks LMCache's settings in YAML and environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from kvshare.core import ascend, lmcache_settings
from kvshare.core.job import Job
from kvshare.services.backends import BACKENDS

CPU_BLOCK_SIZE = 128
"""Tokens per block of vLLM's KV cache on CPU."""


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
    if job.device == "cpu" and job.lmcache.chunk_size % CPU_BLOCK_SIZE:
        yield f"chunk_size {job.lmcache.chunk_size} is not a multiple of {CPU_BLOCK_SIZE}, vLLM's block size on CPU"
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
