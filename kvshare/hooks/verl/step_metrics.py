"""Add each step's sharing metrics to verl's logger, under ``kvshare/``, and print them in one line.

verl 0.9.1 has no extension point for metrics, so this hook wraps ``Tracking.log``, which all its trainers call. Each
call reads the events that were added to the event log since the previous call. The first error is logged and ends the
metrics; training continues.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from kvshare.core import freshness, server_status
from kvshare.hooks.patch import optional, wrap
from kvshare.record.event_log import RUN_DIR, EventLog
from kvshare.record.event_reader import Reader
from kvshare.record.key_table import RecentKeys
from kvshare.record.rows import STEP, of_requests
from kvshare.record.stored import Stored
from kvshare.record.summary import Seen, not_seen, were_lost
from kvshare.record.token_sources import SOURCES, Sharing, with_hits

logger = logging.getLogger(__name__)

REMEMBERED = 1_000_000  # keys, 50 bytes each: a load follows its store soon, or never


@optional("verl's logger does not get kvshare's metrics")
def patch_tracking(module: Any) -> None:
    wrap(module, "Tracking.__init__", _init, "project_name", "experiment_name")
    wrap(module, "Tracking.log", _log, "data", "step")


def _init(wrapped: Any, tracking: Any, args: tuple, kwargs: dict) -> None:
    """Give a job without verl's file logger one: the report reads what it writes."""
    wrapped(*args, **kwargs)
    if os.environ.get(RUN_DIR) and "file" not in tracking.logger:
        try:
            from verl.utils.tracking import FileLogger

            tracking.logger["file"] = FileLogger("kvshare", "run")  # it writes to VERL_FILE_LOGGER_PATH
        except Exception:
            logger.exception("the report will know no steps; training and sharing continue")


def _log(wrapped: Any, tracking: Any, args: tuple, kwargs: dict) -> Any:
    def log(data: dict[str, Any], step: int, *more: Any, **named: Any) -> Any:
        return wrapped({**data, **_sharing(tracking, data)}, step, *more, **named)

    return log(*args, **kwargs)


def _sharing(tracking: Any, data: dict[str, Any]) -> dict[str, float]:
    folder = os.environ.get(RUN_DIR)
    if not folder or STEP not in data or getattr(tracking, "kvshare_failed", False):
        return {}
    try:
        if not hasattr(tracking, "kvshare_steps"):
            tracking.kvshare_steps = Steps(Path(folder))
        metrics, line = tracking.kvshare_steps.step(int(data[STEP]))
        print(line, flush=True)
    except Exception:
        tracking.kvshare_failed = True
        logger.exception("kvshare's metrics end here; training and sharing continue")
        return {}
    return metrics


class Steps:
    """Turns new events of a run into metrics, step by step."""

    def __init__(self, folder: Path) -> None:
        self._event_log = EventLog("trainer", str(folder))
        self._reader = Reader(folder)
        self._run = _read(folder / "run.json")
        self._seen = Seen(Stored(RecentKeys(REMEMBERED)))

    def step(self, number: int) -> tuple[dict[str, float], str]:
        """Metrics of the events since the previous step, and the line to print. Unknown metrics are left out."""
        events, sharing, seen = self._reader.read(), Sharing(), self._seen
        lost = seen.lost
        for event in events:
            seen.add(event)
        for event, hits in with_hits(events, seen.stored):
            sharing.add(event, hits)
        self._event_log.write("step", step=number, server=server_status.read(self._run.get("server_status")))
        count = sharing.count()
        ratios = {**sharing.ratios(), "time_saved_s": count.time_saved(seen.prefill)}
        metrics: dict[str, float] = {f"{name}_tokens": value for name, value in count.tokens().items()}
        metrics |= {name: value for name, value in ratios.items() if value is not None}
        metrics |= {f"generated_tokens_{n}_versions": tokens for n, tokens in sharing.generated().items()}
        metrics |= {
            f"freshness_{freshness.of(os.environ).mode}": 1,
            "replicas_seen": len(seen.replicas),
            "policies": len(of_requests(events)),
            "lost_events": seen.lost - lost,
        }
        ranks = range(self._run.get("standby", 0), self._run.get("replicas", 0))
        unseen = [rank for rank in ranks if rank not in seen.replicas]
        return {f"kvshare/{name}": value for name, value in metrics.items()}, describe(number, metrics, unseen)


def describe(step: int, metrics: dict[str, float], unseen: list[int]) -> str:
    """The line to print; ``unseen`` are the ranks of replicas without an event so far."""
    shown = {name: f"{metrics[f'{name}_tokens']:,}" for name in ("prompt", *SOURCES)}
    unknown = f", {shown['unknown_hit']} of unknown origin" if metrics["unknown_hit_tokens"] else ""
    stale = max(metrics["stale_hit_tokens"], metrics["stale_hit_by_weights_tokens"])
    saved = metrics.get("time_saved_s")
    return (
        f"kvshare step {step}: {shown['prompt']} prompt tokens: {shown['computed']} computed, "
        f"{shown['local_hit']} local hit, {shown['restored_hit']} restored, "
        f"{shown['shared_hit']} shared hit{unknown}, "
        + (f"STALE: {stale:,}; " if stale else "0 stale; ")
        + (f"{policies:.0f} versions in flight; " if (policies := metrics["policies"]) > 1 else "")
        + (f"{saved:.2f} s saved" if saved is not None else "time saved not known yet")
        + (f"; {not_seen(unseen)}" if unseen else "")
        + (f"; {were_lost(lost)}" if (lost := int(metrics["lost_events"])) else "")
    )


def _read(run: Path) -> dict[str, Any]:
    """Read run.json, which preflight writes. On another node the file may be missing."""
    return json.loads(run.read_text()) if run.is_file() else {}
