"""The command line. Exit codes: 0 done, 1 it did not work, 2 something the user must mend."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer
from rich.console import Console

from kvshare import __version__
from kvshare.cli.services import BackendOption
from kvshare.cli.services import app as services
from kvshare.core.errors import UserError

if TYPE_CHECKING:
    from kvshare.launch.preflight import Finding, Job

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(services, name="services")
out = Console()


def main() -> None:
    try:
        app(prog_name="kvshare")
    except UserError as error:
        print(f"kvshare: {error}", file=sys.stderr)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """KV cache sharing between vLLM rollout replicas in verl RL training, through LMCache."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def prepare(
    data: Annotated[Path, typer.Option(help="Where train.parquet and test.parquet go.")] = Path("data/gsm8k"),
    source: Annotated[
        Path | None, typer.Option(help="Folder with GSM8K's train.jsonl and test.jsonl; default: the hub.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Keep this many problems of each split.")] = None,
    offline: Annotated[bool, typer.Option(help="Generate problems, do not try the hub.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of generated problems.")] = 0,
    tiny_model: Annotated[bool, typer.Option(help="Also make models/tiny-qwen2, for CPU.")] = False,
    model: Annotated[Path, typer.Option(help="Where the tiny model goes.")] = Path("models/tiny-qwen2"),
) -> None:
    """Make the training data (GSM8K for verl), and a tiny model to try things on CPU."""
    from kvshare.tools import gsm8k

    if source:
        rows, origin = gsm8k.read_folder(source), str(source)
    else:
        rows, origin = _hub_or_generated(offline, seed)
    gsm8k.write(rows, data, shots, limit)
    sizes = ", ".join(f"{min(len(rows[s]), limit or len(rows[s]))} {s}" for s in gsm8k.SPLITS)
    out.print(f"data:  {data} ({sizes} problems from {origin}, {shots} worked examples each)")
    if tiny_model:
        from kvshare.tools import tiny_model as maker

        maker.make(model)
        out.print(f"model: {model} (Qwen2, 1M parameters, trained on kvshare's own problems)")


def _hub_or_generated(offline: bool, seed: int) -> tuple[dict, str]:
    from kvshare.tools import gsm8k

    if not offline:
        try:
            return gsm8k.read_hub(), "the Hugging Face hub (openai/gsm8k)"
        except OSError as error:
            out.print(f"{str(error).splitlines()[0]}\nusing generated problems instead")
    return gsm8k.generate(train=2000, test=200, seed=seed), f"kvshare's own generator, seed {seed} (not GSM8K)"


DEVICES = ("cuda", "npu", "cpu")


def _known_device(name: str) -> str:
    if name not in DEVICES:
        raise UserError(f"--device {name}: must be one of {', '.join(DEVICES)}")
    return name


DeviceOption = Annotated[str, typer.Option("--device", help=f"{', '.join(DEVICES)}.", callback=_known_device)]
Hydra = Annotated[
    list[str] | None,
    typer.Argument(help="-- and the arguments of verl.trainer.main_ppo, or overrides for those of the launcher."),
]
Json = Annotated[bool, typer.Option("--json", help="Print it as JSON.")]


@app.command(context_settings={"ignore_unknown_options": True})
def preflight(
    backend: BackendOption,
    device: DeviceOption,
    hydra: Hydra = None,
    as_json: Json = False,
    record: Annotated[Path | None, typer.Option(help="Folder of the run that starts now, for its report.")] = None,
) -> None:
    """Check that a run can start and will share; exit code 2 if something must be mended."""
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")  # of what is imported here
    from kvshare.launch import preflight as checks

    job = _job(backend, device, hydra or [])
    findings = checks.run(job)
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


@app.command(context_settings={"ignore_unknown_options": True})
def forecast(backend: BackendOption, device: DeviceOption, hydra: Hydra = None, as_json: Json = False) -> None:
    """How much of the prompts can be shared, and what that stores; from tokenizer, data and recipe."""
    os.environ.setdefault("LMCACHE_LOG_LEVEL", "ERROR")  # of what is imported here
    from kvshare.launch import preflight as checks

    found = checks.forecast(job := _job(backend, device, hydra or []))
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    for name, value in {**found.facts(), "memory": checks.memory.needed(job)}.items():
        out.print(f"{name:30}{value}", soft_wrap=True, highlight=False)
    out.print(found.verdict, soft_wrap=True, highlight=False)


