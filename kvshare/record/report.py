"""A run folder in, ``report.json``, ``report.md`` and ``report.html`` out."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec

from kvshare.core import server_status
from kvshare.core.errors import UserError
from kvshare.record import ucx
from kvshare.record.event_reader import Reader
from kvshare.record.rows import Logged
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
    run["p2p_transport"] = ucx.of_run(folder)
    return summarize(Reader(folder).read(), _steps(folder), run, _steps(baseline) if baseline else None)


def _steps(folder: Path) -> list[Logged]:
    """What verl's file logger has of each step. Other lines are skipped: validations, and one that was cut."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as lines:
        return [step for line in lines if (step := _step(line))]


class _Line(msgspec.Struct):
    data: Logged


_decoder = msgspec.json.Decoder(_Line)


def _step(line: bytes) -> Logged | None:
    with contextlib.suppress(ValueError):
        return _decoder.decode(line).data
    with contextlib.suppress(ValueError):  # Python writes NaN, which is no JSON
        return msgspec.convert(json.loads(line), _Line).data
    return None


def write(folder: Path, baseline: Path | None = None) -> dict[str, Any]:
    """Write report.json, report.md and report.html into a run folder; returns the report."""
    from kvshare.record import page  # and with it matplotlib, which takes a second

    report = read(folder, baseline)
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "report.md").write_text(page.markdown(report))
    (folder / "report.html").write_text(page.html(report))
    return report
