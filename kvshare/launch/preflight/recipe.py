"""Composes verl's config as the run will, and checks the models, files and devices it names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from kvshare.core import ascend
from kvshare.core.job import Job, one_line

MP_CONNECTOR = "LMCacheMPConnector"
FP32 = 4  # bytes; verl sends weights in the optimizer's dtype

ESTIMATORS = {
    *("gae", "grpo", "grpo_passk", "grpo_vectorized", "gdpo", "gpg", "opo", "remax", "rloo", "rloo_vectorized"),
    *("reinforce_plus_plus", "reinforce_plus_plus_baseline", "optimal_token_baseline", "tir_optimal_token_baseline"),
}
"""Values of AdvantageEstimator in verl 0.9.1."""


def config(job: Job) -> Iterator[str]:
    """Compose verl's config from the launcher's arguments, as main_ppo will."""
    from hydra import compose, initialize_config_dir

    verl_spec = find_spec("verl")
    assert verl_spec is not None
    assert verl_spec.submodule_search_locations is not None
    search = f"hydra.searchpath=[file://{verl_spec.submodule_search_locations[0]}/trainer/config]"
    folder, name, overrides = job.hydra()
    try:
        with initialize_config_dir(version_base=None, config_dir=folder):
            job.config = compose(config_name=name, overrides=[*overrides, search])
    except Exception as error:  # Hydra's and OmegaConf's errors share no base class
        yield f"verl's config cannot be composed: {one_line(error)}: correct the override"
        return
    job.facts["config"] = f"{name} of {folder}"
    trainer = job.config.trainer
    for key in ("nnodes", "n_gpus_per_node"):
        if not isinstance(trainer[key], int) or trainer[key] < 1:
            yield f"trainer.{key} is {trainer[key]!r}, must be an integer of at least 1: set N_NODES and N_DEVICES"


def devices(job: Job) -> Iterator[str]:
    wanted = job.config.trainer.n_gpus_per_node
    job.facts["devices"] = f"{job.replicas} replicas of {job.world_size} {job.device}"
    if wanted % job.world_size:
        yield f"{wanted} devices a node cannot be split into replicas of {job.world_size}: change N_DEVICES"
    if job.device == "cpu" or os.environ.get("RAY_ADDRESS"):
        return  # no devices, or only those of this machine, could be counted here
    import torch

    if job.device == "npu":
        import torch_npu  # noqa: F401
    found = getattr(torch, job.device).device_count()
    if found < wanted:
        visible = "ASCEND_RT_VISIBLE_DEVICES" if job.device == "npu" else "CUDA_VISIBLE_DEVICES"
        more = f"make more visible ({visible}={os.environ[visible]})" if visible in os.environ else "make more visible"
        yield f"{wanted} {job.device} devices wanted, {found} found: set N_DEVICES, or {more}"


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

    if isinstance(try_to_load_from_cache(model, "config.json"), str):
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
    import pyarrow.parquet as pq

    job.facts["data"] = str(job.config.data.train_files)
    for key in ("train_files", "val_files"):
        files = job.config.data[key]
        for file in [files] if isinstance(files, str) else files:
            try:
                columns = pq.read_schema(file).names
            except FileNotFoundError:
                yield f"data.{key}: {file} does not exist: make it with kvshare prepare, or set DATA_DIR"
            except (OSError, ValueError) as error:
                yield f"data.{key}: {file} is not a parquet file ({one_line(error)}): make it with kvshare prepare"
            else:
                if job.config.data.prompt_key not in columns:
                    yield f"data.{key}: {file} has no column {job.config.data.prompt_key}: make it with kvshare prepare"


def connector(job: Job) -> Iterator[str]:
    if not job.shares:
        return
    value = job.rollout.engine_kwargs.vllm.get("kv_transfer_config")
    try:
        connector = json.loads(value) if isinstance(value, str) else dict(value or {})
    except ValueError:
        connector = None
    if not isinstance(connector, dict):
        yield f"kv_transfer_config is not a JSON object: {value}"
        return
    if not str(connector.get("kv_connector", "")).startswith("LMCache"):
        yield f"kv_transfer_config names no LMCache connector, so nothing would be shared: {value}"
    elif job.device == "npu" and connector["kv_connector"] != ascend.CONNECTOR:
        yield f"kv_connector {connector['kv_connector']} does not work on Ascend: use {ascend.CONNECTOR} (docs/npu.md)"
    elif (connector["kv_connector"] == MP_CONNECTOR) != (job.backend == "mp"):
        yield f"kv_connector {connector['kv_connector']} is not for the {job.backend} backend: run another launcher"
    job.facts["connector"] = str(connector.get("kv_connector"))
    if connector.get("kv_load_failure_policy") != "recompute":
        yield 'kv_transfer_config lacks "kv_load_failure_policy": "recompute": a failed load would fail the request'


def graphs(job: Job) -> Iterator[str]:
    if job.device != "cpu" and job.shares and job.rollout.enforce_eager:
        yield (
            "actor_rollout_ref.rollout.enforce_eager=true turns graphs off, so every decode step launches its kernels "
            "one by one: set it to false"
        )


def router(job: Job) -> Iterator[str]:
    from omegaconf import OmegaConf

    path = job.rollout.router_config_path
    job.facts["router"] = str(path or "verl's own")
    if path and not Path(path).is_file():
        yield f"router config {path} does not exist: set ROUTER to one that does, or to null for verl's own routing"
    elif path and job.rollout.full_determinism and not OmegaConf.select(OmegaConf.load(path), "full_determinism"):
        yield f"rollout.full_determinism needs full_determinism: true in the router config too: set it in {path}"


def estimator(job: Job) -> Iterator[str]:
    estimator = job.facts["estimator"] = str(job.config.algorithm.adv_estimator)
    if estimator not in ESTIMATORS:
        yield f"ADV_ESTIMATOR {estimator!r} is not one verl knows: use grpo, or gae for PPO with a critic"
