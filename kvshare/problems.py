"""Word problems in GSM8K's format, from a seed: for machines that reach neither the data set nor a hub."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Problem = dict[str, str]
"""``question`` and ``answer``, the answer ending in "#### <integer>" as GSM8K's do."""

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


def _shopping(r: random.Random) -> Problem:
    name, thing, place = r.choice(NAMES), r.choice(THINGS), r.choice(PLACES)
    packs, each, gave = r.randint(3, 12), r.randint(4, 15), r.randint(2, 10)
    total = packs * each
    left = total - gave
    return {
        "question": f"{name} goes to the {place} and buys {packs} packs of {thing}. Each pack has {each} {thing}. "
        f"On the way home {name} gives {gave} {thing} to a friend. How many {thing} does {name} have left?",
        "answer": f"{name} buys {packs} * {each} = <<{packs}*{each}={total}>>{total} {thing}.\n"
        f"After giving {gave} away, {total} - {gave} = <<{total}-{gave}={left}>>{left} {thing} are left.\n#### {left}",
    }


def _wages(r: random.Random) -> Problem:
    name, place = r.choice(NAMES), r.choice(PLACES)
    hours, pay, days, spent = r.randint(2, 9), r.randint(8, 25), r.randint(3, 6), r.randint(10, 40)
    daily, total = hours * pay, hours * pay * days
    return {
        "question": f"{name} works at the {place} for {hours} hours a day and earns ${pay} an hour. "
        f"After {days} days {name} spends ${spent} on lunch. How many dollars does {name} have then?",
        "answer": f"{name} earns {hours} * {pay} = <<{hours}*{pay}={daily}>>{daily} dollars a day.\n"
        f"In {days} days that is {daily} * {days} = <<{daily}*{days}={total}>>{total} dollars.\n"
        f"After lunch {total} - {spent} = <<{total}-{spent}={total - spent}>>{total - spent} dollars remain.\n"
        f"#### {total - spent}",
    }


def _sharing(r: random.Random) -> Problem:
    first, second = r.sample(NAMES, 2)
    thing, people, share, extra = r.choice(THINGS), r.randint(3, 9), r.randint(4, 14), r.randint(5, 20)
    total = people * share
    return {
        "question": f"{first} has {total - extra} {thing} and {second} brings {extra} more. They divide all of the "
        f"{thing} equally among {people} children. How many {thing} does each child get?",
        "answer": f"Together that is {total - extra} + {extra} = <<{total - extra}+{extra}={total}>>{total} {thing}.\n"
        f"Each child gets {total} / {people} = <<{total}/{people}={share}>>{share} {thing}.\n"
        f"#### {share}",
    }


def _travel(r: random.Random) -> Problem:
    name, a, b = r.choice(NAMES), *r.sample(PLACES, 2)
    speed, hours, walk = r.randint(12, 30), r.randint(2, 6), r.randint(1, 9)
    ride = speed * hours
    return {
        "question": f"{name} rides a bicycle from the {a} to the {b} at {speed} kilometers an hour. The ride takes "
        f"{hours} hours. Then {name} walks another {walk} kilometers. How many kilometers is the whole way?",
        "answer": f"The ride is {speed} * {hours} = <<{speed}*{hours}={ride}>>{ride} kilometers.\n"
        f"With the walk it is {ride} + {walk} = <<{ride}+{walk}={ride + walk}>>{ride + walk} kilometers.\n"
        f"#### {ride + walk}",
    }


KINDS: tuple[Callable[[random.Random], Problem], ...] = (_shopping, _wages, _sharing, _travel)


def problems(seed: int) -> Iterator[Problem]:
    """An endless sequence of problems, the same for the same seed on every machine."""
    r = random.Random(seed)
    while True:
        yield r.choice(KINDS)(r)
