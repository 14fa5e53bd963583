"""The look of every picture: one colour for each method, ours thicker, names in words at the ends of lines.

Pictures have no background, and their text a grey that reads on white and on near-black: an SVG is right on a light
page and on a dark one, without a style sheet. One panel is as wide as a phone. matplotlib is imported when a picture
is drawn.
"""

from __future__ import annotations

import functools
import io
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lolo.files import disk
from lolo.studies import names

INK = "#7b7b7b"  # as far from white as from a dark page, 4.2 : 1
WIDTH = 5.0  # inches of a picture: 360 points, so that text on a phone keeps its size
HEIGHT = 3.4  # of a panel

COLOURS = {
    # These six are told apart by readers with any colour vision, and stand out 3 : 1 from light and dark.
    "lolo": "#006bff",
    "naive": "#c52929",
    "bc-only": "#9c84ce",
    "untrained": "#636b6b",
    "adamw": "#de7300",
    "muon": "#19a563",
    # The name at the line tells these from them.
    "replay-only": "#b3478f",
    "adam": "#a0622d",
    "sgdm": "#83801f",
    "nadamw": "#cf5f7a",
    "nesterov": "#5b8f2a",
    "lion": "#1590a8",
    "muon-matched": "#b31fd1",
    "schedule-free": "#8a5ad1",
    "prodigy": "#4f7a96",
}
"""Of a method, in every picture of every command."""
OTHERS = ("#1590a8", "#b3478f", "#83801f", "#8a5ad1", "#a0622d", "#5b8f2a", "#4f7a96", "#cf5f7a")
"""Of methods that are a reader's own, in the order in which they come."""

DASHES: dict[bool, tuple[Any, ...]] = {
    True: ("-", (0, (1, 1)), (0, (4, 1, 1, 1)), (0, (2, 1))),
    False: ((0, (5, 1.5)), (0, (1, 2)), (0, (5, 1.5, 1, 1.5)), (0, (2.5, 2.5))),
}
"""Of the settings of one learned optimizer; and of all other optimizers in a picture, one after the other."""

SETTINGS: Any = {
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "lolo",
}
MAX_POINTS = 300  # of a line; a longer one is drawn as means over equal parts
FEW_POINTS = 12  # that are drawn as dots too: one point makes no line
LARGEST = 1e30
MOST_TEXT = 200  # characters of one piece of text

Draw = TypeVar("Draw", bound=Callable[..., Any])


def styled(draw: Draw) -> Draw:
    """A function that draws, in this style."""

    @functools.wraps(draw)
    def in_style(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(SETTINGS):
            return draw(*args, **kwargs)

    return in_style  # type: ignore[return-value]


def pyplot() -> Any:
    """matplotlib's pyplot, without a display where the caller has not chosen one, as a notebook has."""
    import matplotlib

    if "MPLBACKEND" not in os.environ and "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def panels(count: int, title: str = "", height: float = HEIGHT, columns: int = 1) -> tuple[Any, list[Any]]:
    """A figure with its finding as title, and `count` axes below one another, or in columns.

    pyplot has forgotten the figure: a notebook shows it once.
    """
    plt = pyplot()
    rows = -(-count // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(WIDTH, height * rows + 0.5 * bool(title)), layout="constrained", squeeze=False
    )
    plt.close(figure)
    for axis in axes.flat[count:]:
        axis.axis("off")
    if title:
        figure.suptitle(fill(title, 52), x=0.01, ha="left", fontsize=11, fontweight="bold")
    return figure, list(axes.flat[:count])


@styled
def svg(figure: Any) -> str:
    """The figure as SVG: its text is text, and equal figures are equal bytes."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


@styled
def save_figure(figure: Any, path: Path) -> None:
    """Write a figure completely or not at all; the format follows the file's ending."""
    if path.suffix == ".svg":
        return disk.write_bytes(path, svg(figure).encode())
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150)
    disk.write_bytes(path, buffer.getvalue())


