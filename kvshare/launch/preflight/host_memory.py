"""Estimates the host memory of a whole run on CPU, and refuses a run that cannot fit.

On CPU actor, engines and caches all take host memory. When little is left, Ray's memory monitor kills some of them in
the middle of the run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kvshare.core import server_status
from kvshare.core.errors import UserError
from kvshare.core.job import Job
from kvshare.launch.preflight.prompts import batch_size
from kvshare.launch.preflight.trainer import kind, pools

GIB = 2**30
FP32 = 4  # bytes; verl trains in fp32 on CPU
STATES = 4  # weights, gradients and Adam's two moments
LOGITS = 5.2
"""Peak number of copies of a micro batch's logits in verl's loss without its entropy, measured with fp32 on CPU."""
ENTROPY = 2.0
"""Further copies if the loss needs the entropy."""

# Measured as PSS with the tiny model (docs/reliability.md). Ray's object store stayed empty.
RUN = 3.3 * GIB
"""What Ray, the driver, the service and those processes of verl take that a run has once."""
IDLE_ROUTER = 0.35 * GIB
"""verl starts a router for each pool of replicas, and asks only the last one."""
WORKER = 0.5 * GIB
"""What a training worker takes, apart from the model, or the worker through which a standalone replica gets weights."""
ENGINE = 1.5 * GIB
"""What the three processes of a replica take, apart from model and caches."""
THRESHOLD = "RAY_memory_usage_threshold"


class Training(NamedTuple):
    """What training a model takes, by its own code.

    Args:
        parameters: number of parameters.
        activations: bytes that the forward pass of a micro batch keeps for the backward pass.
        logits: bytes of the logits of a micro batch.
    """

    parameters: int
    activations: int
    logits: int


def host_memory(job: Job) -> Iterator[str]:
    """Compare the run's memory with what Ray lets the processes of this host use."""
    if job.device != "cpu" or job.forecast is None or os.environ.get("RAY_ADDRESS"):  # then Ray may be elsewhere
        return
    from ray._private.utils import get_system_memory, get_used_memory  # as its monitor reads them

    parts = estimate(job, training(job))
    needed, used = sum(parts.values()), get_used_memory()
    limit = get_system_memory() * _number(THRESHOLD, 0.95)
    what = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items() if size)
    job.facts["host_memory"] = f"about {needed / GIB:.1f} GiB ({what}), {limit / GIB:.1f} may be used"
    line = f"the run takes about {needed / GIB:.1f} GiB of host memory ({what}), Ray kills it above {limit / GIB:.1f}"
    less = "lower the largest: ppo_micro_batch_size_per_gpu, lengths, VLLM_CPU_KVCACHE_SPACE, max_local_cpu_size, or "
    less += "N_DEVICES"
    if needed > limit:
        raise UserError(f"{line}: {less}")
    if needed > limit - used:
        yield f"{line}, and {used / GIB:.1f} are in use now: end something else, or {less}"


def estimate(job: Job, model: Training) -> dict[str, float]:
    """Bytes by part at the peak of a step, on one node.

    The peak is either a backward pass or a weight update: they do not overlap.
    """
    from verl.trainer.ppo.utils import need_critic, need_reference_policy

    trainer, rollout = job.config.trainer, job.rollout
    devices, engines, replicas = trainer.n_gpus_per_node, job.workers_a_node, job.workers_a_node / job.world_size
    nodes, own = pools(job).get("standalone", (0, 0))
    standalone = nodes * own / job.nodes
    idle = IDLE_ROUTER if kind(job) == "separate_async" else 0
    fp32, weights = model.parameters * FP32, model.parameters * (FP32 if rollout.dtype == "float32" else 2)
    shards = job.config.actor_rollout_ref.actor.fsdp_config.fsdp_size
    sharded = fp32 * devices / (shards if shards > 0 else devices * trainer.nnodes)
    copies = STATES * (1 + need_critic(job.config)) + need_reference_policy(job.config)
    actor = job.config.actor_rollout_ref.actor
    entropy = actor.calculate_entropy or actor.entropy_coeff != 0
    backward = devices * (model.activations + model.logits * (LOGITS + ENTROPY * entropy))
    bucket = rollout.checkpoint_engine.update_weights_bucket_megabytes * 2**20
    # An engine keeps all new weights (CPUWorkerExtension), then loads them beside the old ones. A standalone replica's
    # new weights also wait in a queue (cpu_checkpoint_engine).
    update = devices * fp32 + engines * min(bucket, fp32) + standalone * fp32 + replicas * weights
    return {
        "processes": RUN + idle + WORKER * (devices + standalone) + ENGINE * engines,
        "weights, gradients, optimizer": copies * sharded,
        "a micro batch or a weight update": max(backward, update),
        "engines' weights": replicas * weights,
        "their KV": engines * _kv_pool(job),
        "LMCache": _lmcache(job),
    }


def training(job: Job) -> Training:
    """Run the model's own forward pass on tensors without memory, and add up what autograd would keep."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoConfig, AutoModelForCausalLM

    given = job.config.actor_rollout_ref.model
    config = AutoConfig.from_pretrained(given.path, trust_remote_code=given.trust_remote_code)
    rows, length = micro_batch(job)
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=given.trust_remote_code
        ).train()
        if given.enable_gradient_checkpointing:
            model.gradient_checkpointing_enable()
        ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, 1, length, length, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        activations = sum(storage.nbytes() for key, storage in kept.items() if key not in own)
        return Training(sum(p.numel() for p in model.parameters()), activations, logits.numel() * FP32)


def micro_batch(job: Job) -> tuple[int, int]:
    """Rows and length of the actor's largest micro batch, in which no answer ends early."""
    assert job.forecast is not None
    data, actor = job.config.data, job.config.actor_rollout_ref.actor
    length = min(job.forecast.lengths.longest, data.max_prompt_length) + data.max_response_length
    rows = max(
        1, actor.ppo_mini_batch_size * job.rollout.n // (job.config.trainer.n_gpus_per_node * job.config.trainer.nnodes)
    )
    if actor.use_dynamic_bsz:  # packed into one row
        return 1, max(length, min(actor.ppo_max_token_len_per_gpu, rows * length))
    return min(rows, actor.ppo_micro_batch_size_per_gpu or rows), length


def _kv_pool(job: Job) -> float:
    """Bytes of the KV pool of an engine's worker. Without a size vLLM takes a fraction of the memory."""
    from ray._private.utils import get_system_memory

    if space := _number("VLLM_CPU_KVCACHE_SPACE", 0):
        return space * GIB
    return job.engine.kv_cache_memory_bytes or job.engine.gpu_memory_utilization * get_system_memory()


def _number(variable: str, default: float) -> float:
    try:
        return float(os.environ.get(variable) or default)
    except ValueError:
        raise UserError(f"{variable}={os.environ[variable]} is not a number: correct or unset it") from None


def _lmcache(job: Job) -> float:
    """Bytes of LMCache's buffers, and of a server on this host as far as the run fills it."""
    if not job.shares:
        return 0
    assert job.forecast is not None
    size = job.lmcache.max_local_cpu_size * GIB
    if job.backend == "mp":
        return size
    local = job.workers_a_node * size
    status = os.environ.get(server_status.VARIABLE)
    if job.backend != "remote" or not status or not Path(status).is_file():
        return local
    trainer = job.config.trainer
    steps = trainer.total_training_steps or trainer.total_epochs * job.forecast.of // batch_size(job)
    return local + min(json.loads(Path(status).read_text())["limit"], steps * job.forecast.stored_bytes_a_step)
