"""Sends events from vLLM's worker processes to the process that started the engine, over a zmq socket on this host.

An event is a small dict: ``{"op": "ready" | "store" | "stored" | "load" | "partial", …}`` (hooks/lmcache/events.py).
Sending never blocks and never raises: an event that cannot be sent at once is dropped. The next one that is sent says
how many were ``dropped`` before it. Any process on this host can send to the socket, so the receiver checks each
message, and logs and skips a malformed one.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from functools import lru_cache
from typing import Annotated, Any
from uuid import uuid4

import msgspec
import zmq
import zmq.asyncio

from kvshare.core.log_limit import LimitedLogger

logger = LimitedLogger(logging.getLogger(__name__))

ADDRESS = "KVSHARE_EVENTS"
"""Address of the zmq socket for events. If it is not set, no events are sent."""

REQUEST = "lmcache.request_id"
"""Request config with the caller's request id, which differs from vLLM's internal id."""


class Sender:
    def __init__(self, address: str) -> None:
        self._lock = threading.Lock()  # LMCache completes remote puts on another thread
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._dropped = 0

    def send(self, event: dict[str, Any]) -> None:
        with self._lock:
            if self._dropped:
                event = {**event, "dropped": self._dropped}
            try:
                self._socket.send(json.dumps(event).encode(), zmq.NOBLOCK)
                self._dropped = 0
            except zmq.ZMQError:
                self._dropped += 1


@lru_cache(maxsize=1)
def sender() -> Sender | None:
    """The sender of this process; None if ADDRESS is not set."""
    address = os.environ.get(ADDRESS)
    return Sender(address) if address else None


class _Event(msgspec.Struct, tag_field="op", tag=str.lower, kw_only=True, omit_defaults=True):
    dropped: int = 0


class Ready(_Event):
    rank: int


class _OfRequest(_Event):
    request: str | None
    policy: str


class _WithWeights(_OfRequest):
    keys: list[int]
    epoch: int
    weights: str


class Store(_WithWeights): ...


class Stored(_OfRequest):
    end: int
    seconds: float


class Load(_WithWeights):
    tokens: list[int]
    expected: int
    seconds: Annotated[float, msgspec.Meta(gt=0)]
    kept: bool = False

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.tokens):
            raise ValueError("keys and tokens differ in length")


class Partial(_OfRequest):
    tokens: int


class StalePrefix(_OfRequest):
    tokens: int


_decoder = msgspec.json.Decoder(Ready | Store | Stored | Load | Partial | StalePrefix)


class Receiver:
    """Receives events at an address of its own. The address is an abstract Unix socket, which leaves no file behind."""

    def __init__(self) -> None:
        self.address = f"ipc://@kvshare-{uuid4().hex}"
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.PULL)
        self._socket.bind(self.address)

    async def receive(self) -> dict[str, Any]:
        while True:
            message = await self._socket.recv()
            try:
                return msgspec.to_builtins(_decoder.decode(message))
            except msgspec.DecodeError as error:
                # Not a warning, because vLLM's API server silences all levels below error in its process.
                logger.error("%s: skipped %.80r, which is not an event: %s", self.address, message, error)
