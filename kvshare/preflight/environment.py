"""What processes inherit, or do not."""

from __future__ import annotations

import os
from collections.abc import Iterator

from kvshare.preflight.job import Job


def environment(job: Job) -> Iterator[str]:
    if not os.environ.get("PYTHONHASHSEED", "").isdigit():
        yield "PYTHONHASHSEED is not a number: chunk hashes would differ between processes: export PYTHONHASHSEED=0"