@app.command()
def overrides(backend: BackendOption, device: DeviceOption, as_json: Json = False) -> None:
    """What makes your own verl job share, as lines of bash: paste them, or source <(kvshare overrides …)."""
    from kvshare.launch import overrides

    environment, hydra = overrides.to_paste(backend, device)
    if as_json:
        print(json.dumps({"environment": environment, "overrides": hydra}, indent=2))
    else:
        print(overrides.as_bash(environment, hydra))


@app.command()
def verify(
    first: Annotated[str, typer.Argument(metavar="URL", help="Of a vLLM server: it computes.")],
    second: Annotated[str, typer.Argument(metavar="URL", help="Of another: it reads.")],
    stamp: Annotated[str | None, typer.Option("--policy", help="Ask under this policy id.")] = None,
    as_json: Json = False,
) -> None:
    """Prove on two live, idle vLLM servers that the second reads what the first has computed.

    Exit codes: 0 sharing, 1 not sharing, 2 cannot be asked, 3 degraded, 4 stale, 5 corrupt, 6 different weights.
    Run it again after a weight update: what the first run left must not be served then.
    """
    from kvshare.tools import verify as verification

    proof = verification.verify(verification.Server(first, stamp), verification.Server(second, stamp))
    if as_json:
        print(json.dumps(proof.to_dict(), indent=2))
    else:
        for name, value in proof.facts.items():
            out.print(f"{name:30}{value}", soft_wrap=True, highlight=False)
        out.print(f"{proof.verdict}: {proof.why}", soft_wrap=True, highlight=False)
    raise typer.Exit(proof.exit_code)


def _job(backend: str, device: str, hydra: list[str]) -> Job:
    """Arguments without --config-dir are overrides for the launcher's."""
    from kvshare.launch import arguments, environment, launchers
    from kvshare.launch.preflight import Job

    if "--config-dir" not in hydra:
        exports, given = launchers.read(backend, device, os.environ)
        run = Path(os.environ.get("KVSHARE_RUN_DIR") or "outputs").absolute()
        variables = environment.of_run(device, run, {**os.environ, **exports})
        os.environ.update(variables)
        hydra = arguments.complete([*given, *hydra], device, variables)
    return Job(backend, device, hydra)


def _print_findings(findings: list[Finding], file: TextIO) -> None:
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for level, check, text in findings:
        table.add_row(level, check, text, style={"error": "red", "warning": "yellow"}.get(level))
    width = None if file.isatty() else 10_000  # one line each for a log
    console = Console(file=file, width=width, highlight=False, markup=False)
    console.print("kvshare preflight")
    console.print(table)


@app.command()
def server(
    host: Annotated[str, typer.Argument(help="Where to listen.")] = "localhost",
    port: Annotated[str, typer.Argument()] = "65432",
    memory: Annotated[str, typer.Option(metavar="GIB", help="How much KV to keep.")] = "8",
    status: Annotated[Path | None, typer.Option(help="JSON file to keep counts in: bytes, entries, evicted…")] = None,
) -> None:
    """lmcache_server with a bound: when its memory is full, the least recently used KV goes."""
    from kvshare.services import lm_server as servers

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


@app.command(context_settings={"ignore_unknown_options": True})
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
        _print_report(made, started.run_dir)
    raise typer.Exit(code)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="KVSHARE_RUN_DIR of the run.")],
    baseline: Annotated[
        Path | None, typer.Option(help="That of a run without a connector: the noise floor of the mismatch.")
    ] = None,
) -> None:
    """Write report.html, report.md and report.json of a run, and print what was shared."""
    from kvshare.record import report as reports

    _print_report(reports.write(run, baseline), run)


