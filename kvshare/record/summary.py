"""What a run shared, in numbers and in words: arithmetic, no I/O. report.py reads and writes the files."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from kvshare.core.policy import is_private
from kvshare.record import token_sources
from kvshare.record.token_sources import Event

ROUTING = ("leaders", "held", "gave_up", "moved", "wait_seconds", "longest_wait", "break_even_tokens")
STEP = "training/global_step"  # all of verl's trainers log it once a step; a validation lacks it
PEARSON = "training/rollout_actor_probs_pearson_corr"
DIFFERENCE = "training/rollout_probs_diff_max"
LOGGED = {  # a step's, by verl
    "reward": "critic/score/mean",
    "response_length": "response_length/mean",
    "seconds": "timing_s/step",
    "pearson": PEARSON,
    "probs_diff": DIFFERENCE,
}


def summarize(
    events: Iterable[Event],
    metrics: Iterable[dict[str, Any]],
    run: dict[str, Any],
    baseline: Iterable[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The report. Token counts and ratios are as in token_sources.py.

    Args:
        events: event log lines of all replicas, in any order (see event_log.py).
        metrics: ``data`` of the lines of verl's file logger, one a step.
        run: ``backend``, ``device`` and ``replicas``, written by preflight.
        baseline: like ``metrics``, of a run without a connector; its mismatch is the noise floor.
            Without one the run's own first step is: there was no older policy to be stale of.
    """
    everything = sorted(events, key=lambda e: e["time"])
    routing: Event = next((e for e in reversed(everything) if e["op"] == "routing"), {})
    ends = [e for e in everything if e["op"] == "step"]
    events = token_sources.of_replicas(everything)
    stored = token_sources.stored_by(events)
    replicas = max([run.get("replicas", 0), *(e["replica"] + 1 for e in events)], default=0)
    steps = _steps(metrics)
    floor = steps[:1] if baseline is None else _steps(baseline)
    prefill = token_sources.fastest_prefill(events)
    up = [e for e in events if e["op"] in ("degraded", "ready")]
    degraded = {e["replica"] for e in up if e["op"] == "degraded"}
    without = {rank for rank, op in {e["replica"]: e["op"] for e in up}.items() if op == "degraded"}
    return {
        **run,
        "replicas": replicas,
        "unseen": sorted(set(range(replicas)) - {e["replica"] for e in events}),
        "steps": len(steps),
        "tokens": token_sources.tokens(events, stored),
        "replica": token_sources.by_replica(events, stored, replicas),
        "hit_rate": token_sources.hit_rate(token_sources.tokens(events, stored)),
        "prefill_amplification": token_sources.amplification(stored),
        "prefill_tokens_per_second": prefill,
        "time_saved_seconds": token_sources.time_saved(events, prefill),
        "routing": {name: routing[name] for name in ROUTING if name in routing},
        "policy": [
            {"policy": policy, **_shared(of_policy, stored)} for policy, of_policy in _by_policy(events).items()
        ],
        "step": [
            {
                "step": logged[STEP],
                **_shared(of_step, stored),
                "time_saved_seconds": token_sources.time_saved(of_step, prefill),
                "replica": token_sources.by_replica(of_step, stored, replicas),
                "server": server,
                **{name: logged.get(metric) for name, metric in LOGGED.items()},
            }
            for logged, of_step, server in _by_step(steps, events, ends)
        ],
        "mismatch": {
            "pearson_min": _extreme(min, steps, PEARSON),
            "pearson_floor": _extreme(min, floor, PEARSON),
            "probs_diff_max": _extreme(max, steps, DIFFERENCE),
            "probs_diff_floor": _extreme(max, floor, DIFFERENCE),
            "floor": "first step" if baseline is None else "baseline",
        },
        "degraded": sorted(without),
        "late": sorted(degraded - without),
    }


