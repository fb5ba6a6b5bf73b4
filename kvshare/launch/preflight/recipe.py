"""Composes verl's config as the run will, and checks the model, the files and the router it names."""

from __future__ import annotations

import glob
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshare.core.errors import UserError
from kvshare.core.job import Job, one_line, verl_config
from kvshare.core.lmcache_settings import near
from kvshare.launch.hydra_overrides import quote

FP32 = 4  # bytes; verl sends weights in the optimizer's dtype

ESTIMATORS = {
    *("gae", "grpo", "grpo_passk", "grpo_vectorized", "gdpo", "gpg", "opo", "remax", "rloo", "rloo_vectorized"),
    *("reinforce_plus_plus", "reinforce_plus_plus_baseline", "optimal_token_baseline", "tir_optimal_token_baseline"),
}
"""Values of AdvantageEstimator in verl 0.9.1."""


def config(job: Job) -> Iterator[str]:
    """Compose verl's config from the arguments, as main_ppo will."""
    from hydra import compose, initialize_config_dir
    from hydra.core.plugins import Plugins

    folder, name, overrides = job.hydra()
    Plugins.instance().register(_verl_configs())
    try:
        with initialize_config_dir(version_base=None, config_dir=folder):
            job.config = compose(config_name=name, overrides=overrides)
    except Exception as error:  # Hydra's and OmegaConf's errors share no base class
        fix = _quoted(overrides) or "correct the override"
        yield f"verl's config cannot be composed: {one_line(error)}: {fix}"
        return
    job.facts["config"] = f"{name} of {folder}"
    for key in ("nnodes", "n_gpus_per_node"):
        value = job.config.trainer[key]
        if not isinstance(value, int) or value < 1:
            yield f"trainer.{key} is {value!r}, must be an integer of at least 1: set N_NODES and N_DEVICES"


