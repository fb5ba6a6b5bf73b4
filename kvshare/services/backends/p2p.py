"""The p2p backend: replicas read KV from each other; one lmcache_controller knows which replica has what."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from kvshare.core import ascend
from kvshare.core import ports as host_ports
from kvshare.core.job import Job
from kvshare.core.p2p_replica import LOOPBACK, PORT_LISTS, TooFewPorts, check_ports
from kvshare.services import health
from kvshare.services.backends.interface import Backend, Exports, Ports


def _settings(job: Job, path: str | None) -> Iterator[str]:
    channel = job.lmcache.transfer_channel
    if not job.lmcache.local_cpu:
        yield f"{path}: with local_cpu: false LMCache keeps nothing that other replicas could read: set it to true"
    if not (job.lmcache.enable_p2p and job.lmcache.enable_controller):
        yield f"{path}: the p2p backend needs enable_p2p: true and enable_controller: true"
    for key, needed in (("retrieve_locations", "P2PBackend"), ("store_location", "LocalCPUBackend")):
        value = getattr(job.lmcache, key, None)
        if value and needed not in str(value):
            yield f"{key} {value} leaves {needed} out, so nothing would be shared: remove it"
    if job.device != "npu" and not job.lmcache.enable_async_loading:
        yield f"{path}: without enable_async_loading: true LMCache never asks the other replicas: set it"
    if job.device != "npu" and channel != "nixl":
        yield f"transfer_channel {channel} is not one through which LMCache's P2P works: set it to nixl"
    if job.device == "npu" and channel not in ascend.TRANSFER_CHANNELS:
        known = " or ".join(ascend.TRANSFER_CHANNELS)
        yield f"transfer_channel {channel} is not one LMCache-Ascend knows: set it to {known}"


def _running(job: Job) -> Iterator[str]:
    lmcache = job.lmcache
    at = health.check_controller(lmcache.controller_pull_url, lmcache.controller_reply_url)
    job.facts["service"] = f"lmcache_controller at {at}"
    if job.rollout.data_parallel_size > 1:
        yield "the p2p backend needs one engine per replica: set rollout.data_parallel_size=1"
    if job.nodes > 1 and job.lmcache.p2p_host not in LOOPBACK:
        yield f"p2p_host {job.lmcache.p2p_host} is one node's address: set it to localhost, each replica uses its own"
    try:
        check_ports(lmcache.to_dict(), job.replicas, job.world_size)
    except TooFewPorts as error:
        yield str(error)
        return
    for name in PORT_LISTS:
        own = list(dict.fromkeys(getattr(lmcache, name) or []))[: job.replicas * job.world_size]
        taken = [port for port in own if not host_ports.is_free("127.0.0.1", port)]
        if taken and job.nodes == 1:
            yield f"{name}: port {', '.join(map(str, taken))} is taken: stop what uses it, or choose other ports"


def _command(listen: str, ports: Ports, folder: Path) -> list[str]:
    monitor = {name: port for name, port in ports.items() if name != "http"}
    command = [sys.executable, "-m", "lmcache.v1.api_server", "--host", listen, "--port", str(ports["http"])]
    # Forget a replica after ten seconds without a heartbeat. LMCache's default is never.
    command += ["--health-check-interval", "2", "--lmcache-worker-timeout", "10"]
    return [*command, "--monitor-ports", json.dumps(monitor)]


def _exports(host: str, ports: Ports, folder: Path) -> Exports:
    return {
        "LMCACHE_CONTROLLER_PULL_URL": f"{host}:{ports['pull']}",
        "LMCACHE_CONTROLLER_REPLY_URL": f"{host}:{ports['reply']}",
    }


BACKEND = Backend(
    service="lmcache_controller",
    ports={"http": 9000, "pull": 8300, "reply": 8400, "heartbeat": 8500},
    command=_command,
    exports=_exports,
    check=lambda exports: health.check_controller(
        exports["LMCACHE_CONTROLLER_PULL_URL"], exports["LMCACHE_CONTROLLER_REPLY_URL"]
    ),
    addresses=("controller_pull_url", "controller_reply_url"),
    settings=_settings,
    running=_running,
)
