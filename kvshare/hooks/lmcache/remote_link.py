"""A socket whose operations end within a deadline."""

from __future__ import annotations

import socket
import time
from typing import Any


class Link:
    """A connected socket.

    Args:
        deadline: on the clock of ``time.monotonic``. It can be set anew for each operation.
    """

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self.socket, self.deadline = connected, deadline

    def close(self) -> None:
        self.socket.close()

    def send(self, data: Any) -> None:
        self.socket.settimeout(left(self.deadline))
        self.socket.sendall(data)

    def receive(self, into: Any) -> None:
        view = memoryview(into)
        while view:
            self.socket.settimeout(left(self.deadline))
            count = self.socket.recv_into(view)
            if not count:
                raise ConnectionError("the server closed the connection")
            view = view[count:]


def left(deadline: float) -> float:
    """Seconds until ``deadline``.

    Raises:
        TimeoutError: it is over.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("no answer in time")
    return seconds
