"""What a run shared, in numbers and in words: arithmetic, no I/O. report.py reads and writes the files."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from kvshare.core.freshness import STRICT
from kvshare.record.conversations import Conversations
from kvshare.record.events import Degraded, Event, Lost, OfReplica, Ready, Request, Routing, Step, Store
from kvshare.record.rows import Logged, PolicyRows, StepRows, over
from kvshare.record.stored import Stored
from kvshare.record.token_sources import Counts, with_hits
from kvshare.record.verdict import of

ROUTING = (
    *("leaders", "stayed", "moved", "held", "gave_up", "wait_seconds", "longest_wait"),
    *("move_seconds", "saved_seconds", "break_even_tokens", "silent"),
)


def summarize(
    events: Iterable[Event],
    steps: list[Logged],
    run: dict[str, Any],
    baseline: list[Logged] | None = None,
) -> dict[str, Any]:
    """The report. Token counts and ratios are as in token_sources.py.

    Args:
        events: those of a run in order of time; iterated twice.
        steps: what verl logged of each step.
        run: ``backend``, ``device``, ``replicas`` and ``standby``, written by preflight.
        baseline: like ``steps``, of a run without a connector; its mismatch is the noise floor.
            Without one the run's own first step is: there was no older policy to be stale of.
    """
    seen = Seen(Stored())
    for event in events:
        seen.add(event)
    total, rows, policies, conversations = Counts(), StepRows(steps, seen.ends), PolicyRows(), Conversations()
    for event, hits in with_hits(events, seen.stored):
        total.add(event, hits)
        rows.add(event, hits)
        policies.add(event, hits)
        conversations.add(event, hits)
    replicas = max(run.get("replicas", 0), max(seen.replicas, default=-1) + 1)
    degraded = {rank for rank, event in seen.up.items() if isinstance(event, Degraded)}
    floor = steps[:1] if baseline is None else baseline
    count, rewards = total.count(), [step.reward for step in steps if step.reward is not None]
    return {
        **run,
        "replicas": replicas,
        "unseen": sorted(set(range(run.get("standby", 0), replicas)) - seen.replicas),
        "lost": seen.lost,
        "steps": len(steps),
        "steps_a_row": rows.size,
        "longest_prompt": seen.longest_prompt,
        "tokens": count.tokens(),
        "replica": total.by_replica(replicas),
        "generated": total.generated(),
        "hit_rate": count.hit_rate(),
        "prefill_amplification": seen.stored.amplification(),
        "prefill_tokens_per_second": seen.prefill,
        "time_saved_seconds": count.time_saved(seen.prefill),
        "routing": seen.routing_until_last_step(),
        "conversations": conversations.to_dict(),
        "policy": policies.to_list(),
        "step": [row.to_dict(replicas, seen.prefill) for row in rows],
        "reward": rewards[:1] + rewards[-1:],
        "mismatch": {
            "pearson_min": over(min, steps, "pearson"),
            "pearson_floor": over(min, floor, "pearson"),
            "probs_diff_max": over(max, steps, "probs_diff"),
            "probs_diff_floor": over(max, floor, "probs_diff"),
            "floor": "first step" if baseline is None else "baseline",
        },
        "versions_in_flight": {
            "in_a_step": max((row.policies for row in rows), default=0),
            "of_a_trajectory": over(max, steps, "spans"),
            "behind": over(max, steps, "behind"),
        },
        "degraded": sorted(degraded),
        "late": sorted(seen.degraded - degraded),
    }


class Seen:
    """What must be known of all events before their tokens can be counted."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.prefill: float | None = None  # the fastest, in tokens per second
        self.longest_prompt = 0
        self.replicas: set[int] = set()
        self.up: dict[int, Event] = {}  # the last Ready or Degraded of each replica
        self.degraded: set[int] = set()
        self.ends: list[int] = []
        self.routing: dict[str, Any] = {}
        self.silent: list[str] = []  # at the last step
        self.lost = 0

    def add(self, event: Event) -> None:
        if isinstance(event, OfReplica):
            self.replicas.add(event.replica)
        if isinstance(event, Store):
            self.stored.add(event)
        elif isinstance(event, Request):
            self.prefill = max(filter(None, (self.prefill, event.prefill)), default=None)
            self.longest_prompt = max(self.longest_prompt, event.prompt)
        elif isinstance(event, Ready | Degraded):
            self.up[event.replica] = event
            self.degraded |= {event.replica} if isinstance(event, Degraded) else set()
        elif isinstance(event, Step):
            self.ends.append(event.step)
            self.silent = self.routing.get("silent", [])
        elif isinstance(event, Lost):
            self.lost += event.events
        elif isinstance(event, Routing):
            self.routing = {name: getattr(event, name) for name in ROUTING}

    def routing_until_last_step(self) -> dict[str, Any]:
        """The router's last counters. Replicas that fall silent after the last step end with the run."""
        return self.routing | {"silent": self.silent} if self.routing and self.ends else self.routing


