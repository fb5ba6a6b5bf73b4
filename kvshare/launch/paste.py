"""Prints, for ``kvshare overrides``, the part of a launcher that another verl job needs to share KV."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from kvshare.launch import environment, hydra_overrides, launchers

SHARING = ("actor_rollout_ref.rollout.", "ray_kwargs.")
"""Hydra keys that sharing needs. The other keys of a launcher set model, data and recipe."""


def overrides(backend: str, device: str) -> tuple[dict[str, str], list[str]]:
    """Environment variables and Hydra overrides that make a verl job share KV."""
    exports, given = launchers.read(backend, device, os.environ)
    run = Path(os.environ.get("KVSHARE_RUN_DIR") or Path("outputs") / backend).absolute()
    variables = environment.of_run(device, run, {**os.environ, **exports})
    complete = hydra_overrides.complete(given, device, variables)
    return variables, [argument for argument in complete if argument.lstrip("+").startswith(SHARING)]


def as_bash(variables: dict[str, str], hydra: list[str]) -> str:
    """Lines of bash to paste or source."""
    lines = [f"export {shlex.quote(f'{name}={value}')}" for name, value in variables.items()]
    lines += ["kvshare_overrides=(", *(f"  {shlex.quote(override)}" for override in hydra), ")"]
    return "\n".join([*lines, '# python3 -m verl.trainer.main_ppo …your arguments… "${kvshare_overrides[@]}"'])
