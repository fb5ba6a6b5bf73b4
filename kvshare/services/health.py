"""Checks that the service of a backend answers, and that it is the right program."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

import msgspec
import zmq

from kvshare.core.errors import UserError
from kvshare.core.lm_protocol import HEALTH_REQUEST, REPLY, SUCCESS
from kvshare.core.ports import in_url
from kvshare.core.secrets import redacted


class NotStarted(Exception):
    """A service ended before it was healthy; ``tail`` has the last lines of its log."""

    def __init__(self, what: str, log: Path) -> None:
        super().__init__(redacted(what))
        self.log = log
        self.tail = redacted(log.read_text(errors="replace")).splitlines()[-15:]


ZMTP = b"\xff"  # first byte of a ZMTP greeting, RFC 23
GET_CHUNK_SIZE = 21
"""Number of this operation in LMCache's multi-process protocol, stable there (transport/zmq_impl/wire.py)."""

TIMEOUT = 3.0  # seconds; the services are local or one hop away
START_SECONDS = 300  # importing LMCache takes a minute on a busy machine; a service that has ended is noticed at once


def check_lmcache_server(url: str) -> str:
    """Ask the server at ``lm://host:port`` for its health; return "host:port".

    Raises:
        UserError: the URL is malformed, nothing answers, or another program does.
    """
    host, port = host_and_port(url)
    start = f"start it with: lmcache_server {host} {port}"
    if ":" in host:
        start = f"start it with: kvshare server {host} {port}"  # lmcache_server listens on IPv4 only
    reply = _exchange(host, port, HEALTH_REQUEST, REPLY.size, f"lmcache_server at {in_url(host)}:{port}", start)
    if len(reply) < REPLY.size or REPLY.unpack(reply)[0] != SUCCESS:
        raise UserError(
            f"{in_url(host)}:{port} is taken by something that is not lmcache_server: "
            f"stop it, or choose another port in remote_url and {start}"
        )
    return f"{in_url(host)}:{port}"


def host_and_port(url: str) -> tuple[str, int]:
    """Host and port of a remote_url; an IPv6 address without brackets.

    Raises:
        UserError: it lacks one of them.
    """
    host, port = _split(url)
    if not host or not port:
        raise UserError(
            f"remote_url {url!r} is not {url.partition('://')[0]}://HOST:PORT: correct it in the LMCache config"
        )
    return host, port


def reach(url: str) -> str:
    """Whether something listens at a URL of which more cannot be known, in words.

    Raises:
        UserError: the URL has no valid port, or has host and port and nothing listens there.
    """
    try:
        parsed = urlparse(url)
        host, port = parsed.hostname, parsed.port
    except ValueError:  # its text may have a part of a password
        raise UserError(f"remote_url {url} is no URL: correct it in the LMCache config") from None
    if not host or not port:
        return "not checked"
    _exchange(host, port, b"", 0, f"remote_url {url}", "start it, or correct remote_url")
    return "reachable"


def _split(url: str) -> tuple[str | None, int | None]:
    try:
        parsed = urlparse(url)
        return parsed.hostname, parsed.port
    except ValueError:
        return None, None


