"""Services that outlive the command that starts them: ``kvshare services up``, ``down`` and ``status``.

What is up is written to ``<folder>/<backend>.json``. Its processes carry a mark in their environment: ``down`` ends
those and nobody else, also after a crash.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from uuid import uuid4

from kvshare.core.errors import UserError
from kvshare.services import health
from kvshare.services.backends import BACKENDS, place
from kvshare.services.processes import end_marked

MARK = "KVSHARE_SERVICE"


@dataclass(frozen=True)
class Started:
    """A service that ``up`` started; it may have ended since."""

    backend: str
    pid: int
    mark: str
    exports: dict[str, str]
    command: list[str]
    log: str

    @property
    def service(self) -> str:
        return BACKENDS[self.backend].service

    def check(self) -> str:
        """Where it is; raises UserError when it is not healthy."""
        return BACKENDS[self.backend].check(self.exports)


def up(backend: str, listen: str, folder: Path, arguments: list[str]) -> Started:
    """Start the service of a backend and wait until it is healthy; one that is up and healthy stays.

    Args:
        listen: the address to listen on.
        folder: for state, log and what the service writes.
        arguments: more for the service itself.

    Raises:
        NotStarted: it ended instead.
    """
    with _locked(folder):
        if known := read(backend, folder):
            try:
                known.check()
                return known
            except UserError:
                _end(known, folder)
        command, exports = place(BACKENDS[backend], listen, folder)
        log, mark = folder.resolve() / f"{backend}.log", uuid4().hex
        command += arguments
        process = subprocess.Popen(
            command,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, MARK: mark},
            start_new_session=True,
        )
        started = Started(backend, process.pid, mark, exports, command, str(log))
        try:
            _file(backend, folder).write_text(json.dumps(asdict(started), indent=2) + "\n")
            health.wait_healthy(started.service, process, started.check, log)
        except BaseException:
            _end(started, folder)
            raise
        return started


def down(backend: str, folder: Path) -> Started | None:
    """End what ``up`` started; None if there is nothing."""
    with _locked(folder):
        if known := read(backend, folder):
            _end(known, folder)
        return known


def read(backend: str, folder: Path) -> Started | None:
    """What ``up`` started and ``down`` has not ended."""
    file = _file(backend, folder)
    if not file.exists():
        return None
    try:
        return Started(**json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{file} is not what kvshare services up wrote: remove it") from None


def _end(started: Started, folder: Path) -> None:
    end_marked(MARK, started.mark)
    _file(started.backend, folder).unlink(missing_ok=True)


def _file(backend: str, folder: Path) -> Path:
    return folder / f"{backend}.json"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One ``up`` or ``down`` at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): give --folder another one") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
