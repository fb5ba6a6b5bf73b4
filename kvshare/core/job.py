"""What is about to start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvshare.core.errors import UserError


@dataclass
class Job:
    """A training that checks look at, and what they found out about it.

    Args:
        backend: a key of ``BACKENDS``.
        device: cuda, npu or cpu.
        hydra_args: arguments of ``verl.trainer.main_ppo``.
    """

    backend: str
    device: str
    hydra_args: list[str]
    config: Any = None  # verl's composed config, from config()
    lmcache: Any = None  # LMCache's own config object, from settings()
    forecast: Any = None  # launch.forecast.Forecast, from forecast()
    facts: dict[str, str] = field(default_factory=dict)  # by name of a check: what its row says when all is well

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

    def hydra(self) -> tuple[str, str, list[str]]:
        """Config folder, config name and overrides.

        Raises:
            UserError: one of the first two is missing.
        """
        rest, options = list(self.hydra_args), {}
        for option in ("--config-dir", "--config-name"):
            if option not in rest[:-1]:
                raise UserError(f"the arguments of verl.trainer.main_ppo go after --; {option} is missing there")
            at = rest.index(option)
            options[option] = rest[at + 1]
            del rest[at : at + 2]
        return str(Path(options["--config-dir"]).resolve()), options["--config-name"], rest


def one_line(error: BaseException) -> str:
    if error.__cause__ is not None and type(error).__name__ == "InstantiationException":
        error = error.__cause__  # Hydra's own says only what it was calling
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
