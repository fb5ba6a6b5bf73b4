"""Checks LMCache's settings: what is written in the file and in the environment, then what LMCache makes of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshare.core import ascend, lmcache_settings
from kvshare.core.job import Job
from kvshare.core.lmcache_settings import EXTRA
from kvshare.launch.preflight.engine import block_size
from kvshare.services.backends import BACKENDS

MP_EXTRA = f"{EXTRA}mp."
NOT_CONFIG = ("max_tokens_per_load",)
"""Keys in kv_connector_extra_config that have LMCache's prefix, and that its connector reads itself."""

PER_REPLICA = ("lmcache_instance_id", "lmcache_worker_ports", "p2p_host", "p2p_init_ports", "p2p_lookup_ports")
"""Settings that kvshare gives each replica, in its environment."""

FROM_FILE = (*PER_REPLICA, "chunk_size", "enable_p2p", "enable_controller")
"""Settings that kvshare's router and rollout servers read from file and environment only."""

BREAKS = {
    "use_layerwise": "makes LMCache drop the policy of a request",
    "enable_blending": "makes LMCache drop the policy of a request",
    "enable_pd": "makes prefill and decode engines, which do not share with each other",
    "external_lookup_client": "looks KV up without the policy",
    "remote_config_url": "lets a server change the settings when the engine starts, and sends it the environment",
}
"""Settings that must be off (false or null), and why."""

KNOWN = {
    *("chunk_size", "local_cpu", "max_local_cpu_size", "remote_url", "remote_serde", "blocking_timeout_secs"),
    *("enable_async_loading", "enable_p2p", "enable_controller", *PER_REPLICA, "transfer_channel"),
    *("controller_pull_url", "controller_reply_url", "lookup_timeout_ms", "nixl_backends", "nixl_buffer_device"),
    *("cache_policy", "extra_config", "min_retrieve_tokens", "lmcache_worker_heartbeat_time", "store_async"),
    *("internal_api_server_enabled", "internal_api_server_host", "internal_api_server_port_start"),
    *("lmcache_worker_heartbeat_delay_time", "local_disk", "max_local_disk_size", "remote_storage_plugins"),
    *BREAKS,
}
"""Settings that kvshare's runs and tests have used, or that another check judges."""

KNOWN_EXTRA = {"lookup_backoff_time"}
KNOWN_MP = ("server_urls", "host", "port", "mq_timeout", "heartbeat_interval", "nonblocking_lookup_status")
"""The same for extra_config, and for the keys of LMCacheMPConnector."""


def written(job: Job) -> Iterator[str]:
    """Check names and types in file and environment."""
    path = os.environ.get("LMCACHE_CONFIG_FILE")
    keys = lmcache_settings.read(path)
    if job.device == "npu":
        ascend.load_lmcache()
    definitions = lmcache_settings.definitions()
    yield from lmcache_settings.mistakes(keys, definitions, Path(path or "").name)
    yield from lmcache_settings.environment_mistakes(os.environ, definitions)
    yield from (line for near, line in _unread(definitions) if near)
    if os.environ.get("LMCACHE_FORCE_SKIP_SAVE"):
        yield "LMCACHE_FORCE_SKIP_SAVE is set, to any text at all, so LMCache stores nothing: unset it"


def _unread(definitions: lmcache_settings.Definitions) -> Iterator[tuple[bool, str]]:
    """Each variable in the environment that looks like LMCache's and that LMCache does not read.

    Yields whether a name that it reads is near, and the line.
    """
    given = [n for n in sorted(os.environ) if n.upper().startswith("LMCACHE_") and n != "LMCache_CONFIG_FILE"]
    names = {f"LMCACHE_{key.upper()}" for key in definitions} | lmcache_settings.NOT_SETTINGS
    if unknown := [name for name in given if name not in names]:
        names |= lmcache_settings.in_source("LMCACHE_[A-Z0-9_]+", "lmcache", "lmcache_ascend")
        for name in unknown:
            if name not in names and not name.startswith(("LMCACHE_EC_", "LMCACHE_CONTROLLER_")):
                near = lmcache_settings.near(name.upper(), names)
                yield bool(near), f"LMCache does not read {name}{near}: correct or unset it"


