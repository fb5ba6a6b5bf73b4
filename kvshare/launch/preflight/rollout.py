"""Asks verl how many rollout replicas a job has, and checks that they are ones kvshare can serve."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import io
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from omegaconf import OmegaConf

from kvshare.core.job import Job, one_line
from kvshare.core.lmcache_settings import near
from kvshare.launch.preflight.environment import ray_address
from kvshare.launch.preflight.trainer import FULLY, kind, only_validates, pools


def verl(job: Job) -> Iterator[str]:
    """Build verl's own config objects, whose ``__post_init__`` checks them, as its trainers do first."""
    rollout = job.rollout
    if rollout.name != "vllm":
        yield f"rollout.name={rollout.name}: kvshare extends verl's vLLM server only, nothing would be shared: use vllm"
        return
    if rollout.disaggregation.enabled:
        yield (
            "rollout.disaggregation.enabled=true: verl then starts prefill and decode servers of its own, with its own "
            "kv_transfer_config, and nothing would be shared: set it to false"
        )
        return
    if wrong := list(_unread(rollout.engine_kwargs)):
        yield from wrong
        return
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    try:
        omega_conf_to_dataclass(rollout)
        omega_conf_to_dataclass(job.config.algorithm)
        if kind(job) != FULLY:  # which does not call it
            with contextlib.redirect_stdout(io.StringIO()):
                validate_config(job.config, need_reference_policy(job.config), need_critic(job.config))
    except Exception as error:
        yield f"verl refuses the config: {one_line(error)}: correct it"


LEAST = {
    "actor_rollout_ref.rollout.n": 1,
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.data_parallel_size": 1,
    "data.max_prompt_length": 1,
    "data.max_response_length": 1,
    "data.train_batch_size": 0,  # of the fully async trainer
}


def numbers(job: Job) -> Iterator[str]:
    """Check the numbers that verl and the later checks calculate with: verl does not, and then fails anywhere."""
    for key, least in LEAST.items():
        value = OmegaConf.select(job.config, key)
        if not isinstance(value, int) or value < least:
            yield f"{key} is {value!r}, must be an integer of at least {least}: correct it"


def _unread(engine_kwargs: Any) -> Iterator[str]:
    """Each key that verl does not read, because it is not the name of a rollout engine."""
    if engine_kwargs is None:
        yield "rollout.engine_kwargs is null, verl's server then fails: remove it"
    for name in engine_kwargs or {}:
        if name not in ENGINES:
            yield f"rollout.engine_kwargs has no {name}{near(name, ENGINES)}, verl ignores it: correct it"


ENGINES = ("vllm", "sglang", "trtllm")


def replicas(job: Job) -> Iterator[str]:
    """Let verl's LLMServerManager make its replicas, without starting them."""
    size = job.rollout.tensor_model_parallel_size * job.rollout.data_parallel_size
    for name, (nodes, devices) in pools(job).items():
        if not isinstance(nodes, int) or not isinstance(devices, int):
            yield f"nnodes of the {name} replicas is {nodes!r}, n_gpus_per_node {devices!r}: set both to an integer"
            return
    found = {name: pool for name, pool in pools(job).items() if pool[0]}
    for name, (nodes, devices) in found.items():
        if nodes * devices < size or nodes * devices % size:
            yield (
                f"{nodes * devices} devices (nodes: {nodes}, devices a node: {devices}) cannot be split into {name} "
                f"replicas of {size}: change N_DEVICES, N_NODES or tensor_model_parallel_size"
            )
            return
    try:
        job.replica_list = made_by_verl(job.config, found)
    except Exception as error:
        yield f"verl cannot place the rollout replicas: {one_line(error)}: correct it"
        return
    across = job.replica_list[0].nnodes
    counts = {name: nodes * devices // size for name, (nodes, devices) in found.items()}
    job.standby = counts["hybrid"] if only_validates(job) else 0
    idle = " for validation only" if job.standby else ""
    kinds = ", ".join(f"{count} {name}{idle if name == 'hybrid' else ''}" for name, count in counts.items())
    job.facts["replicas"] = f"{job.replicas} replicas of {job.world_size} {job.device}" + (
        (f" on {across} nodes each" if across > 1 else "") + (f" ({kinds})" if [*found] != ["hybrid"] else "")
    )


def made_by_verl(config: Any, found: dict[str, tuple[int, int]]) -> list[Any]:
    """The RolloutReplicas that verl makes in the pools, with their ranks, in order.

    Raises:
        AssertionError: verl's, if a replica does not fit the nodes.
    """
    from verl.workers.rollout.llm_server import LLMServerManager
    from verl.workers.rollout.replica import RolloutReplica

    class Replica(RolloutReplica):
        async def init_hybrid(self, worker_group: Any) -> None: ...
        async def init_standalone(self) -> None: ...
        async def launch_servers(self) -> None: ...

    class Manager(LLMServerManager):
        rollout_replica_class = Replica  # verl's hook for recipes

    config = copy.deepcopy(config)
    config.actor_rollout_ref.rollout.prometheus.enable = False  # verl would write Prometheus' config file
    made: list[Any] = []
    with contextlib.redirect_stdout(io.StringIO()):
        for name, (nodes, devices) in found.items():
            workers: Any = SimpleNamespace(world_size=nodes * devices) if name == "hybrid" else None
            manager = Manager(config, worker_group=workers)
            asyncio.run(manager._initialize_llm_servers(start_rank=len(made)))
            made += manager.rollout_replicas
    return made


def devices(job: Job) -> Iterator[str]:
    """Check that this machine has the devices of the job, if verl will start Ray on it."""
    if job.device == "cpu" or ray_address(job):
        return  # no devices, or those of other machines too
    import torch

    if job.device == "npu":
        import torch_npu  # noqa: F401
    training = (job.config.trainer.nnodes, job.config.trainer.n_gpus_per_node)
    own = pools(job).get("standalone", (0, 0))
    wanted = training[1] + (own[1] if own[0] else 0)
    found = getattr(torch, job.device).device_count()
    job.facts["devices"] = f"{found} {job.device} devices here"
    if found < wanted:
        visible = "ASCEND_RT_VISIBLE_DEVICES" if job.device == "npu" else "CUDA_VISIBLE_DEVICES"
        more = f"make more visible ({visible}={os.environ[visible]})" if visible in os.environ else "make more visible"
        yield f"{wanted} {job.device} devices wanted, {found} found: set N_DEVICES, or {more}"


def untried(job: Job) -> Iterator[str]:
    """Say what is not known to work: replicas that span nodes or have several engines, and managers of a user."""
    if job.shares and job.replica_list[0].nnodes > 1:
        yield "replicas on several nodes are not known to share: set tensor_model_parallel_size to fit one node"
    if job.shares and job.rollout.data_parallel_size > 1:
        yield "rollout.data_parallel_size above 1 is not known to share: use more replicas instead"
    custom = job.rollout.agent.get("agent_loop_manager_class"), job.rollout.get("checkpoint_manager_class")
    for name in filter(None, custom):
        yield f"{name} is not known to work with kvshare: check that it sets global_steps on every rollout server"
