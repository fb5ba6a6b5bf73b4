"""Gives each P2P replica its own instance id, ports and address, so that all can share one LMCache YAML.

LMCache indexes its port lists by worker rank, which starts at 0 in every replica. With one YAML the second replica
could not bind its ports. LMCache's controller never points an instance to itself, so replicas with the same instance
id would never find each other's KV.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

PORT_LISTS = ("p2p_init_ports", "p2p_lookup_ports", "lmcache_worker_ports")
LOOPBACK = ("localhost", "127.0.0.1")


class TooFewPorts(ValueError):
    """A port list of the LMCache config is too short for the job."""


def check_ports(config: Mapping[str, Any], replicas: int, world_size: int) -> None:
    """Raise TooFewPorts unless each list has one port for every worker of every replica.

    Args:
        config: LMCache settings by name. For an empty list free ports are picked at start.
        replicas: rollout replicas in the job.
        world_size: workers of one replica (tensor-parallel size).
    """
    needed = replicas * world_size
    for name in PORT_LISTS:
        ports = config.get(name) or []
        if ports and len(set(ports)) < needed:
            raise TooFewPorts(
                f"{name} has {len(set(ports))} different ports, "
                f"{replicas} replicas of {world_size} need {needed}: add ports to the list, or empty it"
            )


def identity(
    config: Mapping[str, Any], replica: int, world_size: int, address: str, free_port: Callable[[], int]
) -> dict[str, str]:
    """Environment variables that give a replica its own instance id, ports and address in LMCache.

    The id is new at each start. With a reused id the controller would keep pointing others to the replica that died.

    Args:
        config: LMCache settings by name.
        replica: rank of the replica in the job, from 0.
        world_size: workers of one replica.
        address: where other replicas reach this one; used if ``p2p_host`` is a loopback address.
        free_port: picks a port; called once for each worker if a list is empty.

    Raises:
        TooFewPorts: a list is too short for this replica.
    """
    check_ports(config, replica + 1, world_size)
    own = slice(replica * world_size, (replica + 1) * world_size)
    host = config.get("p2p_host") or "localhost"
    env = {
        "LMCACHE_LMCACHE_INSTANCE_ID": f"{config.get('lmcache_instance_id') or 'kvshare'}_r{replica}_{uuid4().hex[:8]}",
        "LMCACHE_P2P_HOST": address if host in LOOPBACK else host,
    }
    for name in PORT_LISTS:
        listed = list(dict.fromkeys(config.get(name) or []))[own]
        env[f"LMCACHE_{name.upper()}"] = ",".join(map(str, listed or [free_port() for _ in range(world_size)]))
    return env
