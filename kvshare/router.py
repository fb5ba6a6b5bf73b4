"""Prefill once, decode anywhere: a router for verl's ``rollout.router_config_path``.

verl sends all samples of a prompt at once and spreads them by load, so every replica prefills the
same prompt at the same moment and none finds the other's KV. Here the first request for a prefix
leads; the others wait until its replica says that the prefix is stored, then go where there is room.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import Any

import ray
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from kvshare.ledger import prefix_digest


@dataclass
class Group:
    """Requests for one prefix that are under way together."""

    leader: str
    stored: asyncio.Event = field(default_factory=asyncio.Event)
    members: int = 0


class PrefillOnceRouter(GlobalRequestLoadBalancer):
    """verl's sticky least-loaded balancer, except that followers wait for their leader.

    Args:
        servers: actor handle of each rollout server by its address.
        config: the router YAML; ``hold_seconds`` is the longest a request may be held.
    """

    def __init__(self, servers: dict[str, Any], config: dict[str, Any]) -> None:
        super().__init__(servers)
        self._hold_seconds = float(config.get("hold_seconds", 30))
        self._chunk_size = _chunk_size()
        self._groups: dict[str, Group] = {}
        self._prefix_of: dict[str, str] = {}
        self._watchers: set[asyncio.Task] = set()
        self._counts = {"leaders": 0, "held": 0, "gave_up": 0}

    def require_acquire_fields(self) -> list[str]:
        return ["prompt_ids"]

    def require_release_fields(self) -> list[str]:
        return ["request_id"]

    async def acquire_server(self, request_id: str, prompt_ids: list[int] | None = None) -> tuple[str, Any]:  # type: ignore[override]
        prefix = prefix_digest(list(prompt_ids or ()), self._chunk_size)
        if not prefix or len(self._servers) < 2:
            return super().acquire_server(request_id)
        group = self._groups.get(prefix)
        if group is None:
            group = self._groups[prefix] = Group(leader=request_id)
        group.members += 1
        self._prefix_of[request_id] = prefix
        try:
            if group.leader != request_id:
                await self._hold(group)
                return super().acquire_server(request_id)
            self._counts["leaders"] += 1
            server_id, server = super().acquire_server(request_id)
            self._watch(group, server, prefix)
            return server_id, server
        except BaseException:  # no server, or the caller is gone: there will be no release
            self._leave(request_id)
            raise

    def release_server(self, server_id: str, request_id: str | None = None) -> None:
        super().release_server(server_id, request_id)
        self._leave(request_id)

    def _leave(self, request_id: str | None) -> None:
        prefix = self._prefix_of.pop(request_id or "", None)
        group = self._groups.get(prefix or "")
        if group is None:
            return
        group.members -= 1
        if group.leader == request_id:
            group.stored.set()  # it has ended, well or not: nobody waits for it
        if group.members == 0:
            del self._groups[prefix or ""]

    def _watch(self, group: Group, server: Any, prefix: str) -> None:
        async def watch() -> None:
            try:
                await server.wait_prefix_stored.remote(prefix, self._hold_seconds)
            finally:  # a server that died stores nothing either
                group.stored.set()

        task = asyncio.ensure_future(watch())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

    async def _hold(self, group: Group) -> None:
        if group.stored.is_set():
            return
        self._counts["held"] += 1
        try:
            await asyncio.wait_for(group.stored.wait(), self._hold_seconds)
        except TimeoutError:
            self._counts["gave_up"] += 1
            group.stored.set()

    def get_status(self) -> dict:
        return {**super().get_status(), **self._counts}


def _chunk_size() -> int:
    from lmcache.v1.config import load_engine_config_with_overrides

    return load_engine_config_with_overrides(config_file_path=os.environ.get("LMCACHE_CONFIG_FILE")).chunk_size


# Held requests are pending calls of this actor: Ray's default of 1,000 at once would block releases.
Router = ray.remote(max_concurrency=1_000_000)(PrefillOnceRouter)  # type: ignore[call-overload]
