"""The environment is the file, and what the launchers' processes import is there and loads."""

import ctypes.util
import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions, version
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from gpu.conftest import FILE, PINS, SERVES_MP

SITE = Path(sysconfig.get_path("purelib"))

LMCACHE = "lmcache.integration.vllm"
DRIVER = "verl.trainer.main_ppo verl.trainer.ppo.v1 verl.trainer.ppo.v1.trainer_sync ray transfer_queue tensordict"
ACTOR = """
    verl.workers.engine_workers verl.workers.engine.fsdp.transformer_impl verl.checkpoint_engine
    verl.workers.rollout.vllm_rollout verl.workers.rollout.vllm_rollout.vllm_rollout
    verl.workers.rollout.vllm_rollout.bucketed_weight_transfer verl.workers.rollout.router
"""
AGENT_LOOP = (
    "verl.experimental.agent_loop verl.experimental.agent_loop.single_turn_agent_loop verl.trainer.ppo.v1.agent_loop_tq"
)
SERVER = """
    verl.workers.rollout.vllm_rollout.vllm_async_server verl.workers.rollout.vllm_rollout.utils
    vllm.entrypoints.openai.api_server vllm.entrypoints.cli.main vllm.v1.engine.async_llm vllm.v1.engine.core
    vllm.v1.executor.multiproc_executor vllm.v1.worker.gpu_worker vllm.v1.worker.gpu_model_runner
"""
CONNECTOR = """
    lmcache.integration.vllm.vllm_v1_adapter lmcache.integration.vllm.lmcache_connector_v1 lmcache.v1.cache_engine
    vllm.distributed.kv_transfer.kv_connector.v1.lmcache_connector
"""
PROCESSES = {
    "driver": DRIVER,
    "actor": ACTOR,
    "agent loop": AGENT_LOOP,
    "vLLM server": SERVER,
    "connector": CONNECTOR,
    "connector, p2p": "nixl nixl._api nixl_cu13._bindings lmcache.v1.transfer_channel.nixl_channel",
    "connector, mp": f"{LMCACHE}.lmcache_mp_connector {LMCACHE}.vllm_multi_process_adapter",
    "lmcache_server": "lmcache.v1.server.__main__",
    "lmcache_controller": "lmcache.v1.api_server.__main__",
    "lmcache server": "lmcache.cli.main lmcache.v1.multiprocess.server",
}


def test_environment_is_the_file():
    found = {canonicalize_name(d.name): d.version for d in distributions(path=[str(SITE)])}
    found.pop("kvshare")
    pinned = {canonicalize_name(name): number for name, number in PINS.items()}
    assert found == pinned
    print(f"\n{len(found)} distributions, all of requirements/{FILE}.txt")


def test_torch_is_cudas():
    import torch

    assert torch.version.cuda.startswith("13.")
    assert version("torch") == PINS["torch"]
    machine = os.uname().machine
    assert (machine == "x86_64") or SERVES_MP


@pytest.mark.parametrize("process", PROCESSES)
def test_imports(process):
    """In a process of its own: what one imports must not hide what another lacks."""
    script = f"""
import importlib
for name in {PROCESSES[process].split()}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_all_v1_trainers():
    package = importlib.import_module("verl.trainer.ppo.v1")
    names = [m.name for m in pkgutil.iter_modules(package.__path__, "verl.trainer.ppo.v1.")]
    for name in names:
        importlib.import_module(name)
    assert len(names) >= 5


@pytest.fixture(scope="session")
def driver_stub(tmp_path_factory) -> Path:
    """A folder with a libcuda.so.1 that has every function that some compiled module here asks of the driver."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not compiler:
        pytest.skip("no C compiler for a stand-in of libcuda.so.1")
    names = set()
    for path in compiled():
        names |= set(re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", path.read_bytes()))
    folder = tmp_path_factory.mktemp("driver")
    source = "".join(f"int {name.decode()}(void) {{ return 100; }}\n" for name in sorted(names))
    command = [compiler, "-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1", "-x", "c", "-"]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], input=source, text=True, check=True)
    return folder


def compiled() -> list[Path]:
    """Extension modules that hold or move KV."""
    return sorted(p for package in ("lmcache", "vllm") for p in (SITE / package).glob("*.so"))


def test_compiled_modules_load(driver_stub):
    """Python binds all symbols of an extension when it imports it: one that torch lacks is an ImportError."""
    script = """
import sys, torch
from importlib.util import module_from_spec, spec_from_file_location

for path in sys.argv[1:]:  # by path: LMCache 0.5.3 puts something else under the name of its extension
    try:
        module_from_spec(spec_from_file_location(path.rsplit("/", 1)[1].split(".")[0], path))
    except ImportError as error:
        print(f"{path}: {error}")
"""
    names = [f"{path.parent.name}.{path.name.split('.')[0]}" for path in compiled()]
    path = f"{driver_stub}:{os.environ.get('LD_LIBRARY_PATH', '')}" if not ctypes.util.find_library("cuda") else ""
    environment = {**os.environ, **({"LD_LIBRARY_PATH": path} if path else {})}
    command = [sys.executable, "-c", script, *map(str, compiled())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert {"lmcache.cuda_ops", "lmcache.c_ops"} & set(names)
    print(f"\n{len(names)} compiled modules load: {', '.join(names)}")
