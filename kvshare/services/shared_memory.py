"""Frees the shared memory that killed processes leave in /dev/shm, e.g. vLLM's engines when Ray kills them.

A segment's name does not say whose it is, and a neighbour in another container may use the same /dev/shm. So only
segments are freed that one of our processes has been seen to map.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

FOLDER = Path("/dev/shm")
NAMES = re.compile(r"(psm_|sem\.mp-|verl_weights_|lmcache_l1_pool_).+")
"""Names given by Python's multiprocessing, which vLLM uses, by verl, and by LMCache's multi-process server."""

LOOK_SECONDS = 1


class SharedMemory:
    """Observes, in a thread, which segments appear and are mapped by our processes.

    Args:
        pids: returns the ids of our processes.
    """

    def __init__(self, pids: Callable[[], Iterable[int]]) -> None:
        self.ours: set[str] = set()
        self._pids = pids
        self._known = _names()  # older than our processes, or looked at twice
        self._new: set[str] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._observe, name="kvshare-shm", daemon=True)
        self._thread.start()

    def free(self) -> None:
        """Free our segments, except those that others still map. Call it when our processes have ended.

        Our engines map the segment of LMCache's server, which may not be ours and may go on.
        """
        for name in self.ours.difference(*map(_mapped, psutil.pids())):
            with contextlib.suppress(OSError):
                (FOLDER / name).unlink()

    def stop(self) -> None:
        """Look for the last time. Call it before our processes are ended."""
        self._ended.set()
        self._thread.join()
        self._look()

    def _observe(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        if new := _names() - self._known:  # listing a folder is cheap, reading the maps of all processes is not
            self._known |= new & self._new  # it exists a moment before it is mapped
            self._new = new
            self.ours |= {name for pid in self._pids() for name in new & _mapped(pid)}


def _names() -> set[str]:
    return {path.name for path in FOLDER.iterdir() if NAMES.fullmatch(path.name)} if FOLDER.is_dir() else set()


def _mapped(pid: int) -> set[str]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:  # it has ended
        return set()
    return set(re.findall(rf"{FOLDER}/(\S+)", maps))