def settings(job: Job) -> Iterator[str]:
    """Check the settings that the engine will have."""
    path, extra = os.environ.get("LMCACHE_CONFIG_FILE"), job.extra_config
    definitions = lmcache_settings.definitions()
    if wrong := list(_extra(job, extra, definitions)):
        yield from wrong
        return
    # LMCacheMPConnector has no such config object: kvshare gives it what is in file and environment.
    own = job.lmcache = lmcache_settings.effective(path, None if job.backend == "mp" else extra)
    job.facts["settings"] = f"{path}, chunk_size {own.chunk_size}"
    if outside := list(lmcache_settings.out_of_range(own, definitions)):
        for key, must in outside:
            yield f"{_source(job, key)} is {getattr(own, key)}, must be {must}: correct it"
        return
    yield from _chunks(job)
    if own.local_disk and job.backend != "mp":
        # Each LMCache takes the folder for its own: it evicts what others read, and has no checksum on disk.
        yield f"{_source(job, 'local_disk')} {own.local_disk} would be one folder for all workers: remove it"
    for key, why in BREAKS.items():
        if value := getattr(own, key, None):
            yield f"{_source(job, key)}: {str(value).lower() if value is True else value} {why}: remove it"
    if job.device == "npu" and own.store_async:
        # vLLM frees the blocks of a preempted request, and the connector of vLLM 0.23 does not wait for the store.
        yield f"{_source(job, 'store_async')}: true may store KV that vLLM has overwritten: set it to false"
    fewest = getattr(own, "min_retrieve_tokens", 0)  # LMCache 0.4.4 has no such key
    if job.backend != "mp" and fewest > job.config.data.max_prompt_length:
        yield f"{_source(job, 'min_retrieve_tokens')} {fewest} is longer than any prompt: lower it"
    if job.shares:
        yield from BACKENDS[job.backend].settings(job, path)
    if job.nodes > 1 and job.backend != "mp":  # mp has one server per node
        yield from _localhost(job)


def _extra(job: Job, extra: dict[str, Any], definitions: lmcache_settings.Definitions) -> Iterator[str]:
    """Check the keys in kv_connector_extra_config."""
    where, ours = "kv_connector_extra_config", {key: value for key, value in extra.items() if key.startswith(EXTRA)}
    if job.backend == "mp":
        for key in ours:
            if not key.startswith(MP_EXTRA):
                yield f"{where}: LMCacheMPConnector does not read {key}: remove it, or set it in the LMCache config"
        return
    for key in extra.keys() - ours.keys():
        if (name := key.removeprefix("lmcache_")) in definitions:
            yield f"{where}: LMCache does not read {key}, it would read {EXTRA}{name}: correct it"
    config = {key.removeprefix(EXTRA): value for key, value in ours.items()}
    config = {key: value for key, value in config.items() if key not in NOT_CONFIG}
    yield from lmcache_settings.mistakes(config, definitions, where)
    for key in config:
        if key in FROM_FILE:
            yield f"{where}: kvshare's router and servers do not see {EXTRA}{key}: set it in the LMCache config"


def _chunks(job: Job) -> Iterator[str]:
    chunk = job.lmcache.chunk_size
    if (job.device == "cpu" or job.backend == "mp") and chunk % block_size(job):
        # Whole blocks are copied; the first request would end the engine.
        yield f"chunk_size {chunk} is not a multiple of {block_size(job)}, the engines' block size"
    if job.device == "cpu" and job.backend != "mp" and job.lmcache.save_unfull_chunk:
        yield f"{_source(job, 'save_unfull_chunk')}: true does not work on CPU: set it to false"


def _source(job: Job, key: str) -> str:
    file = Path(os.environ.get("LMCACHE_CONFIG_FILE", "")).name
    return lmcache_settings.source(key, file, os.environ, {} if job.backend == "mp" else job.extra_config)


def _localhost(job: Job) -> Iterator[str]:
    for key in BACKENDS[job.backend].addresses:
        value = str(getattr(job.lmcache, key))
        if any(name in value for name in ("localhost", "127.0.0.1", "[::1]")):
            yield f"{key} {value} is this machine only, the job has {job.nodes} nodes: set its address"


def untried(job: Job) -> Iterator[str]:
    """Say which settings are not known to work, and which variables are nobody's."""
    definitions = lmcache_settings.definitions()
    yield from (line for near, line in _unread(definitions) if not near)
    if not job.shares:
        return
    for key, definition in definitions.items():
        if key not in KNOWN and (value := getattr(job.lmcache, key, None)) not in (definition.get("default"), None, []):
            yield f"{_source(job, key)}: {value} is not known to work with kvshare"
    for key in {*(job.lmcache.extra_config or {})} - KNOWN_EXTRA:
        if not key.startswith("remote_storage_plugin."):
            yield f"{_source(job, 'extra_config')}: {key} is not known to work with kvshare"
    known = {f"{MP_EXTRA}{name}" for name in KNOWN_MP}
    for key in job.extra_config:
        if not (key.startswith(EXTRA) and key.removeprefix(EXTRA) in definitions) and key not in known:
            yield f"kv_connector_extra_config: {key} is not known to work with kvshare"
