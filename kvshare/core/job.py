"""Describes the training job that preflight and forecast look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvshare.core.errors import UserError


@dataclass
class Job:
    """A training job, with what the checks have found out about it so far.

    Args:
        backend: key of ``BACKENDS``.
        device: cuda, npu or cpu.
        hydra_args: arguments of ``verl.trainer.main_ppo``.
    """

    backend: str
    device: str
    hydra_args: list[str]
    config: Any = None  # verl's composed config, set by the check config()
    lmcache: Any = None  # LMCache's config object, set by the check settings()
    forecast: Any = None  # launch.forecast.Forecast, set by the check forecast()
    facts: dict[str, str] = field(default_factory=dict)  # name of a check -> text of its row if it passes

    @property
    def rollout(self) -> Any:
        return self.config.actor_rollout_ref.rollout

    @property
    def shares(self) -> bool:
        """False for a baseline run, which sets ``kv_transfer_config=null``."""
        return self.rollout.engine_kwargs.vllm.get("kv_transfer_config", "missing") is not None

    @property
    def world_size(self) -> int:
        return self.rollout.tensor_model_parallel_size * self.rollout.data_parallel_size

    @property
    def replicas(self) -> int:
        return self.config.trainer.nnodes * self.config.trainer.n_gpus_per_node // self.world_size

    def hydra(self) -> tuple[str, str, list[str]]:
        """Split ``hydra_args`` into config folder (absolute), config name and overrides.

        Raises:
            UserError: --config-dir or --config-name is missing.
        """
        rest, options = list(self.hydra_args), {}
        for option in ("--config-dir", "--config-name"):
            if option not in rest[:-1]:
                raise UserError(f"{option} is missing: give the arguments of verl.trainer.main_ppo after --")
            at = rest.index(option)
            options[option] = rest[at + 1]
            del rest[at : at + 2]
        return str(Path(options["--config-dir"]).resolve()), options["--config-name"], rest


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    if error.__cause__ is not None and type(error).__name__ == "InstantiationException":
        error = error.__cause__  # Hydra's message only names the function it called
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
