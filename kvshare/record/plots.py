"""Stacked bars and lines as inline SVG, drawn by matplotlib in the colours of page.css.

Numbers are in ``<title>``s, which browsers show on hover. That needs no script.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from io import StringIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kvshare.record.token_sources import SOURCES

WIDTH, HEIGHT = 540, 240  # of the SVG, pixels
LABELS = 12  # at most, along an axis
STYLE: Any = {
    "axes.autolimit_mode": "round_numbers",
    "axes.axisbelow": True,
    "axes.xmargin": 0,
    "axes.ymargin": 0,
    "font.size": 11.5,
    "svg.fonttype": "none",  # text stays text, in the page's font
    "svg.hashsalt": "kvshare",  # the same page for the same numbers
}
COLORS = {  # placeholders: the page replaces them by its own, light or dark
    name: f"#0000{number:02x}" for number, name in enumerate(("quiet", "rule", "line", *SOURCES), 1)
}
TIP = "tip "  # an id that starts so becomes a <title>

Format = Callable[[float], str]


def bars(title: str, labels: Sequence[str], axis: str, stacks: Mapping[str, Sequence[float]], show: Format) -> str:
    """One bar a label, of parts stacked in the order of ``stacks``: values by color."""

    def draw(axes: Axes) -> None:
        base = [0.0] * len(labels)
        width = min(0.72, 0.14 * len(labels)) if len(labels) <= 80 else 1
        for name, values in stacks.items():
            for at, value in enumerate(values):
                if value > 0:
                    tip = f"{TIP}{axis} {labels[at]}: {show(value)} {name.replace('_', ' ')}"
                    axes.bar(at, value, width, base[at], color=COLORS[name], clip_on=False, gid=tip)
            base = [below + value for below, value in zip(base, values, strict=True)]
        axes.update_datalim([(0, 0), (0, max(base, default=0) or 1)])

    return _svg(title, labels, axis, show, draw)


def line(
    title: str,
    labels: Sequence[str],
    axis: str,
    values: Sequence[float | None],
    show: Format,
    references: Mapping[str, float] | None = None,
    top: float = 0.0,
    log: bool = False,
) -> str:
    """A line through ``values``, None where one is not known, with level lines for ``references``.

    Args:
        top: what the axis reaches at least.
        log: logarithmic axis, of what is positive.
    """
    known = [(at, value) for at, value in enumerate(values) if value is not None and (value > 0 or not log)]

    def draw(axes: Axes) -> None:
        if log:
            axes.set_yscale("log")
        else:
            axes.update_datalim([(0, 0), (0, top)])
        for name, value in (references or {}).items():
            _level(axes, name, value, show)
        axes.plot(*zip(*known, strict=True), color=COLORS["line"], linewidth=1.8, clip_on=False)
        for at, value in known:
            tip = f"{TIP}{axis} {labels[at]}: {show(value)}"
            size = 6 if len(known) <= 60 else 3
            axes.plot(at, value, "o", color=COLORS["line"], markersize=size, clip_on=False, gid=tip)

    return _svg(title, labels, axis, show, draw)


def _level(axes: Axes, name: str, value: float, show: Format) -> None:
    tip = f"{TIP}{name}: {show(value)}"
    axes.axhline(value, color=COLORS["quiet"], linestyle=(0, (4, 3)), linewidth=1, clip_on=False, gid=tip)
    where = axes.get_yaxis_transform(), "offset points"  # of the line's right end, and of the words above it
    axes.annotate(name, (1, value), (0, 6), *where, ha="right", color=COLORS["quiet"], annotation_clip=False)


def _svg(title: str, labels: Sequence[str], axis: str, show: Format, draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure((WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        _axes(axes, labels, axis, show)
        file = StringIO()
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return _inline(title, file.getvalue())


def _axes(axes: Axes, labels: Sequence[str], axis: str, show: Format) -> None:
    every = math.ceil(len(labels) / LABELS) or 1
    axes.set_xticks(range(0, len(labels), every), [label.partition("–")[0] for label in labels[::every]])
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_xlabel(axis, loc="right", color=COLORS["quiet"])
    if axes.get_yscale() == "linear":
        axes.locator_params("y", nbins=5)
    axes.yaxis.set_major_formatter(lambda value, _: show(value))
    axes.minorticks_off()
    axes.tick_params(length=0, labelcolor=COLORS["quiet"])
    axes.grid(axis="y", color=COLORS["rule"], clip_on=False)
    axes.spines[:].set_visible(False)


def _inline(title: str, svg: str) -> str:
    """An SVG file as a part of a page: with the page's colors, tips, and no ids, which have to be of one element."""
    svg = svg[svg.index("<svg ") :].replace("<svg ", f'<svg role="img" aria-label="{escape(title)}" ', 1)
    svg = re.sub(f'<g id="{TIP}([^"]*)">', r"<g><title>\1</title>", svg)
    svg = re.sub('<g id="[^"]*">', "<g>", svg)
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg
