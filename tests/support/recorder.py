"""The record of an engine's requests, kept as verl's rollout server keeps it, on a disk that can stall and be full."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

from engines import Answer, Engine
from waiting import STUCK, until

from kvshare.hooks.verl.replica_record import ReplicaRecord
from kvshare.hooks.verl.trajectory import Stamp
from kvshare.record import events, worker_events
from kvshare.record.event_log import RUN_DIR
from kvshare.record.event_reader import Reader
from kvshare.routing.prefixes import Prefill

LOG = "events-0.jsonl"


class Disk:
    """A run's folder. It is a symbolic link, so the next part of the record can come to be on another disk.

    No part of this needs root. The record must go on in a new part often: set ``event_log.PART_BYTES``.
    """

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self._made = 0
        self._parent = folder
        self._good = self._make("good")
        self.kept = [self._good]  # folders with what was written
        self.serve()

    def serve(self) -> None:
        self._point(self._good)

    def stall(self) -> Callable[[], None]:
        """Nobody reads the pipe that is the next part, so opening it waits, like a file on NFS without its server.

        Returns what ends it.
        """
        stalled, kept = self._make("stalled"), self._make("kept")
        os.mkfifo(stalled / LOG)
        self._point(stalled)

        def copy() -> None:
            (kept / LOG).write_bytes((stalled / LOG).read_bytes())

        def end() -> None:
            self.serve()
            self.kept.append(kept)
            threading.Thread(target=copy, daemon=True).start()

        return end

    def fill(self) -> Callable[[], None]:
        """Every write fails with ENOSPC. Returns what ends it."""
        full = self._make("full")
        (full / LOG).symlink_to("/dev/full")
        self._point(full)
        return self.serve

    def _make(self, name: str) -> Path:
        self._made += 1
        folder = self._parent / f"{self._made}-{name}"
        folder.mkdir()
        return folder

    def _point(self, folder: Path) -> None:
        new = self.run.with_name("new")
        new.symlink_to(folder)
        new.replace(self.run)


class Recorder:
    """A ReplicaRecord on an event loop. Each request waits for the loop, as it does in the rollout server."""

    def __init__(self, engine: Engine, disk: Disk) -> None:
        self._engine, self._disk = engine, disk
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        os.environ[RUN_DIR] = str(disk.run)
        self._record: ReplicaRecord = self._do(ReplicaRecord, 0, 0, range(1))
        del os.environ[RUN_DIR]
        self._following = self._do(lambda: self._loop.create_task(self._record.follow()))
        self.given = 0  # events that the log was given
        self._lock = threading.Lock()
        self._sender = worker_events.Sender(self._record.address)
        engine.followers.append(self._forward)

    def ask(self, prompt: list[int], stamp: str, tokens: int) -> Answer:
        """Ask the engine while another request waits for the prefix."""
        request, asked, prefix = uuid4().hex, time.monotonic(), str(hash(tuple(prompt)))
        self._do(self._record.started, request)
        self._do(self._record.prefixes.started, request, Prefill(stamp, prefix, len(prompt)))
        waiting = asyncio.run_coroutine_threadsafe(self._record.prefixes.wait((stamp, prefix), STUCK), self._loop)
        answer = self._engine.ask(prompt, stamp, tokens, request=request)
        output = SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=answer.cached)
        output.outputs = [SimpleNamespace(token_ids=answer.tokens)]
        self._do(self._record.first_token, request, output, asked, time.monotonic())
        self._do(self._record.ended, request, Stamp(stamp), output, None)
        waiting.result(STUCK)
        self._count()
        return answer

    def queued(self) -> int:
        return self._record._event_log._queue.qsize()

    def remembered(self) -> int:
        """Requests that have not ended, and those that wait for a prefix."""
        record = self._record
        return len(record._loads._running) + len(record.prefixes._prefills) + len(record.prefixes._waiting)

    def close(self) -> list[events.Event]:
        """What was written."""
        until(lambda: not self.queued())
        self._record._event_log.close()
        return [event for folder in self._disk.kept for event in Reader(folder).read()]

    def _forward(self, event: dict[str, Any]) -> None:
        self._sender.send(event)
        if event["op"] in ("ready", "store", "load"):
            self._count()

    def _count(self) -> None:
        with self._lock:
            self.given += 1

    def _do(self, call: Callable[..., Any], *args: Any) -> Any:
        async def on_loop() -> Any:
            return call(*args)

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result(STUCK)
