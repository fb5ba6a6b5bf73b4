"""Reads the counters that ``kvshare server --status`` keeps in a file, for preflight and the report."""

from __future__ import annotations

import json
from pathlib import Path

VARIABLE = "KVSHARE_SERVER_STATUS"
"""Path of the file that `kvshare server --status` writes."""


def read(path: str | None) -> dict[str, int] | None:
    """The counters last written to ``path``; None if there is no such file on this host."""
    return json.loads(Path(path).read_text()) if path and Path(path).is_file() else None
