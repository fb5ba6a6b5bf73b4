"""The ways to share KV. A backend is a module here that defines BACKEND, and an entry in BACKENDS.

ENGINES has the servers that the remote backend can use instead of ``kvshare server``.
"""

from __future__ import annotations

from pathlib import Path

from kvshare.core import ports
from kvshare.core.errors import UserError
from kvshare.services.backends import mp, p2p, remote
from kvshare.services.backends.engines import ENGINES
from kvshare.services.backends.interface import Backend as Backend
from kvshare.services.backends.interface import Exports
from kvshare.services.health import ipv4_only

BACKENDS = {"remote": remote.BACKEND, "p2p": p2p.BACKEND, "mp": mp.BACKEND}


def of(backend: str, engine: str) -> Backend:
    """The backend of this name, with the service of an engine if one is named.

    Raises:
        UserError: it has no such engine.
    """
    if not engine:
        return BACKENDS[backend]
    if backend != "remote" or engine not in ENGINES:
        raise UserError(f"--engine {engine}: must be one of {', '.join(ENGINES)}, with --backend remote")
    return ENGINES[engine]


def place(backend: Backend, listen: str, folder: Path) -> tuple[list[str], Exports]:
    """Command and exports of a backend's service. A port that is taken is replaced by a free one.

    Args:
        listen: address of this host, e.g. 127.0.0.1; 0.0.0.0 for all of them.
        folder: folder for the files of the service.
    """
    if backend is not remote.BACKEND:
        ipv4_only(backend.service, listen)
    found = ports.free_ports(listen, backend.ports)
    host = ports.own_address() if listen in ("0.0.0.0", "::") else listen
    return backend.command(listen, found, folder.resolve()), backend.exports(host, found, folder.resolve())
