"""``report.html``: one page that needs no network and no script, light or dark as its reader's system is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from kvshare.record import svg
from kvshare.record.report import against_forecast, facts, verdict
from kvshare.record.token_sources import SOURCES

MIB, GIB = 2**20, 2**30
COLUMNS = ("prompt", *SOURCES, "stale_hit")
MOST_ROWS = 2000  # of the table of steps by replica; report.json has them all

COUNTED = """
A <em>shared hit</em> is a prompt token whose KV was loaded and had been stored by another replica; a <em>local hit</em>
came from vLLM's prefix cache, or from LMCache where the same replica had stored it; <em>computed</em> is the rest of
the prompt. A <em>stale hit</em> was loaded under one policy (one version of the weights) from a key that was stored
under another. <em>Prefill amplification</em> is the chunks that all replicas computed over the distinct ones.
The <em>mismatch</em> is verl's: between the probabilities the rollout engine sampled with and those the actor computes
for the same tokens. Counts are of keys that replicas reported to have stored and loaded, not of lookups.
"""


def render(report: dict[str, Any]) -> str:
    what = f"{report.get('backend')} on {report.get('device')}"
    alarm = ' class="alarm"' if report["degraded"] or report["tokens"]["stale_hit"] or report["unseen"] else ""
    style = Path(__file__).with_name("page.css").read_text()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>KV sharing: {escape(what)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p>KV sharing · {escape(what)} · {report["replicas"]} replicas · {report["steps"]} steps</p>
<h1{alarm}>{escape(verdict(report))}</h1>
<p>{escape(_model(report))}</p>
</header>
<section class="tiles">
{"".join(_tile(*tile) for tile in _tiles(report))}
</section>
<section class="figures">
{"".join(_figures(report))}
</section>
<h2>By replica</h2>
{_table("replica", COLUMNS, [(r["rank"], r) for r in report["replica"]] + [("all", report["tokens"])])}
<h2>By step</h2>
{_table("step", (*COLUMNS, "prefill_amplification", "reward", "seconds"), [(s["step"], s) for s in report["step"]])}
{_steps_by_replica(report["step"])}
{_forecast(report)}
<h2>In words</h2>
{_words(facts(report))}
<footer>{COUNTED}</footer>
</body>
</html>
"""


def _model(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())
    parts = [report.get("model"), report.get("adv_estimator"), versions]
    if "chunk_size" in report:
        parts.insert(2, f"chunks of {report['chunk_size']} tokens")
    return " · ".join(str(part) for part in parts if part)