def _verl_configs() -> type:
    """A Hydra plugin that finds verl's configs where main_ppo finds them: before those of --config-dir."""
    from hydra.core.config_search_path import ConfigSearchPath
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    class VerlConfigs(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.prepend("verl", f"file://{verl_config()}", "main")

    return VerlConfigs


def _quoted(overrides: list[str]) -> str | None:
    """How to write the first override that Hydra cannot read because of its value, e.g. a path with an apostrophe."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in overrides:
        try:
            OverridesParser.create().parse_override(override)
        except Exception:
            key, given, value = override.partition("=")
            return f"write it as {shlex.quote(f'{key}={quote(value)}')}" if given else None
    return None


def model(job: Job) -> Iterator[str]:
    model = job.facts["model"] = str(job.config.actor_rollout_ref.model.path)
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            yield f"model folder {model} has no config.json: set MODEL_PATH to a Hugging Face model"
        return
    if model.startswith(("/", ".", "~")) or model.count("/") != 1:
        yield f"model {model} does not exist: set MODEL_PATH (kvshare prepare --tiny-model makes one for CPU)"
        return
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(model, "config.json"), str):
            return
    except HFValidationError:
        yield f"model {model} does not exist, and is no name on the hub: set MODEL_PATH"
        return
    fix = "set MODEL_PATH to a folder, or download it first: hf download " + model
    if constants.HF_HUB_OFFLINE:
        yield f"model {model} is not in the local Hugging Face cache and HF_HUB_OFFLINE is set: {fix}"
        return
    try:
        HfApi().model_info(model, timeout=10)
    except Exception as error:
        yield f"model {model} is not in the local cache and not available from the hub ({one_line(error)}): {fix}"


def bucket(job: Job) -> Iterator[str]:
    """Check that the largest weight fits into verl's bucket of shared memory. If not, the first update would fail."""
    if job.device != "cpu" or not Path(job.config.actor_rollout_ref.model.path).is_dir():
        return  # with CUDA IPC verl sends a large weight separately
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = job.config.actor_rollout_ref.model
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    with torch.device("meta"):  # shapes without memory
        weights = AutoModelForCausalLM.from_config(config).named_parameters()
    name, largest = max(weights, key=lambda weight: weight[1].numel())
    needed = math.ceil(largest.numel() * FP32 / 2**20)
    size = job.rollout.checkpoint_engine.update_weights_bucket_megabytes
    if needed > size:
        key = "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes"
        yield f"{key} is {size}, {name} of the model has {needed} MB: set it to {needed} or more"


def data(job: Job) -> Iterator[str]:
    """Read the first row of each file, as verl's own dataset does."""
    job.facts["data"] = str(job.config.data.train_files)
    if job.config.data.get("custom_cls", {}).get("path"):
        return  # a dataset class of the user's, with files of its own kind
    for key in ("train_files", "val_files"):
        files = job.config.data[key]
        if not files:
            yield f"data.{key} is {files}: set it to a file, or set DATA_DIR"
            continue
        for file in [files] if isinstance(files, str) else files:
            yield from _rows(job, key, str(file))


FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
"""Ends of the names of files that verl's RLHFDataset reads, and the reader of the package datasets that it uses."""


def _rows(job: Job, key: str, file: str) -> Iterator[str]:
    from datasets import load_dataset

    reader = next((reader for end, reader in FORMATS.items() if file.endswith(end)), None)
    if reader is None:
        yield f"data.{key}: {file} is not one that verl reads ({', '.join(FORMATS)}): make it with kvshare prepare"
    elif "://" in file:
        return  # verl copies it when it starts
    elif not Path(file).expanduser().is_file():
        yield f"data.{key}: {file} does not exist: make it with kvshare prepare, or set DATA_DIR"
    else:
        try:
            row = next(iter(load_dataset(reader, data_files=glob.escape(file), split="train", streaming=True)), None)
        except Exception as error:
            yield f"data.{key}: {file} is not {reader} ({one_line(error)}): make it with kvshare prepare"
            return
        if row is None:
            yield f"data.{key}: {file} has no rows: make it with kvshare prepare"
        elif job.config.data.prompt_key not in row:
            yield f"data.{key}: {file} has no column {job.config.data.prompt_key}: make it with kvshare prepare"


CALLED = ("acquire_server", "release_server", "require_acquire_fields", "require_release_fields")
"""Methods of a router that verl's LLMServerClient calls."""


def router(job: Job) -> Iterator[str]:
    """Load the router as verl will, and check the settings of kvshare's own."""
    path = job.rollout.router_config_path
    job.facts["router"] = str(path or "verl's own")
    settings = router_settings(job)
    if not settings:
        return
    from verl.utils.import_utils import load_class_from_fqn

    try:
        found = load_class_from_fqn(settings["router_class"], "router_class")
    except Exception as error:
        yield f"{path}: router_class {settings['router_class']} cannot be loaded ({one_line(error)}): correct it"
        return
    if not callable(found):
        yield f"{path}: router_class {settings['router_class']} is not a class: correct it"
    elif lacks := [name for name in CALLED if not hasattr(found, name)]:
        yield f"{path}: router_class {settings['router_class']} has no {lacks[0]}, which verl calls: correct it"
    if getattr(found, "__module__", "").startswith("kvshare."):
        yield from (f"{path}: {line}" for line in router_mistakes(settings, found.__module__))
    if job.rollout.full_determinism and not settings.get("full_determinism"):
        yield f"rollout.full_determinism needs full_determinism: true in the router config too: set it in {path}"


def router_settings(job: Job) -> dict[Any, Any]:
    """The router's YAML, as verl reads it; nothing for verl's own router.

    Raises:
        UserError: verl cannot use the file.
    """
    path = job.rollout.router_config_path
    if not path:
        return {}
    from omegaconf import OmegaConf
    from verl.utils.import_utils import resolve_config_path

    try:
        path = resolve_config_path(str(path))
        settings = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(
            f"router config {path} does not exist: set ROUTER to one that does, or to null for verl's own routing"
        ) from None
    except Exception as error:
        raise UserError(
            f"router config {path} is not YAML ({one_line(error)}): correct it, or start from config/router.yaml"
        ) from None
    if not isinstance(settings, dict) or not isinstance(settings.get("router_class"), str):
        raise UserError(f"router config {path} has no router_class, which verl needs: start from config/router.yaml")
    return settings


PLACEMENTS = ("cost", "spread")


def router_mistakes(settings: dict[Any, Any], module: str) -> Iterator[str]:
    """One line for each setting of a router of kvshare's that it does not know or cannot use."""
    own = ("max_imbalance",) if module.endswith(".affinity") else ("placement", "hold_seconds", "chunk_size")
    known = ("router_class", "full_determinism", *own)
    for key, value in settings.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in known:
            yield f"kvshare's router knows no key {key}{near(str(key), known)}: remove or correct it"
        elif key == "hold_seconds" and not (number and 0 <= value < math.inf):
            yield f"hold_seconds is {value!r}, must be a number of seconds, 0 or more: correct it"
        elif key == "placement" and value not in PLACEMENTS:
            yield f"placement is {value!r}, must be one of {', '.join(PLACEMENTS)}: correct it"
        elif key == "full_determinism" and not isinstance(value, bool):
            yield f"full_determinism is {value!r}, must be true or false: correct it"
        elif key in ("chunk_size", "max_imbalance") and value is not None and not (type(value) is int and value > 0):
            yield f"{key} is {value!r}, must be an integer above 0: correct it"


def estimator(job: Job) -> Iterator[str]:
    estimator = job.facts["estimator"] = str(job.config.algorithm.adv_estimator)
    if estimator not in ESTIMATORS:
        yield f"ADV_ESTIMATOR {estimator!r} is not one verl knows: use grpo, or gae for PPO with a critic"