def _steps(metrics: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [m for m in metrics if STEP in m]


def _shared(events: list[Event], stored: token_sources.Stored) -> dict[str, Any]:
    count = token_sources.tokens(events, stored)
    return {
        **count,
        "hit_rate": token_sources.hit_rate(count),
        "prefill_amplification": token_sources.amplification(token_sources.stored_by(events)),
    }


def _by_policy(events: list[Event]) -> dict[str, list[Event]]:
    """Events of each policy in the order of their first one; private policies together."""
    groups: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if name := event.get("policy"):
            groups["private" if is_private(name) else name].append(event)
    return groups


def _by_step(
    steps: list[dict[str, Any]], events: list[Event], ends: list[Event]
) -> Iterable[tuple[dict[str, Any], list[Event], dict[str, Any] | None]]:
    """Of each step: what verl logged, the events since the step before, and the server's status at its end."""
    groups: dict[int, list[Event]] = defaultdict(list)
    times = [end["time"] for end in ends]
    for event in events:
        if (at := bisect_left(times, event["time"])) < len(ends):
            groups[ends[at]["step"]].append(event)
    servers = {end["step"]: end.get("server") for end in ends}
    for logged in steps:
        yield logged, groups[logged[STEP]], servers.get(logged[STEP])


def _extreme(choose: Any, steps: list[dict[str, Any]], name: str) -> float | None:
    return choose([m[name] for m in steps if name in m], default=None)


def against_forecast(report: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """What preflight forecast of a step, and what a step came to, on average; empty if it forecast nothing."""
    forecast, steps = report.get("forecast"), report["step"]
    if not forecast or not steps:
        return {}
    server = steps[-1]["server"]
    return {
        "tokens shared between replicas": (forecast["shareable_tokens_a_step"], _mean(steps, "shared_hit")),
        "tokens hit within one": (forecast["local_tokens_a_step"], _mean(steps, "local_hit")),
        "bytes stored": (
            forecast["stored_bytes_a_step"],
            (server["bytes"] + server["evicted_bytes"]) / len(steps) if server else None,
        ),
    }


def _mean(steps: list[dict[str, Any]], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def verdict(report: dict[str, Any]) -> str:
    """One sentence for a human."""
    unseen = f" {not_seen(report['unseen'])}." if report["unseen"] and report["tokens"]["prompt"] else ""
    return _verdict(report) + unseen


def _verdict(report: dict[str, Any]) -> str:
    tokens = report["tokens"]
    if report["degraded"]:
        ranks = ", ".join(map(str, report["degraded"]))
        return f"NOT SHARING: LMCache did not start in replica {ranks}, or its server never answered; see the log."
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


def not_seen(replicas: list[int]) -> str:
    ranks = ", ".join(map(str, replicas))
    return f"NOT SEEN: replica {ranks} (on several nodes KVSHARE_RUN_DIR must be a folder that all of them share)"


def facts(report: dict[str, Any]) -> dict[str, str]:
    """What is not a token count, in words."""
    mismatch, server, rewards = report["mismatch"], report.get("server"), _known(report["step"], "reward")
    found = {
        "kvshare server": server
        and f"{server['bytes'] / 2**30:.2f} of {server['limit'] / 2**30:.2f} GiB; "
        f"{server['evicted']:,} entries evicted, {server['refused']:,} refused",
        "LMCache": report["late"]
        and f"came up late in replica {', '.join(map(str, report['late']))}, which shared nothing until then",
        "prefill amplification": f"{report['prefill_amplification']} (1.0: each prefix computed once)",
        "hit rate": report["hit_rate"] is not None and f"{report['hit_rate']:.1%} of prompt tokens were not computed",
        "time saved": _saved(report),
        "router": _routing(report["routing"]),
        "rollout/actor correlation": f"{mismatch['pearson_min']} "
        f"(lowest of all steps; noise floor, {mismatch['floor']}: {mismatch['pearson_floor']})",
        "rollout/actor probability difference": f"{mismatch['probs_diff_max']} "
        f"(highest; noise floor, {mismatch['floor']}: {mismatch['probs_diff_floor']})",
        "reward": rewards and f"{rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in the last",
        **{
            f"{what} a step": f"forecast {forecast:,}" + ("" if measured is None else f", measured {measured:,.0f}")
            for what, (forecast, measured) in against_forecast(report).items()
        },
    }
    return {name: text for name, text in found.items() if text}


def _known(steps: list[dict[str, Any]], name: str) -> list[Any]:
    return [step[name] for step in steps if step[name] is not None]


def _saved(report: dict[str, Any]) -> str | None:
    saved, rate = report["time_saved_seconds"], report["prefill_tokens_per_second"]
    if saved is None or not any(report["tokens"][hit] for hit in ("shared_hit", "local_hit")):
        return None
    return (
        f"{saved:.2f} s of the engines' time: computing what was loaded, at the fastest prefill seen "
        f"({rate:,.0f} tokens/s), less the loading"
    )


def _routing(counts: dict[str, Any]) -> str:
    if not counts:
        return "verl's own"
    even = counts["break_even_tokens"]
    return (
        f"{counts['leaders']} led, {counts['held']} waited ({counts['longest_wait']:.2f} s at most), "
        f"{counts['gave_up']} gave up, {counts['moved']} moved; "
        + ("loading never pays here" if even is None else f"loading pays from {even} tokens")
    )
