"""Replace LMCache's ``lm://`` client.

LMCache 0.5.6's client (LMCServerConnector) never reconnects to a restarted server and waits forever for a hung one. It
accepts part of a reply as the whole, and loads entries that a dying client left incomplete. This client uses the same
protocol, URL and settings. Entries go through shared memory if ``kvshare server`` runs on this host (remote_shm.py),
else by TCP (remote_tcp.py).
"""

from __future__ import annotations

import asyncio
from typing import Any

from kvshare.core.lm_protocol import CHECKSUM
from kvshare.hooks.lmcache.remote_client import Client, Connection
from kvshare.hooks.lmcache.remote_shm import SharedConnection
from kvshare.hooks.lmcache.remote_tcp import TCPConnection
from kvshare.hooks.patch import replace


def patch_lm_connector(module: Any) -> None:
    """Replace the class in its module: LMCache looks it up there for each new connector."""
    known = {"18e408041daf": "0.4.4, 0.5.3", "7b81d568062d": "0.5.6"}
    replace(module, "LMCServerConnector", LMConnector, known)


class LMConnector(Client):
    def __init__(self, host: str, port: int, loop: asyncio.AbstractEventLoop, local_cpu_backend: Any) -> None:
        super().__init__(f"lm://{host}:{port}", local_cpu_backend)
        self._address = host, port

    def _open(self, deadline: float) -> Connection:
        return SharedConnection.open(*self._address, deadline) or TCPConnection.open(*self._address, deadline)

    def _allocate(self, entry: Any) -> Any:
        size = entry.length - CHECKSUM
        if not entry.dtype or size != entry.shape.numel() * entry.dtype.itemsize or size > self.full_chunk_size_bytes:
            raise ValueError(f"it sent an entry of {entry.length} bytes, which kvshare did not store")
        return self._chunk(entry.shape, entry.dtype, entry.fmt)
