"""The ways to share KV. A backend is a module here with one BACKEND, and its entry in BACKENDS."""

from __future__ import annotations

from pathlib import Path

from kvshare.core import ports
from kvshare.services.backends import mp, p2p, remote
from kvshare.services.backends.backend import Backend as Backend
from kvshare.services.backends.backend import Exports

BACKENDS = {"remote": remote.BACKEND, "p2p": p2p.BACKEND, "mp": mp.BACKEND}


def place(backend: Backend, listen: str, folder: Path) -> tuple[list[str], Exports]:
    """Command and exports of a backend's service on its ports, or free ones where those are taken.

    Args:
        listen: an address of this host, e.g. 127.0.0.1, or 0.0.0.0 for all of them.
        folder: for what it writes.
    """
    found = ports.free_ports(listen, backend.ports)
    host = ports.own_address() if listen == "0.0.0.0" else listen
    return backend.command(listen, found, folder.resolve()), backend.exports(host, found, folder.resolve())
