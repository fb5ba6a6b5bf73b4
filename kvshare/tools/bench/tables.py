"""What `kvshare bench` found, as Markdown and as a plot."""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CASES = {"none": "no connector", "miss": "miss", "shared": "shared hit", "local": "local hit"}


def markdown(result: Row) -> str:
    parts = [f"{result['machine']}; {result['copy'][0]} copies {result['copy'][1] / 1e9:.1f} GB/s"]
    if result["cases"]:
        parts.append(_cases(result))
    if result["patterns"]:
        parts.append(_patterns(result["patterns"]))
    return "\n\n".join(parts)


def rollouts(rows: list[Row]) -> str:
    """Seconds, median and range; tokens of the median round."""
    head = ["rollout", "working set / pool", "arm", "makespan, s", "first token, p50, s", "p95, s", "computed", "moved"]
    lines = []
    for row in rows:
        times = [_range(row, name, 1, 2) for name in ("makespan", "first_p50", "first_p95")]
        moved = statistics.median(sample.get("moved", 0) for sample in row["samples"])
        computed = f"{_median(row, 'computed') / _median(row, 'prompt'):.0%}"
        lines.append([row["rollout"], f"{_median(row, 'of_pool'):.1f}", row["arm"], *times, computed, f"{moved:.0f}"])
    return _table(head, lines)


def _cases(result: Row) -> str:
    """Times to the (last) first token in ms, median and range; hits against recomputing and against the copy alone."""
    head = ["prompt tokens", "at once", *CASES.values(), "tokens found", "MB loaded", "copy alone", "times faster"]
    lines = []
    for (tokens, at_once), cases in _by_shape(result["cases"]).items():
        found = _median(cases["shared"], "shared")
        moved = found * (result["kv_bytes_a_token"] or 0)
        faster = _median(cases.get("none", cases["miss"]), "first") / _median(cases["shared"], "first")
        times = [_range(cases.get(case)) for case in CASES]
        loaded = [f"{found:,.0f}", f"{moved / 1e6:,.0f}", f"{moved / result['copy'][1] * 1e3:.1f}", f"{faster:.1f}"]
        lines.append([f"{tokens:,}", str(at_once), *times, *loaded])
    return _table(head, lines) + "\n\n" + _decode(result["cases"])


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _decode(rows: list[Row]) -> str:
    """A token after the first, and how far first tokens are from those without a connector."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        cases[row["case"]] += row["samples"]
    off = max(s["logprob_difference"] for row in rows for s in row["samples"])
    out = [f"Largest difference of a first token's log probability: {off:.2g}."]
    if (answer := rows[0]["answer"]) > 1:
        each = {c: statistics.median((s["end"] - s["first"]) / (answer - 1) for s in got) for c, got in cases.items()}
        out.append("A later token, ms: " + ", ".join(f"{CASES[c]} {t * 1e3:.1f}" for c, t in each.items()) + ".")
    return " ".join(out)


def _patterns(rows: list[Row]) -> str:
    head = ["prompt tokens", "n", "routing", "prefill amplification", "tokens shared", "last first token", "end"]
    lines = []
    for row in rows:
        amplification = f"{_median(row, 'computed') / (row['tokens'] + 1):.2f}"
        shape = [f"{row['tokens']:,}", str(row["n"]), row["routing"]]
        lines.append([*shape, amplification, f"{_median(row, 'shared'):,.0f}", _range(row), _range(row, "end")])
    return _table(head, lines)


def _by_shape(rows: list[Row]) -> dict[tuple[int, int], dict[str, Row]]:
    shapes: dict[tuple[int, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        shapes[row["tokens"], row["at_once"]][row["case"]] = row
    return shapes


def _median(row: Row, name: str) -> float:
    return statistics.median(sample[name] for sample in row["samples"])


def _range(row: Row | None, name: str = "first", scale: float = 1e3, digits: int = 1) -> str:
    """Median, lowest and highest; in ms, if the samples are in seconds."""
    if row is None:
        return ""
    seen = [sample[name] * scale for sample in row["samples"]]
    return f"{statistics.median(seen):.{digits}f} ({min(seen):.{digits}f}–{max(seen):.{digits}f})"


def plot(result: Row, path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "bench"  # the same file for the same numbers
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    alone = min(at_once for _, at_once in _by_shape(result["cases"]))
    for case, label in CASES.items():
        rows = [row for row in result["cases"] if row["case"] == case and row["at_once"] == alone]
        if rows:
            middle = [_median(row, "first") * 1e3 for row in rows]
            low = [m - min(s["first"] for s in row["samples"]) * 1e3 for m, row in zip(middle, rows, strict=True)]
            high = [max(s["first"] for s in row["samples"]) * 1e3 - m for m, row in zip(middle, rows, strict=True)]
            axes.errorbar([row["tokens"] for row in rows], middle, (low, high), marker="o", capsize=3, label=label)
    if result["kv_bytes_a_token"]:
        lengths = sorted({row["tokens"] for row in result["cases"]})
        copy = [tokens * result["kv_bytes_a_token"] / result["copy"][1] * 1e3 for tokens in lengths]
        axes.plot(lengths, copy, "k:", label="copy alone")
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="ms to the first token")
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