def against_forecast(report: dict[str, Any]) -> dict[str, tuple[float, float | None]]:
    """What preflight forecast of a step, and what a step came to, on average; empty if it forecast nothing."""
    forecast, rows, steps = report.get("forecast"), report["step"], report["steps"]
    if not forecast or not rows:
        return {}
    server = rows[-1]["server"]
    first = report["conversations"]["turn"][:1] or rows  # the forecast is of the first prompts of conversations
    return {
        "tokens shared between replicas": (
            forecast["shareable_tokens_a_step"],
            sum(row["shared_hit"] for row in first) / steps,
        ),
        "tokens hit within one": (
            forecast["local_tokens_a_step"],
            sum(row["local_hit"] + row["restored_hit"] for row in first) / steps,
        ),
        "bytes stored": (
            forecast["stored_bytes_a_step"],
            (server["bytes"] + server["evicted_bytes"]) / steps if server else None,
        ),
    }


def verdict(report: dict[str, Any]) -> str:
    """One sentence for a human."""
    unseen = f" {not_seen(report['unseen'])}." if report["unseen"] and report["tokens"]["prompt"] else ""
    return of(report) + unseen + (f" {were_lost(report['lost'])}." if report["lost"] else "")


def not_seen(replicas: list[int]) -> str:
    ranks = ", ".join(map(str, replicas))
    return f"NOT SEEN: replica {ranks} (on several nodes KVSHARE_RUN_DIR must be a folder that all of them share)"


def were_lost(events: int) -> str:
    return f"{events:,} EVENTS WERE LOST: the counts are too low (the record's disk was full or slow, or a line is cut)"


def facts(report: dict[str, Any]) -> dict[str, str]:
    """What is not a token count, in words."""
    mismatch, server, rewards = report["mismatch"], report.get("server"), report["reward"]
    found = {
        "kvshare server": server
        and f"{server['bytes'] / 2**30:.2f} of {server['limit'] / 2**30:.2f} GiB; "
        f"{server['evicted']:,} entries evicted, {server['refused']:,} refused",
        "replicas write KV by": report.get("p2p_transport"),
        "LMCache": report["late"]
        and f"came up late in replica {', '.join(map(str, report['late']))}, which shared nothing until then",
        "freshness": _freshness(report),
        "versions in flight": _versions(report["versions_in_flight"]),
        "stale hits": _stale(report["tokens"]),
        "prefill amplification": f"{report['prefill_amplification']} (1.0: each prefix computed once)",
        "hit rate": report["hit_rate"] is not None and f"{report['hit_rate']:.1%} of prompt tokens were not computed",
        "time saved": _saved(report),
        "router": _routing(report["routing"]),
        **_conversations(report["conversations"], (report.get("forecast") or {}).get("evicted_between_turns")),
        "rollout/actor correlation": mismatch["pearson_min"] is not None
        and f"{mismatch['pearson_min']} "
        f"(lowest of all steps; noise floor, {mismatch['floor']}: {mismatch['pearson_floor']})",
        "rollout/actor probability difference": mismatch["probs_diff_max"] is not None
        and f"{mismatch['probs_diff_max']} (highest; noise floor, {mismatch['floor']}: {mismatch['probs_diff_floor']})",
        "reward": rewards and f"{rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in the last",
        **_compared(report),
    }
    return {name: text for name, text in found.items() if text}


