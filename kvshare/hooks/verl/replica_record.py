"""Follows what the workers of a replica report, and writes the event log: who is ready, what is stored and loaded."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Any

from kvshare.hooks.verl.loads import Loads
from kvshare.hooks.verl.trajectory import Stamp
from kvshare.record import worker_events
from kvshare.record.event_log import RUN_DIR, EventLog
from kvshare.record.events import ABORT
from kvshare.routing.cost_model import Rates
from kvshare.routing.prefixes import StoredPrefixes

logger = logging.getLogger(__name__)

READY_SECONDS = 10
"""Seconds from the start of all engines of a replica until a missing ``ready`` event is logged as an error."""


class ReplicaRecord:
    """What is known of the workers on one node of a replica, and of the requests that they run.

    Args:
        replica_rank: of the replica.
        node_rank: verl starts a server on each node of a replica.
        workers: ranks of the workers on this node.
    """

    def __init__(self, replica_rank: int, node_rank: int, workers: range) -> None:
        self.prefixes = StoredPrefixes()
        self.rates = Rates()
        self.ready = asyncio.Event()
        self._replica_rank = replica_rank
        self._not_ready = set(workers)
        self._loads = Loads()
        self._events = worker_events.Receiver()
        self._event_log = EventLog(replica_rank, os.environ.get(RUN_DIR), node_rank)

    @property
    def address(self) -> str:
        """Where the workers send their events."""
        return self._events.address

    async def follow(self) -> None:
        while True:
            self.record(await self._events.receive())

    def record(self, event: dict[str, Any]) -> None:
        op, request = event.pop("op"), event.get("request") or ""
        self._event_log.lost(event.pop("dropped", 0))
        if op == "ready":
            self._not_ready.discard(event["rank"])
            if self._not_ready:
                return
            self.ready.set()
        elif op == "store":
            self.prefixes.storing(request)
        elif op == "stored":
            self.rates.stored(event["seconds"])
            self.prefixes.stored(request, event["end"])
            return
        elif op == "partial":
            self._loads.partial(event)
            return
        elif op == "load":
            if event["tokens"]:
                self.rates.loaded(sum(event["tokens"]), event["seconds"])
            if self._loads.loaded(event):
                return
        self._event_log.write(op, **event)

    async def check_ready(self) -> None:
        """Report workers whose LMCache has not started in time."""
        try:
            await asyncio.wait_for(self.ready.wait(), READY_SECONDS)
        except TimeoutError:
            ranks = sorted(self._not_ready)
            self._event_log.write("degraded", ranks=ranks)
            logger.error(
                "replica %d shares NO KV: LMCache did not start on rank %s, or LMCache's server does not answer. "
                "Search the replica's log for 'degraded mode' and 'does not answer'. Training continues without it",
                self._replica_rank,
                ", ".join(map(str, ranks)),
            )
            await self.ready.wait()
            logger.error("LMCache has started in replica %d: it shares KV from here on", self._replica_rank)

    # -- requests -----------------------------------------------------------------------------

    def started(self, request_id: str) -> None:
        self._loads.started(request_id)

    def first_token(self, request_id: str, output: Any, asked: float, answered: float) -> float:
        """Record the first token. Returns the prefill rate since the request was sent, in tokens per second."""
        cached = output.num_cached_tokens or 0
        # Without LMCache nothing is stored. Counting all tokens as cached ends the wait of other requests.
        self.prefixes.first_token(request_id, cached if self.ready.is_set() else sys.maxsize)
        return self.rates.prefilled(len(output.prompt_token_ids or ()) - cached, asked, answered)

    def ended(self, request_id: str, stamp: Stamp, output: Any, prefill: float | None) -> None:
        """Write a request and its loads.

        Args:
            output: its last one; None if it has failed.
            prefill: prefill rate in tokens per second; None if it has no first token.
        """
        self.prefixes.ended(request_id)
        for load in self._loads.ended(request_id):
            self._event_log.write("load", **load)
        if output is not None:
            self._event_log.write(
                "request",
                policy=stamp.policy,
                versions=stamp.versions,
                prompt=len(output.prompt_token_ids or ()),
                cached=output.num_cached_tokens or 0,
                prefill=prefill,
                generated=generated(output),
                request=request_id,
                finish=output.outputs[0].finish_reason if output.outputs else ABORT,
            )


def generated(output: Any) -> int:
    """Tokens that a request has generated."""
    return sum(len(one.token_ids) for one in output.outputs)
