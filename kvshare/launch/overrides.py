"""The launchers as data: what one would run, and what of that belongs into somebody's own verl job."""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

from kvshare.core.errors import UserError

NOT_RECIPE = ("actor_rollout_ref.rollout.", "ray_kwargs.")
"""Hydra keys that sharing needs; what a launcher sets beside them is model, data and recipe."""


def folder() -> Path:
    """Where the launchers are: the root of a checkout, or where the wheel puts them."""
    folders = (Path(__file__).resolve().parents[2], Path(sysconfig.get_path("data")) / "share" / "kvshare")
    for found in folders:
        if (found / path("remote", "cuda").name).is_file():
            return found
    raise UserError(f"there are no launchers in {folders[0]} or {folders[1]}: install kvshare again")


def path(backend: str, device: str) -> Path:
    """Of a launcher, within ``folder()``."""
    return Path(f"run_qwen_{backend}_backend{'' if device == 'cuda' else f'_{device}'}.sh")


def dry_run(backend: str, device: str, overrides: list[str]) -> tuple[dict[str, str], list[str]]:
    """Environment that a launcher exports, and the arguments it gives to ``verl.trainer.main_ppo``.

    Raises:
        UserError: it prints something else.
    """
    run = os.environ.get("KVSHARE_RUN_DIR") or str(Path("outputs") / backend)
    command = ["bash", str(folder() / path(backend, device)), *overrides]
    environ = {**os.environ, "DRY_RUN": "1", "KVSHARE_RUN_DIR": run}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[1]} does not run: {done.stderr.strip()}")
    *exports, train = done.stdout.strip().splitlines()
    environment = dict(shlex.split(line)[1].split("=", 1) for line in exports)
    return environment, shlex.split(train)[3:]


def to_paste(backend: str, device: str) -> tuple[dict[str, str], list[str]]:
    """Environment and Hydra overrides that make somebody's own verl job share."""
    environment, arguments = dry_run(backend, device, [])
    return environment, [argument for argument in arguments if argument.lstrip("+").startswith(NOT_RECIPE)]


def as_bash(environment: dict[str, str], overrides: list[str]) -> str:
    """Lines to paste, or to source."""
    lines = [f"export {shlex.quote(f'{name}={value}')}" for name, value in environment.items()]
    lines += ["kvshare_overrides=(", *(f"  {shlex.quote(override)}" for override in overrides), ")"]
    return "\n".join([*lines, '# python3 -m verl.trainer.main_ppo …your arguments… "${kvshare_overrides[@]}"'])
