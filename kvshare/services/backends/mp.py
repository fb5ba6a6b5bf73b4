"""The mp backend: the replicas of each host share KV through one lmcache server on that host."""

from __future__ import annotations

import math
import os
import re
import shutil
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

EXTRA = "lmcache.mp."
MODE, MODE_VARIABLE, ENGINE_DRIVEN = f"{EXTRA}mp_transfer_mode", "LMCACHE_MP_TRANSFER_MODE", "engine_driven"


def addresses(job: Job) -> list[str]:
    """URLs of the servers, as LMCacheMPConnector reads them: kv_connector_extra_config first, then remote_url."""
    extra = job.extra_config
    given = extra.get(f"{EXTRA}server_urls")
    if not given and (f"{EXTRA}host" in extra or f"{EXTRA}port" in extra):
        given = f"{extra.get(f'{EXTRA}host', 'tcp://localhost')}:{extra.get(f'{EXTRA}port', 5555)}"
    given = given or job.lmcache.remote_url or ""
    listed = given if isinstance(given, list) else str(given).split(",")
    stripped = [url.strip() for url in listed if url.strip()]
    return [url if "://" in url else f"tcp://{url}" for url in stripped]


def _settings(job: Job, path: str | None) -> Iterator[str]:
    if job.device == "npu":
        yield "the mp backend does not run on Ascend, LMCache-Ascend 0.4.4 has only a stub of its server: use another"
        return
    found = addresses(job)
    if not found:
        yield f"{path} has no remote_url, the mp backend needs tcp://HOST:PORT of lmcache server"
    if len(found) > 1:
        yield f"{EXTRA}server_urls names {len(found)} servers, kvshare knows one per host: name one"
    for url in found:
        if not url.startswith("tcp://"):
            yield f"{path}: remote_url is {url}, the mp backend needs tcp://HOST:PORT of lmcache server"
    yield from _extra(job)
    yield from _transfer(job)


def _transfer(job: Job) -> Iterator[str]:
    """Check who copies KV: the engine, or LMCache's server (LMCache 0.5.6)."""
    mode = job.extra_config.get(MODE) or os.environ.get(MODE_VARIABLE) or ENGINE_DRIVEN
    kinds = set(getattr(job.model.hf_config.get_text_config(), "layer_types", None) or ())
    if mode == ENGINE_DRIVEN and len(kinds) > 1 and not job.engine.disable_hybrid_kv_cache_manager:
        yield (
            f"the model has layers of several kinds ({', '.join(sorted(kinds))}), the engine copies KV of one: add "
            "+actor_rollout_ref.rollout.engine_kwargs.vllm.disable_hybrid_kv_cache_manager=true"
        )
    if mode != ENGINE_DRIVEN and job.device == "cuda" and job.engine.enable_sleep_mode:
        yield (
            f"{MODE} {mode}: the server cannot map KV that vLLM's sleep mode frees: set it to {ENGINE_DRIVEN}, or "
            "enable_sleep_mode and free_cache_engine to False"
        )


def _extra(job: Job) -> Iterator[str]:
    """Check the keys in kv_connector_extra_config by the types of LMCache's defaults."""
    from lmcache.integration.vllm.vllm_multi_process_adapter import ExtraConfigDefault

    where, defaults = "kv_connector_extra_config", {f"{EXTRA}{item.name}": item.default for item in ExtraConfigDefault}
    known = {*defaults, *lmcache_settings.in_source(rf'(?<="){re.escape(EXTRA)}[a-z_.]+(?=")', "lmcache.integration")}
    for key, value in job.extra_config.items():
        if not key.startswith(EXTRA):
            continue
        if key not in known:
            close = lmcache_settings.near(key, known)
            yield f"{where}: LMCacheMPConnector knows no key {key}{close}: remove or correct it"
            continue
        default = defaults.get(key)
        if isinstance(default, float) and not (_number(value) and float(value) > 0):
            yield f"{where}: {key} is {value!r}, must be a number of seconds above 0: correct it"
        if isinstance(default, bool) and not isinstance(value, bool):
            yield f"{where}: {key} is {value!r}, must be true or false: correct it"


def _number(value: Any) -> bool:
    try:
        return math.isfinite(float(value)) and not isinstance(value, bool)
    except (TypeError, ValueError):
        return False


def _running(job: Job) -> Iterator[str]:
    (url,) = addresses(job)
    at, chunk_size = health.check_mp_server(url)
    nodes = job.nodes
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
    # Engines copy to and from its shared memory themselves. With a GPU the server would take 0.7 GiB of it.
    command = ["env", "CUDA_VISIBLE_DEVICES=", sys.executable, "-m", "kvshare.mp_server"]
    command += ["--host", listen, "--port", str(ports["server"]), "--chunk-size", str(chunk_size)]
    command += ["--l1-size-gb", str(memory), "--shm-name", f"kvshare-{ports['server']}", "--no-l1-use-lazy"]
    command += ["--eviction-policy", "LRU"]  # nothing looks up KV of old policies, so it is evicted first
    # The default mode is for GPUs only. With it an engine on CPU waits forever to be registered.
    command += ["--supported-transfer-mode", "auto"]
    return [*command, "--http-host", "127.0.0.1", "--http-port", str(ports["http"]), "--disable-metrics"]


def _check_memory(gib: Any) -> None:
    """Check the size in GiB. Without room in /dev/shm LMCache would send KV by TCP."""
    free = min(psutil.virtual_memory().available, shutil.disk_usage("/dev/shm").free) / 2**30
    try:
        size = float(gib)
    except (TypeError, ValueError):
        size = 0.0
    if not 0 < size < free:
        raise UserError(
            f"max_local_cpu_size {gib} must be a number of GiB below the {free:.1f} that are free in this machine's "
            "memory and /dev/shm (docker run --shm-size): set it in the LMCache config, or LMCACHE_MAX_LOCAL_CPU_SIZE"
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
