"""The mp backend: the replicas of each host and one lmcache server there."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.specifiers import SpecifierSet

from kvshare import services
from kvshare.preflight.job import Job
from kvshare.upstream import installed

ADDRESSES = ("remote_url",)
SAFE = SpecifierSet(">=0.5.6")
"""Before, what the server could not give was reported to vLLM as loaded (LMCacheMPWorkerAdapter.get_finished)."""


def settings(job: Job, path: str | None) -> Iterator[str]:
    if not str(job.lmcache.remote_url).startswith("tcp://"):
        yield f"{path}: remote_url is {job.lmcache.remote_url}, the mp backend needs tcp://HOST:PORT of lmcache server"
    if not SAFE.contains(found := installed("lmcache"), prereleases=True):
        yield f"package lmcache {found} takes a failed load for a good one in the mp backend: install 'lmcache{SAFE}'"
    if job.device == "npu":
        yield "the mp backend does not run on Ascend: LMCache-Ascend 0.4.4's server is not implemented: use another"


def service(job: Job) -> Iterator[str]:
    at, chunk_size = services.check_mp_server(job.lmcache.remote_url)
    nodes = job.config.trainer.nnodes
    job.facts["service"] = f"lmcache server at {at}" + (f" on each of {nodes} nodes" if nodes > 1 else "")
    if chunk_size != job.lmcache.chunk_size:
        yield (
            f"lmcache server at {at} has chunks of {chunk_size} tokens, chunk_size is {job.lmcache.chunk_size}: "
            "start it again with --chunk-size, or set LMCACHE_CHUNK_SIZE"
        )
