"""Starts what a bench config lists: services, two engines that share, and one with no connector."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from kvshare import events, p2p, services
from kvshare.errors import UserError
from kvshare.processes import Processes

KEYS = {"services": list, "engine": str, "connector": dict, "environment": dict}
PORT = re.compile(r"\{([a-z_]+)\}")


@dataclass
class Engines:
    urls: list[str]  # two that share
    plain: str | None  # one with no connector
    events: list[events.Receiver] | None  # of the two, where they send any
    chunk_size: int  # tokens


def read(path: Path) -> dict[str, Any]:
    """A bench config; each ``{name}`` in it has become a free port.

    Raises:
        UserError: it is missing, or not what config/bench_cpu.yaml is.
    """
    ports: dict[str, int] = {}
    try:
        text = PORT.sub(lambda m: str(ports.setdefault(m[1], services.free_port())), path.read_text())
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"bench config {path}: {str(error).splitlines()[0]}: start from config/bench_cpu.yaml"
        ) from None
    if not isinstance(config, dict) or config.keys() != KEYS.keys():
        raise UserError(f"bench config {path} must have the keys {', '.join(KEYS)}: start from config/bench_cpu.yaml")
    for key, kind in KEYS.items():
        if not isinstance(config[key], kind):
            raise UserError(f"bench config {path}: {key} must be a {kind.__name__}: start from config/bench_cpu.yaml")
    config["ports"] = list(ports.values())
    return config


@contextmanager
def started(config: dict[str, Any], logs: Path) -> Iterator[Engines]:
    """Everything the config lists, up; it ends with the context. Must be entered inside no event loop.

    Raises:
        services.NotStarted: something ended instead; the message has the end of its log.
    """
    environment = {"PYTHONHASHSEED": "0", **{name: str(value) for name, value in config["environment"].items()}}
    receivers = [events.Receiver(), events.Receiver()]
    logs.mkdir(parents=True, exist_ok=True)
    with Processes(("KVSHARE_RUN", uuid4().hex)) as processes:
        for i, command in enumerate(config["services"]):
            _start_service(processes, shlex.split(command), logs / f"service-{i}.log", environment, config["ports"])
        connector = ["--kv-transfer-config", json.dumps(config["connector"])]
        settings, chunk_size = _lmcache(environment)
        arms = [(f"engine-{i}", connector, {events.ADDRESS: r.address}) for i, r in enumerate(receivers)]
        running = []
        for rank, (name, more, own) in enumerate([*arms, ("plain", [], {})]):
            if settings.get("enable_p2p") and more:
                own = own | p2p.identity(settings, rank, 1)
            port = services.free_port()
            command = [*shlex.split(config["engine"]), "--host", "127.0.0.1", "--port", str(port), *more]
            child = processes.start(_ours(command), logs / f"{name}.log", environment | own)
            running.append((child, logs / f"{name}.log", f"http://127.0.0.1:{port}"))
        for child, log, url in running:
            while not _answers(url):
                _check(child, log)
                time.sleep(0.5)
        *urls, plain = [url for _, _, url in running]
        yield Engines(urls, plain, receivers, chunk_size)


def _start_service(
    processes: Processes, command: list[str], log: Path, environment: dict[str, str], ports: list[int]
) -> None:
    child = processes.start(_ours(command), log, environment)
    for port in [port for port in ports if any(str(port) in word for word in command)]:
        while services.is_free("127.0.0.1", port):
            _check(child, log)
            time.sleep(0.2)


def _ours(command: list[str]) -> list[str]:
    """With this Python, where the command says python3 or kvshare."""
    if command[0] == "kvshare":
        return [sys.executable, "-m", *command]
    return [sys.executable, *command[1:]] if command[0] == "python3" else command


def _lmcache(environment: dict[str, str]) -> tuple[dict[str, Any], int]:
    """In-process LMCache's settings under this environment."""
    from lmcache.v1.config import load_engine_config_with_overrides

    before = dict(os.environ)
    os.environ.update(environment)
    try:
        config = load_engine_config_with_overrides(config_file_path=os.environ.get("LMCACHE_CONFIG_FILE"))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return config.to_dict(), config.chunk_size


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5):
            return True
    except OSError:
        return False


def _check(child: Any, log: Path) -> None:
    if child.poll() is not None:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise services.NotStarted(f"{tail}\n{log}: ended with exit code {child.returncode}")
