"""Wait for a condition, or until processes have stopped. A test that sleeps depends on how busy the machine is."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil

Found = TypeVar("Found")

STUCK = 300
"""Seconds without progress after which a test fails. No healthy process takes as long, however busy the machine is."""


def until(done: Callable[[], Found], process: subprocess.Popen | None = None, log: Path | None = None) -> Found:
    """Wait until ``done()`` is true, and return its value.

    Args:
        process: fail at once when it has ended.
        log: each line that is added to it is progress.
    """
    size, since = 0, time.monotonic()
    while not (found := done()):
        said = log.read_text(errors="replace") if log and log.exists() else ""
        assert process is None or process.poll() is None, f"exit code {process.poll()}: {said[-3000:]}"
        if len(said) != size:
            size, since = len(said), time.monotonic()
        assert time.monotonic() - since < STUCK, f"no progress for {STUCK} s: {said[-3000:]}"
        time.sleep(0.02)
    return found


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process and its children meanwhile. Until a signal has reached all threads, one may still answer."""
    parent = psutil.Process(pid)
    found = [parent, *parent.children(recursive=True)]
    try:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        until(lambda: all(_has_stopped(process.pid) for process in found))
        yield
    finally:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()


def _has_stopped(pid: int) -> bool:
    """Whether all its threads have stopped (T) or ended (Z)."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that ends
        threads = Path(f"/proc/{pid}/task").iterdir()
        return all((thread / "stat").read_text().rpartition(")")[2].split()[0] in "TZ" for thread in threads)
    return not psutil.pid_exists(pid)
