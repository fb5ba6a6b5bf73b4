"""`kvshare prepare`, `demo`, `verify` and `bench`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvshare.cli.options import PASSES, BackendOption, Json, out
from kvshare.cli.reporting import print_report
from kvshare.core.errors import UserError
from kvshare.tools.bench.workloads import FORMS, Workload

app = typer.Typer()


@app.command()
def prepare(
    data: Annotated[Path, typer.Option(help="Where train.parquet and test.parquet go.")] = Path("data/gsm8k"),
    source: Annotated[
        Path | None, typer.Option(help="Folder with GSM8K's train.jsonl and test.jsonl; default: the hub.")
    ] = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Keep this many problems of each split.")] = None,
    tools: Annotated[bool, typer.Option("--tools", help="For conversations with tools (RECIPE=gsm8k_tools).")] = False,
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
        rows, origin = _hub_or_generated(offline, seed, tools)
    gsm8k.write(rows, data, shots, limit, tools)
    sizes = ", ".join(f"{min(len(rows[s]), limit or len(rows[s]))} {s}" for s in gsm8k.SPLITS)
    out.print(f"data:  {data} ({sizes} problems from {origin}, {shots} worked examples each)")
    if tiny_model:
        from kvshare.tools import tiny_model as maker

        maker.make(model)
        out.print(f"model: {model} (Qwen2, 1M parameters, trained on kvshare's own problems)")


def _hub_or_generated(offline: bool, seed: int, tools: bool) -> tuple[dict, str]:
    from kvshare.tools import gsm8k

    if not offline:
        try:
            return gsm8k.read_hub(), "the Hugging Face hub (openai/gsm8k)"
        except OSError as error:
            out.print(f"{str(error).splitlines()[0]}\nusing generated problems instead")
    return gsm8k.generate(2000, 200, seed, tools), f"kvshare's own generator, seed {seed} (not GSM8K)"


@app.command(context_settings=PASSES)
def demo(
    backend: BackendOption = "remote",
    run: Annotated[Path, typer.Option(help="Folder for data, model, logs and the report.")] = Path("outputs/demo"),
    tools: Annotated[bool, typer.Option("--tools", help="Conversations with tools.")] = False,
    overrides: Annotated[list[str] | None, typer.Argument(help="-- and Hydra overrides for the training.")] = None,
) -> None:
    """Train a tiny Qwen with GRPO on this machine's CPU while two vLLM replicas share KV."""
    from kvshare.tools import demo as demos

    try:
        result = demos.Demo(run, overrides or [], backend, tools).run()
    except demos.DemoFailed as failed:
        for line in failed.tail:
            print(line, file=sys.stderr)
        print(f"kvshare demo: {failed}; log: {failed.log}", file=sys.stderr)
        raise typer.Exit(1) from None
    print_report(result, run)
    if wrong := demos.failures(result):
        for line in wrong:
            print(f"kvshare demo: {line}", file=sys.stderr)
        raise typer.Exit(1)


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
    rollout: Annotated[list[str] | None, typer.Option(help=f"Instead: {FORMS}; may be repeated.")] = None,
    arms: Annotated[str, typer.Option(help="With --rollout: what is compared; also connector, with verl's router.")] = (
        "verl,affinity,offloading,kvshare"
    ),
    replicas: Annotated[int, typer.Option(min=1, help="With --rollout: engines of each kind that the arms need.")] = 2,
    devices: Annotated[str, typer.Option(help="With --rollout: CUDA devices for the engines, in turn.")] = "",
    offload: Annotated[float, typer.Option(help="With --rollout: GiB an engine for vLLM's own offloading.")] = 48,
    limit: Annotated[float, typer.Option(help="With --rollout: seconds after which no further round begins.")] = 3600,
    answer: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16,
    repeat: Annotated[int, typer.Option(min=1, help="Turns of all cases.")] = 5,
    settle: Annotated[float, typer.Option(min=0, help="Seconds a prompt has to be stored, and one more a GB.")] = 1.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every sample to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it, to this SVG file.")] = None,
    logs: Annotated[Path, typer.Option(help="Folder for the logs of what it starts.")] = Path("outputs/bench"),
    arguments: Annotated[list[str] | None, typer.Argument(help="-- and arguments of all engines (--rollout).")] = None,
) -> None:
    """Time to the first token: no connector, miss, shared hit, local hit, in turns; and the copy that limits it."""
    from kvshare.services.health import NotStarted
    from kvshare.tools.bench import run as benches
    from kvshare.tools.bench import tables
    from kvshare.tools.bench.asked import Asked

    shapes = [(length, many) for length in _numbers("--tokens", tokens) for many in _numbers("--at-once", at_once)]
    asked = Asked(shapes, n, answer, repeat, settle)

    def save(result: dict) -> None:
        if json_file:
            json_file.write_text(json.dumps(result, indent=1))

    try:
        if rollout and config:
            todo = benches.Rollouts(
                [Workload.parse(text) for text in rollout],
                arms.split(","),
                replicas,
                list(filter(None, devices.split(","))),
                offload,
                repeat,
                limit,
                arguments or [],
            )
            result = benches.rollouts(config, todo, logs, save)
        elif config:
            result = benches.of_config(config, asked, logs)
        elif engine and len(engine) == 2:
            result = benches.of_urls(engine, plain, asked)
        else:
            raise UserError("bench needs a config, or two servers that share: --engine URL --engine URL")
    except NotStarted as failed:
        print(*failed.tail, f"kvshare bench: {failed}; log: {failed.log}", sep="\n", file=sys.stderr)
        raise typer.Exit(1) from None
    save(result)
    if plot and "cases" in result:
        tables.plot(result, plot)
    print(tables.rollouts(result["rollouts"]) if "rollouts" in result else tables.markdown(result))


def _numbers(option: str, text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",") if part.strip().isdecimal()]
    if len(numbers) != text.count(",") + 1 or not all(numbers):
        raise UserError(f"{option} {text!r} must be whole numbers from 1, separated by commas")
    return numbers
