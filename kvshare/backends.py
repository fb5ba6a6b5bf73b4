"""The ways to share KV, and the service each of them needs. A backend is an entry in BACKENDS."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from kvshare import lmcache_config, services
from kvshare.errors import UserError

Ports = dict[str, int]
Exports = dict[str, str]


@dataclass(frozen=True)
class Backend:
    """
    Args:
        service: what its service is called.
        ports: of the service, by name; those in config/.
        command: what starts it, from the address to listen on, the ports and a folder for what it writes.
        exports: environment variables that tell others of it, from the host they reach it at, the ports and the folder.
        check: returns where it is, from the exports; raises UserError when it is not healthy.
    """

    service: str
    ports: Ports
    command: Callable[[str, Ports, Path], list[str]]
    exports: Callable[[str, Ports, Path], Exports]
    check: Callable[[Mapping[str, str]], str]


def _server(listen: str, ports: Ports, folder: Path) -> list[str]:
    command = [sys.executable, "-m", "kvshare", "server", listen, str(ports["server"])]
    return [*command, "--status", str(folder / "server-status.json")]


def _controller(listen: str, ports: Ports, folder: Path) -> list[str]:
    monitor = {name: port for name, port in ports.items() if name != "http"}
    command = [sys.executable, "-m", "lmcache.v1.api_server", "--host", listen, "--port", str(ports["http"])]
    # A replica that is silent for so many seconds is forgotten; LMCache's default is never.
    command += ["--health-check-interval", "2", "--lmcache-worker-timeout", "10"]
    return [*command, "--monitor-ports", json.dumps(monitor)]


def _mp_server(listen: str, ports: Ports, folder: Path) -> list[str]:
    """It reads no config file: its arguments are what the launchers' says."""
    launchers = Path(__file__).resolve().parent.parent / "config" / "mp_backend_config.yaml"
    file = os.environ.get("LMCACHE_CONFIG_FILE") or (str(launchers) if launchers.exists() else None)
    settings = lmcache_config.read(file) if file else {}
    # Not by LMCache, which takes ten seconds to import; its defaults.
    chunk_size = os.environ.get("LMCACHE_CHUNK_SIZE", settings.get("chunk_size", 256))
    memory = os.environ.get("LMCACHE_MAX_LOCAL_CPU_SIZE", settings.get("max_local_cpu_size", 5))
    _check_memory(memory)
    command = [sys.executable, "-m", "lmcache.cli.main", "server", "--host", listen, "--port", str(ports["server"])]
    command += ["--chunk-size", str(chunk_size), "--l1-size-gb", str(memory)]
    command += ["--eviction-policy", "LRU"]  # KV of old policies is asked for by nobody, so it goes first
    # Both ways to move KV: the default is for GPUs only, and leaves an engine on CPU waiting to be registered.
    command += ["--supported-transfer-mode", "auto"]
    return [*command, "--http-host", "127.0.0.1", "--http-port", str(ports["http"]), "--disable-metrics"]


def _check_memory(gib: Any) -> None:
    """Where it cannot be pinned, the server takes all of it when it starts."""
    free = psutil.virtual_memory().available / 2**30
    try:
        size = float(gib)
    except (TypeError, ValueError):
        size = 0.0
    if not 0 < size < free:
        raise UserError(
            f"max_local_cpu_size {gib} must be a number of GiB, less than the {free:.1f} this machine has free: "
            "set it in the LMCache config, or LMCACHE_MAX_LOCAL_CPU_SIZE"
        )


BACKENDS = {
    "remote": Backend(
        "kvshare server",  # not lmcache_server: what runs unwatched must not grow without end
        {"server": 65432},
        _server,
        lambda host, ports, folder: {
            "LMCACHE_REMOTE_URL": f"lm://{host}:{ports['server']}",
            services.SERVER_STATUS: str(folder / "server-status.json"),
        },
        lambda exports: services.check_lmcache_server(exports["LMCACHE_REMOTE_URL"]),
    ),
    "p2p": Backend(
        "lmcache_controller",
        {"http": 9000, "pull": 8300, "reply": 8400, "heartbeat": 8500},
        _controller,
        lambda host, ports, folder: {
            "LMCACHE_CONTROLLER_PULL_URL": f"{host}:{ports['pull']}",
            "LMCACHE_CONTROLLER_REPLY_URL": f"{host}:{ports['reply']}",
        },
        lambda exports: services.check_controller(
            exports["LMCACHE_CONTROLLER_PULL_URL"], exports["LMCACHE_CONTROLLER_REPLY_URL"]
        ),
    ),
    "mp": Backend(
        "lmcache server",
        {"server": 5555, "http": 8080},
        _mp_server,
        lambda host, ports, folder: {"LMCACHE_REMOTE_URL": f"tcp://{host}:{ports['server']}"},
        lambda exports: services.check_mp_server(exports["LMCACHE_REMOTE_URL"])[0],
    ),
}


def place(backend: Backend, listen: str, folder: Path) -> tuple[list[str], Exports]:
    """Command and exports of a backend's service on its ports, or free ones where those are taken.

    Args:
        listen: an address of this host, e.g. 127.0.0.1, or 0.0.0.0 for all of them.
        folder: for what it writes.
    """
    ports = services.free_ports(listen, backend.ports)
    host = services.own_address() if listen == "0.0.0.0" else listen
    return backend.command(listen, ports, folder.resolve()), backend.exports(host, ports, folder.resolve())
