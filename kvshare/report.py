"""What a run shared, from its ledger (``events-*.jsonl``) and verl's metrics (``metrics.jsonl``)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvshare.errors import UserError
from kvshare.policy import is_private

Event = dict[str, Any]


ROUTING = ("leaders", "held", "gave_up", "moved", "wait_seconds", "longest_wait", "break_even_tokens")
PEARSON = "training/rollout_actor_probs_pearson_corr"
DIFFERENCE = "training/rollout_probs_diff_max"


def summarize(
    events: Iterable[Event],
    metrics: Iterable[dict[str, Any]],
    run: dict[str, Any],
    baseline: Iterable[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The report: pure arithmetic.

    Args:
        events: ledger lines of all replicas, in any order (see ledger.py).
        metrics: ``data`` of the lines of verl's file logger, one a step.
        run: ``backend``, ``device`` and ``replicas``, written by preflight.
        baseline: like ``metrics``, of a run without a connector; its mismatch is the noise floor.
            Without one the run's own first step is: there was no older policy to be stale of.

    Token counts: ``prompt`` = ``computed`` + ``local_hit`` + ``shared_hit`` + ``unknown_hit``.
    ``local_hit``: from vLLM's prefix cache, or loaded and stored by the same replica;
    ``shared_hit``: loaded, and stored by another replica of this run; ``unknown_hit``: loaded, and
    nobody in the ledger stored it. ``stale_hit``: those of the loaded tokens whose key was also
    stored under another policy. ``prefill_amplification``: chunks that replicas computed over
    distinct chunks computed; 1.0 is perfect sharing; None if no prompt filled a chunk.
    """
    events = list(events)
    routing: Event = next((e for e in reversed(events) if e["op"] == "routing"), {})
    events = list(_first_loads(e for e in events if e["op"] != "routing"))
    stored_by = _stored_by(events)
    replicas = range(max([run.get("replicas", 0), *(e["replica"] + 1 for e in events)], default=0))
    steps = _steps(metrics)
    floor = steps[:1] if baseline is None else _steps(baseline)
    return {
        **run,
        "replicas": len(replicas),
        "steps": len(steps),
        "tokens": _tokens(events, stored_by),
        "replica": [{"rank": r, **_tokens([e for e in events if e["replica"] == r], stored_by)} for r in replicas],
        "prefill_amplification": _amplification(stored_by),
        "routing": {name: routing[name] for name in ROUTING if name in routing},
        "policy": [
            {
                "policy": policy,
                **_tokens(of_policy, stored_by),
                "prefill_amplification": _amplification(_stored_by(of_policy)),
            }
            for policy, of_policy in _by_policy(events).items()
        ],
        "mismatch": {
            "pearson_min": _extreme(min, steps, PEARSON),
            "pearson_floor": _extreme(min, floor, PEARSON),
            "probs_diff_max": _extreme(max, steps, DIFFERENCE),
            "probs_diff_floor": _extreme(max, floor, DIFFERENCE),
            "floor": "first step" if baseline is None else "baseline",
        },
        "reward": [m.get("critic/score/mean") for m in steps],
        "step_seconds": [m.get("timing_s/step") for m in steps],
        "degraded": sorted({e["replica"] for e in events if e["op"] == "degraded"}),
    }


def _steps(metrics: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m for m in metrics if "training/global_step" in m]


def _first_loads(events: Iterable[Event]) -> Iterable[Event]:
    """A preempted request loads again; vLLM counts its prompt once."""
    seen = set()
    for event in events:
        if event["op"] == "load" and event.get("request"):
            load = event["replica"], event["request"]
            if load in seen:
                continue
            seen.add(load)
        yield event


def _stored_by(events: list[Event]) -> dict[int, set[tuple[int, str]]]:
    """Who stored each key, under which policy."""
    stored_by: dict[int, set[tuple[int, str]]] = defaultdict(set)
    for event in events:
        if event["op"] == "store":
            for key in event["keys"]:
                stored_by[key].add((event["replica"], event["policy"]))
    return stored_by


def _tokens(events: list[Event], stored_by: dict[int, set[tuple[int, str]]]) -> dict[str, int]:
    count = dict.fromkeys(("prompt", "computed", "local_hit", "shared_hit", "unknown_hit", "stale_hit"), 0)
    loaded = expected = 0
    for event in events:
        if event["op"] == "request":
            count["prompt"] += event["prompt"]
            count["local_hit"] += event["cached"]
        elif event["op"] == "load":
            expected += event["expected"]
            for key, tokens in zip(event["keys"], event["tokens"], strict=True):
                loaded += tokens
                count[_origin(stored_by.get(key, set()), event["replica"])] += tokens
                if any(policy != event["policy"] for _, policy in stored_by.get(key, ())):
                    count["stale_hit"] += tokens
    # vLLM counts as cached what it expected LMCache to load, whether that arrived or not.
    count["local_hit"] = max(0, count["local_hit"] - expected)
    count["computed"] = count["prompt"] - count["local_hit"] - count["shared_hit"] - count["unknown_hit"]
    return count


def _origin(stored_by: set[tuple[int, str]], replica: int) -> str:
    if not stored_by:
        return "unknown_hit"
    return "local_hit" if any(r == replica for r, _ in stored_by) else "shared_hit"


