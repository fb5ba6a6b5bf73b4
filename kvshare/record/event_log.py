"""What one replica shared, as it happens: a JSON-lines file.

Lines of the file (``report.py`` reads them; tokens are counts, keys are LMCache chunk hashes):

* ``{"op": "store", "policy": P, "keys": […]}``
* ``{"op": "load", "policy": P, "request": R, "keys": […], "tokens": [per key], "expected": tokens promised,
  "seconds": it took}``
* ``{"op": "request", "policy": P, "prompt": tokens, "cached": tokens vLLM did not schedule,
  "prefill": tokens a second that the engine computed until the first token}``
* ``{"op": "routing", …}``: the router's counters so far (``events-router.jsonl``)
* ``{"op": "step", "step": N, "server": its status or null}``: verl has logged step N (``events-trainer.jsonl``)

each with ``time`` (Unix seconds) and ``replica``.
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
"""Environment variable with the folder the ledger goes to; unset: no ledger."""


class Ledger:
    """Appends to ``<folder>/events-<replica>.jsonl``; writes nothing without a folder, or when it cannot.

    Args:
        replica: rank, or "router", or "trainer".
    """

    def __init__(self, replica: int | str, folder: str | None) -> None:
        self._replica = replica
        self._file: TextIO | None = None
        if folder:
            with self._never_in_the_way():
                Path(folder).mkdir(parents=True, exist_ok=True)
                self._file = (Path(folder) / f"events-{replica}.jsonl").open("a", buffering=1)

    def write(self, op: str, **fields: Any) -> None:
        if self._file:
            line = {"op": op, "time": round(time.time(), 3), "replica": self._replica, **fields}
            with self._never_in_the_way():
                self._file.write(json.dumps(line) + "\n")

    @contextlib.contextmanager
    def _never_in_the_way(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            logger.error("%s keeps no ledger from here on, the report will lack it: %s", self._replica, error)
            self._file = None


class Reader:
    """Reads what replicas have appended to a folder's ledger since the last time; whole lines only.

    Each writes on its own node: of a run on several nodes this sees all only if the folder is shared.
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
    """Of JSON lines; one that a full disk or a kill has cut is passed over."""
    for line in lines:
        with contextlib.suppress(ValueError):
            yield json.loads(line)
