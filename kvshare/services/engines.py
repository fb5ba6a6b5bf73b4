"""Checks that a Valkey (or Redis) server or a Mooncake Store answers, and that its memory has a bound."""

from __future__ import annotations

import importlib
import subprocess
import sys

from kvshare.core.engines import PACKAGES
from kvshare.core.errors import UserError
from kvshare.services import health

UP = "start it with: kvshare services up --backend remote --engine "


def installed(url: str) -> None:
    """Check that the client of an engine can be imported here.

    Raises:
        UserError: it cannot.
    """
    scheme = url.partition("://")[0]
    module, needed = PACKAGES[scheme]
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{scheme}:// has no client here ({error}): install {needed}") from None


def check(url: str, user: str = "", password: str = "") -> str:
    """Ask the server for its health; return what it is and where.

    Args:
        user, password: those of ``valkey_username`` and ``valkey_password``; Redis has them in the URL.

    Raises:
        UserError: nothing answers, another program does, its memory has no bound, or its client is not installed.
    """
    installed(url)
    return _mooncake(url) if url.startswith("mooncakestore://") else _valkey(url, user, password)


def _valkey(url: str, user: str, password: str) -> str:
    import redis  # a dependency of LMCache

    host, port = health.host_and_port(url)
    at, given = f"{host}:{port}", {key: value for key, value in (("username", user), ("password", password)) if value}
    try:
        with redis.Redis.from_url(
            url.replace("valkey://", "redis://"),
            socket_timeout=health.TIMEOUT,
            socket_connect_timeout=health.TIMEOUT,
            **given,
        ) as client:
            found = client.info()
    except (redis.RedisError, OSError, ValueError) as error:
        raise UserError(f"no Valkey or Redis answers at {at} ({error}): {UP}valkey, or correct remote_url") from None
    if not found["maxmemory"] or not found["maxmemory_policy"].startswith("allkeys-"):
        raise UserError(
            f"the server at {at} never evicts KV (maxmemory {found['maxmemory']}, {found['maxmemory_policy']}): "
            "set maxmemory, and maxmemory-policy allkeys-lru"
        )
    name = "Valkey" if found.get("server_name") == "valkey" else "Redis"
    return f"{name} {found.get('valkey_version') or found['redis_version']} at {at}"


def _mooncake(url: str) -> str:
    """In a process of its own: Mooncake's client waits for a server that hangs."""
    host, port = health.host_and_port(url)
    command = [sys.executable, "-m", "kvshare.services.mooncake", "check", url]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10 * health.TIMEOUT)
        problem = done.returncode and (done.stdout.splitlines() or ["its client ended"])[-1]
    except subprocess.TimeoutExpired:
        problem = "no answer in time"
    if problem:
        raise UserError(f"no Mooncake Store works at {host}:{port} ({problem}): {UP}mooncake, or correct remote_url")
    return f"Mooncake Store at {host}:{port}"
