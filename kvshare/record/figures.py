"""Which plots a report has, and what they show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kvshare.record import plots
from kvshare.record.token_sources import SOURCES

MIB, GIB = 2**20, 2**30

Step = dict[str, Any]


class Plot(NamedTuple):
    title: str
    note: str
    sources: list[str]  # colors of its legend
    svg: str


def of_report(report: dict[str, Any]) -> Iterator[Plot]:
    steps = report["step"]
    yield from _sources([_of_one_step(row) for row in steps], "step")
    yield from _sources([{**replica, "replica": replica["rank"]} for replica in report["replica"]], "replica")
    yield from _line(steps, "Hit rate", "prompt tokens that were not computed", "hit_rate", "{:.0%}".format, top=1.0)
    most = report["replicas"]
    yield from _line(
        steps,
        "Prefill amplification",
        "chunks computed by all replicas over distinct chunks",
        "prefill_amplification",
        references={"each prefix once": 1.0} | ({f"{most}: no sharing": float(most)} if 1 < most <= 16 else {}),
    )
    floor = report["mismatch"]["probs_diff_floor"]
    yield from _line(
        steps,
        "Rollout/actor mismatch",
        "highest difference of a token's probability",
        "probs_diff",
        "{:.1e}".format,
        references={f"noise floor, {report['mismatch']['floor']}": floor} if floor else {},
        log=True,
    )
    yield from _memory(steps)
    yield from _line(steps, "Reward", "mean score of a step's answers", "reward")
    yield from _line(steps, "Answer length", "mean tokens of an answer", "response_length")


def _of_one_step(row: Step) -> Step:
    """Tokens of a step, the mean if the row is of several."""
    return {"step": row["step"], **{name: row[name] / row["steps"] for name in SOURCES}}


def _sources(rows: Sequence[Step], axis: str) -> Iterator[Plot]:
    if rows:
        title = f"Prompt tokens by source, each {axis}"
        names = [name for name in SOURCES if name != "unknown_hit" or any(row[name] for row in rows)]
        stacks = {name: [row[name] for row in rows] for name in names}
        yield Plot(title, "", names, plots.bars(title, [str(row[axis]) for row in rows], axis, stacks, _count))


def _line(
    steps: Sequence[Step], title: str, note: str, name: str, show: plots.Format = "{:.3g}".format, **more: Any
) -> Iterator[Plot]:
    values = [step[name] for step in steps]
    if any(values):
        labels = [str(step["step"]) for step in steps]
        yield Plot(title, note, [], plots.line(title, labels, "step", values, show, **more))


def _memory(steps: Sequence[Step]) -> Iterator[Plot]:
    known = [step["server"] for step in steps if step["server"]]
    if not known:
        return
    most, limit = max(server["bytes"] for server in known), known[-1]["limit"]
    unit, name = (GIB, "GiB") if most > GIB else (MIB, "MiB")
    rows = [{"step": step["step"], "held": step["server"] and step["server"]["bytes"] / unit} for step in steps]
    note = f"{name} that kvshare server holds at the end of a step; it keeps {limit / GIB:.2f} GiB at most"
    references = {"limit": limit / unit} if most > limit / 4 else {}
    yield from _line(rows, "Memory of the cache", note, "held", references=references)


def _count(value: float) -> str:
    """1500 → 1.5k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
