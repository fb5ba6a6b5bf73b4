"""Reads from the text of ``run_qwen_*.sh`` what a launcher exports and which arguments it gives to verl."""

from __future__ import annotations

import re
import shlex
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from kvshare.core.errors import UserError

VARIABLE = re.compile(r"\$\{(\w+)(?::-((?:[^{}]|\{[^{}]*\})*))?\}|\$(\w+)")  # ${NAME}, ${NAME:-default}, $NAME


def folder() -> Path:
    """Folder of the launchers: the root of a checkout, or the folder where the wheel installs them.

    Raises:
        UserError: neither folder has them.
    """
    folders = (Path(__file__).resolve().parents[2], Path(sysconfig.get_path("data")) / "share" / "kvshare")
    for found in folders:
        if (found / name("remote", "cuda")).is_file():
            return found
    raise UserError(f"there are no launchers in {folders[0]} or {folders[1]}: install kvshare again")


def name(backend: str, device: str) -> str:
    return f"run_qwen_{backend}_backend{'' if device == 'cuda' else f'_{device}'}.sh"


def read(backend: str, device: str, caller: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Variables that a launcher exports, and its arguments for ``verl.trainer.main_ppo``.

    The launcher is not run. Its assignments and its last command are parsed, and variables are expanded as in bash.

    Args:
        caller: environment in which the launcher would run.

    Raises:
        UserError: there is no launcher for this backend and device.
    """
    path = folder() / name(backend, device)
    if not path.is_file():
        raise UserError(f"there is no {path.name}: the {backend} backend does not run on {device}")
    known = {**caller, "here": str(path.parent)}
    exports: dict[str, str] = {}
    setup, _, last = path.read_text().partition("\nexec ")
    for words in (shlex.split(line, comments=True) for line in setup.splitlines()):
        for key, value in (word.split("=", 1) for word in words if re.match(r"\w+=", word)):
            if not value.startswith("$("):
                known[key] = _expand(value, known)
            if words[0] == "export":
                exports[key] = known[key]
    command = [word for word in shlex.split(last.replace("\\\n", " ")) if word != "$@"]
    verl = command.index("verl.trainer.main_ppo")
    return exports, [_expand(word, known) for word in command[verl + 1 :]]


def _expand(text: str, known: Mapping[str, str]) -> str:
    def value(found: re.Match) -> str:
        braced, default, plain = found.groups()
        return known.get(braced or plain) or _expand(default or "", known)

    return VARIABLE.sub(value, text)
