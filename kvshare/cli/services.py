"""`kvshare server`, and `kvshare services`, which starts, checks and ends the service of a backend on this host."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kvshare.cli.options import PASSES, BackendOption, Json
from kvshare.core.errors import UserError
from kvshare.core.secrets import redacted
from kvshare.services import background
from kvshare.services.health import NotStarted

app = typer.Typer()
services = typer.Typer(no_args_is_help=True, help="Start, check and end the service of a backend on this host.")
app.add_typer(services, name="services")


Folder = Annotated[Path, typer.Option("--folder", help="Folder for state and logs.")]
Host = Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all of this host's.")]
HERE = Path("outputs/services")
LOOPBACK = "127.0.0.1"


@services.command(context_settings=PASSES)
def up(
    backend: BackendOption,
    engine: Annotated[str, typer.Option(help="valkey or mooncake, for --backend remote.")] = "",
    host: Host = LOOPBACK,
    folder: Folder = HERE,
    as_json: Json = False,
    arguments: Annotated[list[str] | None, typer.Argument(help="-- and arguments for the service.")] = None,
) -> None:
    """Start the service, or keep a healthy one, and print what to export: eval "$(kvshare services up …)"."""
    try:
        started = background.up(backend, host, folder, arguments or [], engine)
    except NotStarted as failed:
        raise _failed(failed) from None
    _print(started, as_json)


@services.command()
def down(backend: BackendOption, folder: Folder = HERE) -> None:
    """End what up has started, including what a crash has left."""
    ended = background.down(backend, folder)
    print(f"{ended.service} (pid {ended.pid}) has ended" if ended else f"nothing is up in {folder}")


@services.command()
def status(backend: BackendOption, folder: Folder = HERE, as_json: Json = False) -> None:
    """Print the variables again, and whether the service is healthy. If it is not, the exit code is 1."""
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
    """Print state and variables of a service; return whether it is healthy."""
    try:
        where, health = started.check(), "healthy"
    except UserError as error:
        where, health = "", redacted(str(error))
    if as_json:
        facts: dict[str, Any] = {"backend": started.backend, "service": started.service, "pid": started.pid}
        print(json.dumps({**facts, "healthy": bool(where), "exports": started.exports, "log": started.log}))
        return bool(where)
    print(f"# {started.service}, pid {started.pid}, {f'healthy at {where}' if where else health}; log: {started.log}")
    for name, value in started.exports.items():
        print(f"export {name}={shlex.quote(value)}")
    return bool(where)


@app.command()
def server(
    host: Annotated[str, typer.Argument(help="Where to listen.")] = "localhost",
    port: Annotated[str, typer.Argument()] = "65432",
    memory: Annotated[str, typer.Option(metavar="GIB", help="How much KV to keep.")] = "8",
    status: Annotated[Path | None, typer.Option(help="JSON file of counters: bytes, entries, evicted…")] = None,
) -> None:
    """lmcache_server with a memory limit. When it is full, the least recently used KV is evicted."""
    from kvshare.services import server as servers

    servers.serve(host, _port(port), _bytes(memory), status)


def _port(text: str) -> int:
    if not (text.isdecimal() and len(text) < 6 and 0 < int(text) < 65536):
        raise UserError(f"PORT {text!r} must be a number from 1 to 65535")
    return int(text)


def _bytes(gib: str) -> int:
    import psutil

    machine = psutil.virtual_memory().total
    try:
        size = int(float(gib) * 2**30)
    except (ValueError, OverflowError):  # not a number, or infinite
        size = 0
    if not 0 < size <= machine:
        raise UserError(f"--memory {gib!r} must be a number of GiB, at most this machine's {machine / 2**30:.1f}")
    return size
