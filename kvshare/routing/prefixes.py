"""Tracks when other replicas can find a prefix."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from cachetools import LRUCache

Key = tuple[str, str]  # policy, digest of a prefix


@dataclass
class Prefill:
    """A running request whose prefix other requests may be waiting for."""

    policy: str
    prefix: str  # last of chunk_digests; empty if the prompt is shorter than a chunk
    tokens: int  # length of the prefix
    storing: int = 0  # store() calls whose KV has not arrived yet
    ended: bool = False

    @property
    def key(self) -> Key:
        return self.policy, self.prefix


class StoredPrefixes:
    """Knows when other replicas can find the prefix of a request, and lets requests wait for that."""

    def __init__(self, remember: int = 10_000) -> None:
        self._stored: LRUCache = LRUCache(maxsize=remember)  # Key -> True
        # By request id. A lost event leaves a prefill here after its request has ended.
        self._prefills: LRUCache = LRUCache(maxsize=remember)
        self._waiting: dict[Key, set[asyncio.Future[bool]]] = {}

    async def wait(self, key: Key, seconds: float) -> bool:
        """True once others can find the prefix; False if it will not be stored, or after ``seconds``."""
        if key in self._stored:
            return True
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, set()).add(future)
        try:
            return await asyncio.wait_for(future, seconds)
        except TimeoutError:
            return False
        finally:
            self._stop_waiting(key, future)

    def started(self, request: str, prefill: Prefill) -> None:
        if prefill.prefix:
            self._prefills[request] = prefill

    def first_token(self, request: str, cached: int) -> None:
        """The prefill is done. If ``cached`` tokens cover the prefix, others can find it already."""
        prefill = self._prefills.get(request)
        if prefill and cached >= prefill.tokens:
            self._resolve(prefill.key, True)

    def storing(self, request: str) -> None:
        if prefill := self._prefills.get(request):
            prefill.storing += 1

    def stored(self, request: str, end: int) -> None:
        """One store() has finished: the request's first ``end`` tokens are stored. 0 means that it failed."""
        if prefill := self._prefills.get(request):
            prefill.storing -= 1
            if not end:
                self._resolve(prefill.key, False)
            elif end >= prefill.tokens and not prefill.storing:
                self._resolve(prefill.key, True)
            self._forget_if_over(request, prefill)

    def ended(self, request: str) -> None:
        """The request ended, with or without success. Its running stores may still finish."""
        if prefill := self._prefills.get(request):
            prefill.ended = True
            self._forget_if_over(request, prefill)

    def give_up(self) -> None:
        """Tell all waiting requests that their prefixes will not be stored, because the weights change."""
        for key in list(self._waiting):
            self._resolve(key, False)

    def _stop_waiting(self, key: Key, future: asyncio.Future[bool]) -> None:
        if waiting := self._waiting.get(key):
            waiting.discard(future)
            if not waiting:
                del self._waiting[key]

    def _forget_if_over(self, request: str, prefill: Prefill) -> None:
        if prefill.ended and not prefill.storing:
            del self._prefills[request]
            self._resolve(prefill.key, False)

    def _resolve(self, key: Key, stored: bool) -> None:
        if stored:
            self._stored[key] = True
        for future in self._waiting.pop(key, ()):
            if not future.done():
                future.set_result(stored)
