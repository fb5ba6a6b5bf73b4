"""Is the service a backend needs there, and is it really LMCache's?"""

from __future__ import annotations

import ipaddress
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlparse

import psutil

from kvshare.errors import UserError
from kvshare.processes import Processes


class NotStarted(Exception):
    """A service ended before it was up."""


SERVER_STATUS = "KVSHARE_SERVER_STATUS"
"""Environment variable with the file that ``kvshare server --status`` writes; preflight and report read it."""

TIMEOUT = 3.0  # seconds; these are local or one hop away


def check_lmcache_server(url: str) -> str:
    """Ask an ``lm://host:port`` for its health; returns "host:port".

    Raises:
        UserError: bad URL, nobody there, or somebody else.
    """
    try:
        parsed = urlparse(url)
        host, port = parsed.hostname, parsed.port
    except ValueError:
        host, port = None, None
    if not host or not port:
        raise UserError(f"remote_url {url!r} is not lm://HOST:PORT: correct it in the LMCache config")
    start = f"start it with: lmcache_server {host} {port}"
    reply = _exchange(host, port, health_request(), 36, f"lmcache_server at {host}:{port}", start)
    if not _is_health_reply(reply):
        raise UserError(
            f"{host}:{port} is taken by something that is not lmcache_server: "
            f"stop it, or choose another port in remote_url and {start}"
        )
    return f"{host}:{port}"


def start_lmcache_server(processes: Processes, log: Path, env: Mapping[str, str]) -> str:
    """Start an lmcache_server on a free port of 127.0.0.1 and wait until it is healthy; returns "host:port".

    Raises:
        NotStarted: it ended instead; ``log`` says why.
    """
    port = free_port()
    server = processes.start([sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)], log, env)
    while server.poll() is None:
        try:
            return check_lmcache_server(f"lm://127.0.0.1:{port}")
        except UserError:
            time.sleep(0.5)
    raise NotStarted(f"lmcache_server ended with exit code {server.returncode}")


def check_controller(pull_url: str, reply_url: str) -> str:
    """Look for lmcache_controller's two zmq sockets; returns their addresses.

    Raises:
        UserError: bad address, nobody there, or somebody else.
    """
    ports: dict[str, tuple[str, int]] = {}
    for name, url in (("pull", pull_url), ("reply", reply_url)):
        host, _, text = str(url).removeprefix("tcp://").rpartition(":")
        if not host or not text.isdigit():
            raise UserError(f"controller_{name}_url {url!r} is not HOST:PORT: correct it in the LMCache config")
        ports[name] = (host, int(text))
    host, pull, reply = ports["pull"][0], ports["pull"][1], ports["reply"][1]
    start = (
        f"start it with: lmcache_controller --host {host} --port 9000 "
        f"""--monitor-ports '{{"pull": {pull}, "reply": {reply}}}'"""
    )
    for name, (host, port) in ports.items():
        greeting = _exchange(host, port, b"", 1, f"lmcache_controller's {name} port {host}:{port}", start)
        if greeting != b"\xff":  # first byte of a ZMTP greeting, RFC 23
            raise UserError(
                f"{host}:{port} is taken by something that is not lmcache_controller: "
                f"stop it, or choose another port in controller_{name}_url and {start}"
            )
    return f"{host}:{pull} and {reply}"


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


def _exchange(host: str, port: int, request: bytes, size: int, what: str, start: str) -> bytes:
    """Send ``request`` and read up to ``size`` bytes; empty if none come."""
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT) as s:
            s.settimeout(TIMEOUT)
            reply = b""
            try:
                s.sendall(request)
                while len(reply) < size and (more := s.recv(size - len(reply))):
                    reply += more
            except OSError:
                pass  # it closed the connection or says nothing: what came is the answer
            return reply
    except OSError as error:
        raise UserError(f"{what} does not answer ({error.strerror or error}): {start}") from None


def health_request() -> bytes:
    """What asks an ``lm://`` server whether it is well."""
    import torch
    from lmcache.utils import CacheEngineKey
    from lmcache.v1.memory_management import MemoryFormat
    from lmcache.v1.protocol import ClientCommand, ClientMetaMessage

    key = CacheEngineKey("kvshare", 1, 0, 0, torch.float16)
    shape = torch.Size([0, 0, 0, 0])
    return ClientMetaMessage(ClientCommand.HEALTH, key, 0, MemoryFormat(1), torch.float16, shape).serialize()


def _is_health_reply(reply: bytes) -> bool:
    from lmcache.v1.protocol import ServerMetaMessage, ServerReturnCode

    try:
        return ServerMetaMessage.deserialize(reply).code == ServerReturnCode.SUCCESS
    except Exception:  # struct.error, ValueError, KeyError: not LMCache's protocol
        return False
