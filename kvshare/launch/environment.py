"""Builds the environment that every process of a run needs, on every node.

hydra_overrides.py hands it to Ray's workers.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from kvshare.core import lmcache_settings
from kvshare.core.secrets import is_secret
from kvshare.launch import launchers
from kvshare.record.event_log import RUN_DIR

PASSED_ON = re.compile(
    "(LMCACHE|LMCache|MOONCAKE|VERL|UCX|NCCL)_.+|VLLM_(?!HOST_IP).+|KVSHARE_(RUN_DIR|FRESHNESS|MAX_VERSIONS)|PYTHONHASHSEED"
)
"""The caller's variables to pass on. Workers of a Ray cluster that is already up do not inherit them.

VLLM_HOST_IP is not one: each node has its own."""

CONFIG = "KVSHARE_CONFIG"
"""Folder of the recipes, where gsm8k_tools.yaml finds its tools."""

VERL_PLUGIN = "kvshare.verl_plugin"
MODULES = "VERL_USE_EXTERNAL_MODULES"

DEVICE: dict[str, dict[str, str]] = {
    "cuda": {},
    "npu": {},
    "cpu": {
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",  # verl 0.9.1 registers its FSDP engines for cuda and npu only
        "TORCHDYNAMO_DISABLE": "1",
        "RAY_raylet_start_wait_time_s": "300",
        "RAY_prestart_worker_first_driver": "false",  # otherwise Ray starts one idle worker per CPU in num_cpus
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    },
}


def of_run(device: str, run: Path, caller: Mapping[str, str]) -> dict[str, str]:
    """Variables for the driver, Ray's workers and the engines, including those of the caller that match PASSED_ON.

    Args:
        device: cuda, npu or cpu.
        run: folder of the run.
        caller: environment of the process that launches the run.
    """
    config = os.path.abspath(lmcache_settings.path(caller) or "")
    modules = [*filter(None, caller.get(MODULES, "").split(",")), VERL_PLUGIN]
    passed = {name: value for name, value in caller.items() if PASSED_ON.fullmatch(name)}
    return {
        **passed,
        "LMCache_CONFIG_FILE": config,
        "LMCACHE_CONFIG_FILE": config,  # the name that LMCache reads
        "PYTHONHASHSEED": "0",  # chunk hashes must agree between processes
        MODULES: ",".join(dict.fromkeys(modules)),
        RUN_DIR: str(run),
        CONFIG: str(launchers.folder() / "config"),
        "VERL_FILE_LOGGER_PATH": str(run / "metrics.jsonl"),
        **DEVICE[device],
    }


def as_bash(variables: Mapping[str, str]) -> list[str]:
    """A line of bash for each variable. A secret one is only named: it has to be in the caller's environment."""
    return [
        f"# {name} has a password: export it yourself"
        if is_secret(name, value)
        else f"export {shlex.quote(f'{name}={value}')}"
        for name, value in variables.items()
    ]
