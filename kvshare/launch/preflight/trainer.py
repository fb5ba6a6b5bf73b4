"""Asks verl what its trainer makes of a job: which devices get replicas, how weights reach them, how far they may lag.

The trainers of verl 0.9.1: ``sync``, ``colocate_async`` and ``separate_async`` of verl.trainer.main_ppo; ``v0``, its
legacy trainer; ``fully_async_policy`` and ``one_step_off_policy`` of verl.experimental, with mains of their own.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
from collections.abc import Iterator
from typing import Any

from omegaconf import OmegaConf

from kvshare.core import freshness
from kvshare.core.job import OWN_MAINS, Job, one_line
from kvshare.launch.hydra_overrides import RUNTIME_ENV

FULLY, ONE_STEP = OWN_MAINS
"""Trainers with a main of their own, known by their configs."""

TRIED = ("sync", "colocate_async", "separate_async", *OWN_MAINS)
"""Trainers with which kvshare has trained."""


def kind(job: Job) -> str:
    """Which of verl's trainers runs the job."""
    if "async_training" in job.config:
        return FULLY
    if "rollout" in job.config:
        return ONE_STEP
    return job.config.trainer.v1.trainer_mode if job.config.trainer.use_v1 else "v0"


def mode(job: Job) -> Iterator[str]:
    """Check that verl's main_ppo has this trainer."""
    from verl.trainer.ppo.v1 import get_trainer_cls

    given = OmegaConf.select(job.config, "trainer.v1.trainer_mode")
    try:
        get_trainer_cls(given)
    except ValueError as error:
        own = "fully_async_policy is +async=fully, one_step_off_policy is +async=one_step: docs/async.md"
        yield f"trainer.v1.trainer_mode: {one_line(error)}: correct it ({own})"


def trainer(job: Job) -> Iterator[str]:
    """Let verl make its trainer, whose constructor checks the config. It starts nothing yet."""
    from verl.trainer.ppo.utils import need_critic

    name = job.facts["trainer"] = kind(job)
    config = job.config
    asserted: dict[str, Any] = {}
    if name in OWN_MAINS:  # their trainers are Ray actors, which need a cluster
        # Their mains do this first.
        job.rollout.nnodes, job.rollout.n_gpus_per_node = config.rollout.nnodes, config.rollout.n_gpus_per_node
        asserted["actor_rollout_ref.hybrid_engine"] = False
    if name == FULLY:  # FullyAsyncRollouter.__init__
        asserted |= {"data.train_batch_size": 0, "data.gen_batch_size": 1}
    for key, wanted in asserted.items():
        if (given := OmegaConf.select(config, key)) != wanted:
            yield f"verl's {name} trainer asserts {key}={_yaml(wanted)}, it is {_yaml(given)}: set it"
    if name in OWN_MAINS and need_critic(config):
        yield f"verl 0.9.1's {name} trainer cannot make a critic: take another estimator, e.g. ADV_ESTIMATOR=grpo"
    if name in (*OWN_MAINS, "v0"):
        return
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = copy.deepcopy(config)
    config.trainer.checkpoint_callback_class = None  # a user's class, which may do anything
    try:
        get_trainer_cls(name)(config)
    except Exception as error:
        yield f"verl's {name} trainer refuses the config: {one_line(error)}: correct it"
        return
    if name == "separate_async" and not hybrid(job) and _logs_info(job):
        yield (
            "verl 0.9.1's separate_async fails at a log line of level INFO if actor_rollout_ref.hybrid_engine=false "
            f"(a TypeError): set ++{RUNTIME_ENV}.VERL_LOGGING_LEVEL=WARNING"
        )


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _logs_info(job: Job) -> bool:
    """Whether verl's trainer, which runs in a Ray actor, logs lines of level INFO."""
    given = OmegaConf.select(job.config, f"{RUNTIME_ENV}.VERL_LOGGING_LEVEL") or os.environ.get("VERL_LOGGING_LEVEL")
    level = logging.getLevelName(str(given or "INFO").upper())
    return not isinstance(level, int) or level <= logging.INFO


