"""The remote backend: all replicas share KV through one server that speaks lm://."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from kvshare.core import policy, server_status
from kvshare.core.job import Job
from kvshare.services import health
from kvshare.services.backends.interface import Backend, Exports, Ports


def _settings(job: Job, path: str | None) -> Iterator[str]:
    url = str(job.lmcache.remote_url or "")
    if not url:
        yield f"{path} has no remote_url, so nothing would be shared: set it, e.g. lm://localhost:65432"
    if url.startswith("lm://"):
        yield from _key(job)


def _key(job: Job) -> Iterator[str]:
    """Check that keys fit into lm://. If not, LMCache would fail an assertion in its worker with each key."""
    import torch
    from lmcache.utils import CacheEngineKey
    from lmcache.v1 import protocol

    model = policy.key_model_name(str(job.config.actor_rollout_ref.model.path))
    key = CacheEngineKey(model, job.world_size, job.world_size - 1, 2**64 - 1, torch.bfloat16).to_string()
    room = getattr(protocol, "MAX_KEY_LENGTH", 150)  # older versions have no such constant
    if len(key) > room:
        fix = "give the model a shorter path"
        yield f"a key of {len(key)} characters is too long for lm://, which allows {room}: {fix}"


def _running(job: Job) -> Iterator[str]:
    url = str(job.lmcache.remote_url)
    if url.startswith("lm://"):
        job.facts["service"] = "lmcache_server at " + health.check_lmcache_server(url)
    else:
        job.facts["service"] = f"{url}, not checked"
    yield from ()


def _command(listen: str, ports: Ports, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "kvshare", "server", listen, str(ports["server"])]
    return [*command, "--status", str(folder / "server-status.json")]


def _exports(host: str, ports: Ports, folder: Path) -> Exports:
    return {
        "LMCACHE_REMOTE_URL": f"lm://{host}:{ports['server']}",
        server_status.VARIABLE: str(folder / "server-status.json"),
    }


BACKEND = Backend(
    service="kvshare server",  # not lmcache_server, which grows without a limit
    ports={"server": 65432},
    command=_command,
    exports=_exports,
    check=lambda exports: health.check_lmcache_server(exports["LMCACHE_REMOTE_URL"]),
    addresses=("remote_url",),
    settings=_settings,
    running=_running,
)
