"""Starts the processes of a bench config: a backend's service, engines that share KV, and others to compare with."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from kvshare.core import p2p_replica, ports
from kvshare.core.errors import UserError
from kvshare.record import worker_events
from kvshare.services import health
from kvshare.services.backends import BACKENDS, place
from kvshare.services.processes import Processes
from kvshare.tools import vllm_http

KEYS = {"backend": str, "arguments": list, "engine": str, "connector": dict, "environment": dict}


@dataclass
class Engines:
    by_kind: dict[str, list[str]]  # URLs: "shared", "plain" (without connector), "offload" (vLLM's own offloading)
    events: Sequence[worker_events.Receiver] | None  # of those that share; None if they send no events
    chunk_size: int  # tokens per chunk


def read(path: Path) -> dict[str, Any]:
    """Read a bench config.

    Raises:
        UserError: the file is missing, or its keys are not those of config/bench/remote_cpu.yaml.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"bench config {path}: {str(error).splitlines()[0]}: start from config/bench/remote_cpu.yaml"
        ) from None
    if not isinstance(config, dict) or config.keys() != KEYS.keys():
        raise UserError(
            f"bench config {path} must have the keys {', '.join(KEYS)}: start from config/bench/remote_cpu.yaml"
        )
    for key, kind in KEYS.items():
        if not isinstance(config[key], kind):
            raise UserError(
                f"bench config {path}: {key} must be a {kind.__name__}: start from config/bench/remote_cpu.yaml"
            )
    if config["backend"] not in BACKENDS:
        raise UserError(f"bench config {path}: backend must be one of {', '.join(BACKENDS)}")
    return config


@contextmanager
def started(
    config: dict[str, Any],
    logs: Path,
    kinds: Sequence[str] = ("shared", "shared", "plain"),
    devices: Sequence[str] = (),
    offload: float = 0,
    arguments: Sequence[str] = (),
) -> Iterator[Engines]:
    """Start the backend's service and the engines, and end them with the context.

    Args:
        config: of ``read()``.
        logs: folder for their logs.
        kinds: of the engines: "shared", "plain", "offload".
        devices: CUDA devices, given to the engines in turn; none: they see all.
        offload: GiB of host memory for vLLM's own offloading, an engine.
        arguments: of all engines; they win over those of the config.

    Raises:
        NotStarted: a process ended, or was not healthy in time.
    """
    logs.mkdir(parents=True, exist_ok=True)
    backend, receivers = BACKENDS[config["backend"]], list[worker_events.Receiver]()
    environment = {"PYTHONHASHSEED": "0", **{name: str(value) for name, value in config["environment"].items()}}
    with Processes(("KVSHARE_BENCH", uuid4().hex)) as processes:
        command, exports = place(backend, "127.0.0.1", logs)
        log = logs / f"{config['backend']}.log"
        service = processes.start([*command, *map(str, config["arguments"])], log, environment)
        health.wait_healthy(backend.service, service, lambda: backend.check(exports), log)
        environment |= exports
        settings = _lmcache(environment)
        running = []
        for number, kind in enumerate(kinds):
            own, special = dict(environment), list[str]()
            if devices:
                own["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
            if kind == "shared":
                receivers.append(worker_events.Receiver())
                own[worker_events.ADDRESS] = receivers[-1].address
                special = ["--kv-transfer-config", json.dumps(config["connector"])]
                if settings["enable_p2p"]:
                    own |= p2p_replica.identity(settings, number, 1, "127.0.0.1", ports.free_port)
            elif kind == "offload":
                special = ["--kv-offloading-size", str(offload), "--kv-offloading-backend", "native"]
            url = f"http://127.0.0.1:{(port := ports.free_port())}"
            log = logs / f"engine-{number}-{kind}.log"
            command = [*_ours(config["engine"]), "--host", "127.0.0.1", "--port", str(port), *special, *arguments]
            running.append((kind, processes.start(command, log, own), url, log))
        for kind, child, url, log in running:
            health.wait_healthy(f"the {kind} engine", child, partial(_check, url), log, ENGINE_SECONDS)
        by_kind = {kind: [url for other, _, url, _ in running if other == kind] for kind in kinds}
        yield Engines(by_kind, receivers, settings["chunk_size"])


ENGINE_SECONDS = 600  # time to load a model, compile it and capture graphs


def _ours(command: str) -> list[str]:
    """The words of a command, with this Python in place of python3."""
    first, *rest = shlex.split(command)
    return [sys.executable if first == "python3" else first, *rest]


def _lmcache(environment: Mapping[str, str]) -> dict[str, Any]:
    """LMCache's settings as the engines see them. Read in another process, because they depend on its environment."""
    code = "import json, os; from kvshare.core import lmcache_settings as c; "
    code += "print(json.dumps(c.effective(os.environ.get('LMCACHE_CONFIG_FILE')).to_dict(), default=str))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | dict(environment), capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"LMCache's settings: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _check(url: str) -> str:
    try:
        vllm_http.get(f"{url}/health", seconds=5)
    except OSError as error:
        raise UserError(f"{url}: {error}") from None
    return url
