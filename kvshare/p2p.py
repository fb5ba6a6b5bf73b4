"""One LMCache YAML for all P2P replicas: each gets its own instance id and its own ports.

LMCache indexes its port lists by worker rank, which starts at 0 in every replica, and its controller
never sends an instance to itself: with one YAML the second replica cannot bind its ports, and
replicas that share an instance id never hit each other. Pure functions, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PORT_LISTS = ("p2p_init_ports", "p2p_lookup_ports", "lmcache_worker_ports")


class TooFewPorts(ValueError):
    """A port list of the LMCache config is too short for the job."""


def check_ports(config: Mapping[str, Any], replicas: int, world_size: int) -> None:
    """Raise TooFewPorts unless each list has one port for every worker of every replica.

    Args:
        config: LMCache settings by name; an empty list means that free ports are picked at start.
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


def identity(config: Mapping[str, Any], replica: int, world_size: int) -> dict[str, str]:
    """LMCache environment overrides that give a replica its own instance id and ports.

    Args:
        config: LMCache settings by name.
        replica: rank of the replica in the job, from 0.
        world_size: workers of one replica.

    Raises:
        TooFewPorts: a list ends before this replica's slice.
    """
    check_ports(config, replica + 1, world_size)
    own = slice(replica * world_size, (replica + 1) * world_size)
    env = {"LMCACHE_LMCACHE_INSTANCE_ID": f"{config.get('lmcache_instance_id') or 'kvshare'}_r{replica}"}
    for name in PORT_LISTS:
        if ports := config.get(name):
            env[f"LMCACHE_{name.upper()}"] = ",".join(str(port) for port in list(dict.fromkeys(ports))[own])
    return env
