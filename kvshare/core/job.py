"""Describes the training job that preflight and forecast look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CONFIG_FOLDER, CONFIG_PATH, CONFIG_NAME = ("--config-dir", "-cd"), ("--config-path", "-cp"), ("--config-name", "-cn")
OWN_MAINS = ("fully_async_policy", "one_step_off_policy")
"""Packages in verl.experimental that have a main of their own, with a folder of configs."""


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
    replica_list: list[Any] = field(default_factory=list)  # verl's RolloutReplicas, set by the check replicas()
    standby: int = 0  # number of the first of them that generate for validations only, set by the check replicas()
    model: Any = None  # verl's HFModelConfig, set by the check engine()
    engine: Any = None  # vLLM's parsed arguments, set by the check engine()
    connectors: list[Any] = field(default_factory=list)  # LMCache's, as vLLM's KVTransferConfigs, set by connector()
    lmcache: Any = None  # LMCache's config object as the engine has it, set by the check settings()
    forecast: Any = None  # launch.forecast.Forecast, set by the check forecast()
    facts: dict[str, str] = field(default_factory=dict)  # name of a check -> text of its row if it passes

    @property
    def rollout(self) -> Any:
        return self.config.actor_rollout_ref.rollout

    @property
    def shares(self) -> bool:
        """False for a baseline run, which sets ``kv_transfer_config=null``."""
        given = self.rollout.engine_kwargs.get("vllm") or {}
        return given.get("kv_transfer_config", "missing") is not None

    @property
    def extra_config(self) -> dict[str, Any]:
        """``kv_connector_extra_config`` of the connector, which LMCache applies after file and environment."""
        return dict(self.connectors[0].kv_connector_extra_config) if self.connectors else {}

    @property
    def world_size(self) -> int:
        """Workers of one replica."""
        return self.replica_list[0].world_size

    @property
    def replicas(self) -> int:
        return len(self.replica_list)

    @property
    def serving(self) -> int:
        """Replicas that generate what is trained on."""
        return self.replicas - self.standby

    @property
    def nodes(self) -> int:
        """Nodes of the job, if all pools of replicas are on the same ones."""
        return max(self.config.trainer.nnodes, self.rollout.nnodes)

    @property
    def workers_a_node(self) -> int:
        """The most workers with an LMCache engine that one node gets."""
        return -(-self.replicas * self.world_size // self.nodes)

    def hydra(self) -> tuple[str, str, list[str]]:
        """Split ``hydra_args`` into config folder (absolute), config name and overrides, with main_ppo's defaults."""
        rest = list(self.hydra_args)
        folder, path = _take(rest, CONFIG_FOLDER), _take(rest, CONFIG_PATH)
        name = (_take(rest, CONFIG_NAME) or "ppo_trainer").removesuffix(".yaml")
        if path and Path(path).is_absolute():  # Hydra takes another path from the folder of verl's main
            folder = folder or path
        return str(Path(folder).resolve()) if folder else _folder_of(name), name, rest


def verl_config() -> str:
    """verl's own folder of Hydra configs, found without importing verl."""
    spec = find_spec("verl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return f"{spec.submodule_search_locations[0]}/trainer/config"


def _folder_of(name: str) -> str:
    """The folder of verl's configs that has this one; main_ppo's if none has."""
    mains = Path(verl_config()).parents[1] / "experimental"
    folders = [verl_config(), *(str(mains / package / "config") for package in OWN_MAINS)]
    return next((folder for folder in folders if (Path(folder) / f"{name}.yaml").is_file()), folders[0])


def has_config(arguments: list[str]) -> bool:
    """Whether arguments name a Hydra config, so that they are those of a whole job."""
    return any(a.partition("=")[0] in (*CONFIG_FOLDER, *CONFIG_PATH, *CONFIG_NAME) for a in arguments)


def _take(arguments: list[str], names: tuple[str, ...]) -> str | None:
    """Remove an option from ``arguments``, ``--name value`` or ``--name=value``, and return its last value."""
    found = None
    for at in reversed(range(len(arguments))):
        name, given, value = arguments[at].partition("=")
        if name in names and (given or at + 1 < len(arguments)):
            end = at + (1 if given else 2)
            value = value if given else arguments[end - 1]
            found = value if found is None else found
            del arguments[at:end]
    return found


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    if error.__cause__ is not None and type(error).__name__ == "InstantiationException":
        error = error.__cause__  # Hydra's message only names the function it called
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".:") if lines else type(error).__name__
