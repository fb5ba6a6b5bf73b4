"""Checks the service that the backend of a job needs."""

from __future__ import annotations

from collections.abc import Iterator

from kvshare.core import ports
from kvshare.core.engines import PACKAGES
from kvshare.core.job import Job
from kvshare.services.backends import BACKENDS, remote


def service(job: Job) -> Iterator[str]:
    if not job.shares:
        job.facts["service"] = "no connector (baseline), nothing is shared"
        return
    yield from BACKENDS[job.backend].running(job)


def exposure(job: Job) -> Iterator[str]:
    if not job.shares:
        return
    values = [str(getattr(job.lmcache, key)) for key in BACKENDS[job.backend].addresses]
    listed = [value.rpartition(":")[2] for value in values]
    for host, port in ports.exposed({int(port) for port in listed if port.isdigit()}):
        yield (
            f"port {port} of LMCache listens on {host}, other hosts can reach it, and it has no authentication: "
            "start it with 127.0.0.1, or protect it with a firewall"
        )


def untried(job: Job) -> Iterator[str]:
    """Say which storage is not known to work."""
    if job.shares and job.backend == "remote":
        for url in remote.urls(job):
            known = ("lm",) if job.device == "npu" else ("lm", *PACKAGES)
            if url.partition("://")[0] not in known:
                yield f"{url} is not known to work with kvshare: only {', '.join(known)} are"
        if job.lmcache.enable_p2p:
            yield "enable_p2p: true beside a remote server is not known to work: use one of the two"
    if job.shares and job.backend == "p2p" and job.lmcache.remote_url:
        yield f"remote_url {job.lmcache.remote_url} beside P2P is not known to work: use one of the two"