@app.command(context_settings={"ignore_unknown_options": True})
def demo(
    backend: BackendOption = "remote",
    run: Annotated[Path, typer.Option(help="Folder for data, model, logs and the report.")] = Path("outputs/demo"),
    overrides: Annotated[list[str] | None, typer.Argument(help="-- and Hydra overrides for the training.")] = None,
) -> None:
    """Train a tiny Qwen with GRPO on this machine's CPU while two vLLM replicas share KV."""
    from kvshare.tools import demo as demos

    try:
        result = demos.Demo(run, overrides or [], backend).run()
    except demos.DemoFailed as failed:
        for line in failed.tail:
            print(line, file=sys.stderr)
        print(f"kvshare demo: {failed}; log: {failed.log}", file=sys.stderr)
        raise typer.Exit(1) from None
    _print_report(result, run)
    if wrong := demos.failures(result):
        for line in wrong:
            print(f"kvshare demo: {line}", file=sys.stderr)
        raise typer.Exit(1)


@app.command()
def bench(
    config: Annotated[
        Path | None, typer.Argument(help="YAML with what to start; config/bench/remote_cpu.yaml is one.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Instead: a running vLLM server; two that share.")
    ] = None,
    plain: Annotated[str | None, typer.Option(metavar="URL", help="And one with no connector.")] = None,
    tokens: Annotated[str, typer.Option(help="Prompt lengths.")] = "1024,4096",
    at_once: Annotated[str, typer.Option(help="Different prompts at the same time.")] = "1",
    n: Annotated[int, typer.Option("-n", min=0, help="Also GRPO's pattern, with this many samples of a prompt.")] = 0,
    answer: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="Turns of all cases.")] = 5,
    settle: Annotated[float, typer.Option(min=0, help="Seconds a prompt has to be stored, and one more a GB.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every sample to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it, to this SVG file.")] = None,
    logs: Annotated[Path, typer.Option(help="Folder for the logs of what it starts.")] = Path("outputs/bench"),
) -> None:
    """Time to the first token: no connector, miss, shared hit, local hit, in turns; and the copy that limits it."""
    from kvshare.services.health import NotStarted
    from kvshare.tools.bench import run as benches
    from kvshare.tools.bench import tables
    from kvshare.tools.bench.asked import Asked

    shapes = [(length, many) for length in _numbers("--tokens", tokens) for many in _numbers("--at-once", at_once)]
    asked = Asked(shapes, n, answer, repeat, settle)
    try:
        if config:
            result = benches.of_config(config, asked, logs)
        elif engine and len(engine) == 2:
            result = benches.of_urls(engine, plain, asked)
        else:
            raise UserError("bench needs a config, or two servers that share: --engine URL --engine URL")
    except NotStarted as failed:
        print(*failed.tail, f"kvshare bench: {failed}; log: {failed.log}", sep="\n", file=sys.stderr)
        raise typer.Exit(1) from None
    if json_file:
        json_file.write_text(json.dumps(result, indent=1))
    if plot:
        tables.plot(result, plot)
    print(tables.markdown(result))


def _numbers(option: str, text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != text.count(",") + 1 or not all(numbers):
        raise UserError(f"{option} {text!r} must be whole numbers from 1, separated by commas")
    return numbers


def _print_report(report: dict, run: Path) -> None:
    from rich.table import Table

    from kvshare.record.summary import facts, verdict

    columns = ("prompt", "computed", "local_hit", "shared_hit", "stale_hit")
    table = Table(title=f"KV sharing: {report.get('backend')} on {report.get('device')}, {report['steps']} steps")
    table.add_column("tokens")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for replica in report["replica"]:
        table.add_row(f"replica {replica['rank']}", *(f"{replica[name]:,}" for name in columns))
    table.add_row("all", *(f"{report['tokens'][name]:,}" for name in columns), style="bold")
    out.print(table)
    for name, value in facts(report).items():
        out.print(f"{name:38}{value}", soft_wrap=True)
    out.print(verdict(report))
    out.print(f"report: {run / 'report.html'}, and as report.md and report.json", soft_wrap=True)


if __name__ == "__main__":
    main()
