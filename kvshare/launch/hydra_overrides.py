"""Completes the Hydra arguments of a launcher with settings that depend on this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from kvshare.core.secrets import is_secret

DATA = ("data.train_files", "data.val_files", "actor_rollout_ref.rollout.router_config_path")
MODELS = ("actor_rollout_ref.model.path", "critic.model.path")
RUNTIME_ENV = "ray_kwargs.ray_init.runtime_env.env_vars"
ATTENTION = "attention"
"""Config group in config/ with settings for an attention implementation."""


def complete(arguments: list[str], device: str, environment: Mapping[str, str]) -> list[str]:
    """Arguments of ``verl.trainer.main_ppo`` with absolute paths, installed attention and Ray's environment.

    Args:
        arguments: arguments from the launcher and the user.
        device: cuda, npu or cpu.
        environment: environment variables for Ray's workers. Those in ``arguments`` take precedence. A secret one is
            left out, because verl prints its overrides; workers inherit it from the shell that starts Ray.
    """
    own = [_absolute(argument) for argument in arguments]
    if device == "cuda" and not has_flash_attention() and not any(_key(a) == ATTENTION for a in own):
        own.append(f"+{ATTENTION}=sdpa")
    given = {_key(argument) for argument in own}
    variables = {n: f"{RUNTIME_ENV}.{n}" for n, value in environment.items() if not is_secret(n, value)}
    return own + [f"++{key}={quote(environment[name])}" for name, key in variables.items() if key not in given]


def has_flash_attention() -> bool:
    """Whether flash-attn, verl's default, is installed. PyPI has it as source only, so no lock file includes it."""
    return find_spec("flash_attn") is not None


def quote(text: str) -> str:
    """Quote any text as a value for Hydra (hydra.cc, "Quoted values")."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    return "'" + re.sub(r"\\+$", lambda found: found[0] * 2, escaped) + "'"


def _absolute(argument: str) -> str:
    """Make a path absolute, because Ray's workers have other working directories."""
    key, _, value = argument.partition("=")
    name, path = key.lstrip("+"), value[1:-1] if value[:1] + value[-1:] in ("''", '""') else value
    if not path or path.startswith(("[", "null", "None")) or name not in (*DATA, *MODELS):
        return argument
    local = name in DATA or Path(path).expanduser().exists()  # otherwise it is a name on the hub
    return f"{key}={quote(os.path.abspath(Path(path).expanduser()) if local else path)}"


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")
