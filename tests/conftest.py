"""Shared by the tests: made data and a made model, free ports, processes that end with the session."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

import pytest
from backend import BACKENDS, Backend
from engine_backends import Mooncake, Valkey
from engines import Engine
from hypothesis import HealthCheck, settings
from oracle import Weights
from waiting import until

from kvshare.core import ports
from kvshare.services import health
from kvshare.services.processes import Processes
from kvshare.tools import gsm8k, tiny_model
from kvshare.tools.demo import QUIET

pytest_plugins = ("jobs",)
ROOT = Path(__file__).resolve().parent.parent
CHUNK = 256  # tokens; as in config/remote_backend_config.yaml
BACKENDS.update(valkey=Valkey, mooncake=Mooncake)
LAUNCHERS = sorted(path.name for path in ROOT.glob("run_qwen_*.sh"))

settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are shared
settings.load_profile("noisy")
health.TIMEOUT = 60
PATIENCE = {
    "LMCACHE_BLOCKING_TIMEOUT_SECS": os.environ.get("LMCACHE_BLOCKING_TIMEOUT_SECS", "10"),
    "LMCACHE_LOOKUP_TIMEOUT_MS": "10000",
}
"""How long live engines wait for their server, and schedulers for a worker: a busy machine takes longer than 2 s."""
os.environ.update(QUIET, LMCACHE_LOG_LEVEL="WARNING")
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # scripts find this Python


def pytest_addoption(parser):
    parser.addoption("--backend", default="remote", choices=BACKENDS, help="What live engines share through.")


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    mark = str(tmp_path_factory.mktemp("processes"))
    with Processes(("KVSHARE_TEST_SESSION", mark)) as running:
        yield running


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    gsm8k.write(gsm8k.generate(train=64, test=4, seed=1), folder, shots=17, limit=8)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.make(folder)
    return folder


@pytest.fixture(scope="session")
def lmcache_server(processes, tmp_path_factory) -> str:
    """Address of a real lmcache_server."""
    port, log = ports.free_port(), tmp_path_factory.mktemp("server") / "log"
    server = processes.start([sys.executable, "-m", "lmcache.v1.server", "127.0.0.1", str(port)], log)
    check = partial(health.check_lmcache_server, f"lm://127.0.0.1:{port}")
    return health.wait_healthy("lmcache_server", server, check, log)


@pytest.fixture(scope="session")
def weights(model, tmp_path_factory) -> Weights:
    return Weights(tmp_path_factory.mktemp("weights"), model)


@pytest.fixture(scope="session")
def backend(request, processes, tmp_path_factory) -> Backend:
    """What the engines share through; it can be made to fail."""
    return BACKENDS[request.config.getoption("backend")](processes, tmp_path_factory.mktemp("backend") / "log")


@pytest.fixture(scope="session")
def start_engine(processes, backend, weights, tmp_path_factory):
    """Starts an engine on the one model folder they share; ``wait()`` for it."""
    folder = tmp_path_factory.mktemp("engines")
    # A path that lmcache_server's own key format could not carry: with @, and too long.
    model = weights.make(0, folder / "qwen@tiny" / ("long-" * 20))

    def start(rank: int, name: str, *options: str, **more: str) -> Engine:
        given = {"connector": backend.connector, "options": options}
        return Engine(processes, rank, model, folder / f"{name}.log", PATIENCE | backend.environment | more, **given)

    start.model = model
    return start


@pytest.fixture(scope="session")
def engines(start_engine, backend) -> list[Engine]:
    """Two replicas, with vLLM's own prefix cache on. Their server is not there when they start."""
    with backend.absent():
        started = [engine.wait() for engine in [start_engine(0, "0"), start_engine(1, "1")]]
    for engine in started:
        until(engine.ready)
    return started
