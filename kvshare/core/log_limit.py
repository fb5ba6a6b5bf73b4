"""Keeps a fault that comes with each request from filling the log."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

EVERY = 60.0  # seconds


class LimitedLogger(logging.LoggerAdapter):
    """Logs a message at once, then at most once a minute, with the number of times it was left out.

    Messages are told apart by their text before ``%`` formatting, and by their first argument if that is a string: the
    server or replica that is meant. Use it for what an entry, an event or a request can repeat, and the plain logger
    for a change of state, whose last line must not be missing.
    """

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger, {})
        self._lock = threading.Lock()
        self._logged: dict[Any, tuple[float, int]] = {}  # when, and how often it was left out since

    def log(self, level: int, msg: Any, *args: Any, **kwargs: Any) -> None:
        which = msg, args[0] if args and isinstance(args[0], str) else None
        with self._lock:
            now = time.monotonic()
            at, left_out = self._logged.get(which, (now - EVERY, 0))
            if now < at + EVERY:
                self._logged[which] = at, left_out + 1
                return
            self._logged[which] = now, 0
        if left_out:
            msg, args = f"{msg} (and %d times since this was last logged)", (*args, left_out)
        super().log(level, msg, *args, **{"stacklevel": 2, **kwargs})
