"""`kvshare report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvshare.cli.options import out

app = typer.Typer()


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="KVSHARE_RUN_DIR of the run.")],
    baseline: Annotated[
        Path | None, typer.Option(help="That of a run without a connector: the noise floor of the mismatch.")
    ] = None,
) -> None:
    """Write report.html, report.md and report.json of a run, and print what was shared."""
    from kvshare.record import report as reports

    print_report(reports.write(run, baseline), run)


def print_report(report: dict, run: Path) -> None:
    from rich.table import Table

    from kvshare.record.summary import facts, verdict

    columns = ("prompt", "computed", "local_hit", "restored_hit", "shared_hit", "stale_hit")
    table = Table(title=f"KV sharing: {report.get('backend')} on {report.get('device')}, {report['steps']} steps")
    table.add_column("tokens")
    for name in columns:
        table.add_column(name.removesuffix("_hit"), justify="right")
    for replica in report["replica"]:
        table.add_row(f"replica {replica['rank']}", *(f"{replica[name]:,}" for name in columns))
    table.add_row("all", *(f"{report['tokens'][name]:,}" for name in columns), style="bold")
    out.print(table)
    for name, value in facts(report).items():
        out.print(f"{name:38}{value}", soft_wrap=True)
    out.print(verdict(report))
    out.print(f"report: {run / 'report.html'}, and as report.md and report.json", soft_wrap=True)
