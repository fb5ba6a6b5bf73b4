"""Reads the events of a run, in order of time, while it is under way or later. It never holds more than one a log.

Each replica writes on its own node. With several nodes the folder must be shared to read all events.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from kvshare.record import event_log, events
from kvshare.record.events import Event

BLOCK = 2**16  # bytes


class Span(NamedTuple):
    """Whole lines of a file, from byte ``begin`` to byte ``end``."""

    path: Path
    begin: int
    end: int


class Record:
    """Events that can be iterated again and again; each time they are read from the files.

    A log is in order of time, so merging the logs suffices to order all events.
    """

    def __init__(self, logs: list[list[Span]]) -> None:
        self._logs = logs

    def __iter__(self) -> Iterator[Event]:
        return heapq.merge(*map(_events, self._logs), key=attrgetter("time"))


def _events(log: list[Span]) -> Iterator[Event]:
    for path, begin, end in log:
        with path.open("rb") as file:
            file.seek(begin)
            for line in file:
                begin += len(line)
                if begin > end:
                    break
                if len(line) > 1:
                    yield events.decode(line)


class Reader:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}  # bytes

    def read(self) -> Record:
        """The events that were appended since the last call."""
        return Record([[self._new(path) for path in parts] for parts in event_log.parts(self._folder).values()])

    def _new(self, path: Path) -> Span:
        begin = self._read.get(path, 0)
        self._read[path] = end = _last_line_end(path, begin)
        return Span(path, begin, end)


def _last_line_end(path: Path, begin: int) -> int:
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > begin:
            at = max(begin, end - BLOCK)
            file.seek(at)
            if (newline := file.read(end - at).rfind(b"\n")) >= 0:
                return at + newline + 1
            end = at
    return begin
