"""Everything that would make a run fail or share nothing, found before it starts."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kvshare import ascend, lmcache_config, p2p, services, versions
from kvshare.errors import UserError

BACKENDS = ("remote", "p2p")
DEVICES = ("cuda", "npu", "cpu")
CPU_BLOCK_SIZE = 128
"""Tokens in a block of vLLM's CPU KV cache."""

ESTIMATORS = {
    *("gae", "grpo", "grpo_passk", "grpo_vectorized", "gdpo", "gpg", "opo", "remax", "rloo", "rloo_vectorized"),
    *("reinforce_plus_plus", "reinforce_plus_plus_baseline", "optimal_token_baseline", "tir_optimal_token_baseline"),
}
"""verl 0.9.1, AdvantageEstimator."""


@dataclass
class Job:
    """What is about to start, and what was found about it."""

    backend: str
    device: str
    hydra_args: list[str]
    config: Any = None  # verl's composed config
    lmcache: Any = None  # LMCache's own config object
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def rollout(self) -> Any:
        return self.config.actor_rollout_ref.rollout

    @property
    def shares(self) -> bool:
        """False for a baseline: ``kv_transfer_config=null`` was asked for."""
        return self.rollout.engine_kwargs.vllm.get("kv_transfer_config", "missing") is not None

    @property
    def world_size(self) -> int:
        return self.rollout.tensor_model_parallel_size * self.rollout.data_parallel_size

    @property
    def replicas(self) -> int:
        return self.config.trainer.nnodes * self.config.trainer.n_gpus_per_node // self.world_size


def run(job: Job) -> list[str]:
    """Errors, one line each, the most basic first; what depends on a failed check is not checked."""
    errors = list(_packages(job))
    if errors:
        return errors
    checks = (_plugins, _devices, _model, _data, _connector, _router, _service, _estimator)
    for stage in ((_compose, _lmcache), checks):
        for check in stage:
            errors += _collect(check, job)
        if errors:
            return errors
    job.warnings = [*_collect(_memory, job), *_collect(_exposure, job)]
    return []


def _collect(check: Callable[[Job], Iterator[str]], job: Job) -> list[str]:
    found = []
    try:
        found += list(check(job))
    except UserError as error:
        found.append(str(error))
    except Exception as error:  # a value nobody thought of: one line all the same
        found.append(f"check of {check.__name__.strip('_')} failed: {type(error).__name__}: {_one_line(error)}")
    return found


def _packages(job: Job) -> Iterator[str]:
    yield from versions.problems(job.device)
    if job.device == "npu":
        yield from ascend.missing()
    if find_spec("torchvision") and job.device == "cpu":
        yield "package torchvision does not fit torch's CPU build: pip uninstall -y torchvision torchaudio torchcodec"


def _compose(job: Job) -> Iterator[str]:
    """verl's config, composed from the launcher's arguments as main_ppo will do it."""
    from hydra import compose, initialize_config_dir

    verl_spec = find_spec("verl")
    assert verl_spec is not None
    assert verl_spec.submodule_search_locations is not None
    search = f"hydra.searchpath=[file://{verl_spec.submodule_search_locations[0]}/trainer/config]"
    folder, name, overrides = _hydra_arguments(job.hydra_args)
    try:
        with initialize_config_dir(version_base=None, config_dir=folder):
            job.config = compose(config_name=name, overrides=[*overrides, search])
    except Exception as error:  # Hydra's and OmegaConf's own, which share no base
        yield f"verl's config cannot be composed: {_one_line(error)}: correct the override"
        return
    trainer = job.config.trainer
    for key in ("nnodes", "n_gpus_per_node"):
        if not isinstance(trainer[key], int) or trainer[key] < 1:
            yield f"trainer.{key} is {trainer[key]!r}, must be a number from 1: set N_NODES and N_DEVICES"


def _hydra_arguments(args: list[str]) -> tuple[str, str, list[str]]:
    rest = list(args)
    options = {}
    for option in ("--config-dir", "--config-name"):
        if option not in rest[:-1]:
            raise UserError(f"preflight takes the arguments of verl.trainer.main_ppo after --; {option} is missing")
        at = rest.index(option)
        options[option] = rest[at + 1]
        del rest[at : at + 2]
    return str(Path(options["--config-dir"]).resolve()), options["--config-name"], rest


