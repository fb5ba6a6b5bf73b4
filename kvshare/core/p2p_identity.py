"""One LMCache YAML for all P2P replicas: each gets an instance id, ports and an address of its own.

LMCache indexes its port lists by worker rank, which starts at 0 in every replica, and its controller
never sends an instance to itself: with one YAML the second replica cannot bind its ports, and
replicas that share an instance id never hit each other.
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


def identity(
    config: Mapping[str, Any], replica: int, world_size: int, address: str, free_port: Callable[[], int]
) -> dict[str, str]:
    """LMCache environment overrides that give a replica its own instance id, ports and address.

    The id is another one at each start: the controller would go on sending others to a namesake that died.

    Args:
        config: LMCache settings by name.
        replica: rank of the replica in the job, from 0.
        world_size: workers of one replica.
        address: where the other replicas reach this one, if ``p2p_host`` is this host only.
        free_port: finds one for each worker where a list is empty.

    Raises:
        TooFewPorts: a list ends before this replica's slice.
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
