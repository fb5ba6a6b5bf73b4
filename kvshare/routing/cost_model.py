"""Estimates when loading a prefix is faster than computing it, from rates that an engine has reached."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TypedDict


class Pace(TypedDict):
    """What an engine can do. None stands for a value that is not known yet."""

    prefill: float | None  # tokens per second
    load: float | None  # tokens per second, from LMCache
    delay: float | None  # seconds from the end of a prefill until others can find it
    decode: float | None  # tokens per second, for one request
    response: float | None  # mean tokens of an answer


ENOUGH = 16  # measurements before a rate is used: the first steps of a run are slow


class Rates:
    """Keeps the last 64 measurements of each rate and reports the best, because slower ones include waiting."""

    def __init__(self) -> None:
        self._prefill, self._load, self._delay, self._decode = (deque[float](maxlen=64) for _ in range(4))
        self._response = deque[int](maxlen=256)
        self._prompts = deque[tuple[int, float, float]](maxlen=256)

    def prefilled(self, tokens: int, asked: float, answered: float) -> float:
        """Record a prefill and return the engine's prefill rate during it, in tokens per second.

        Tokens that the engine computed for other requests in that time count too, because requests wait for each other.

        Args:
            tokens: tokens of the prompt that were computed.
            asked: when the request was sent; any clock, in seconds.
            answered: when its first token came, by the same clock.
        """
        self._prompts.append((tokens, asked, answered))
        meanwhile = sum(_share(prompt, asked, answered) for prompt in self._prompts)
        rate = meanwhile / (answered - asked)
        self._prefill.append(rate)
        return rate

    def loaded(self, tokens: int, seconds: float) -> None:
        self._load.append(tokens / seconds)

    def stored(self, delay: float) -> None:
        self._delay.append(max(0.0, delay))

    def answered(self, tokens: int, seconds: float) -> None:
        """Record an answer of ``tokens`` tokens, with ``seconds`` from its first token to its last."""
        self._response.append(tokens)
        if tokens > 1 and seconds > 0:
            self._decode.append((tokens - 1) / seconds)

    def pace(self) -> Pace:
        return {
            "prefill": _best(max, self._prefill),
            "load": _best(max, self._load),
            "delay": _best(min, self._delay),
            "decode": _best(max, self._decode),
            "response": sum(self._response) / len(self._response) if self._response else None,
        }


def _share(prompt: tuple[int, float, float], begin: float, end: float) -> float:
    """Tokens of a prompt that were computed between two times, assuming a constant rate."""
    tokens, asked, answered = prompt
    return tokens * max(0.0, min(end, answered) - max(begin, asked)) / (answered - asked)


def _best(choose: Callable[[deque[float]], float], seen: deque[float]) -> float | None:
    return choose(seen) if len(seen) >= ENOUGH else None


UNKNOWN = Pace(prefill=None, load=None, delay=None, decode=None, response=None)


def worth(rate: float | None, decode: float | None, guess: float) -> float:
    """Time of a token at ``rate`` as a fraction of the time to decode one, at most 1; ``guess`` if unknown."""
    return min(1.0, decode / rate) if rate and decode else guess


def break_even(pace: Pace) -> float:
    """Length in tokens above which loading a prefix is faster than computing it; infinite if it never is.

    Computing takes ``n / prefill`` seconds. Waiting for another replica and loading takes ``delay + n / load``. The
    result is 0 while one of the three is unknown, because only sharing can measure them.
    """
    prefill, load, delay = pace["prefill"], pace["load"], pace["delay"]
    if prefill is None or load is None or delay is None:
        return 0.0
    return delay / (1 / prefill - 1 / load) if load > prefill else math.inf
