"""What is asked in a rollout: batches of prompts with answers of different length, and conversations."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

from kvshare.core.errors import UserError

Turn = tuple[int, int, float]
"""Tokens of the prompt and of the answer, and seconds until the next turn."""
Conversation = tuple[int, list[Turn]]
"""Which prompt, and its turns: each has all tokens of the one before it."""

FORMS = "batch:PROMPTS:N:TOKENS:MEDIAN:MOST, talks:COUNT:FIRST:MORE or talks:COUNT:FIRST:MORE:TURNS"
FIELDS = {"batch": (5,), "talks": (3, 4)}


@dataclass(frozen=True)
class Workload:
    """``batch``: all samples of all prompts at once, answers of ``median`` tokens and at most ``most``.

    ``talks``: conversations of two to seven turns, or of ``turns`` each, the first of ``first`` tokens, the next of
    ``more`` more each.
    """

    kind: str
    numbers: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Workload:
        kind, *numbers = text.split(":")
        fits = len(numbers) in FIELDS.get(kind, ())
        if not fits or not all(number.isdecimal() and int(number) for number in numbers):
            raise UserError(f"--rollout {text!r} must be {FORMS}, in whole numbers from 1")
        return cls(kind, tuple(map(int, numbers)))

    def __str__(self) -> str:
        return ":".join([self.kind, *map(str, self.numbers)])

    def conversations(self, seed: int) -> list[Conversation]:
        """The same ones for the same seed. A sample of a batch is a conversation of one turn."""
        rng = random.Random(seed)
        if self.kind == "batch":
            count, n, tokens, median, most = self.numbers
            return batch(count, n, tokens + 1, lengths(rng, count * n, median, most))  # whole chunks can be found
        count, *shape = self.numbers
        return [(i, talk(rng, *shape)) for i in range(count)]


def tokens_of(conversations: Iterable[Conversation]) -> int:
    """The working set: tokens of KV that all of them have in the end, of a common prompt once."""
    texts, answers = dict[int, int](), 0
    for text, turns in conversations:
        prompt, answer, _ = turns[-1]
        texts[text] = max(texts.get(text, 0), prompt)
        answers += answer
    return sum(texts.values()) + answers


def batch(prompts: int, n: int, tokens: int, answers: Iterable[int], first: int = 0) -> list[Conversation]:
    """One step of GRPO: all samples of all prompts at once. The prompts are numbered from ``first``."""
    return [(first + i // n, [(tokens, answer, 0.0)]) for i, answer in zip(range(prompts * n), answers, strict=True)]


def talk(rng: random.Random, first: int, more: int, turns: int = 0) -> list[Turn]:
    """A conversation of so many turns, or, with 0, of two to seven, each of which adds ``more`` tokens."""
    turns = turns or max(2, min(7, round(rng.lognormvariate(1.1, 0.8))))
    return [(first + more * turn, lengths(rng, 1, 64, 256)[0], rng.expovariate(2.0)) for turn in range(turns)]


def lengths(rng: random.Random, count: int, median: int, most: int, spread: float = 0.8) -> list[int]:
    """Tokens of answers: log-normal, at least 4 and at most ``most``."""
    return [max(4, min(most, round(rng.lognormvariate(math.log(median), spread)))) for _ in range(count)]
