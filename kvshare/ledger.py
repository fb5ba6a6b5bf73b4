"""What one replica shared, as it happens: a JSON-lines file, and the prefixes others may count on.

Lines of the file (``report.py`` reads them; tokens are counts, keys are LMCache chunk hashes):

* ``{"op": "store", "policy": P, "keys": […]}``
* ``{"op": "load", "policy": P, "request": R, "keys": […], "tokens": [per key], "expected": tokens promised}``
* ``{"op": "request", "policy": P, "prompt": tokens, "cached": tokens vLLM did not schedule}``

each with ``time`` (Unix seconds) and ``replica``.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cachetools import LRUCache

logger = logging.getLogger(__name__)


def whole_chunks(tokens: int, chunk_size: int) -> int:
    """How many of ``tokens`` leading tokens lie in whole chunks."""
    return tokens // chunk_size * chunk_size


def prefix_digest(prompt_ids: list[int], chunk_size: int) -> str:
    """Digest of the part of a prompt that whole chunks cover; empty if it is less than one chunk."""
    whole = whole_chunks(len(prompt_ids), chunk_size)
    if not whole:
        return ""
    return hashlib.blake2b(array("q", prompt_ids[:whole]).tobytes(), digest_size=16).hexdigest()


class Ledger:
    """Appends to ``<folder>/events-<replica>.jsonl``; writes nothing without a folder, or when it cannot."""

    def __init__(self, replica: int, folder: str | None) -> None:
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
            logger.error("replica %d keeps no ledger from here on, the report will lack it: %s", self._replica, error)
            self._file = None


@dataclass
class Prefill:
    """A request under way whose prefix others may be waiting for."""

    policy: str
    prefix: str
    tokens: int  # of the prefix
    storing: int = 0  # store() calls whose KV has not arrived yet


class StoredPrefixes:
    """Knows when the prefix of a request can be found by others, and lets the router wait for that."""

    def __init__(self, remember: int = 10_000) -> None:
        self._stored: LRUCache = LRUCache(maxsize=remember)  # (policy, prefix) -> asyncio.Event
        self._prefills: dict[str, Prefill] = {}

    def event(self, policy: str, prefix: str) -> asyncio.Event:
        return self._stored.setdefault((policy, prefix), asyncio.Event())

    def started(self, request: str, prefill: Prefill) -> None:
        if prefill.prefix:
            self._prefills[request] = prefill

    def first_token(self, request: str, cached: int) -> None:
        """The prefill is done; if ``cached`` tokens cover its prefix there was nothing to store."""
        prefill = self._prefills.get(request)
        if prefill and cached >= prefill.tokens:
            self._found(prefill)

    def storing(self, request: str) -> None:
        if prefill := self._prefills.get(request):
            prefill.storing += 1

    def stored(self, request: str, end: int) -> None:
        """One store() has arrived, with the request's tokens up to ``end``."""
        if prefill := self._prefills.get(request):
            prefill.storing -= 1
            if end >= prefill.tokens and not prefill.storing:
                self._found(prefill)

    def finished(self, request: str) -> None:
        """The request ended, however it did: nobody need wait for it any longer."""
        if prefill := self._prefills.pop(request, None):
            self._found(prefill)

    def _found(self, prefill: Prefill) -> None:
        self.event(prefill.policy, prefill.prefix).set()
