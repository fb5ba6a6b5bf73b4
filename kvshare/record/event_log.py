"""Writes the event log: JSON lines of what a replica, the router or the trainer did (see events.py).

Whoever calls ``write`` generates tokens or routes requests, and the log may lie on NFS. So a thread of its own writes,
from a bounded queue. What does not fit into the queue, or onto the disk, is dropped and counted. The count is written
as soon as there is room, and the report says that events were lost.

A log is written in parts: ``events-0.jsonl``, then ``events-0.1.jsonl``, ``events-0.2.jsonl``, … Nothing is renamed or
deleted. Whatever the record grows to stays, because the report needs all of it.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import queue
import threading
import time
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from kvshare.core.log_limit import LimitedLogger

logger = LimitedLogger(logging.getLogger(__name__))

RUN_DIR = "KVSHARE_RUN_DIR"
"""Folder of the run, for the event log. If it is not set, no event log is written."""

FILES = "events-*.jsonl"
PART_BYTES = 64 * 2**20  # a part that has so many is closed
QUEUED = 10_000  # events; with 64 keys each 14 MB
BATCH = 500  # events written at once
FLUSH_SECONDS = 5.0  # at the end of the process


def parts(folder: Path) -> dict[str, list[Path]]:
    """The files of a folder's event logs by who wrote them, oldest first."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob(FILES), key=_number):
        found.setdefault(path.name.split(".")[0].removeprefix("events-"), []).append(path)
    return found


def _number(part: Path) -> int:
    number = part.name.split(".")[1]
    return int(number) if number.isdecimal() else 0


class EventLog:
    """Appends to the event log in ``folder``. Never waits for the disk. Without a folder, it does nothing.

    Args:
        replica: rank of the replica, or "router", or "trainer".
        node: rank of the node within the replica. Each node has a file of its own.
    """

    def __init__(self, replica: int | str, folder: str | None, node: int = 0) -> None:
        self._replica = replica
        self._queue: queue.Queue[bytes | None] = queue.Queue(QUEUED)
        self._lock = threading.Lock()
        self._lost = 0
        self._thread: threading.Thread | None = None
        if folder:
            self._file = LogFile(Path(folder), f"{replica}-node{node}" if node else replica)
            self._thread = threading.Thread(target=self._run, name="kvshare-event-log", daemon=True)
            self._thread.start()
            atexit.register(self.close)

    def write(self, op: str, **fields: Any) -> None:
        if self._thread:
            try:
                self._queue.put_nowait(self._line(op, fields))
            except queue.Full:
                logger.error("the event log of %s cannot be written as fast as events come", self._replica)
                self.lost(1)

    def lost(self, events: int) -> None:
        """Add to the count of lost events, which is written before the next event."""
        with self._lock:
            self._lost += events

    def close(self) -> None:
        """Write what is queued, for at most FLUSH_SECONDS."""
        thread, self._thread = self._thread, None
        if thread:
            atexit.unregister(self.close)
            end = time.monotonic() + FLUSH_SECONDS
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=FLUSH_SECONDS)
            thread.join(max(0.0, end - time.monotonic()))

    def _line(self, op: str, fields: dict[str, Any]) -> bytes:
        event = {"op": op, "time": round(time.time(), 3), "replica": self._replica, **fields}
        return msgspec.json.encode(event) + b"\n"

    def _run(self) -> None:
        ended = False
        while not ended:
            lines = [self._queue.get()]
            while len(lines) < BATCH and not self._queue.empty():
                lines.append(self._queue.get())
            ended = None in lines
            self._append([line for line in lines if line])

    def _append(self, lines: list[bytes]) -> None:
        with self._lock:
            lost, self._lost = self._lost, 0
        count = [self._line("lost", {"events": lost})] if lost else []
        written = self._file.append(b"".join(count + lines)).splitlines(keepends=True)
        if count and written[:1] != count:
            self.lost(lost)
        self.lost(len(lines) - len(written[len(count) :]))  # a reader counts the last one, if it was cut


class LogFile:
    """The last part of a log. It is opened for the first write, and again after an error."""

    def __init__(self, folder: Path, writer: int | str) -> None:
        self._folder, self._writer = folder, str(writer)
        self._file: FileIO | None = None
        self._size = 0

    def append(self, data: bytes) -> bytes:
        """Append lines. Returns what could be written."""
        left = memoryview(data)
        try:
            file = self._open()
            while left:
                count = file.write(left)
                self._size += count
                left = left[count:]
        except OSError as error:
            logger.error("cannot write the event log of %s, the report will lack events: %s", self._writer, error)
            self._close()
        return data[: len(data) - len(left)]

    def _open(self) -> FileIO:
        if self._file and self._size < PART_BYTES:
            return self._file
        self._close()
        self._folder.mkdir(parents=True, exist_ok=True)
        found = parts(self._folder).get(self._writer, [])
        path = found[-1] if found else self._folder / f"events-{self._writer}.jsonl"
        if found and path.stat().st_size >= PART_BYTES:
            path = self._folder / f"events-{self._writer}.{_number(path) + 1}.jsonl"
        self._file = FileIO(path, "a")
        self._size = path.stat().st_size
        if self._size:  # a full disk or a kill may have cut the last line
            self._size += self._file.write(b"\n")
        return self._file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file:
            with contextlib.suppress(OSError):
                file.close()
