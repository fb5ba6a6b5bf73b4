"""Estimates how long a request takes on a server, from rates that the engines have reached."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypedDict


class Pace(TypedDict):
    """What an engine can do. None stands for a value that is not known yet."""

    prefill: float | None  # tokens per second
    load: float | None  # tokens per second, from LMCache
    delay: float | None  # seconds from the end of a prefill until others can find it
    step: float | None  # seconds of a decode step that reads no KV
    context: float | None  # seconds by which a step is longer for each token of the prompts whose KV it reads
    response: float | None  # mean tokens of an answer
    stall: float | None  # 1 if an engine does nothing else while it loads, 0 if it loads in the background


ENOUGH = 4  # measurements before a rate is used: the first steps of a run are slow


class Rates:
    """Keeps the last 64 measurements of each rate. Reports the best of those that include waiting."""

    def __init__(self) -> None:
        self.stall: float | None = None
        self._prefill, self._load, self._delay = (deque[float](maxlen=64) for _ in range(3))
        self._steps = deque[tuple[float, float]](maxlen=256)  # prompt tokens read, seconds
        self._response = deque[int](maxlen=256)
        self._prompts = deque[tuple[int, float, float]](maxlen=256)
        self._read, self._read_seconds, self._since = 0, 0.0, 0.0  # prompt tokens now, and their integral

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

    def decoding(self, tokens: int, now: float) -> float:
        """Record that decode steps read the KV of ``tokens`` more prompt tokens from now on; fewer, if negative.

        Returns the integral over time so far of the tokens that they read, in token seconds.
        """
        self._read_seconds += self._read * (now - self._since)
        self._read, self._since = self._read + tokens, now
        return self._read_seconds

    def answered(self, tokens: int, seconds: float, read_seconds: float) -> None:
        """Record an answer.

        Args:
            tokens: its tokens.
            seconds: from its first token to its last.
            read_seconds: what ``decoding`` returned at its last token, less what it returned at its first.
        """
        self._response.append(tokens)
        if tokens > 1 and seconds > 0:
            self._steps.append((read_seconds / seconds, seconds / (tokens - 1)))

    def pace(self) -> Pace:
        step, context = _line(self._steps) if len(self._steps) >= ENOUGH else (None, None)
        return {
            "prefill": _known(max, self._prefill),
            "load": _known(max, self._load),
            "delay": _known(statistics.median, self._delay),
            "step": step,
            "context": context,
            "response": sum(self._response) / len(self._response) if self._response else None,
            "stall": self.stall,
        }


def _share(prompt: tuple[int, float, float], begin: float, end: float) -> float:
    """Tokens of a prompt that were computed between two times, assuming a constant rate."""
    tokens, asked, answered = prompt
    return tokens * max(0.0, min(end, answered) - max(begin, asked)) / (answered - asked)


def _known(choose: Callable[[deque[float]], float], seen: deque[float]) -> float | None:
    return choose(seen) if len(seen) >= ENOUGH else None


UNKNOWN = Pace(prefill=None, load=None, delay=None, step=None, context=None, response=None, stall=None)

ASSUMED = {
    "prefill": 10_000.0,
    "load": 100_000.0,
    "delay": 0.02,
    "step": 0.01,
    "context": 2e-8,
    "response": 256.0,
    "stall": 1.0,
}
"""Rates until they are measured, in a proportion that favours sharing: only sharing can measure what it costs."""


def _line(points: deque[tuple[float, float]]) -> tuple[float, float]:
    """Step and context of a pace: the line through points (least squares).

    Points that are too close to each other, as of a server that always has as much to do, give no line. Then both are
    in the proportion of the assumed ones.
    """
    xs, ys = zip(*points, strict=True)
    if statistics.pstdev(xs) > 0.1 * statistics.fmean(xs):
        slope, intercept = statistics.linear_regression(xs, ys)
        if slope >= 0 and intercept >= 0:
            return intercept, slope
    step = statistics.fmean(y / (1 + x * ASSUMED["context"] / ASSUMED["step"]) for x, y in points)
    return step, step * ASSUMED["context"] / ASSUMED["step"]


def expected(pace: Pace) -> dict[str, float]:
    """The rates of a pace, the assumed ones where nothing is known."""
    return ASSUMED | {name: value for name, value in pace.items() if isinstance(value, int | float)}


class Cost(NamedTuple):
    """Seconds that a request takes on a server, and that it takes from the other requests there."""

    wait: float  # until its prompt's turn
    prompt: float  # to compute and load the prompt
    stall: float  # that others stand still meanwhile, in sum
    answer: float  # to generate the answer, and by which others generate theirs later, in sum

    @property
    def total(self) -> float:
        return self.wait + self.prompt + self.stall + self.answer


def cost(
    rate: dict[str, float],
    requests: float,
    context: float,
    *,
    stalled: float,
    wait: float,
    compute: int,
    load: int,
    prompt: int,
) -> Cost:
    """The cost of a request on a server.

    Each decode step reads the KV of all requests, so it takes longer with them. And so do theirs with it, for the half
    of an answer that is left to them on average.

    Args:
        rate: ``expected()`` of the engine.
        requests: requests on the server.
        context: tokens of their prompts.
        stalled: requests that stand still while the prompt is computed, and, with some backends, loaded.
        wait: seconds until the prompt's turn.
        compute: tokens of the prompt to compute.
        load: tokens of the prompt to load.
        prompt: all tokens of the prompt.
    """
    computing, loading = compute / rate["prefill"], load / rate["load"]
    stall = (computing + loading * rate["stall"]) * stalled
    own = rate["step"] + rate["context"] * (context + prompt)
    others = requests / 2 * rate["context"] * prompt
    return Cost(wait, computing + loading, stall, rate["response"] * (own + others))


def break_even(pace: Pace) -> float:
    """Length in tokens above which loading a prefix is faster than computing it; infinite if it never is.

    Computing takes ``n / prefill`` seconds. Waiting for another replica and loading takes ``delay + n / load``. The
    result is 0 while one of the three is unknown, because only sharing can measure them.
    """
    prefill, load, delay = pace["prefill"], pace["load"], pace["delay"]
    if prefill is None or load is None or delay is None:
        return 0.0
    return delay / (1 / prefill - 1 / load) if load > prefill else math.inf
