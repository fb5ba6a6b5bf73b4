"""The launchers as data: what ``run_qwen_*.sh`` exports and gives to verl, read from their text."""

from __future__ import annotations

import re
import shlex
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from kvshare.core.errors import UserError

VARIABLE = re.compile(r"\$\{(\w+)(?::-((?:[^{}]|\{[^{}]*\})*))?\}|\$(\w+)")  # ${NAME}, ${NAME:-default}, $NAME


def folder() -> Path:
    """Where the launchers are: the root of a checkout, or where the wheel puts them."""
    folders = (Path(__file__).resolve().parents[2], Path(sysconfig.get_path("data")) / "share" / "kvshare")
    for found in folders:
        if (found / name("remote", "cuda")).is_file():
            return found
    raise UserError(f"there are no launchers in {folders[0]} or {folders[1]}: install kvshare again")


def name(backend: str, device: str) -> str:
    return f"run_qwen_{backend}_backend{'' if device == 'cuda' else f'_{device}'}.sh"


def read(backend: str, device: str, caller: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """What a launcher exports, and the arguments it gives to ``verl.trainer.main_ppo``.

    It is not run: its assignments and its last command are read, and the variables in them replaced as bash would.

    Args:
        caller: the environment it would be run in.

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