def _compared(report: dict[str, Any]) -> dict[str, str]:
    """The rows of ``against_forecast``. What did not have to move, and so was not loaded, is a local hit."""
    bounds = ("at most ", "at least ", "") if (report.get("forecast") or {}).get("at_most") else ("", "", "")
    found = {}
    for bound, (what, (forecast, measured)) in zip(bounds, against_forecast(report).items(), strict=False):
        found[f"{what} a step"] = f"forecast {bound}{forecast:,}"
        if measured is not None:
            found[f"{what} a step"] += f", measured {measured:,.0f}"
    return found


def _conversations(counts: dict[str, Any], forecast: float | None) -> dict[str, str]:
    stayed = counts["stayed"]
    if not (stayed["requests"] or counts["moved"]["requests"]):
        return {}
    evicted = 1 - stayed["here"] / stayed["before"] if stayed["before"] else 0
    expected = "" if forecast is None else f"forecast at most {forecast:.0%}, measured "
    return {
        "turns after the first": f"computed {counts['amplification']} times the tokens that were new",
        "evicted between turns": f"{expected}{evicted:.0%}",
        "turns on the same replica": _again(stayed),
        "turns on another replica": _again(counts["moved"]),
        "interrupted, then continued": _again(counts["interrupted"]),
    }


def _again(counts: dict[str, int]) -> str:
    if not counts["requests"]:
        return ""
    again, before = counts["again"], counts["before"]
    return (
        f"{counts['requests']:,} times, {counts['with_kv']:,} with their KV: {again:,} of {before:,} earlier tokens "
        f"({again / before:.1%}) were computed again"
    )


def _freshness(report: dict[str, Any]) -> str:
    mode = report.get("freshness", STRICT)
    if mode == STRICT:
        return mode
    by_versions = ", ".join(f"{number:,} from KV of {versions}" for versions, number in report["generated"].items())
    return f"{mode}: tokens generated {by_versions} versions; {report['tokens']['kept_hit']:,} prompt tokens kept"


def _versions(versions: dict[str, Any]) -> str:
    """Nothing of a synchronous run, in which there is one at a time."""
    parts, spans, behind = [], versions["of_a_trajectory"] or 1, versions["behind"] or 0
    if versions["in_a_step"] > 1:
        parts.append(f"requests of up to {versions['in_a_step']} ended in one step")
    if spans > 1 or behind:
        begin = f" and begin up to {behind:.0f} before the trainer's" if behind else ""
        parts.append(f"trajectories span up to {spans:.0f}{begin} (verl)")
    return "; ".join(parts)


def _stale(tokens: dict[str, int]) -> str:
    return f"{tokens['stale_hit']:,} by policy id, {tokens['stale_hit_by_weights']:,} by checksum of the weights"


def _saved(report: dict[str, Any]) -> str | None:
    saved, rate = report["time_saved_seconds"], report["prefill_tokens_per_second"]
    if saved is None or not any(report["tokens"][hit] for hit in ("shared_hit", "restored_hit")):
        return None
    return (
        f"{saved:.2f} s of the engines' time: computing what was loaded, at the fastest prefill seen "
        f"({rate:,.0f} tokens/s), less the loading"
    )


def _routing(counts: dict[str, Any]) -> str:
    if not counts:
        return "verl's own, or affinity: neither counts"
    even = counts["break_even_tokens"]
    parts = [
        f"{counts['leaders']} led, {counts['stayed']} stayed with their prompt, {counts['moved']} moved for balance "
        f"(by estimate that cost {counts['move_seconds']:.1f} s and saved {counts['saved_seconds']:.1f} s)",
        f"{counts['held']} waited ({counts['longest_wait']:.2f} s at most), {counts['gave_up']} gave up",
        "loading never pays here" if even is None else f"loading pays from {even} tokens" if even else "",
        *(f"the router hears nothing of the replica at {address}" for address in counts["silent"]),
    ]
    return "; ".join(filter(None, parts))
