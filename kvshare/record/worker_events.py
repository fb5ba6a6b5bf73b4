"""Events from vLLM's worker processes to whoever started the engine, over a zmq socket on this host.

An event is a small dict: ``{"op": "ready" | "store" | "stored" | "load", …}`` (see hooks/lmcache/events.py).
Sending never blocks and never raises: an event that cannot be sent at once is dropped. Who receives passes
over what is no event, with a line in the log: anybody on this host may send.
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

logger = logging.getLogger(__name__)

ADDRESS = "KVSHARE_EVENTS"
"""Environment variable with the zmq address events go to; unset: nobody listens, nothing is sent."""

REQUEST = "lmcache.request_id"
"""Request config with the caller's own request id (vLLM's internal ids differ from it)."""


class Sender:
    def __init__(self, address: str) -> None:
        self._lock = threading.Lock()  # LMCache completes remote puts on a thread of its own
        self._socket: zmq.Socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)

    def send(self, event: dict[str, Any]) -> None:
        try:
            with self._lock:
                self._socket.send(json.dumps(event).encode(), zmq.NOBLOCK)
        except zmq.ZMQError:
            pass


@lru_cache(maxsize=1)
def sender() -> Sender | None:
    """This process's sender, or None if nobody listens."""
    address = os.environ.get(ADDRESS)
    return Sender(address) if address else None


class _Event(msgspec.Struct, tag_field="op", tag=str.lower): ...


class Ready(_Event): ...


class _OfRequest(_Event):
    request: str | None
    policy: str


class Store(_OfRequest):
    keys: list[int]


class Stored(_OfRequest):
    end: int
    seconds: float


class Load(_OfRequest):
    keys: list[int]
    tokens: list[int]
    expected: int
    seconds: Annotated[float, msgspec.Meta(gt=0)]

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.tokens):
            raise ValueError("as many tokens as keys")


_decoder = msgspec.json.Decoder(Ready | Store | Stored | Load)


class Receiver:
    """Bound to an address of its own (an abstract Unix socket: it leaves no file behind)."""

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
                # Not a warning: vLLM's API server silences all below an error in its process.
                logger.error("%s: passed over %.80r, which is no event: %s", self.address, message, error)
