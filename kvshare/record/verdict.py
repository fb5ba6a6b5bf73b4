"""From the facts of a run to one sentence: whether it shared, and if not, why not."""

from __future__ import annotations

from typing import Any

from kvshare.record.token_sources import stale


def of(report: dict[str, Any]) -> str:
    """The verdict on a report as summary.py makes it. The first that applies, the worst ones first."""
    tokens, chunk = report["tokens"], report.get("chunk_size")
    if report["degraded"]:
        ranks = ", ".join(map(str, report["degraded"]))
        return f"NOT SHARING: LMCache did not start in replica {ranks}, or its server never answered; see the log."
    if count := stale(tokens):
        return f"STALE: the KV of {count:,} tokens was computed by other weights. Please report this."
    if report.get("backend") == "no connector":
        return "A baseline: no connector, nothing was shared."
    if not tokens["prompt"]:
        return "No request was recorded."
    if tokens["shared_hit"]:
        share = 100 * tokens["shared_hit"] / tokens["prompt"]
        return f"{share:.1f}% of prompt tokens came from another replica, none of them stale."
    if report["prefill_amplification"] is None:
        return _nothing_stored(report["longest_prompt"], chunk)
    if report["replicas"] < 2:
        return "Nothing could be shared: there is one replica."
    if report["prefill_amplification"] == 1:
        return "No token was shared between replicas: no prefix was asked of two of them."
    return (
        "NOT SHARING: No token was shared between replicas, they computed the same prefixes "
        f"{report['prefill_amplification']} times (see docs/troubleshooting.md)."
    )


def _nothing_stored(longest: int, chunk: int | None) -> str:
    if chunk is None:
        return f"Nothing could be shared: nothing was stored; the longest prompt has {longest:,} tokens."
    if longest < chunk:
        return (
            f"Nothing could be shared: no prompt fills a chunk, the longest has {longest:,} tokens of {chunk} "
            "(see chunk_size in the LMCache config)."
        )
    return (
        f"NOT SHARING: nothing was stored, though prompts of up to {longest:,} tokens fill chunks of {chunk} "
        "(see kv_role, the connector and LMCache's log)."
    )
