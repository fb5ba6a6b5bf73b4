"""A run folder in, ``report.json``, ``report.md`` and ``report.html`` out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvshare.core import server_status
from kvshare.core.errors import UserError
from kvshare.record.event_log import Reader, objects
from kvshare.record.summary import summarize


def read(folder: Path, baseline: Path | None = None) -> dict[str, Any]:
    """The report of a run folder.

    Raises:
        UserError: one of the two is not a run folder.
    """
    for path in filter(None, (folder, baseline)):
        if not (path / "run.json").is_file():
            raise UserError(
                f"{path} has no run.json: give the KVSHARE_RUN_DIR of a run that a launcher started, "
                "or that kvshare preflight --record wrote to"
            )
    run = json.loads((folder / "run.json").read_text())
    run["server"] = server_status.read(run.pop("server_status", None))
    return summarize(Reader(folder).read(), _metrics(folder), run, _metrics(baseline) if baseline else None)


def _metrics(folder: Path) -> Iterable[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return (line["data"] for line in objects(path.read_bytes().splitlines() if path.exists() else []))


def write(folder: Path, baseline: Path | None = None) -> dict[str, Any]:
    """Write report.json, report.md and report.html into a run folder; returns the report."""
    from kvshare.record import page  # and with it matplotlib, which takes a second

    report = read(folder, baseline)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.md").write_text(page.markdown(report))
    (folder / "report.html").write_text(page.html(report))
    return report
