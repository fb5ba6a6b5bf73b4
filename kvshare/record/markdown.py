"""``report.md``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvshare.record.report import facts, verdict

TOKENS = ("prompt", "computed", "local hit", "shared hit", "stale hit")
MORE = ("prefill amplification",)


def render(report: dict[str, Any]) -> str:
    title = f"{report.get('backend')} on {report.get('device')}, {report['replicas']} replicas, {report['steps']} steps"
    replicas = [(f"replica {r['rank']}", r) for r in report["replica"]] + [("**all**", report["tokens"])]
    steps = [(s["step"], s) for s in report["step"]]
    policies = [(p["policy"], p) for p in report["policy"]]
    parts = [
        [f"# KV sharing: {title}"],
        [verdict(report)],
        _table("tokens", TOKENS, replicas),
        _table("step", (*TOKENS, *MORE, "reward"), steps),
        _table("policy", (*TOKENS, *MORE), policies),
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts(report).items())],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _table(first: str, columns: Iterable[str], rows: Iterable[tuple[Any, dict[str, Any]]]) -> list[str]:
    columns = list(columns)
    cells = [[str(name), *(_cell(row[column.replace(" ", "_")]) for column in columns)] for name, row in rows]
    return [f"| {' | '.join(row)} |" for row in [[first, *columns], ["---"] * (len(columns) + 1), *cells]]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