def hybrid(job: Job) -> bool:
    """Whether a trainer with standalone replicas also has replicas on the training devices."""
    if kind(job) == FULLY:
        return _dynamic(job) or job.config.async_training.use_trainer_do_validate
    return kind(job) == "separate_async" and job.config.actor_rollout_ref.get("hybrid_engine", True)


def _dynamic(job: Job) -> bool:
    return job.config.async_training.get("use_dynamic_resource_scheduling", False)


def pools(job: Job) -> dict[str, tuple[int, int]]:
    """(nodes, devices a node) of each resource pool in which verl starts rollout replicas, in the order of their ranks.

    Hybrid replicas share the devices of the training, standalone ones have devices of their own (verl 0.9.1:
    PPOTrainer._setup, PPOTrainerSeparateAsync._setup, FullyAsyncLLMServerManager, OneStepOffRayTrainer).
    """
    training = {"hybrid": (job.config.trainer.nnodes, job.config.trainer.n_gpus_per_node)}
    if kind(job) not in ("separate_async", *OWN_MAINS):
        return training
    return (training if hybrid(job) else {}) | {"standalone": (job.rollout.nnodes, job.rollout.n_gpus_per_node)}


def only_validates(job: Job) -> bool:
    """Whether hybrid replicas generate only for validation. The standalone ones then generate what is trained on."""
    if kind(job) == FULLY:
        return hybrid(job) and not _dynamic(job)
    return hybrid(job) and not job.config.trainer.v1.separate_async.hybrid_rollout.enable_switch


def weights(job: Job) -> Iterator[str]:
    """Load the checkpoint engine that sends the weights to standalone replicas."""
    given = job.rollout.checkpoint_engine
    job.facts["weights"] = "within the training workers"
    if "standalone" not in pools(job):
        return
    from verl.checkpoint_engine import CheckpointEngineRegistry
    from verl.utils.import_utils import import_external_libs

    job.facts["weights"] = f"by verl's checkpoint engine {given.backend}"
    if given.backend == "naive":
        yield "checkpoint_engine.backend=naive does not reach standalone replicas: set it to nccl"
        return
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import_external_libs(given.custom_backend_module or None)
            CheckpointEngineRegistry.get(given.backend)
    except Exception as error:
        cpu = "set +async=separate_cpu, fully_cpu or one_step_cpu"
        fix = cpu if job.device == "cpu" else "install what it needs, or set another backend"
        yield f"checkpoint_engine.backend={given.backend}: {one_line(error)}: {fix}"


def staleness(job: Job) -> Iterator[str]:
    """Compare how many versions of the weights a trajectory may span with how many its KV may come from."""
    allowed, versions = freshness.of(os.environ)
    most = _versions(job)
    spans = "any number of versions" if most is None else f"{most} version{'s' if most > 1 else ''} at most"
    job.facts["staleness"] = f"{allowed}; a trajectory spans {spans}"
    if allowed == freshness.STRICT:
        return
    if most == 1:
        yield (
            f"{freshness.MODE}={allowed} changes nothing with verl's {kind(job)} trainer: it trains on no request that "
            "goes on across a weight update: unset it"
        )
    elif most is not None and versions > most:
        yield (
            f"{freshness.MAX_VERSIONS} is {versions}, but verl trains on no trajectory that spans more than {most} "
            f"versions: set it to {max(2, most)}, or raise trainer.v1.sampler.max_off_policy_threshold"
        )


def _versions(job: Job) -> int | None:
    """The most versions of the weights that a trajectory may span if verl trains on it; None if there is no bound."""
    name = kind(job)
    if name in ("colocate_async", "separate_async"):
        return job.config.trainer.v1.sampler.max_off_policy_threshold
    if name == FULLY and job.config.async_training.partial_rollout:
        return None
    return 1


def untried(job: Job) -> Iterator[str]:
    if (name := kind(job)) not in TRIED:
        yield f"verl's {name} trainer is not known to work with kvshare: {', '.join(TRIED)} have been trained with"
