"""The mp backend: the replicas of each host share KV through one lmcache server on that host."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from kvshare.core import lmcache_settings
from kvshare.core.errors import UserError
from kvshare.core.job import Job
from kvshare.services import health
from kvshare.services.backends.interface import Backend, Exports, Ports


def _settings(job: Job, path: str | None) -> Iterator[str]:
    if not str(job.lmcache.remote_url).startswith("tcp://"):
        yield f"{path}: remote_url is {job.lmcache.remote_url}, the mp backend needs tcp://HOST:PORT of lmcache server"
    if job.device == "npu":
        yield "the mp backend does not run on Ascend, LMCache-Ascend 0.4.4 has only a stub of its server: use another"


def _running(job: Job) -> Iterator[str]:
    at, chunk_size = health.check_mp_server(job.lmcache.remote_url)
    nodes = job.config.trainer.nnodes
    job.facts["service"] = f"lmcache server at {at}" + (f" on each of {nodes} nodes" if nodes > 1 else "")
    if chunk_size != job.lmcache.chunk_size:
        yield (
            f"lmcache server at {at} has chunks of {chunk_size} tokens, chunk_size is {job.lmcache.chunk_size}: "
            "start it again with --chunk-size, or set LMCACHE_CHUNK_SIZE"
        )


def _command(listen: str, ports: Ports, folder: Path) -> list[str]:
    """lmcache server reads no config file, so the values of the LMCache YAML become its arguments."""
    default = Path(__file__).resolve().parents[3] / "config" / "mp_backend_config.yaml"
    file = lmcache_settings.path(os.environ) or (str(default) if default.exists() else None)
    settings = lmcache_settings.read(file) if file else {}
    # Importing LMCache to read its settings would take ten seconds. The fallbacks are its defaults.
    chunk_size = os.environ.get("LMCACHE_CHUNK_SIZE", settings.get("chunk_size", 256))
    memory = os.environ.get("LMCACHE_MAX_LOCAL_CPU_SIZE", settings.get("max_local_cpu_size", 5))
    _check_memory(memory)
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", listen, "--port", str(ports["server"])]
    command += ["--chunk-size", str(chunk_size), "--l1-size-gb", str(memory)]
    command += ["--eviction-policy", "LRU"]  # nothing looks up KV of old policies, so it is evicted first
    # The default mode is for GPUs only. With it an engine on CPU waits forever to be registered.
    command += ["--supported-transfer-mode", "auto"]
    return [*command, "--http-host", "127.0.0.1", "--http-port", str(ports["http"]), "--disable-metrics"]


def _check_memory(gib: Any) -> None:
    """Check the size in GiB. Without a GPU the server allocates all of it at start."""
    free = psutil.virtual_memory().available / 2**30
    try:
        size = float(gib)
    except (TypeError, ValueError):
        size = 0.0
    if not 0 < size < free:
        raise UserError(
            f"max_local_cpu_size {gib} must be a number of GiB below the {free:.1f} that are free on this machine: "
            "set it in the LMCache config, or LMCACHE_MAX_LOCAL_CPU_SIZE"
        )


def _exports(host: str, ports: Ports, folder: Path) -> Exports:
    return {"LMCACHE_REMOTE_URL": f"tcp://{host}:{ports['server']}"}


BACKEND = Backend(
    service="lmcache server",
    ports={"server": 5555, "http": 8080},
    command=_command,
    exports=_exports,
    check=lambda exports: health.check_mp_server(exports["LMCACHE_REMOTE_URL"])[0],
    addresses=("remote_url",),
    settings=_settings,
    running=_running,
)
