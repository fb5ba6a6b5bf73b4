"""Wait for a condition. A test that sleeps and then counts depends on how busy the machine is."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

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
