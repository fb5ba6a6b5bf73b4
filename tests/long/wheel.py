"""The wheel in an environment of its own (`make wheel`, a minute; pip downloads what kvshare depends on)."""

import subprocess
import sys
import venv

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def kvshare(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    venv.create(folder / "venv", with_pip=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([str(folder / "venv/bin/pip"), "-q", "install", str(wheel)], check=True)
    return folder / "venv/bin/kvshare"


def test_help_imports_only_what_is_fast(kvshare):
    command = [kvshare.parent / "python", "-X", "importtime", "-m", "kvshare", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert "preflight" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"aiohttp", "hydra", "jinja2", "matplotlib", "numpy", "prometheus_client", "pyarrow", "torch"}


def test_it_brings_the_launchers(kvshare):
    command = [kvshare, "overrides", "--backend", "p2p", "--device", "npu"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    shared = kvshare.parent.parent / "share" / "kvshare"
    assert f"export LMCACHE_CONFIG_FILE={shared}/config/p2p_backend_config.yaml\n" in done.stdout


@pytest.mark.parametrize("command", ["preflight", "forecast"])
def test_what_is_not_installed_is_one_line(kvshare, command):
    arguments = [kvshare, command, "--backend", "remote", "--device", "cuda"]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert "package torch is missing: pip install --no-deps -r requirements/gpu" in done.stderr
    assert "Traceback" not in done.stderr
