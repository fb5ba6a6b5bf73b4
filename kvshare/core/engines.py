"""Valkey (or Redis) and Mooncake Store as the server of the remote backend: what their clients need."""

from __future__ import annotations

import ipaddress
from typing import Any
from urllib.parse import urlsplit

from kvshare.core import ports

PACKAGES = {
    "valkey": ("glide_sync", "valkey-glide-sync"),
    "redis": ("redis", "redis"),
    "rediss": ("redis", "redis"),
    "mooncakestore": ("mooncake.store", "mooncake-transfer-engine (or …-cuda13, …-npu, …-non-cuda), and libibverbs1"),
}
"""By scheme of remote_url: the module that LMCache's connector imports, and what must be installed for it."""


def settings(url: str, timeout: float, threads: int) -> dict[str, Any] | None:
    """What LMCache's connector needs in ``extra_config``; None if kvshare does not know the engine.

    Args:
        url: remote_url.
        timeout: seconds that an operation may take.
        threads: that use the connector at a time.
    """
    scheme = url.partition("://")[0]
    if scheme == "valkey":
        return {"valkey_num_workers": threads, "connection_timeout": timeout}
    if scheme == "mooncakestore":
        return {"transfer_timeout": timeout, **{f"mooncake_{key}": value for key, value in mooncake(url).items()}}
    return {} if scheme in PACKAGES else None


def mooncake(url: str, memory: int = 0) -> dict[str, str]:
    """What a client of the Mooncake master at ``mooncakestore://host:port`` is set up with.

    Args:
        memory: bytes that this client gives to the store.
    """
    master = urlsplit(url)
    return {
        "local_hostname": "127.0.0.1" if _is_loopback(master.hostname or "") else ports.own_address(),
        "metadata_server": "P2PHANDSHAKE",  # clients ask each other, there is no server for it
        "master_server_addr": master.netloc,
        "global_segment_size": str(memory),
        "local_buffer_size": str(16 << 20),
        "protocol": "tcp",
    }


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
