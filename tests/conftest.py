"""Shared by the tests: made data and a made model, free ports, processes that end with the session."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kvshare import gsm8k, services, tiny_model
from kvshare.demo import QUIET
from kvshare.processes import Processes

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = sorted(path.name for path in ROOT.glob("run_qwen_*.sh"))

os.environ.update(QUIET, LMCACHE_LOG_LEVEL="WARNING")
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # scripts find this Python


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    mark = str(tmp_path_factory.mktemp("processes"))
    with Processes(("KVSHARE_TEST_SESSION", mark)) as running:
        yield running


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    gsm8k.write(gsm8k.generate(train=64, test=4, seed=1), folder, shots=10, limit=8)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_model.make(folder)
    return folder


@pytest.fixture(scope="session")
def lmcache_server(processes, tmp_path_factory) -> str:
    """Address of a real lmcache_server."""
    return services.start_lmcache_server(processes, tmp_path_factory.mktemp("server") / "log", QUIET)
