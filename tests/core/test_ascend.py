"""Preflight for Ascend, on machines that lack one thing or another; none has an NPU."""

import platform
from types import SimpleNamespace

import pytest

from kvshare.core import ascend, lmcache_settings, versions
from kvshare.core.errors import UserError
from kvshare.launch import preflight
from kvshare.launch.preflight import engine, lmcache
from kvshare.services.backends import p2p


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """One that has all of it, as far as files go."""
    library = tmp_path / "cann" / f"{platform.machine()}-linux" / "lib64" / "libascendcl.so"
    for file in (library, tmp_path / "dev" / "davinci0", tmp_path / "bin" / "npu-smi"):
        file.parent.mkdir(parents=True)
        file.touch(mode=0o755)
    monkeypatch.setattr(ascend, "DEV", tmp_path / "dev")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path / "cann"))
    monkeypatch.delenv("ASCEND_TOOLKIT_HOME", raising=False)
    monkeypatch.library = library
    return monkeypatch


def test_nothing_is_missing(machine, tmp_path):
    assert list(ascend.missing()) == []
    machine.delenv("ASCEND_HOME_PATH")
    machine.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path / "cann"))
    assert list(ascend.missing()) == []


def test_cann_is_not_set_up(machine):
    machine.delenv("ASCEND_HOME_PATH")
    (line,) = ascend.missing()
    assert line.startswith("CANN is not set up, neither ASCEND_HOME_PATH nor ASCEND_TOOLKIT_HOME is set")


def test_cann_has_no_library(machine, tmp_path):
    machine.library.unlink()
    (line,) = ascend.missing()
    assert line.startswith(f"CANN at {tmp_path}/cann has no lib64/libascendcl.so")


def test_no_driver(machine, tmp_path):
    (tmp_path / "dev" / "davinci0").rename(tmp_path / "dev" / "davinci_manager")  # a container without devices
    (line,) = ascend.missing()
    assert line.startswith(f"no NPU, {tmp_path}/dev/davinci* does not exist: install the Ascend driver")


def test_no_npu_smi(machine, tmp_path):
    (tmp_path / "bin" / "npu-smi").unlink()
    (line,) = ascend.missing()
    assert line.startswith("npu-smi is not on PATH")


@pytest.mark.parametrize("package", ["torch-npu", "vllm-ascend", "lmcache-ascend"])
def test_package_is_missing(machine, package):
    lines = preflight.errors(preflight.run(preflight.Job("remote", "npu", [])))
    (line,) = [line for line in lines if f"package {package} is missing" in line]
    built = package == "lmcache-ascend"  # it is not on PyPI
    fix = "the command is in requirements/npu.txt" if built else "pip install --no-deps -r requirements/npu.txt"
    assert line.endswith(fix)


def test_this_machine_lacks_all_of_it(monkeypatch, tmp_path):
    """One line for each thing, and nothing else is looked at."""
    monkeypatch.setattr(ascend, "DEV", tmp_path)
    monkeypatch.setattr(
        versions,
        "FITS",
        {"npu": [versions.Fit("npu.txt", {"no-torch-npu": "==1", "lmcache-ascend": "==0.4.4"}, {"remote": {}})]},
    )
    for name, value in (("PATH", ""), ("ASCEND_HOME_PATH", ""), ("ASCEND_TOOLKIT_HOME", "")):
        monkeypatch.setenv(name, value)
    starts = ["package no-torch-npu is missing", "package lmcache-ascend is missing", "CANN", "no NPU", "npu-smi"]
    lines = preflight.errors(preflight.run(preflight.Job("remote", "npu", [])))
    assert len(lines) == len(starts)
    assert all(line.startswith(start) and "\n" not in line for line, start in zip(lines, starts, strict=True))


def test_lmcache_ascend_does_not_load(monkeypatch, tmp_path):
    (tmp_path / "lmcache_ascend.py").write_text("raise OSError('libhccl.so:\\n cannot open shared object file')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"lmcache_ascend does not load \(OSError: libhccl.so: cannot open") as error:
        ascend.load_lmcache()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["LMCacheConnectorV1", "LMCacheAscendConnector", ascend.CONNECTOR])
def test_connector(name, monkeypatch):
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    monkeypatch.setattr(KVConnectorFactory, "get_connector_class", lambda config: object)  # none here is Ascend's
    job = preflight.Job("remote", "npu", [])
    given = KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_load_failure_policy="recompute")
    job.engine = SimpleNamespace(kv_transfer_config=given)
    rollout = SimpleNamespace(engine_kwargs={"vllm": {"kv_transfer_config": "{}"}})
    job.config = SimpleNamespace(actor_rollout_ref=SimpleNamespace(rollout=rollout))
    wrong = f"kv_connector {name} does not work on Ascend: use {ascend.CONNECTOR} (docs/npu.md)"
    assert list(engine.connector(job)) == ([] if name == ascend.CONNECTOR else [wrong])


def test_channel_of_lmcache():
    job = preflight.Job("p2p", "npu", [])
    job.lmcache = SimpleNamespace(transfer_channel="nixl", enable_p2p=True, enable_controller=True, local_cpu=True)
    found = list(p2p.BACKEND.settings(job, "f.yaml"))
    assert found[-1] == "transfer_channel nixl is not one LMCache-Ascend knows: set it to hccl or hixl"
    job.lmcache.transfer_channel = "hccl"
    assert list(p2p.BACKEND.settings(job, "f.yaml")) == []


def test_stores_behind_vllms_back(monkeypatch, tmp_path):
    path = tmp_path / "f.yaml"
    path.write_text("remote_url: lm://localhost:1")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(path))
    monkeypatch.setattr(ascend, "load_lmcache", lambda: None)
    settings = {"chunk_size": 256, "use_layerwise": False, "enable_blending": False, "local_disk": None}
    settings |= {"remote_url": "redis://one:1", "remote_serde": "naive", "remote_storage_plugins": None}
    made = SimpleNamespace(**settings, store_async=True)
    monkeypatch.setattr(lmcache_settings, "effective", lambda path, extra: made)
    job = preflight.Job("remote", "npu", [])
    rollout = SimpleNamespace(engine_kwargs={"vllm": {}}, nnodes=0)
    job.config = SimpleNamespace(
        trainer=SimpleNamespace(nnodes=1),
        data=SimpleNamespace(max_prompt_length=1024),
        actor_rollout_ref=SimpleNamespace(rollout=rollout),
    )
    (line,) = lmcache.settings(job)
    assert line == "f.yaml: store_async: true may store KV that vLLM has overwritten: set it to false"