def _tiles(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    tokens, mismatch = report["tokens"], report["mismatch"]
    if tokens["prompt"]:
        yield f"{tokens['shared_hit'] / tokens['prompt']:.1%}", "of prompt tokens from another replica"
        yield f"{report['hit_rate']:.1%}", "of prompt tokens not computed"
    yield f"{tokens['stale_hit']:,}", "stale tokens"
    if report["prefill_amplification"] is not None:
        yield f"{report['prefill_amplification']:.2f}", f"prefill amplification; {report['replicas']} is no sharing"
    if mismatch["pearson_min"] is not None:
        yield f"{mismatch['pearson_min']:.7f}", "rollout/actor correlation, lowest"
    if rewards := [step["reward"] for step in report["step"] if step["reward"] is not None]:
        yield f"{rewards[0]:.2f} → {rewards[-1]:.2f}", "reward, first and last step"


def _tile(value: str, label: str) -> str:
    return f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>\n"


def _figures(report: dict[str, Any]) -> Iterator[str]:
    steps, mismatch = report["step"], report["mismatch"]
    labels = [str(step["step"]) for step in steps]

    def line(title: str, note: str, name: str, show: svg.Format, **more: Any) -> str:
        values = [step[name] for step in steps]
        return _figure(title, note, svg.line(title, labels, "step", values, show, **more)) if any(values) else ""

    ranks = [str(replica["rank"]) for replica in report["replica"]]
    for title, names, axis, rows in (
        ("Prompt tokens by source, each step", labels, "step", steps),
        ("Prompt tokens by source, each replica", ranks, "replica", report["replica"]),
    ):
        if rows:
            yield _figure(title, _legend(rows), svg.bars(title, names, axis, _stacks(rows), _count))
    yield line("Hit rate", "prompt tokens that were not computed", "hit_rate", lambda v: f"{v:.0%}", top=1.0)
    most = report["replicas"]
    yield line(
        "Prefill amplification",
        "chunks computed by all replicas over distinct chunks",
        "prefill_amplification",
        _short,
        references={"each prefix once": 1.0} | ({f"{most}: no sharing": float(most)} if 1 < most <= 16 else {}),
    )
    floor = mismatch["probs_diff_floor"]
    yield line(
        "Rollout/actor mismatch",
        "highest difference of a token's probability",
        "probs_diff",
        lambda v: f"{v:.1e}" if v else "0",
        references={f"noise floor, {mismatch['floor']}": floor} if floor else {},
        log=True,
    )
    yield _memory(steps, labels)
    yield line("Reward", "mean score of a step's answers", "reward", _short)
    yield line("Answer length", "mean tokens of an answer", "response_length", _short)


def _memory(steps: Sequence[dict[str, Any]], labels: Sequence[str]) -> str:
    servers = [step["server"] for step in steps]
    known = [server for server in servers if server]
    if not known:
        return ""
    limit = known[-1]["limit"]
    unit, name = (GIB, "GiB") if max(server["bytes"] for server in known) > GIB else (MIB, "MiB")
    values = [server and server["bytes"] / unit for server in servers]
    note = f"{name} that kvshare server holds at the end of a step; it keeps {limit / GIB:.2f} GiB at most"
    reached = max(server["bytes"] for server in known) > limit / 4
    references = {"limit": limit / unit} if reached else {}
    return _figure(
        "Memory of the cache", note, svg.line("Memory of the cache", labels, "step", values, _short, references)
    )


def _stacks(rows: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    return {name.replace("_", "-"): [row[name] for row in rows] for name in _sources(rows)}


def _sources(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [name for name in SOURCES if name != "unknown_hit" or any(row[name] for row in rows)]


def _legend(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(f'<i class="{name.replace("_", "-")}"></i>{name.replace("_", " ")}' for name in _sources(rows))


def _figure(title: str, note: str, drawing: str) -> str:
    return f"<figure><figcaption><b>{escape(title)}</b><span>{note}</span></figcaption>\n{drawing}</figure>\n"


def _steps_by_replica(steps: Sequence[dict[str, Any]]) -> str:
    rows = [(f"{step['step']}, replica {r['rank']}", r) for step in steps for r in step["replica"]]
    if not 0 < len(rows) <= MOST_ROWS:
        return ""
    return f"<details><summary>each replica</summary>{_table('step', COLUMNS, rows)}</details>"


def _forecast(report: dict[str, Any]) -> str:
    compared = against_forecast(report)
    if not compared:
        return ""
    rows = [(what, {"forecast": forecast, "measured": measured}) for what, (forecast, measured) in compared.items()]
    verdict = escape(report["forecast"]["verdict"])
    return f"<h2>Forecast and measured, a step</h2>\n<p>{verdict}</p>\n{_table('', ('forecast', 'measured'), rows)}"


def _table(first: str, columns: Iterable[str], rows: Iterable[tuple[Any, dict[str, Any]]]) -> str:
    columns = list(columns)
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in (first, *columns))
    body = "".join(
        f"<tr><td>{escape(str(name))}</td>{''.join(f'<td>{_cell(row[column])}</td>' for column in columns)}</tr>\n"
        for name, row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def _words(named: dict[str, str]) -> str:
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>\n" for name, text in named.items())
    return f'<table class="words"><tbody>\n{rows}</tbody></table>'


def _count(value: float) -> str:
    """1500 → 1.5k: for axes and tooltips of token counts."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _short(value: float) -> str:
    return f"{value:.3g}"
