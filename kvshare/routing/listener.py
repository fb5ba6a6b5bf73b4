"""Follows what each rollout server says of itself: its policy, its rates and its image placeholders."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import statistics
from collections.abc import Callable
from typing import Any

from kvshare.routing.cost_model import UNKNOWN, Pace, expected
from kvshare.routing.placement import Server

logger = logging.getLogger(__name__)

RETRY = (1, 2, 4, 8, 16, 30)
"""Seconds until a server that did not answer is asked again; the last one from then on."""


class Listener:
    """Keeps a call open to each server, which returns when the server's policy changes.

    Args:
        state: by server, updated with what is heard.
        changed: called with a server's name when its policy has changed, and when nothing is heard of it any more.
    """

    def __init__(self, state: dict[str, Server], changed: Callable[[str], None]) -> None:
        self.pace: Pace = UNKNOWN.copy()  # the median of what servers report
        self.rate = expected(self.pace)
        self._paces: dict[str, Pace] = {}
        self.placeholders: set[int] = set()
        self.silent: set[str] = set()  # servers that do not answer
        self._state, self._changed = state, changed
        self._tasks: dict[str, asyncio.Task] = {}
        self._news = asyncio.Event()  # set and replaced with each report

    async def hear_all(self, handles: dict[str, Any], until: float) -> None:
        """Start to follow servers. Wait until each has reported once, or until ``until`` on the event loop's clock."""
        for name, handle in handles.items():
            if name not in self._tasks:
                self._tasks[name] = asyncio.ensure_future(self._follow(name, handle))
        unheard = [server for server in self._state.values() if not server.heard.is_set()]
        if unheard:
            hearing = asyncio.gather(*(server.heard.wait() for server in unheard))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(hearing, until - asyncio.get_running_loop().time())
            for server in unheard:
                server.heard.set()

    async def wait_resumed(self, until: float) -> None:
        """Wait while all servers are paused or load weights, or until ``until``: none would take a request before."""
        clock = asyncio.get_running_loop().time
        while self._state and all(server.policy is None for server in self._state.values()) and not self.silent:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), until - clock())
            if clock() >= until:
                break

    def heard(self, name: str, pace: Pace) -> None:
        self._paces[name] = pace
        for rate in pace:
            known = [value for other in self._paces.values() if (value := other[rate]) is not None]  # type: ignore[literal-required]
            self.pace[rate] = statistics.median(known) if known else None  # type: ignore[literal-required]
        self.rate = expected(self.pace)

    def forget(self, name: str) -> None:
        self._paces.pop(name, None)
        self.silent.discard(name)
        if task := self._tasks.pop(name, None):
            task.cancel()

    async def _follow(self, name: str, handle: Any) -> None:
        failed = 0
        while True:
            known: str | None = ""  # no server's policy, so the first call returns at once
            try:
                self.placeholders |= set(await handle.image_placeholders.remote())
                while True:
                    known, pace = await handle.wait_policy_change.remote(known)
                    failed = 0
                    self.heard(name, pace)
                    self.silent.discard(name)
                    self._update(name, known)
            except Exception as error:
                logger.warning(
                    "router: %s does not report its policy, no request waits for its prefixes until it does: %s",
                    name,
                    error,
                )
            self.silent.add(name)
            self._update(name, None)
            await asyncio.sleep(RETRY[min(failed, len(RETRY) - 1)])
            failed += 1

    def _update(self, name: str, policy: str | None) -> None:
        server = self._state[name]
        server.policy = policy
        server.heard.set()
        news, self._news = self._news, asyncio.Event()
        news.set()
        self._changed(name)
