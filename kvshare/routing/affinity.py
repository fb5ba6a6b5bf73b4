"""A router that sends all samples of a prompt to one replica: the simplest way to compute a prompt once."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import ray
from cachetools import LRUCache
from verl.workers.rollout.router import GlobalRequestLoadBalancer

from kvshare.routing.digests import token_ids

REMEMBERED = 10_000  # prompts


class AffinityRouter(GlobalRequestLoadBalancer):
    """Places a new prompt on the replica with the fewest requests, and its other samples on the same one.

    Args:
        servers: actor handle of each rollout server by address.
        config: the router YAML. A replica that has ``max_imbalance`` more requests than another takes no further
            samples of its prompts: they go to the replica with the fewest from then on. With ``full_determinism`` only
            the request id decides the placement, as in verl's own router.
    """

    def __init__(self, servers: dict[str, Any], config: dict[str, Any] | None = None) -> None:
        config = config or {}
        super().__init__(servers, full_determinism=bool(config.get("full_determinism")))
        self._max_imbalance = int(config.get("max_imbalance", 64))
        self._prompts: LRUCache = LRUCache(maxsize=REMEMBERED)  # digest -> server

    def require_acquire_fields(self) -> list[str]:
        return ["prompt_ids"]

    def acquire_server(self, request_id: str, prompt_ids: Any = None) -> tuple[str, Any]:
        prompt = hashlib.sha256(array("i", token_ids(prompt_ids))).digest()
        if request_id not in self._request_id_to_server and self._has_room(self._prompts.get(prompt)):
            self._request_id_to_server[request_id] = self._prompts[prompt]
        name, handle = super().acquire_server(request_id)
        self._prompts[prompt] = name
        return name, handle

    def _has_room(self, name: str | None) -> bool:
        least = min(self._inflight_requests.values(), default=0)
        return name in self._inflight_requests and self._inflight_requests[name] < least + self._max_imbalance


Router = ray.remote(AffinityRouter)
