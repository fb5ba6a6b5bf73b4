"""Hold the memory of P2P loads that were not answered, until the other replica can no longer write to it.

The replica writes into memory that the load names. LMCache 0.5.6 frees that memory after a timeout. The replica may be
slow or stopped, and write later: into the KV of other tokens. The load's answer says that the write is over, however
late it comes. So does the end of the connection, because the replica has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

logger = logging.getLogger(__name__)

SHARE = 0.25
"""Fraction of LMCache's local memory that may be held. Above it, nothing is loaded from other replicas."""

WATCHED = zmq.EVENT_CONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_DISCONNECTED


class Unanswered(Exception):
    """A replica did not answer a load, and may still write to ``memory``, LMCache's memory objects."""

    def __init__(self, memory: list[Any]) -> None:
        super().__init__("no answer to a load")
        self.memory = memory


class Held:
    """Memory of unanswered loads, by the address of the replica that may write to it.

    Args:
        limit: bytes.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._memory: dict[str, list[Any]] = {}
        self._tasks: set[asyncio.Task] = set()

    def __contains__(self, address: str) -> bool:
        return address in self._memory

    def full(self) -> bool:
        return self.bytes() > self._limit

    def bytes(self) -> int:
        return sum(memory.get_size() for held in self._memory.values() for memory in held)

    def hold(self, address: str, memory: list[Any]) -> None:
        was_full = self.full()
        self._memory.setdefault(address, []).extend(memory)
        if self.full() and not was_full:
            logger.error(
                "%.1f MiB of LMCache's memory wait for replicas that do not answer: no KV is loaded from any replica "
                "until they answer or end",
                self.bytes() / 2**20,
            )

    def hold_until_over(self, address: str, memory: list[Any], socket: Any) -> None:
        """Hold memory until the load's answer comes through ``socket``, or the connection ends. Closes the socket."""
        self.hold(address, memory)
        task = asyncio.ensure_future(self._free(address, socket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _free(self, address: str, socket: Any) -> None:
        await _over(socket)
        close(socket)
        for memory in self._memory.pop(address):
            memory.ref_count_down()
        logger.error("the replica at %s has answered or ended: the memory of its load is free again", address)


def watch(socket: Any) -> None:
    """Notice from now on whether ``socket`` is connected."""
    _events(socket)


def _events(socket: Any) -> list[int]:
    """What has happened to the connection of a socket since the last call, oldest first."""
    monitor, events = socket.get_monitor_socket(WATCHED), []
    while monitor.get(zmq.EVENTS) & zmq.POLLIN:
        events.append(parse_monitor_message(zmq.Socket.shadow(monitor).recv_multipart())["event"])
    return events


async def _over(socket: Any) -> None:
    """Wait until the replica that was asked has answered or ended, or the load has not been sent.

    A load for a replica that is not connected is sent when it is. Closing the socket drops it.
    """
    while not socket.get(zmq.EVENTS) & zmq.POLLOUT:  # a REQ socket can send while no answer is outstanding
        events = _events(socket)
        if zmq.EVENT_DISCONNECTED in events or events[-1:] == [zmq.EVENT_CONNECT_RETRIED]:
            return
        with contextlib.suppress(zmq.Again):  # after the socket's RCVTIMEO
            await socket.recv()


def close(socket: Any) -> None:
    """Close a socket that is watched."""
    monitor = socket.get_monitor_socket()
    socket.disable_monitor()
    monitor.close(linger=0)
    socket.close(linger=0)
