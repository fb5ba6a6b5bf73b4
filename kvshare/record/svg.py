"""Two kinds of plot as inline SVG: stacked bars and a line, over the steps or replicas of a run.

Colours are classes, which page.py gives a light and a dark value; numbers are in ``<title>``s, which
browsers show on hover, and need no script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 540, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 34
INNER_WIDTH, INNER_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

Format = Callable[[float], str]


def bars(title: str, labels: Sequence[str], axis: str, stacks: Mapping[str, Sequence[float]], show: Format) -> str:
    """One bar a label, of parts stacked in the order of ``stacks``: values by CSS class."""
    totals = [sum(parts) for parts in zip(*stacks.values(), strict=True)]
    ticks = linear_ticks(0, max(totals, default=0))
    height = _linear(0, ticks[-1])
    slot = INNER_WIDTH / max(1, len(labels))
    width = min(64.0, slot * (0.72 if slot > 6 else 1))
    shapes = []
    for at, label in enumerate(labels):
        base = 0.0
        for name, values in stacks.items():
            top = base + values[at]
            if values[at] > 0:
                x, y = LEFT + slot * (at + 0.5) - width / 2, height(top)
                shapes.append(
                    f'<rect class="{name}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
                    f'height="{height(base) - y:.1f}"><title>{escape(axis)} {escape(label)}: '
                    f"{show(values[at])} {name.replace('-', ' ')}</title></rect>"
                )
            base = top
    return _svg(title, [*_y_axis(ticks, height, show), *shapes, *_x_axis(labels, axis)])


def line(
    title: str,
    labels: Sequence[str],
    axis: str,
    values: Sequence[float | None],
    show: Format,
    references: Mapping[str, float] | None = None,
    top: float | None = None,
    log: bool = False,
) -> str:
    """A line through ``values``, None where one is not known, with level lines for ``references``.

    Args:
        top: upper end of the axis; default: what the values need.
        log: logarithmic axis; values and references are positive.
    """
    references = references or {}
    known = [v for v in [*values, *references.values()] if v is not None and (v > 0 or not log)]
    if log:
        ticks = log_ticks(min(known, default=1.0), max(known, default=1.0))
        height = _logarithmic(ticks[0], ticks[-1])
    else:
        ticks = linear_ticks(min(0.0, *known, 0.0), top if top is not None else max(known, default=0.0))
        height = _linear(ticks[0], ticks[-1])
    slot = INNER_WIDTH / max(1, len(labels))
    points = [
        (LEFT + slot * (at + 0.5), height(value), label, value)
        for at, (label, value) in enumerate(zip(labels, values, strict=True))
        if value is not None and (value > 0 or not log)
    ]
    levels = [_level(name, value, height(value), show) for name, value in references.items()]
    path = " ".join(f"{'L' if at else 'M'}{x:.1f} {y:.1f}" for at, (x, y, _, _) in enumerate(points))
    dots = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{3.5 if len(points) <= 60 else 1.5}">'
        f"<title>{escape(axis)} {escape(label)}: {show(value)}</title></circle>"
        for x, y, label, value in points
    ]
    return _svg(
        title,
        [*_y_axis(ticks, height, show), *levels, f'<path class="line" d="{path}"/>', *dots, *_x_axis(labels, axis)],
    )


def linear_ticks(low: float, high: float) -> list[float]:
    """Round numbers, about five of them, from at most ``low`` to at least ``high``."""
    span = high - low or 1.0
    rough = span / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil((low + span) / step - 1e-9)
    return [step * n for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from at most ``low`` to at least ``high``, two or more of them."""
    first = math.floor(math.log10(low) + 1e-9)
    last = max(first + 1, math.ceil(math.log10(high) - 1e-9))
    return [10.0**n for n in range(first, last + 1)]


def _linear(low: float, high: float) -> Callable[[float], float]:
    return lambda value: TOP + INNER_HEIGHT * (1 - (value - low) / (high - low))


def _logarithmic(low: float, high: float) -> Callable[[float], float]:
    height = _linear(math.log10(low), math.log10(high))
    return lambda value: height(math.log10(value))


def _level(name: str, value: float, y: float, show: Format) -> str:
    return (
        f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}">'
        f"<title>{escape(name)}: {show(value)}</title></line>"
        f'<text class="note" x="{WIDTH - RIGHT}" y="{y - 5 if y > TOP + 12 else y + 13:.1f}" text-anchor="end">'
        f"{escape(name)}</text>"
    )


def _y_axis(ticks: Sequence[float], height: Callable[[float], float], show: Format) -> list[str]:
    return [
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height(t):.1f}" y2="{height(t):.1f}"/>'
        f'<text x="{LEFT - 8}" y="{height(t) + 4:.1f}" text-anchor="end">{show(t)}</text>'
        for t in ticks
    ]


def _x_axis(labels: Sequence[str], axis: str) -> list[str]:
    slot, y = INNER_WIDTH / max(1, len(labels)), HEIGHT - BOTTOM + 16
    every = math.ceil(len(labels) / 12) or 1
    shown = [
        f'<text x="{LEFT + slot * (at + 0.5):.1f}" y="{y}" text-anchor="middle">{escape(label)}</text>'
        for at, label in enumerate(labels)
        if at % every == 0
    ]
    return [*shown, f'<text class="note" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(axis)}</text>']


def _svg(title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )
