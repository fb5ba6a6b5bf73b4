"""Options that several commands have, and the console they print to."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvshare.core.errors import UserError
from kvshare.launch import paste
from kvshare.services.backends import BACKENDS

DEVICES = ("cuda", "npu", "cpu")
PASSES = {"ignore_unknown_options": True}
"""For commands whose arguments are another program's."""

out = Console()


def _known_backend(name: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"--backend {name}: must be one of {', '.join(BACKENDS)}")
    return name


def _known_device(name: str) -> str:
    if name not in DEVICES:
        raise UserError(f"--device {name}: must be one of {', '.join(DEVICES)}")
    return name


BackendOption = Annotated[
    str,
    typer.Option("--backend", help=f"{', '.join(BACKENDS)}.", callback=_known_backend, envvar=paste.BACKEND),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help=f"{', '.join(DEVICES)}.", callback=_known_device, envvar=paste.DEVICE)
]
Hydra = Annotated[
    list[str] | None,
    typer.Argument(help="-- and overrides for the launcher, or, with --config-name, the arguments of a whole job."),
]
Main = Annotated[
    list[str] | None,
    typer.Argument(help="-- and the arguments of verl.trainer.main_ppo; without any: those of the launcher."),
]
Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]