def wait_healthy(
    name: str, process: subprocess.Popen, check: Callable[[], str], log: Path, seconds: float = START_SECONDS
) -> str:
    """Wait until a starting service is healthy; return the value of ``check``.

    Raises:
        NotStarted: the service ended, or is not healthy after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        try:
            return check()
        except UserError as error:
            if time.monotonic() > deadline:
                raise NotStarted(f"{name} is not healthy after {seconds:.0f} s ({error})", log) from None
            time.sleep(0.2)
    raise NotStarted(f"{name} ended with exit code {process.returncode}", log)


def check_controller(pull_url: str, reply_url: str) -> str:
    """Check lmcache_controller's two zmq sockets; return their addresses.

    Raises:
        UserError: an address is malformed, nothing answers, or another program does.
    """
    ports: dict[str, tuple[str, int]] = {}
    for name, url in (("pull", pull_url), ("reply", reply_url)):
        host, port = _split(f"tcp://{str(url).removeprefix('tcp://')}")
        if not host or not port:
            raise UserError(f"controller_{name}_url {url!r} is not HOST:PORT: correct it in the LMCache config")
        ipv4_only("lmcache_controller", host)
        ports[name] = (host, port)
    host, pull, reply = ports["pull"][0], ports["pull"][1], ports["reply"][1]
    start = (
        f"start it with: lmcache_controller --host {host} --port 9000 "
        f"""--monitor-ports '{{"pull": {pull}, "reply": {reply}}}'"""
    )
    for name, (host, port) in ports.items():
        greeting = _exchange(host, port, b"", 1, f"lmcache_controller's {name} port {host}:{port}", start)
        if greeting != ZMTP:
            raise UserError(
                f"{host}:{port} is taken by something that is not lmcache_controller: "
                f"stop it, or choose another port in controller_{name}_url and {start}"
            )
    if not _looks_up(*ports["reply"]):
        raise UserError(
            f"{ports['reply'][0]}:{reply} speaks zmq, but not as lmcache_controller's reply port: "
            f"stop it, or choose another port in controller_reply_url and {start}"
        )
    return f"{host}:{pull} and {reply}"


def ipv4_only(service: str, host: str) -> None:
    """Refuse an IPv6 address. LMCache never sets zmq's option for IPv6, so its sockets have IPv4 only (0.5.6).

    Raises:
        UserError: it is one.
    """
    if ":" in host:
        raise UserError(f"{service} and the engines that ask it have no IPv6, {host} is that: give an IPv4 address")


def check_mp_server(url: str) -> tuple[str, int]:
    """Ask the multi-process server at ``tcp://host:port`` for its chunk size; return "host:port" and tokens per chunk.

    Raises:
        UserError: the URL is malformed, nothing answers, or another program does.
    """
    host, port = _split(url)
    if not url.startswith("tcp://") or not host or not port:
        raise UserError(f"remote_url {url!r} is not tcp://HOST:PORT: correct it in the LMCache config")
    ipv4_only("lmcache server", host)
    start = "start it with: kvshare services up --backend mp"
    greeting = _exchange(host, port, b"", 1, f"lmcache server at {host}:{port}", start)
    number, operation = msgspec.msgpack.encode(0), msgspec.msgpack.encode(GET_CHUNK_SIZE)
    reply = _ask(zmq.DEALER, host, port, number, operation) if greeting == ZMTP else []
    try:
        chunk_size = msgspec.msgpack.decode(reply[2], type=int)
    except (IndexError, msgspec.MsgspecError):
        raise UserError(
            f"{host}:{port} does not answer as lmcache server does (hangs, or another program has the port): "
            f"end it, or choose another port in remote_url, and {start}"
        ) from None
    return f"{host}:{port}", chunk_size


def _looks_up(host: str, port: int) -> bool:
    """Whether an empty P2P lookup gets lmcache_controller's answer."""
    ask = {"type": "BatchedP2PLookupMsg", "hashes": [], "instance_id": "kvshare", "worker_id": 0}
    return b"BatchedP2PLookupRetMsg" in b"".join(_ask(zmq.REQ, host, port, msgspec.msgpack.encode(ask)))


def _ask(kind: int, host: str, port: int, *frames: bytes) -> list[bytes]:
    """Send a zmq message and return the reply; an empty list if none comes within TIMEOUT."""
    s: zmq.Socket = zmq.Context.instance().socket(kind)
    with s:
        s.setsockopt(zmq.LINGER, 0)
        s.connect(f"tcp://{host}:{port}")
        s.send_multipart(frames)
        return s.recv_multipart() if s.poll(int(TIMEOUT * 1000)) else []


def _exchange(host: str, port: int, request: bytes, size: int, what: str, start: str) -> bytes:
    """Send ``request`` and return up to ``size`` bytes of the answer, possibly none."""
    try:
        with socket.create_connection((host, port), timeout=TIMEOUT) as s:
            s.settimeout(TIMEOUT)
            reply = b""
            try:
                s.sendall(request)
                while len(reply) < size and (more := s.recv(size - len(reply))):
                    reply += more
            except OSError:
                pass  # connection closed or timeout: return what has arrived
            return reply
    except OSError as error:
        raise UserError(f"{what} does not answer ({error.strerror or error}): {start}") from None
