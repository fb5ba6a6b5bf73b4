"""Prints, for ``kvshare overrides``, the part of a launcher that another verl job needs to share KV."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from kvshare.launch import environment, hydra_overrides, launchers

SHARING = ("actor_rollout_ref.rollout.", "ray_kwargs.")
"""Hydra keys that sharing needs. The other keys of a launcher set model, data and recipe."""

BACKEND = "KVSHARE_BACKEND"
"""The command line's ``--backend``, if that is not given. ``kvshare overrides`` exports it."""
DEVICE = "KVSHARE_DEVICE"
"""The command line's ``--device``, if that is not given. ``kvshare overrides`` exports it."""


def overrides(backend: str, device: str) -> tuple[dict[str, str], list[str]]:
    """Environment variables and Hydra overrides that make a verl job share KV."""
    exports, given = launchers.read(backend, device, os.environ)
    run = Path(os.environ.get("KVSHARE_RUN_DIR") or Path("outputs") / backend).absolute()
    variables = environment.of_run(device, run, {**os.environ, **exports})
    complete = (argument.lstrip("+") for argument in hydra_overrides.complete(given, device, variables))
    # ++ sets a key whether the job has it or not; + would fail if it does.
    pasted = [f"++{argument}" for argument in complete if argument.startswith(SHARING)]
    return {BACKEND: backend, DEVICE: device, **variables}, pasted


def as_bash(variables: dict[str, str], hydra: list[str]) -> str:
    """Lines of bash to paste or source. A password is not printed: it has to be in the environment already."""
    lines = environment.as_bash(variables)
    lines += ["kvshare_overrides=(", *(f"  {shlex.quote(override)}" for override in hydra), ")"]
    return "\n".join([*lines, '# python3 -m verl.trainer.main_ppo …your arguments… "${kvshare_overrides[@]}"'])