def _lmcache(job: Job) -> Iterator[str]:
    path = os.environ.get("LMCACHE_CONFIG_FILE")
    settings = lmcache_config.read(path)
    if job.device == "npu":
        ascend.load_lmcache()
    definitions = lmcache_config.definitions()
    found = [
        *lmcache_config.mistakes(settings, definitions, Path(path or "").name),
        *lmcache_config.environment_mistakes(os.environ, definitions),
    ]
    if found:
        yield from found
        return
    job.lmcache = lmcache_config.effective(path)
    if job.device == "cpu" and job.lmcache.chunk_size % CPU_BLOCK_SIZE:
        yield f"chunk_size {job.lmcache.chunk_size} is not a multiple of {CPU_BLOCK_SIZE}, vLLM's block size on CPU"
    if job.backend == "p2p" and job.lmcache.transfer_channel == "nixl" and not find_spec("nixl"):
        yield f"package nixl, the P2P transport, is missing: pip install nixl ({versions.requirements(job.device)})"
    for option in ("use_layerwise", "enable_blending"):
        if getattr(job.lmcache, option):
            yield f"{path}: {option}: true makes LMCache drop the policy of a request: set it to false"
    if job.device == "npu":
        yield from _lmcache_ascend(job, path)
    if job.config.trainer.nnodes > 1:
        yield from _localhost(job)
    if job.backend == "remote" and not job.lmcache.remote_url:
        yield f"{path} has no remote_url, so nothing would be shared: set it, e.g. lm://localhost:65432"
    if job.backend == "p2p" and not (job.lmcache.enable_p2p and job.lmcache.enable_controller):
        yield f"{path}: the p2p backend needs enable_p2p: true and enable_controller: true"


def _lmcache_ascend(job: Job, path: str | None) -> Iterator[str]:
    if job.backend == "p2p" and job.lmcache.transfer_channel not in ascend.TRANSFER_CHANNELS:
        known = " or ".join(ascend.TRANSFER_CHANNELS)
        yield f"transfer_channel {job.lmcache.transfer_channel} is not one LMCache-Ascend knows: set it to {known}"
    if job.lmcache.store_async:
        # vLLM frees a preempted request's blocks; the connector of vLLM 0.23 does not wait for the store.
        yield f"{path}: store_async: true may store KV that vLLM has overwritten: set it to false"


def _localhost(job: Job) -> Iterator[str]:
    keys = ("remote_url",) if job.backend == "remote" else ("p2p_host", "controller_pull_url", "controller_reply_url")
    for key in keys:
        value = str(getattr(job.lmcache, key))
        if "localhost" in value or "127.0.0.1" in value:
            yield f"{key} {value} is this machine only, the job has {job.config.trainer.nnodes} nodes: give its address"


def _plugins(job: Job) -> Iterator[str]:
    if not [e for e in entry_points(group="vllm.general_plugins") if e.name == "kvshare"]:
        yield "vLLM does not see kvshare's plugin: pip install -e . (or the kvshare wheel) in this environment"
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvshare" not in allowed.split(","):
        yield f"VLLM_PLUGINS={allowed} keeps kvshare's plugin out: add kvshare to it, or unset it"
    if "kvshare.verl_plugin" not in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(","):
        yield "verl does not load kvshare's plugin: export VERL_USE_EXTERNAL_MODULES=kvshare.verl_plugin"
    if not os.environ.get("PYTHONHASHSEED", "").isdigit():
        yield "PYTHONHASHSEED is not a number: chunk hashes would differ between processes: export PYTHONHASHSEED=0"


def _devices(job: Job) -> Iterator[str]:
    wanted = job.config.trainer.n_gpus_per_node
    if wanted % job.world_size:
        yield f"{wanted} devices a node cannot be split into replicas of {job.world_size}: change N_DEVICES"
    if job.device == "cpu" or os.environ.get("RAY_ADDRESS"):
        return  # no devices to count, or those of a cluster
    import torch

    if job.device == "npu":
        import torch_npu  # noqa: F401
    found = getattr(torch, job.device).device_count()
    if found < wanted:
        visible = "ASCEND_RT_VISIBLE_DEVICES" if job.device == "npu" else "CUDA_VISIBLE_DEVICES"
        more = f"make more visible ({visible}={os.environ[visible]})" if visible in os.environ else "make more visible"
        yield f"{wanted} {job.device} devices asked for, {found} found: set N_DEVICES, or {more}"


def _model(job: Job) -> Iterator[str]:
    model = str(job.config.actor_rollout_ref.model.path)
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
        yield f"model {model} is not in the local cache and the hub does not give it ({_one_line(error)}): {fix}"


def _data(job: Job) -> Iterator[str]:
    import pyarrow.parquet as pq

    for key in ("train_files", "val_files"):
        files = job.config.data[key]
        for file in [files] if isinstance(files, str) else files:
            try:
                columns = pq.read_schema(file).names
            except FileNotFoundError:
                yield f"data.{key}: {file} does not exist: make it with kvshare prepare, or set DATA_DIR"
            except (OSError, ValueError) as error:
                yield f"data.{key}: {file} is not a parquet file ({_one_line(error)}): make it with kvshare prepare"
            else:
                if job.config.data.prompt_key not in columns:
                    yield f"data.{key}: {file} has no column {job.config.data.prompt_key}: make it with kvshare prepare"


def _connector(job: Job) -> Iterator[str]:
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
        yield f"kv_transfer_config names no LMCache connector, nothing would be shared: {value}"
    elif job.device == "npu" and connector["kv_connector"] != ascend.CONNECTOR:
        yield f"kv_connector {connector['kv_connector']} does not work on Ascend: use {ascend.CONNECTOR} (docs/npu.md)"
    if connector.get("kv_load_failure_policy") != "recompute":
        yield 'kv_transfer_config lacks "kv_load_failure_policy": "recompute": a failed load would fail the request'


