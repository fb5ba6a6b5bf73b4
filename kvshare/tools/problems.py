"""Generates word problems in GSM8K's format, for machines that cannot reach the data set.

Each problem has one operation on small numbers, or two for conversations with tools (gsm8k_tools.py). A model of a
million parameters can learn that (tiny_model.py).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator

Problem = dict[str, str]
"""``question`` and ``answer``. The answer ends with "#### <integer>", as in GSM8K."""

NAMES = [
    *("Ada", "Ben", "Carla", "Deniz", "Elif", "Farid", "Grace", "Hana", "Ivan", "Jing"),
    *("Karim", "Lena", "Mara", "Nils", "Omar", "Priya", "Quinn", "Rosa", "Sven", "Tara"),
]
THINGS = [
    *("apples", "pencils", "marbles", "stickers", "books", "cookies", "stamps", "shells", "buttons", "tickets"),
    *("cards", "candles"),
]
PLACES = [
    *("market", "school", "library", "harbour", "garden", "workshop", "bakery", "station", "museum", "theatre"),
]


OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def worked(before: str, first: int, sign: str, second: int, after: str) -> str:
    """An answer in GSM8K's format, including the calculator annotation."""
    result = OPERATIONS[sign](first, second)
    return f"{before} {first} {sign} {second} = <<{first}{sign}{second}={result}>>{result} {after}.\n#### {result}"


def _buying(r: random.Random) -> Problem:
    name, thing, place = r.choice(NAMES), r.choice(THINGS), r.choice(PLACES)
    packs, each = _number(r), _number(r)
    return {
        "question": f"{name} goes to the {place} and buys {packs} packs of {thing}. Each pack has {each} {thing}. "
        f"How many {thing} does {name} have now?",
        "answer": worked(f"{name} has", packs, "*", each, f"{thing} now"),
    }


def _giving(r: random.Random) -> Problem:
    (first, second), thing, place = r.sample(NAMES, 2), r.choice(THINGS), r.choice(PLACES)
    gave = _number(r)
    had = gave + _number(r)
    return {
        "question": f"{first} has {had} {thing}. On the way to the {place} {first} gives {gave} {thing} to {second}. "
        f"How many {thing} does {first} have left?",
        "answer": worked(f"{first} has", had, "-", gave, f"{thing} left"),
    }


def _adding(r: random.Random) -> Problem:
    (first, second), thing, place = r.sample(NAMES, 2), r.choice(THINGS), r.choice(PLACES)
    one, other = _number(r), _number(r)
    return {
        "question": f"{first} has {one} {thing} and {second} brings {other} more to the {place}. "
        f"How many {thing} do {first} and {second} have together?",
        "answer": worked("Together they have", one, "+", other, thing),
    }


def _sharing(r: random.Random) -> Problem:
    name, thing, place = r.choice(NAMES), r.choice(THINGS), r.choice(PLACES)
    children = _number(r)
    total = children * _number(r)
    return {
        "question": f"{name} brings {total} {thing} to the {place} and divides all of them equally among {children} "
        f"children. How many {thing} does each child get?",
        "answer": worked("Each child gets", total, "/", children, thing),
    }


def _two_steps(r: random.Random) -> Problem:
    """One of three ways to get things, then one of three ways to pass them on."""
    (name, friend), thing, place = r.sample(NAMES, 2), r.choice(THINGS), r.choice(PLACES)
    first, begin, (a, b) = r.choice(
        [
            ("*", "{name} goes to the {place} and buys {a} packs of {thing}. Each pack has {b} {thing}.", _pair(r)),
            ("+", "{name} has {a} {thing} and finds {b} more at the {place}.", _pair(r)),
            ("-", "{name} takes {a} {thing} to the {place} and loses {b} of them.", (10 + _number(r), _number(r))),
        ]
    )
    have = OPERATIONS[first](a, b)
    parts = [n for n in range(2, 10) if have % n == 0]
    second, end = r.choice(
        [
            ("-", "Then {name} gives {c} {thing} to {friend}. How many {thing} does {name} have left?"),
            ("+", "Then {friend} brings {c} more. How many {thing} do they have together?"),
            ("/", "Then {name} divides them equally among {c} children. How many {thing} does each child get?"),
        ][: 3 if parts else 2]
    )
    c = r.choice(parts) if second == "/" else r.randint(2, min(9, have))
    result = OPERATIONS[second](have, c)
    words = {"name": name, "friend": friend, "thing": thing, "place": place, "a": a, "b": b, "c": c}
    return {
        "question": f"{begin} {end}".format(**words),
        "answer": f"{name} has {a} {first} {b} = <<{a}{first}{b}={have}>>{have} {thing}.\n"
        f"That makes {have} {second} {c} = <<{have}{second}{c}={result}>>{result} {thing}.\n#### {result}",
    }


def _pair(r: random.Random) -> tuple[int, int]:
    return _number(r), _number(r)


def _number(r: random.Random) -> int:
    return r.randint(2, 9)


ONE_STEP: tuple[Callable[[random.Random], Problem], ...] = (_buying, _giving, _adding, _sharing)
TWO_STEPS: tuple[Callable[[random.Random], Problem], ...] = (_two_steps,)


def problems(seed: int, kinds: tuple[Callable[[random.Random], Problem], ...] = ONE_STEP) -> Iterator[Problem]:
    """Yield problems without end. The same seed gives the same problems on every machine."""
    r = random.Random(seed)
    while True:
        yield r.choice(kinds)(r)
