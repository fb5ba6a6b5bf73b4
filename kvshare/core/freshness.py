"""How fresh the KV of a token must be: the two modes, and how a run chooses one.

* ``strict``: a token is computed from KV of the current weights only.
* ``trajectory``: a conversation or partial rollout that began under a policy may keep the KV of that policy across
  weight updates, for a bounded number of versions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from kvshare.core.errors import UserError

MODE = "KVSHARE_FRESHNESS"
"""``strict`` (the default) or ``trajectory``."""

MAX_VERSIONS = "KVSHARE_MAX_VERSIONS"
"""With ``trajectory``: how many versions of the weights the KV of one token may come from, at most. Default 2."""

STRICT, TRAJECTORY = "strict", "trajectory"


class Freshness(NamedTuple):
    mode: str
    versions: int  # the largest number of versions; 1 if strict


def of(environment: Mapping[str, str]) -> Freshness:
    """Read the mode. Raises UserError for a value that is none."""
    mode, versions = environment.get(MODE) or STRICT, environment.get(MAX_VERSIONS) or "2"
    if mode not in (STRICT, TRAJECTORY):
        raise UserError(f"{MODE} is {mode!r}: set it to {STRICT} or {TRAJECTORY}")
    if not versions.isdecimal() or int(versions) < 2:
        raise UserError(f"{MAX_VERSIONS} is {versions!r}: set it to a number from 2 on")
    return Freshness(mode, int(versions) if mode == TRAJECTORY else 1)