def _router(job: Job) -> Iterator[str]:
    from omegaconf import OmegaConf

    path = job.rollout.router_config_path
    if path and not Path(path).is_file():
        yield f"router config {path} does not exist: set ROUTER to one that does, or to null for verl's own routing"
    elif path and job.rollout.full_determinism and not OmegaConf.select(OmegaConf.load(path), "full_determinism"):
        yield f"rollout.full_determinism needs full_determinism: true in the router config too: set it in {path}"


def _service(job: Job) -> Iterator[str]:
    if not job.shares:
        job.facts["service"] = "no connector: a baseline, nothing is shared"
        return
    if job.backend == "remote":
        if str(job.lmcache.remote_url).startswith("lm://"):
            job.facts["service"] = "lmcache_server at " + services.check_lmcache_server(job.lmcache.remote_url)
        return
    job.facts["service"] = "lmcache_controller at " + services.check_controller(
        job.lmcache.controller_pull_url, job.lmcache.controller_reply_url
    )
    settings = job.lmcache.to_dict()
    try:
        p2p.check_ports(settings, job.replicas, job.world_size)
    except p2p.TooFewPorts as error:
        yield str(error)
        return
    for name in p2p.PORT_LISTS:
        own = list(dict.fromkeys(settings.get(name) or []))[: job.replicas * job.world_size]
        taken = [port for port in own if not services.is_free("127.0.0.1", port)]
        if taken and job.config.trainer.nnodes == 1:
            yield f"{name}: port {', '.join(map(str, taken))} is taken: stop what uses it, or choose other ports"


def _estimator(job: Job) -> Iterator[str]:
    estimator = job.config.algorithm.adv_estimator
    if estimator not in ESTIMATORS:
        yield f"ADV_ESTIMATOR {estimator!r} is not one verl knows: use grpo, or gae for PPO with a critic"


def _memory(job: Job) -> Iterator[str]:
    """How much KV a step may store, and whether the server keeps as much."""
    data = job.config.data
    try:
        a_token = kv_bytes(json.loads((Path(job.config.actor_rollout_ref.model.path) / "config.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # on the hub, or no model of that kind
        return
    a_token *= 2 if job.rollout.dtype == "float32" else 1
    whole = data.max_prompt_length // job.lmcache.chunk_size * job.lmcache.chunk_size
    stored = job.facts["stored_bytes"] = data.train_batch_size * whole * a_token
    status = os.environ.get(services.SERVER_STATUS)
    if job.backend == "remote" and status and Path(status).is_file():
        limit = json.loads(Path(status).read_text())["limit"]
        if limit < stored:
            keeps, needs = f"{limit / 2**30:.2f} GiB", f"{stored / 2**30:.2f} GiB"
            yield (
                f"kvshare server keeps {keeps}, a step stores up to {needs}: prefixes may be evicted before others "
                f"read them: start it with --memory {math.ceil(stored / 2**30 * 1.2)}"
            )


def kv_bytes(model: dict[str, Any]) -> int:
    """Bytes of KV a token in 16 bits, from a Hugging Face ``config.json``."""
    heads = model["num_attention_heads"]
    head_size = model.get("head_dim") or model["hidden_size"] // heads
    return 2 * model["num_hidden_layers"] * model.get("num_key_value_heads", heads) * head_size * 2


def _exposure(job: Job) -> Iterator[str]:
    for host, port in services.exposed(_ports(job)):
        yield (
            f"port {port} of LMCache listens on {host}, beyond this host, and asks nobody who they are: "
            "start it with 127.0.0.1, or see to a firewall"
        )


def _ports(job: Job) -> set[int]:
    """Of the services the backend needs."""
    p2p_urls = [job.lmcache.controller_pull_url, job.lmcache.controller_reply_url]
    urls = p2p_urls if job.backend == "p2p" else [job.lmcache.remote_url]
    ports = [str(url).rpartition(":")[2] for url in urls]
    return {int(port) for port in ports if port.isdigit()}


def record(job: Job, folder: Path) -> None:
    """Write ``run.json``, which the report needs, and clear what an earlier run left in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("events-*.jsonl"):
        old.unlink()
    (folder / "run.json").write_text(json.dumps(describe(job), indent=2) + "\n")


def describe(job: Job) -> dict[str, Any]:
    """What the report says about the run (``run.json``)."""
    return {
        "backend": job.backend if job.shares else "no connector",
        "device": job.device,
        "replicas": job.replicas,
        "model": str(job.config.actor_rollout_ref.model.path),
        "chunk_size": job.lmcache.chunk_size,
        "stored_bytes_a_step": job.facts.get("stored_bytes"),
        "server_status": os.environ.get(services.SERVER_STATUS),
        "adv_estimator": str(job.config.algorithm.adv_estimator),
        "versions": {name: versions.version(name) for name in ("verl", "vllm", "lmcache", "torch", "ray")},
    }


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
