"""Starts child processes, each in its own process group, and ends them all when the parent ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil

from kvshare.services.shared_memory import SharedMemory

GRACE = 15  # seconds between SIGTERM and SIGKILL
TEMPORARY = "KVSHARE_TMPDIR"
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Processes:
    """A context manager that ends everything it has started when it exits, for whatever reason.

    Args:
        mark: environment variable and value for all children. It identifies daemons that have left their process
            group, such as Ray's.
    """

    def __init__(self, mark: tuple[str, str]) -> None:
        self._mark = mark
        self._children: list[subprocess.Popen] = []

    def __enter__(self) -> Processes:
        self._shared_memory = SharedMemory(lambda: [process.pid for process in marked(*self._mark)])
        # Use the folder of an outer Processes, which will remove it. The path must be short: Ray's sockets lie there,
        # and a socket path has at most 107 characters.
        self._inherited = os.environ.get(TEMPORARY)
        self._temporary = self._inherited or tempfile.mkdtemp(prefix="kvshare-")
        # Keep ignored signals ignored. nohup ignores SIGHUP, so that its command outlives the terminal.
        handled = [number for number in ENDING if signal.getsignal(number) != signal.SIG_IGN]
        self._previous = {number: signal.signal(number, _as_interrupt) for number in handled}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in self._previous:  # a second Ctrl-C must not interrupt the cleanup
            signal.signal(number, signal.SIG_IGN)
        self.end()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(self, command: list[str], log: Path | None, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start ``command``. Its output goes to ``log``; without one, to the output of this process."""
        temporary = {"TMPDIR": self._temporary, TEMPORARY: self._temporary}
        with open(log, "wb") if log else contextlib.nullcontext() as out:
            child = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT if out else None,
                stdin=subprocess.DEVNULL,
                env={**os.environ, **(env or {}), **temporary, self._mark[0]: self._mark[1]},
                start_new_session=True,
            )
        self._children.append(child)
        return child

    def kill(self, child: subprocess.Popen) -> None:
        """Kill one child and its process group at once."""
        _signal_group(child.pid, signal.SIGKILL)
        child.wait()

    def end(self) -> None:
        """End all children and marked processes, and remove what they left in /tmp and /dev/shm."""
        self._shared_memory.stop()
        for child in reversed(self._children):
            _signal_group(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for child in self._children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            _signal_group(child.pid, signal.SIGKILL)
            child.wait()
        _kill(marked(*self._mark))
        if not self._inherited:
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._shared_memory.free()


def marked(name: str, value: str) -> list[psutil.Process]:
    """Processes with this variable in their environment, except this process and its parents."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid not in ours and process.environ().get(name) == value:
                found.append(process)
    return found


def end_marked(name: str, value: str) -> None:
    """End the marked processes: SIGTERM first, SIGKILL after GRACE seconds."""
    found = marked(name, value)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.terminate()
            process.resume()  # a stopped process does not receive SIGTERM
    psutil.wait_procs(found, timeout=GRACE)
    _kill(marked(name, value))


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=GRACE)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
