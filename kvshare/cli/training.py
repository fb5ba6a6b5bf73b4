"""`kvshare preflight`, `forecast`, `overrides` and `launch`: before and while a run trains."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from kvshare.cli.options import PASSES, BackendOption, DeviceOption, Hydra, Json, Main, out
from kvshare.cli.reporting import print_report
from kvshare.core.secrets import is_secret
from kvshare.record.event_log import RUN_DIR

if TYPE_CHECKING:
    from kvshare.launch.preflight import Finding, Job

app = typer.Typer()


@app.command(context_settings=PASSES)
def preflight(
    backend: BackendOption,
    device: DeviceOption,
    hydra: Main = None,
    as_json: Json = False,
    record: Annotated[Path | None, typer.Option(help="Folder of the run that starts now, for its report.")] = None,
) -> None:
    """Check that a run can start and will share; exit code 2 if something must be mended."""
    _quiet()
    from kvshare.launch import preflight as checks

    job = checks.Job(backend, device, hydra) if hydra else _of_launcher(backend, device, [])
    with _progress() as doing:
        findings = checks.run(job, doing)
    wrong = checks.errors(findings)
    if as_json:
        run = None if wrong else checks.describe(job)
        print(json.dumps({"findings": [finding._asdict() for finding in findings], "run": run}, indent=2))
    else:
        _print_findings(findings, sys.stderr if wrong else sys.stdout)
    if wrong:
        raise typer.Exit(2)
    if record:
        checks.record(job, record)


@app.command(context_settings=PASSES)
def forecast(backend: BackendOption, device: DeviceOption, hydra: Hydra = None, as_json: Json = False) -> None:
    """How much of the prompts can be shared, and what that stores; from tokenizer, data and recipe."""
    _quiet()
    from kvshare.core.job import Job, has_config
    from kvshare.launch import preflight as checks

    given = hydra or []
    job = Job(backend, device, given) if has_config(given) else _of_launcher(backend, device, given)
    found = checks.forecast(job)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    for name, value in {**found.facts(), "memory": checks.memory.needed(job)}.items():
        out.print(f"{name:30}{value}", soft_wrap=True, highlight=False)
    out.print(found.verdict, soft_wrap=True, highlight=False)


@app.command()
def overrides(backend: BackendOption, device: DeviceOption, as_json: Json = False) -> None:
    """What makes your own verl job share, as lines of bash: paste them, or source <(kvshare overrides …)."""
    from kvshare.launch import paste

    environment, hydra = paste.overrides(backend, device)
    if as_json:
        secret = [name for name, value in environment.items() if is_secret(name, value)]
        shown = {name: value for name, value in environment.items() if name not in secret}
        print(json.dumps({"environment": shown, "secret": secret, "overrides": hydra}, indent=2))
    else:
        print(paste.as_bash(environment, hydra))


@app.command(context_settings=PASSES)
def launch(
    backend: BackendOption,
    device: DeviceOption,
    command: Annotated[list[str], typer.Argument(help="-- and python3 -m verl.trainer.main_ppo with its arguments.")],
) -> None:
    """What every launcher becomes: preflight, train, end everything that was started, report.

    START_SERVICES=1 also starts what the backend needs; DRY_RUN=1 only prints.
    Exit code: that of preflight or training.
    """
    from kvshare.launch import launch as launches
    from kvshare.services.health import NotStarted

    started = launches.Launch(backend, device, command, os.environ)
    if os.environ.get("DRY_RUN") == "1":
        print(started.dry_run())
        return
    try:
        code = started.run(services=os.environ.get("START_SERVICES") == "1")
    except NotStarted as failed:
        print(*failed.tail, f"kvshare launch: {failed}; log: {failed.log}", sep="\n", file=sys.stderr)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        print("kvshare launch: interrupted; everything it started has ended", file=sys.stderr)
        raise typer.Exit(130) from None
    if not code and (made := launches.write_report(started.run_dir)):
        print_report(made, started.run_dir)
    raise typer.Exit(code)


def _quiet() -> None:
    """Keep warnings and logs of what is imported out of the output."""
    for name in ("LMCACHE_LOG_LEVEL", "VLLM_LOGGING_LEVEL"):
        os.environ.setdefault(name, "ERROR")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _of_launcher(backend: str, device: str, overrides: list[str]) -> Job:
    """The job that a launcher would run, in its environment."""
    from kvshare.launch import environment, hydra_overrides, launchers
    from kvshare.launch.preflight import Job

    exports, given = launchers.read(backend, device, os.environ)
    run = Path(os.environ.get(RUN_DIR) or "outputs").absolute()
    variables = environment.of_run(device, run, {**os.environ, **exports})
    os.environ.update(variables)
    return Job(backend, device, hydra_overrides.complete([*given, *overrides], device, variables))


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Say on stderr what is being done: in one line that changes on a terminal, else in a line each."""
    if not sys.stderr.isatty():
        yield lambda what: print(f"kvshare preflight looks at {what} …", file=sys.stderr, flush=True)
        return
    with Console(stderr=True).status("kvshare preflight") as status:
        yield lambda what: status.update(f"kvshare preflight looks at {what} …")


def _print_findings(findings: list[Finding], file: TextIO) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for level, check, text in findings:
        table.add_row(level, check, text, style={"error": "red", "warning": "yellow"}.get(level))
    width = None if file.isatty() else 10_000  # one line each for a log
    console = Console(file=file, width=width, highlight=False, markup=False)
    console.print("kvshare preflight")
    console.print(table)
