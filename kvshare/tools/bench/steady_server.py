"""What the router asks of a rollout server (``KVShareServer``), answered for an engine whose weights never change."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from kvshare.core import policy
from kvshare.routing.cost_model import Pace, Rates
from kvshare.routing.prefixes import StoredPrefixes

POLICY = policy.policy_id(policy.new_run(), 0)


class SteadyServer:
    """Subclasses run the requests, and report them to ``_prefixes`` and ``_rates``."""

    def __init__(self) -> None:
        self._prefixes, self._rates = StoredPrefixes(), Rates()

    async def image_placeholders(self) -> list[int]:
        return []

    async def wait_policy_change(self, known: str | None) -> tuple[str, Pace]:
        if known == POLICY:
            await asyncio.Event().wait()  # never
        return POLICY, self._rates.pace()

    async def wait_prefix_stored(self, policy: str, prefix: str, seconds: float) -> tuple[bool, Pace]:
        return await self._prefixes.wait((policy, prefix), seconds), self._rates.pace()


class Handle:
    """``handle.method.remote(…)``, as of a Ray actor."""

    def __init__(self, server: SteadyServer) -> None:
        self._server = server

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._server, name))
