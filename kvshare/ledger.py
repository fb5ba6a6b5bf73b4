"""What one replica shared, as it happens: a JSON-lines file.

Lines of the file (``report.py`` reads them; tokens are counts, keys are LMCache chunk hashes):

* ``{"op": "store", "policy": P, "keys": […]}``
* ``{"op": "load", "policy": P, "request": R, "keys": […], "tokens": [per key], "expected": tokens promised}``
* ``{"op": "request", "policy": P, "prompt": tokens, "cached": tokens vLLM did not schedule}``
* ``{"op": "routing", …}``: the router's counters so far (``events-router.jsonl``)

each with ``time`` (Unix seconds) and ``replica``.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

logger = logging.getLogger(__name__)


class Ledger:
    """Appends to ``<folder>/events-<replica>.jsonl``; writes nothing without a folder, or when it cannot.

    Args:
        replica: rank, or "router".
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
