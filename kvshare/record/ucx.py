"""Which transport UCX moves KV through between P2P replicas. It falls back without a word, so it is asked to log it.

UCX chooses for each connection when it is made, and NIXL has no call that tells. With UCX_PROTO_INFO (1.23) UCX logs a
table for each operation on each connection:

    | one intra-node cfg#1                                     |
    | remote memory write by ucp_put* from host memory to host |
    | 0..inf | zero-copy   | cma/memory                        |

"self" connections are the agent's own.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from kvshare.record.event_log import RUN_DIR

ROW = re.compile(r"\.\.inf \|[^|]*\| *([^|]*?) *\|")  # of the largest writes
FILES = "ucx-*.log"
PLACES = {"intra-node": "on one host", "inter-node": "between hosts"}


def ask() -> None:
    """Make UCX log its choices, unless the user has settings of their own. Call it before UCX is loaded."""
    if "UCX_LOG_FILE" not in os.environ and "UCX_PROTO_INFO" not in os.environ:
        os.environ["UCX_PROTO_INFO"] = "y"
        os.environ["UCX_LOG_FILE"] = str(_folder() / "ucx-%p.log")  # UCX puts the process id in


def own() -> str:
    """Transports of this process, in words; empty while none is known, or if its log cannot be read."""
    log = _folder() / f"ucx-{os.getpid()}.log"
    try:
        return _transports(log, log.stat().st_size)
    except OSError:  # none yet, or the folder is on NFS that fails, and the caller is vLLM's worker
        return ""


@lru_cache(1)  # vLLM asks in each step that loads, the log grows with connections
def _transports(log: Path, size: int) -> str:
    return transports([log])


def of_run(folder: Path) -> str:
    """Transports of all replicas of a run."""
    return transports(folder.glob(FILES))


def transports(logs: Iterable[Path]) -> str:
    found: dict[str, set[str]] = {}
    for log in logs:
        place, writes = "", False
        for line in log.read_text(errors="replace").splitlines() if log.is_file() else ():
            if " cfg#" in line:
                place = next((words for kind, words in PLACES.items() if kind in line), "")
            elif " by ucp_" in line:
                writes = "memory write" in line
            elif place and writes and (row := ROW.search(line)):
                found.setdefault(place, set()).add(row[1])
    return ", ".join(f"{' and '.join(sorted(names))} {place}" for place, names in sorted(found.items()))


def _folder() -> Path:
    return Path(os.environ.get(RUN_DIR) or tempfile.gettempdir())
