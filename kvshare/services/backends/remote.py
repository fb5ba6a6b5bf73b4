"""The remote backend: all replicas share KV through one server that speaks lm://."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshare.core import policy, server_status
from kvshare.core.engines import PACKAGES
from kvshare.core.job import Job
from kvshare.core.ports import in_url
from kvshare.services import engines, health
from kvshare.services.backends.interface import Backend, Exports, Ports

KEEP_NOTHING = ("blackhole", "mock", "plugin://mock")
"""Schemes of LMCache's connectors for its own tests. What one replica stores, no other finds."""

PARSED = ("lm", "fs", "infinistore", *PACKAGES)
"""Schemes of connectors that want host and port (parse_remote_url), ``fs`` too: fs://localhost:1/folder."""


def urls(job: Job) -> list[str]:
    """The URLs for which LMCache makes a remote backend: remote_url, and one for each of remote_storage_plugins."""
    plugins = [f"plugin://{name}" for name in getattr(job.lmcache, "remote_storage_plugins", None) or []]
    return ([job.lmcache.remote_url] if job.lmcache.remote_url else []) + plugins


def _settings(job: Job, path: str | None) -> Iterator[str]:
    if not urls(job):
        yield f"{path} has no remote_url, so nothing would be shared: set it, e.g. lm://localhost:65432"
    for url in urls(job):
        yield from _url(job, url)
    if job.lmcache.remote_serde != "naive":
        yield (
            f"remote_serde {job.lmcache.remote_serde}: replicas would not load KV as it was stored, bit for bit; only "
            "naive does that: set it to naive"
        )
    for key in ("retrieve_locations", "store_location"):
        value = getattr(job.lmcache, key, None)
        if value and "RemoteBackend" not in str(value):
            yield f"{key} {value} leaves the remote server out, so nothing would be shared: remove it"


def _url(job: Job, url: str) -> Iterator[str]:
    """Check that one of LMCache's connectors takes the URL. If none does, the engine runs in degraded mode."""
    from lmcache.v1.storage_backend.connector import ConnectorManager

    scheme, given, _ = url.partition("://")
    if not given:
        yield f"remote_url {url} has no scheme, LMCache would run degraded and share nothing: write e.g. lm://HOST:PORT"
        return
    loop: Any = None  # unused until it connects
    if not any(a.can_parse(url) for a in ConnectorManager(url, loop, None, job.lmcache).adapters):
        yield f"LMCache has no connector for remote_url {url}, it would run degraded and share nothing: use lm://HOST:PORT"
    elif scheme in KEEP_NOTHING or url in KEEP_NOTHING:
        yield f"remote_url {url} is for LMCache's own tests and shares nothing: use lm://HOST:PORT"
    elif scheme in PARSED:
        health.host_and_port(url)
        if scheme == "lm":
            yield from _key(job)
        if scheme in PACKAGES:
            yield from _engine(job, url)


def _engine(job: Job, url: str) -> Iterator[str]:
    engines.installed(url)
    for key in ("save_unfull_chunk", "use_layerwise"):
        if getattr(job.lmcache, key, False):
            engine = url.partition("://")[0]
            yield f"{key}: true: kvshare stores only whole chunks of all layers in {engine}: set it to false"


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
    told = []
    for url in urls(job):
        if url.startswith("lm://"):
            told.append("lmcache_server at " + health.check_lmcache_server(url))
        elif url.partition("://")[0] in PACKAGES:
            extra = job.lmcache.extra_config or {}
            told.append(engines.check(url, extra.get("valkey_username", ""), extra.get("valkey_password", "")))
        else:
            told.append(f"{url}, {'a folder' if url.startswith('fs://') else health.reach(url)}")
    job.facts["service"] = ", ".join(told)
    yield from ()


def _command(listen: str, ports: Ports, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "kvshare", "server", listen, str(ports["server"])]
    return [*command, "--status", str(folder / "server-status.json")]


def _exports(host: str, ports: Ports, folder: Path) -> Exports:
    return {
        "LMCACHE_REMOTE_URL": f"lm://{in_url(host)}:{ports['server']}",
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
