"""When is it faster to load a prefix than to compute it? From what an engine was seen to do."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TypedDict


class Pace(TypedDict):
    """None is not known yet."""

    prefill: float | None  # tokens a second
    load: float | None  # tokens a second, from LMCache
    delay: float | None  # seconds from the end of a prefill until others can find it
    decode: float | None  # tokens a second, of one request
    response: float | None  # tokens of an answer, on average


ENOUGH = 16  # of each, before it counts: the first steps of a run are slow


class Rates:
    """The best of the last 64 of each: what was slower than that had to wait for others."""

    def __init__(self) -> None:
        self._prefill, self._load, self._delay, self._decode = (deque[float](maxlen=64) for _ in range(4))
        self._response = deque[int](maxlen=256)
        self._prompts = deque[tuple[int, float, float]](maxlen=256)

    def prefilled(self, tokens: int, asked: float, answered: float) -> float:
        """Tokens computed of a prompt, from when it was asked to its first token, by any clock; returns the rate.

        What the engine computed of others meanwhile counts too: on a busy one a request waits for many.
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
        """Args: tokens of the answer; seconds from its first token to its last."""
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
    """How many of a prompt's tokens were computed between two times, if it went on evenly."""
    tokens, asked, answered = prompt
    return tokens * max(0.0, min(end, answered) - max(begin, asked)) / (answered - asked)


def _best(choose: Callable[[deque[float]], float], seen: deque[float]) -> float | None:
    return choose(seen) if len(seen) >= ENOUGH else None


UNKNOWN = Pace(prefill=None, load=None, delay=None, decode=None, response=None)


def worth(rate: float | None, decode: float | None, guess: float) -> float:
    """What a token prefilled or loaded at ``rate`` takes of the time of one generated; at most 1."""
    return min(1.0, decode / rate) if rate and decode else guess


def break_even(pace: Pace) -> float:
    """Tokens from which loading a prefix is faster than computing it; infinite if it never is.

    Computing takes ``n / prefill`` seconds, waiting for another's and loading it ``delay + n / load``.
    0 as long as one of them is not known: the first prefixes are how they become known.
    """
    prefill, load, delay = pace["prefill"], pace["load"], pace["delay"]
    if prefill is None or load is None or delay is None:
        return 0.0
    return delay / (1 / prefill - 1 / load) if load > prefill else math.inf
