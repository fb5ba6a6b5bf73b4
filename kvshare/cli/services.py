"""``kvshare services``: start, look at and end what a backend needs on this host."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvshare.core.errors import UserError
from kvshare.services import background
from kvshare.services.backends import BACKENDS
from kvshare.services.health import NotStarted

app = typer.Typer(no_args_is_help=True, help="Start, look at and end what a backend needs on this host.")
PASSES = {"ignore_unknown_options": True}


def known_backend(name: str) -> str:
    if name not in BACKENDS:
        raise UserError(f"--backend {name}: must be one of {', '.join(BACKENDS)}")
    return name


BackendOption = Annotated[str, typer.Option("--backend", help=f"{', '.join(BACKENDS)}.", callback=known_backend)]
Folder = Annotated[Path, typer.Option("--folder", help="For state and logs.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all of this host's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
HERE = Path("outputs/services")
LOOPBACK = "127.0.0.1"


@app.command(context_settings=PASSES)
def up(
    backend: BackendOption,
    host: Host = LOOPBACK,
    folder: Folder = HERE,
    as_json: Json = False,
    arguments: Annotated[list[str] | None, typer.Argument(help="-- and arguments of the service itself.")] = None,
) -> None:
    """Start it, wait until it is healthy, print what to export; what is up stays: eval "$(kvshare services up …)"."""
    try:
        started = background.up(backend, host, folder, arguments or [])
    except NotStarted as failed:
        raise _failed(failed) from None
    _print(started, as_json)


@app.command()
def down(backend: BackendOption, folder: Folder = HERE) -> None:
    """End what up started, also what a crash has left."""
    ended = background.down(backend, folder)
    print(f"{ended.service} (pid {ended.pid}) has ended" if ended else f"nothing is up in {folder}")


@app.command()
def status(backend: BackendOption, folder: Folder = HERE, as_json: Json = False) -> None:
    """Is it healthy? Prints what up printed; exit code 1 if it is not."""
    started = background.read(backend, folder)
    if started is None:
        print("{}" if as_json else f"nothing is up in {folder}")
        raise typer.Exit(1)
    if not _print(started, as_json):
        raise typer.Exit(1)


def _failed(failed: NotStarted) -> typer.Exit:
    for line in failed.tail:
        print(line, file=sys.stderr)
    print(f"kvshare services: {failed}; log: {failed.log}", file=sys.stderr)
    return typer.Exit(1)


def _print(started: background.Started, as_json: bool) -> bool:
    """Returns whether it is healthy."""
    try:
        where, health = started.check(), "healthy"
    except UserError as error:
        where, health = "", str(error)
    if as_json:
        facts: dict[str, Any] = {"backend": started.backend, "service": started.service, "pid": started.pid}
        print(json.dumps({**facts, "healthy": bool(where), "exports": started.exports, "log": started.log}))
        return bool(where)
    print(f"# {started.service}, pid {started.pid}, {f'healthy at {where}' if where else health}; log: {started.log}")
    for name, value in started.exports.items():
        print(f"export {name}={shlex.quote(value)}")
    return bool(where)