def _amplification(stored_by: dict[int, set[tuple[int, str]]]) -> float | None:
    """Replicas that computed a chunk, on average over (chunk, policy)."""
    distinct = sum(len({policy for _, policy in who}) for who in stored_by.values())
    return round(sum(map(len, stored_by.values())) / distinct, 3) if distinct else None


def _by_policy(events: list[Event]) -> dict[str, list[Event]]:
    """Events of each policy in the order of their first one; private policies together."""
    groups: dict[str, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda e: e["time"]):
        if name := event.get("policy"):
            groups["private" if is_private(name) else name].append(event)
    return groups


def _extreme(choose: Any, steps: list[dict[str, Any]], name: str) -> float | None:
    return choose([m[name] for m in steps if name in m], default=None)


def read(folder: Path, baseline: Path | None = None) -> dict[str, Any]:
    """The report of a run folder.

    Raises:
        UserError: one of the two is not a run folder.
    """
    for path in filter(None, (folder, baseline)):
        if not (path / "run.json").is_file():
            raise UserError(f"{path} has no run.json: give the KVSHARE_RUN_DIR of a run that a launcher started")
    events = (e for path in sorted(folder.glob("events-*.jsonl")) for e in _lines(path))
    run = json.loads((folder / "run.json").read_text())
    status = Path(run.pop("server_status", None) or "")
    run["server"] = json.loads(status.read_text()) if status.is_file() else None
    return summarize(events, _metrics(folder), run, _metrics(baseline) if baseline else None)


def _metrics(folder: Path) -> Iterable[dict[str, Any]]:
    return (line["data"] for line in _lines(folder / "metrics.jsonl"))


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    """Objects of a JSON-lines file; the last line of a run that was killed may be half a line."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            continue


def verdict(report: dict[str, Any]) -> str:
    """One sentence for a human."""
    tokens = report["tokens"]
    if report["degraded"]:
        return f"NOT SHARING: LMCache did not start in replica {', '.join(map(str, report['degraded']))}; see its log."
    if tokens["stale_hit"]:
        return f"STALE: {tokens['stale_hit']:,} loaded tokens were computed by other weights. Please report this."
    if report.get("backend") == "no connector":
        return "A baseline: no connector, nothing was shared."
    if not tokens["prompt"]:
        return "No request was recorded."
    if report["prefill_amplification"] is None:
        return "Nothing could be shared: no prompt fills a chunk (see chunk_size in the LMCache config)."
    if not tokens["shared_hit"]:
        return "No token was shared between replicas."
    share = 100 * tokens["shared_hit"] / tokens["prompt"]
    return f"{share:.1f}% of prompt tokens came from another replica, none of them stale."


def to_markdown(report: dict[str, Any]) -> str:
    head = (
        f"# KV sharing: {report.get('backend')} on {report.get('device')}, {report['replicas']} replicas, "
        f"{report['steps']} steps\n\n{verdict(report)}\n"
    )
    columns = "prompt | computed | local hit | shared hit | stale |"
    lines = [head, f"| tokens | {columns}", "|---|---|---|---|---|---|"]
    lines += [_row(f"replica {r['rank']}", r) for r in report["replica"]] + [_row("**all**", report["tokens"]), ""]
    lines += [f"| policy | {columns} prefill amplification |", "|---|---|---|---|---|---|---|"]
    lines += [f"{_row(p['policy'], p)} {p['prefill_amplification']} |" for p in report["policy"]] + [""]
    lines += ["| | |", "|---|---|"] + [f"| {name} | {value} |" for name, value in facts(report).items()]
    return "\n".join(lines) + "\n"


def facts(report: dict[str, Any]) -> dict[str, str]:
    """What is not a token count, in words."""
    mismatch, server = report["mismatch"], report.get("server")
    memory = (
        {}
        if not server
        else {
            "kvshare server": f"{server['bytes'] / 2**30:.2f} of {server['limit'] / 2**30:.2f} GiB; "
            f"{server['evicted']:,} entries evicted, {server['refused']:,} refused"
        }
    )
    return memory | {
        "prefill amplification": f"{report['prefill_amplification']} (1.0: each prefix computed once)",
        "router": _routing(report["routing"]),
        "rollout/actor correlation": f"{mismatch['pearson_min']} "
        f"(lowest of all steps; noise floor, {mismatch['floor']}: {mismatch['pearson_floor']})",
        "rollout/actor probability difference": f"{mismatch['probs_diff_max']} "
        f"(highest; noise floor, {mismatch['floor']}: {mismatch['probs_diff_floor']})",
    }


def _routing(counts: dict[str, Any]) -> str:
    if not counts:
        return "verl's own"
    even = counts["break_even_tokens"]
    return (
        f"{counts['leaders']} led, {counts['held']} waited ({counts['longest_wait']:.2f} s at most), "
        f"{counts['gave_up']} gave up, {counts['moved']} moved; "
        + ("loading never pays here" if even is None else f"loading pays from {even} tokens")
    )


def _row(name: str, t: dict[str, Any]) -> str:
    cells = [t["prompt"], t["computed"], t["local_hit"], t["shared_hit"], t["stale_hit"]]
    return f"| {name} | " + " | ".join(f"{cell:,}" for cell in cells) + " |"


def write(folder: Path, baseline: Path | None = None) -> dict[str, Any]:
    """Write report.json and report.md into a run folder; returns the report."""
    report = read(folder, baseline)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.md").write_text(to_markdown(report))
    return report
