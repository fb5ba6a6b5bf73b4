"""Finds free ports, ports that other hosts can reach, and the address of this host."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Mapping

import psutil

from kvshare.core.errors import UserError


def exposed(ports: set[int]) -> list[tuple[str, int]]:
    """Those of ``ports`` that other hosts can reach, as (address, port), sorted by port."""
    listening = {c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr}
    found = [(a.ip, a.port) for a in listening if a.port in ports and not ipaddress.ip_address(a.ip).is_loopback]
    return sorted(found, key=lambda at: at[1])


def in_url(host: str) -> str:
    """A host as it is written before ":PORT": an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host else host


def family(host: str) -> socket.AddressFamily:
    """Address family for listening on ``host``; IPv4 for a name that has both.

    Raises:
        OSError: the host is not known.
    """
    found = {info[0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return socket.AF_INET if socket.AF_INET in found else socket.AF_INET6


def is_free(host: str, port: int) -> bool:
    """Whether a port of this machine can be bound now."""
    with socket.socket(family(host)) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """A port of 127.0.0.1 that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def free_ports(host: str, wanted: Mapping[str, int]) -> dict[str, int]:
    """A port for each name: the one wanted if it is free on ``host``, else another free one.

    Raises:
        UserError: ``host`` is not an address of this machine.
    """
    with contextlib.ExitStack() as bound:  # stay bound until all are found, so that they differ
        found = {}
        for name, port in wanted.items():
            try:
                s = bound.enter_context(socket.socket(family(host)))
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                s.bind((host, port if is_free(host, port) else 0))
            except (OSError, UnicodeError) as error:  # UnicodeError: not a valid host name
                reason = getattr(error, "strerror", None) or error
                raise UserError(f"cannot listen on {host} ({reason}): give an address of this host") from None
            found[name] = s.getsockname()[1]
        return found


def own_address() -> str:
    """The address under which other hosts reach this one. No packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # an address for documentation, RFC 5737
        except OSError:  # no route to other hosts
            return "127.0.0.1"
        return s.getsockname()[0]
