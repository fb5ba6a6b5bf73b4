"""Runs services in the background, for ``kvshare services up``, ``down`` and ``status``.

``up`` describes the service in ``<folder>/<backend>.json`` and marks its processes by an environment variable.
``down`` ends exactly the marked processes, also after a crash.
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
from kvshare.services import backends, health
from kvshare.services.processes import end_marked

MARK = "KVSHARE_SERVICE"


@dataclass(frozen=True)
class Started:
    """A service that ``up`` has started. It may have ended since."""

    backend: str
    engine: str  # of the remote backend; empty for kvshare server
    pid: int
    mark: str
    exports: dict[str, str]
    command: list[str]
    log: str

    @property
    def service(self) -> str:
        return backends.of(self.backend, self.engine).service

    def check(self) -> str:
        """Return the address of the service; raise UserError if it is not healthy."""
        return backends.of(self.backend, self.engine).check(self.exports)


def up(backend: str, listen: str, folder: Path, arguments: list[str], engine: str = "") -> Started:
    """Start the service of a backend and wait until it is healthy. Keep a service that is already up and healthy.

    Args:
        engine: key of ENGINES; empty for the backend's own service.
        listen: address to listen on.
        folder: folder for state, log and the files of the service.
        arguments: further arguments for the service.

    Raises:
        NotStarted: the service ended, or did not become healthy in time.
    """
    with _locked(folder):
        if known := read(backend, folder):
            try:
                known.check()
                if known.engine == engine:
                    return known
            except UserError:
                pass
            _end(known, folder)
        command, exports = backends.place(backends.of(backend, engine), listen, folder)
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
        started = Started(backend, engine, process.pid, mark, exports, command, str(log))
        try:
            _file(backend, folder).write_text(json.dumps(asdict(started), indent=2) + "\n")
            health.wait_healthy(started.service, process, started.check, log)
        except BaseException:
            _end(started, folder)
            raise
        return started


def down(backend: str, folder: Path) -> Started | None:
    """End the service that ``up`` started and return it; None if there is none."""
    with _locked(folder):
        if known := read(backend, folder):
            _end(known, folder)
        return known


def read(backend: str, folder: Path) -> Started | None:
    """The service that ``up`` started and ``down`` has not ended; None if there is none."""
    file = _file(backend, folder)
    if not file.exists():
        return None
    try:
        return Started(**json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise UserError(f"{file} was not written by this kvshare services up: remove it") from None


def _end(started: Started, folder: Path) -> None:
    end_marked(MARK, started.mark)
    _file(started.backend, folder).unlink(missing_ok=True)


def _file(backend: str, folder: Path) -> Path:
    return folder / f"{backend}.json"


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Allow one ``up`` or ``down`` at a time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}): give --folder another one") from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
