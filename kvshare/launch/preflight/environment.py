"""Checks the environment, and whether the workers of a running Ray cluster get it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from omegaconf import OmegaConf

from kvshare.core import freshness
from kvshare.core.job import Job
from kvshare.core.lmcache_settings import NOT_SETTINGS
from kvshare.core.secrets import is_secret
from kvshare.launch.environment import PASSED_ON
from kvshare.launch.hydra_overrides import RUNTIME_ENV, quote

NOT_NEEDED = {*NOT_SETTINGS, "VLLM_NO_USAGE_STATS"} - {"LMCACHE_CONFIG_FILE"}
FORWARDED = {"VERL_FULL_DETERMINISM", "VLLM_BATCH_INVARIANT", "VERL_RL_INSIGHT_ENABLE", "PYTHONHASHSEED", "NCCL_ALGO"}
"""Variables that verl 0.9.1 forwards (get_ppo_ray_runtime_env)."""


def environment(job: Job) -> Iterator[str]:
    freshness.of(os.environ)
    if not os.environ.get("PYTHONHASHSEED", "").isdigit():
        yield "PYTHONHASHSEED is not a number: chunk hashes would differ between processes: export PYTHONHASHSEED=0"


def cluster(job: Job) -> Iterator[str]:
    """Check that workers of a running Ray cluster, which have the environment of ``ray start``, get all variables."""
    job.facts["cluster"] = "verl starts Ray itself"
    if not (address := ray_address(job)):
        return
    job.facts["cluster"] = f"Ray at {address}"
    given = OmegaConf.select(job.config, "ray_kwargs.ray_init.runtime_env.env_vars") or {}
    lost = [n for n in sorted(os.environ) if PASSED_ON.fullmatch(n) and n not in {*given, *FORWARDED, *NOT_NEEDED}]
    secret = [n for n in lost if is_secret(n, os.environ[n])]
    if secret:  # verl prints its overrides
        yield f"Ray at {address} is up already, its workers will not see {', '.join(secret)}: start Ray with it set"
    if open_ := [n for n in lost if n not in secret]:
        options = " ".join(f"++{RUNTIME_ENV}.{n}={quote(os.environ[n])}" for n in open_)
        yield f"Ray at {address} is up already, its workers will not see {', '.join(open_)}: add {options}"


def ray_address(job: Job) -> str | None:
    """Address of the cluster that verl's ``ray.init`` will connect to; None if it will start one."""
    current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    address = os.environ.get("RAY_ADDRESS") or OmegaConf.select(job.config, "ray_kwargs.ray_init.address")
    address = address or (current.read_text().strip() if current.is_file() else None)
    return None if address == "local" else address
