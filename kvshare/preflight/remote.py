"""The remote backend: every replica and one lmcache_server."""

from __future__ import annotations

from collections.abc import Iterator

from kvshare import services
from kvshare.preflight.job import Job

ADDRESSES = ("remote_url",)


def settings(job: Job, path: str | None) -> Iterator[str]:
    if not job.lmcache.remote_url:
        yield f"{path} has no remote_url, so nothing would be shared: set it, e.g. lm://localhost:65432"


def service(job: Job) -> Iterator[str]:
    url = str(job.lmcache.remote_url)
    if url.startswith("lm://"):
        job.facts["service"] = "lmcache_server at " + services.check_lmcache_server(url)
    else:
        job.facts["service"] = f"{url}, not checked"
    yield from ()
