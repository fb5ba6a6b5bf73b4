"""The backends, and what is checked the same way for each.

A backend's module has

* ``ADDRESSES``: the LMCache settings with addresses that every replica must reach;
* ``settings(job, path)``: lines about what the settings of file ``path`` lack;
* ``service(job)``: lines about the service it needs; what is there goes into ``job.facts["service"]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from kvshare import services
from kvshare.preflight import mp, p2p, remote
from kvshare.preflight.job import Job

BACKENDS: dict[str, ModuleType] = {"remote": remote, "p2p": p2p, "mp": mp}


def service(job: Job) -> Iterator[str]:
    if not job.shares:
        job.facts["service"] = "no connector: a baseline, nothing is shared"
        return
    yield from BACKENDS[job.backend].service(job)


def exposure(job: Job) -> Iterator[str]:
    values = [str(getattr(job.lmcache, key)) for key in BACKENDS[job.backend].ADDRESSES]
    ports = [value.rpartition(":")[2] for value in values]
    for host, port in services.exposed({int(port) for port in ports if port.isdigit()}):
        yield (
            f"port {port} of LMCache listens on {host}, beyond this host, and asks nobody who they are: "
            "start it with 127.0.0.1, or see to a firewall"
        )
