"""``report.html`` and ``report.md``, from the templates beside this file.

The page needs no network and no script, and is light or dark as its reader's system is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from kvshare.record import figures, summary
from kvshare.record.token_sources import SOURCES

COLUMNS = ["prompt", *SOURCES, "stale_hit"]
MOST_ROWS = 2000  # of the table with steps and replicas: its last; report.json has them all


def html(report: dict[str, Any]) -> str:
    return _render("report.html.j2", report, plots=figures.of_report(report))


def markdown(report: dict[str, Any]) -> str:
    return _render("report.md.j2", report)


def _render(template: str, report: dict[str, Any], **more: Any) -> str:
    more |= {"verdict": summary.verdict(report), "facts": summary.facts(report), "rows": _rows(report)}
    return _environment().get_template(template).render(report, columns=COLUMNS, most_rows=MOST_ROWS, **more)


def _rows(report: dict[str, Any]) -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    """Of each table, by what its first column names."""
    steps, compared = report["step"], summary.against_forecast(report)
    return {
        "replica": [(replica["rank"], replica) for replica in report["replica"]] + [("all", report["tokens"])],
        "step": [(step["step"], step) for step in steps],
        "step, replica": [(f"{step['step']}, {r['rank']}", r) for step in steps for r in step["replica"]],
        "turn": [(turn["turn"], turn) for turn in report["conversations"]["turn"]],
        "policy": [(policy["policy"], policy) for policy in report["policy"]],
        "forecast": [(what, {"forecast": f, "measured": measured}) for what, (f, measured) in compared.items()],
    }


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _cell
    return environment


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
