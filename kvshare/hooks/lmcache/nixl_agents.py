"""Create NIXL agents whose progress thread sleeps, or that have none.

NIXL's progress thread uses a full core in each worker, even when idle (NIXL 1.5.1). A delay lets the thread sleep, but
not while a connection waits for the other side: UCX then polls a socket that is always writable. vLLM's worker spins
too. The two threads take two cores, and without a third core the other replica cannot answer. So on CPU there is no
progress thread, and LMCache's event loop drives NIXL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import wrapt

from kvshare.hooks import check
from kvshare.hooks.patch import optional, put

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 0.001
"""How often NIXL checks for messages of other replicas. The progress thread may check more often."""

RETRY_SECONDS = 5.0  # after an error of NIXL


@optional("NIXL's progress thread uses a full core in each worker")
def patch_nixl(module: Any) -> None:
    try:
        from nixl import _api
    except ImportError:
        return  # LMCache reports this itself
    # nixlAgent is compiled, so the check covers the function that calls it.
    known = {"bf0513d85ff3": "1.5.1"}
    check.source(_api, "nixl_agent.__init__", known)
    put(_api.nixlBind, "nixlAgent", wrapt.FunctionWrapper(_api.nixlBind.nixlAgent, _create_agent), known)


_thread: ContextVar[bool | None] = ContextVar("_thread", default=None)


@contextmanager
def nixl_agents(thread: bool) -> Iterator[None]:
    """Create NIXL agents within this context with a sleeping progress thread, or with none."""
    token = _thread.set(thread)
    try:
        yield
    finally:
        _thread.reset(token)


def _create_agent(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    if (thread := _thread.get()) is not None:
        config = args[1]
        config.useProgThread, config.pthrDelay = thread, int(PROGRESS_SECONDS * 1e6)
    return wrapped(*args, **kwargs)


async def progress(agent: Any, running: asyncio.Event) -> None:
    """Drive an agent without a progress thread, as long as ``running`` is set."""
    while running.is_set():
        pause = PROGRESS_SECONDS
        try:
            agent.get_new_notifs()  # this call drives UCX; LMCache sends no notifications
        except Exception:
            logger.exception("NIXL makes no progress: KV of other replicas is recomputed until it does")
            pause = RETRY_SECONDS
        await asyncio.sleep(pause)
