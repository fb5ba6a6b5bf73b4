"""Ports and addresses of this host."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Mapping

import psutil

from kvshare.core.errors import UserError


def exposed(ports: set[int]) -> list[tuple[str, int]]:
    """Which of these ports of this machine can be reached from others, and where they listen."""
    listening = {c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr}
    found = [(a.ip, a.port) for a in listening if a.port in ports and not ipaddress.ip_address(a.ip).is_loopback]
    return sorted(found, key=lambda at: at[1])


def is_free(host: str, port: int) -> bool:
    """Whether a port of this machine can be bound now."""
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def free_ports(host: str, wanted: Mapping[str, int]) -> dict[str, int]:
    """Those wanted where they are free on ``host``, an address of this machine, others where not.

    Raises:
        UserError: it is none.
    """
    with contextlib.ExitStack() as bound:  # until all are found: they must differ
        found = {}
        for name, port in wanted.items():
            s = bound.enter_context(socket.socket())
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((host, port if is_free(host, port) else 0))
            except OSError as error:
                raise UserError(f"cannot listen on {host} ({error.strerror}): give an address of this host") from None
            found[name] = s.getsockname()[1]
        return found


def own_address() -> str:
    """The address of this host on the way to others; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # nobody's, RFC 5737
        except OSError:  # no route: it is alone
            return "127.0.0.1"
        return s.getsockname()[0]
