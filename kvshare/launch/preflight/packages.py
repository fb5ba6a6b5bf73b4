"""Checks that the packages and plugins of a run are installed and work together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from importlib.util import find_spec, module_from_spec

from kvshare.core import ascend, versions
from kvshare.core.job import Job, one_line
from kvshare.core.versions import installed
from kvshare.launch.hydra_overrides import has_flash_attention

CUDA_CODE = ("lmcache.cuda_ops", "lmcache.c_ops")
"""The name from LMCache 0.5.4 on, and the name before."""


def packages(job: Job) -> Iterator[str]:
    yield from versions.problems(job.device, job.backend)
    if job.device == "npu":
        yield from ascend.missing()
    if find_spec("torchvision") and job.device == "cpu":
        yield "package torchvision does not fit torch's CPU build: pip uninstall -y torchvision torchaudio torchcodec"
    job.facts["packages"] = ", ".join(f"{name} {installed(name)}" for name in versions.MAIN)


def compiled(job: Job) -> Iterator[str]:
    """Check that LMCache's CUDA code loads. If not, LMCache only logs a warning and uses slow code."""
    if job.device != "cuda":
        return
    import torch

    found = next(filter(None, map(_extension, CUDA_CODE)), None)
    fix = "pip install --no-deps -r requirements/gpu.txt, or build it with the command in requirements/gpu-verl.txt"
    if found is None:
        yield f"LMCache was built without its CUDA code, it would copy KV slowly: {fix}"
        return
    try:
        module_from_spec(found)  # loads the library, but runs no code of the module
    except ImportError as error:
        name, reason = f"lmcache.{found.name}", one_line(error)
        yield f"{name}, LMCache's CUDA code, does not load with torch {torch.__version__} ({reason}): {fix}"


def _extension(name: str) -> ModuleSpec | None:
    """Find a compiled module on disk. LMCache 0.5.3 hides it in sys.modules behind a stand-in without a spec."""
    package, _, module = name.rpartition(".")
    parent = find_spec(package)
    return PathFinder.find_spec(module, parent.submodule_search_locations) if parent else None


def attention(job: Job) -> Iterator[str]:
    """Check that flash-attn is there if the recipe needs it, as verl's default does. PyPI has it as source only."""
    if job.device != "cuda":
        return
    from omegaconf import OmegaConf
    from verl.trainer.ppo.utils import need_critic

    found = has_flash_attention()
    models = [job.config.actor_rollout_ref.model]
    if need_critic(job.config):
        models.append(job.config.critic.model)
    for part in models:
        wanted = OmegaConf.select(part, "override_config.attn_implementation", default="flash_attention_2")
        job.facts["attention"] = (
            wanted if found else f"{wanted}, flash-attn is not installed (config/attention/sdpa.yaml)"
        )
        if not found and wanted.startswith("flash_attention"):
            yield (
                f"flash-attn is not installed, but the recipe asks for {wanted}: add +attention=sdpa, or "
                "pip install flash-attn --no-build-isolation"
            )
            return


def plugins(job: Job) -> Iterator[str]:
    if not [e for e in entry_points(group="vllm.general_plugins") if e.name == "kvshare"]:
        yield "vLLM does not see kvshare's plugin: pip install -e . (or the kvshare wheel) in this environment"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvshare" not in allowed.split(","):
        yield f"VLLM_PLUGINS={allowed} keeps kvshare's plugin out: add kvshare to it, or unset it"
    if "kvshare.verl_plugin" not in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
        yield "verl does not load kvshare's plugin: export VERL_USE_EXTERNAL_MODULES=kvshare.verl_plugin"
