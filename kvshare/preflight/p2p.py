"""The p2p backend: replicas that read from each other, and one lmcache_controller."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from kvshare import ascend, services, versions
from kvshare.p2p import LOOPBACK, PORT_LISTS, TooFewPorts, check_ports
from kvshare.preflight.job import Job

ADDRESSES = ("controller_pull_url", "controller_reply_url")


def settings(job: Job, path: str | None) -> Iterator[str]:
    channel = job.lmcache.transfer_channel
    if not (job.lmcache.enable_p2p and job.lmcache.enable_controller):
        yield f"{path}: the p2p backend needs enable_p2p: true and enable_controller: true"
    if job.device != "npu" and not job.lmcache.enable_async_loading:
        yield f"{path}: without enable_async_loading: true LMCache never asks the other replicas: set it"
    if channel == "nixl" and not find_spec("nixl"):
        yield f"package nixl, the P2P transport, is missing: pip install nixl ({versions.requirements(job.device)})"
    if job.device == "npu" and channel not in ascend.TRANSFER_CHANNELS:
        known = " or ".join(ascend.TRANSFER_CHANNELS)
        yield f"transfer_channel {channel} is not one LMCache-Ascend knows: set it to {known}"


def service(job: Job) -> Iterator[str]:
    lmcache = job.lmcache
    at = services.check_controller(lmcache.controller_pull_url, lmcache.controller_reply_url)
    job.facts["service"] = f"lmcache_controller at {at}"
    if job.rollout.data_parallel_size > 1:
        yield "the p2p backend takes one engine a replica: set rollout.data_parallel_size=1, and more devices or nodes"
    if job.config.trainer.nnodes > 1 and job.lmcache.p2p_host not in LOOPBACK:
        yield f"p2p_host {job.lmcache.p2p_host} is one node's: set it to localhost, each replica takes its own node's"
    try:
        check_ports(lmcache.to_dict(), job.replicas, job.world_size)
    except TooFewPorts as error:
        yield str(error)
        return
    for name in PORT_LISTS:
        own = list(dict.fromkeys(getattr(lmcache, name) or []))[: job.replicas * job.world_size]
        taken = [port for port in own if not services.is_free("127.0.0.1", port)]
        if taken and job.config.trainer.nnodes == 1:
            yield f"{name}: port {', '.join(map(str, taken))} is taken: stop what uses it, or choose other ports"
