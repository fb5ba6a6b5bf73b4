"""What must be installed, and fit together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import entry_points
from importlib.util import find_spec

from kvshare import ascend, versions
from kvshare.preflight.job import Job
from kvshare.upstream import installed


def packages(job: Job) -> Iterator[str]:
    yield from versions.problems(job.device)
    if job.device == "npu":
        yield from ascend.missing()
    if find_spec("torchvision") and job.device == "cpu":
        yield "package torchvision does not fit torch's CPU build: pip uninstall -y torchvision torchaudio torchcodec"
    job.facts["packages"] = ", ".join(f"{name} {installed(name)}" for name in versions.MAIN)


def plugins(job: Job) -> Iterator[str]:
    if not [e for e in entry_points(group="vllm.general_plugins") if e.name == "kvshare"]:
        yield "vLLM does not see kvshare's plugin: pip install -e . (or the kvshare wheel) in this environment"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvshare" not in allowed.split(","):
        yield f"VLLM_PLUGINS={allowed} keeps kvshare's plugin out: add kvshare to it, or unset it"
    if "kvshare.verl_plugin" not in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
        yield "verl does not load kvshare's plugin: export VERL_USE_EXTERNAL_MODULES=kvshare.verl_plugin"
