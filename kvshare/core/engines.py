"""The servers beside ``lm://`` that kvshare's client of the remote backend can use, by the scheme of remote_url."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

ENGINES = ("valkey", "redis", "rediss", "mooncakestore", "resp")


def settings(url: str, timeout: float, threads: int) -> dict[str, Any] | None:
    """What LMCache's connector to an engine needs in ``extra_config``; None if kvshare does not know it.

    Args:
        timeout: seconds that an operation may take.
        threads: that use the connector at a time.
    """
    scheme = url.partition("://")[0]
    if scheme not in ENGINES:
        return None
    extra: dict[str, Any] = {"save_chunk_meta": False}
    if scheme == "valkey":
        extra |= {"valkey_num_workers": threads, "connection_timeout": timeout}
    if scheme == "mooncakestore":
        extra |= {
            "transfer_timeout": timeout,
            "mooncake_master_server_addr": urlsplit(url).netloc,
            "mooncake_metadata_server": "P2PHANDSHAKE",
            "mooncake_local_hostname": "127.0.0.1",
            "mooncake_global_segment_size": 0,
            "mooncake_local_buffer_size": 16 << 20,
        }
    return extra
