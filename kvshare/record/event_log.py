"""Writes and reads the event log: a JSON-lines file per replica with what it stored and loaded.

Each line has ``time`` (Unix seconds), ``replica`` and the fields below. Keys are LMCache chunk hashes:

* ``{"op": "store", "policy": P, "keys": […]}``
* ``{"op": "load", "policy": P, "request": R, "keys": […], "tokens": [per key], "expected": tokens
  that the lookup promised, "seconds": duration of the load}``
* ``{"op": "request", "policy": P, "prompt": tokens, "cached": tokens that vLLM did not schedule,
  "prefill": prefill rate of the engine up to the first token, in tokens per second}``
* ``{"op": "degraded"}``: LMCache did not start in the replica
* ``{"op": "routing", …}``: the router's counters so far (``events-router.jsonl``)
* ``{"op": "step", "step": N, "server": its status or null}``: verl has logged step N (``events-trainer.jsonl``)
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)

RUN_DIR = "KVSHARE_RUN_DIR"
"""Folder of the run, for the event log. If it is not set, no event log is written."""


class EventLog:
    """Appends to ``<folder>/events-<replica>.jsonl``. Without a folder, and after an error, it writes nothing.

    Args:
        replica: rank of the replica, or "router", or "trainer".
    """

    def __init__(self, replica: int | str, folder: str | None) -> None:
        self._replica = replica
        self._file: TextIO | None = None
        if folder:
            with self._stop_on_error():
                Path(folder).mkdir(parents=True, exist_ok=True)
                self._file = (Path(folder) / f"events-{replica}.jsonl").open("a", buffering=1)

    def write(self, op: str, **fields: Any) -> None:
        if self._file:
            line = {"op": op, "time": round(time.time(), 3), "replica": self._replica, **fields}
            with self._stop_on_error():
                self._file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def _stop_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("the event log of %s ends here, and the report will lack the rest: %s", self._replica, error)
            self._file = None


class Reader:
    """Reads the events that were appended to the logs in a folder since the last call; whole lines only.

    Each replica writes on its own node. With several nodes the folder must be shared to read all events.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._at: dict[Path, int] = {}

    def read(self) -> list[dict[str, Any]]:
        return [event for path in sorted(self._folder.glob("events-*.jsonl")) for event in objects(self._new(path))]

    def _new(self, path: Path) -> list[bytes]:
        with path.open("rb") as file:
            file.seek(self._at.get(path, 0))
            new = file.read()
        end = new.rfind(b"\n") + 1
        self._at[path] = self._at.get(path, 0) + end
        return new[:end].splitlines()


def objects(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Objects of JSON lines. Skips a line that a full disk or a kill has cut."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