def colours(methods: Sequence[str]) -> dict[str, str]:
    """The colour of each method."""
    own = [method for method in dict.fromkeys(methods) if method not in COLOURS]
    return {**COLOURS, **{method: OTHERS[i % len(OTHERS)] for i, method in enumerate(own)}}


def looks(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, width and dashes of each label's line. The first of ours is thick and in front."""
    by_method = colours([names.method_of(label) for label in labels])
    ours, seen, found = names.reference(labels) if labels else "", dict[str, int](), dict[str, dict[str, Any]]()
    for label in labels:
        method = names.method_of(label)
        learned = method in names.LEARNED or label == ours
        dashes, counted = DASHES[learned], method if learned else "all others"
        found[label] = {
            "color": by_method[method],
            "linewidth": 2.8 if label == ours else 1.5,
            "linestyle": dashes[seen.setdefault(counted, 0) % len(dashes)],
            "zorder": 3 if label == ours else 2,
        }
        seen[counted] += 1
    return found


def even(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The same of lines that are no optimizers: none is marked."""
    dashes = DASHES[True]
    return {
        label: {"color": OTHERS[i % len(OTHERS)], "linewidth": 1.5, "linestyle": dashes[i % len(dashes)]}
        for i, label in enumerate(labels)
    }


class Curve(NamedTuple):
    """One curve, and the band around it."""

    label: str
    x: NDArray[Any]  # [n]
    y: NDArray[Any]  # [n], may be non-finite
    low: NDArray[Any] | None = None  # [n]
    high: NDArray[Any] | None = None


def drawable(values: NDArray[Any]) -> NDArray[np.float64]:
    """NaN, which is a gap, instead of what is not finite or too large for a picture."""
    values = np.asarray(values, np.float64)
    return np.where(np.abs(values) < LARGEST, values, np.nan)


def thin(line: Curve) -> Curve:
    """At most MAX_POINTS points: means over equal parts, with the range of each part as the band."""
    if len(line.x) <= MAX_POINTS:
        return line
    starts = np.linspace(0, len(line.x), MAX_POINTS + 1).astype(int)[:-1]
    sizes = np.diff(starts, append=len(line.x))
    low, high = (line.y if band is None else band for band in (line.low, line.high))
    return Curve(
        line.label,
        np.maximum.reduceat(line.x, starts),
        np.add.reduceat(drawable(line.y), starts) / sizes,
        np.minimum.reduceat(drawable(low), starts),
        np.maximum.reduceat(drawable(high), starts),
    )


def limits(values: NDArray[Any]) -> tuple[float, float]:
    """Limits that show all but extreme values: a diverging run leaves through the top, however many there are."""
    finite = drawable(values)
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return 0.0, 1.0
    low, most, high = (float(np.quantile(finite, share)) for share in (0.0, 0.75, 0.98))
    high = min(high, low + max(4 * (most - low), 0.5))
    margin = 0.06 * max(high - low, 1e-3 * abs(high), 1e-12)
    return low - margin, high + 2 * margin


def draw_lines(axis: Any, lines: Sequence[Curve], look: dict[str, dict[str, Any]] | None = None) -> None:
    """Curves and their bands. Set limits, scales and titles, then `name_lines`."""
    look = looks([line.label for line in lines]) if look is None else look
    for line in map(thin, lines):
        dots = {"marker": "o", "markersize": 3} if len(line.x) <= FEW_POINTS else {}
        axis.plot(line.x, drawable(line.y), label=line.label, **look[line.label], **dots)
        if line.low is not None and line.high is not None:
            colour = look[line.label]["color"]
            axis.fill_between(line.x, drawable(line.low), drawable(line.high), color=colour, alpha=0.12, linewidth=0)


def fill(text: str, width: int) -> str:
    """Text in lines of a width, at most MOST_TEXT characters; what can't be printed, or turns it around, is marked."""
    text = "".join(c if c.isprintable() or c == "\u00a0" else "\ufffd" for c in text[:MOST_TEXT])
    return textwrap.fill(text, width, break_on_hyphens=False)


def explain(axis: Any, *lines: str) -> None:
    """What a panel shows, above it; long lines are broken."""
    axis.set_title("\n".join(fill(line, 50) for line in lines))


def step_axis(axis: Any, first: float, last: float) -> None:
    """Steps as numbers, on a log axis unless they are of one size."""
    axis.set(xscale="log" if last >= 10 * first else "linear", xlabel="training step", xlim=(first / 1.05, last * 1.02))
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter("")


def log_axis(axis: Any) -> None:
    """A log axis upwards, its powers of ten as numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def mark_unroll(axis: Any, steps: int) -> None:
    """A dotted vertical line at the length of the unroll in meta-training, and its name."""
    axis.axvline(steps, color=INK, linestyle=":", linewidth=1)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    axis.annotate("unroll in\nmeta-training", (steps, 0.99), (4, 0), va="top", **place)


GAP = 0.07  # between the axis and the names, in axis widths; a short line leads across
NAME_WIDTH = 15  # characters


def name_lines(axis: Any, words: Callable[[str], str] = names.in_words) -> list[Any]:
    """The name of each line that `draw_lines` drew, right of its end, no two on one another. Returns the texts."""
    lines = [line for line in axis.get_lines() if not line.get_label().startswith("_")]
    texts = []
    for line in lines:
        name = fill(words(line.get_label()), NAME_WIDTH)
        bold = "bold" if line.get_linewidth() > 2 and len(lines) > 1 else "normal"
        texts.append(axis.text(1 + GAP, 0.5, name, transform=axis.transAxes, va="center", fontweight=bold))
    if not texts:
        return texts
    axis.figure.get_layout_engine().execute(axis.figure)  # now sizes are known
    box = axis.get_window_extent()
    heights = np.array([text.get_window_extent().height for text in texts]) + 3
    ends = np.array([_end(axis, line) for line in lines])  # [lines, 2], in axis widths and heights
    places = spread(ends[:, 1] * box.height, heights, box.height) / box.height
    for line, text, end, place in zip(lines, texts, ends, places, strict=True):
        text.set_y(place)
        axis.plot(
            [end[0], 1 + 0.85 * GAP],
            [end[1], place],
            color=line.get_color(),
            linewidth=1,
            transform=axis.transAxes,
            clip_on=False,
            label="_leader",
        )
    return texts


def _end(axis: Any, line: Any) -> tuple[float, float]:
    """Where a line's name leads to, in axis widths and heights: its last point, or the edge that it left through."""
    x, y = (np.asarray(values, np.float64) for values in line.get_data())
    there = np.flatnonzero(np.isfinite(y))
    if not there.size:
        return 1.0, 0.5
    point = axis.transAxes.inverted().transform(axis.transData.transform((x[there[-1]], y[there[-1]])))
    return float(np.clip(point[0], 0, 1)), float(np.clip(point[1], 0, 1))


def spread(wanted: NDArray[Any], heights: NDArray[Any], top: float) -> NDArray[np.float64]:
    """Places near the wanted ones whose boxes of these heights touch no other, from 0 to `top` if they fit there.

    Places pushed up and places pushed down are both free of overlaps, and so is their mean.
    """
    order = np.argsort(wanted, kind="stable")
    sizes, aims = heights[order], np.asarray(wanted, np.float64)[order]

    def pushed_up(aims: NDArray[Any], floor: float) -> NDArray[np.float64]:
        found = np.empty_like(aims)
        for i, aim in enumerate(aims):
            found[i] = max(aim, floor + sizes[i] / 2)
            floor = found[i] + sizes[i] / 2
        return found

    def pushed_down(aims: NDArray[Any], ceiling: float) -> NDArray[np.float64]:
        found = np.empty_like(aims)
        for i in reversed(range(len(aims))):
            found[i] = min(aims[i], ceiling - sizes[i] / 2)
            ceiling = found[i] - sizes[i] / 2
        return found

    middle = (pushed_up(aims, -np.inf) + pushed_down(aims, np.inf)) / 2
    inside = pushed_down(pushed_up(middle, 0.0), max(top, sizes.sum()))
    places = np.empty_like(inside)
    places[order] = inside
    return places
