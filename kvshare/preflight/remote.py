"""The remote backend: every replica and one lmcache_server."""

from __future__ import annotations

from collections.abc import Iterator

from kvshare import policy, services
from kvshare.preflight.job import Job

ADDRESSES = ("remote_url",)


def settings(job: Job, path: str | None) -> Iterator[str]:
    url = str(job.lmcache.remote_url or "")
    if not url:
        yield f"{path} has no remote_url, so nothing would be shared: set it, e.g. lm://localhost:65432"
    if url.startswith("lm://"):
        yield from _key(job)


def _key(job: Job) -> Iterator[str]:
    """lm:// has room for so many characters; LMCache asserts it with each key, in its worker."""
    import torch
    from lmcache.utils import CacheEngineKey
    from lmcache.v1 import protocol

    model = policy.key_model_name(str(job.config.actor_rollout_ref.model.path))
    key = CacheEngineKey(model, job.world_size, job.world_size - 1, 2**64 - 1, torch.bfloat16).to_string()
    room = getattr(protocol, "MAX_KEY_LENGTH", 150)  # a literal in older versions
    if len(key) > room:
        fix = "give the model a shorter path"
        yield f"a key of {len(key)} characters is too long for lm://, {room} fit: {fix}"


def service(job: Job) -> Iterator[str]:
    url = str(job.lmcache.remote_url)
    if url.startswith("lm://"):
        job.facts["service"] = "lmcache_server at " + services.check_lmcache_server(url)
    else:
        job.facts["service"] = f"{url}, not checked"
    yield from ()
