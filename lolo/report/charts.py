"""Curves and histograms as SVG inside a page: its colours follow the page's, light or dark; its text is text.

No name from outside gets into the SVG: names are in the legend, which is HTML. matplotlib is imported when a chart is
drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from lolo.report import markup
from lolo.report.markup import Html, join, tag

LARGEST = 1e30
FEW_POINTS = 30  # that are drawn as dots too
MAX_POINTS = 300  # of a curve; a longer one is drawn as means over equal parts
DASHES = ("", "6 2", "6 2 1.5 2", "1.5 1.5")  # beside the colour, for those who don't see it
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


class Series(NamedTuple):
    """One curve."""

    label: str
    x: NDArray[Any]  # [n]
    y: NDArray[Any]  # [n], may be non-finite
    low: NDArray[Any] | None = None  # [n], of a band around it
    high: NDArray[Any] | None = None


def thin(series: Series) -> Series:
    """At most MAX_POINTS points: means over equal parts, with the range of each part as the band."""
    if len(series.x) <= MAX_POINTS:
        return series
    starts = np.linspace(0, len(series.x), MAX_POINTS + 1).astype(int)[:-1]
    sizes = np.diff(starts, append=len(series.x))
    low, high = (series.y if band is None else band for band in (series.low, series.high))
    return Series(
        series.label,
        np.maximum.reduceat(series.x, starts),
        np.add.reduceat(drawable(series.y), starts) / sizes,
        np.minimum.reduceat(drawable(low), starts),
        np.maximum.reduceat(drawable(high), starts),
    )


def drawable(values: NDArray[Any]) -> NDArray[np.float64]:
    """NaN, which is a gap, instead of what is not finite or too large for a picture."""
    values = np.asarray(values, np.float64)
    return np.where(np.abs(values) < LARGEST, values, np.nan)


def curves(
    title: str, series: Sequence[Series], xlabel: str, ylabel: str, log_x: bool = False, mark: float | None = None
) -> Html:
    """Curves over a step; `mark` is a vertical line at the unroll's length. Non-finite values are gaps."""

    def draw(axis: Any) -> None:
        for i, one in enumerate(series):
            one = thin(one)
            dots = {"marker": "o", "markersize": 3} if len(one.x) <= FEW_POINTS else {}  # one point makes no line
            axis.plot(one.x, drawable(one.y), color=colour(i), dashes=_dashes(i), linewidth=1.6, **dots)
            if one.low is not None and one.high is not None:
                axis.fill_between(
                    one.x, drawable(one.low), drawable(one.high), color=colour(i), alpha=0.15, linewidth=0
                )
        if mark is not None:
            axis.axvline(mark, color="black", linestyle=":", linewidth=1)
        axis.set(xscale="log" if log_x else "linear", xlabel=xlabel, ylabel=ylabel)
        axis.set_ylim(*_limits([one.y for one in series]))

    drawn = [one for one in series if np.isfinite(drawable(one.y)).any()]
    return chart(title, draw if drawn else None, [one.label for one in series])


def histogram(title: str, counts: dict[str, tuple[NDArray[Any], NDArray[Any]]], xlabel: str) -> Html:
    """Shares of values [n] with their counts [n], by label; on a log axis, since most values are often one."""
    largest = max((float(values.max()) for values, _ in counts.values() if values.size), default=0.0)
    width = _bin_width(largest)
    edges = width * np.arange(int(largest // width) + 2)

    def draw(axis: Any) -> None:
        for i, (values, weights) in enumerate(counts.values()):
            share = np.histogram(values, edges, weights=weights)[0] / max(weights.sum(), 1)
            style = (0, _dashes(i)) if dash(i) else "-"
            axis.stairs(share, edges, edgecolor=colour(i), linewidth=1.6, linestyle=style)
        axis.set(yscale="log", xlabel=f"{xlabel} (bins of {width:g})", ylabel="share")

    drawn = any(weights.sum() > 0 for _, weights in counts.values())
    return chart(title, draw if drawn else None, list(counts))


def _bin_width(largest: float) -> float:
    """A round width for at most 50 bins."""
    rough = max(largest / 50, 1.0)
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(m * power for m in (1, 2.5, 5, 10) if m * power >= rough))


def _limits(curves: Sequence[NDArray[Any]]) -> tuple[float, float]:
    """Limits that show all but extreme values of the later parts: a diverging run leaves through the top."""
    values = drawable(np.concatenate([curve[len(curve) // 20 :] for curve in curves]))
    values = values[np.isfinite(values)]
    if not values.size:
        values = np.array([0.0, 1.0])
    low, high = float(values.min()), float(np.quantile(values, 0.98))
    margin = 0.06 * max(high - low, 1e-3 * abs(high), 1e-12)
    return low - margin, high + 2 * margin


def colour(i: int) -> str:
    """A stand-in that `inline` makes the page's colour of series i."""
    return f"#0000{1 + i % markup.COLOURS:02x}"


def dash(i: int) -> str:
    """SVG's dash array of series i; with the colours, no two of 32 are alike."""
    return DASHES[(i + i // markup.COLOURS) % len(DASHES)]


def _dashes(i: int) -> tuple[float, ...]:
    return tuple(map(float, dash(i).split()))


def chart(title: str, draw: Any, labels: Sequence[str]) -> Html:
    """A figure: title, picture and, for several series, a legend. `draw` fills an axis; None: nothing to draw."""
    caption = tag("figcaption", title)
    if draw is None:
        return tag("figure", caption, tag("p", "There is no finite number to draw.", class_="faint"))
    names = ", ".join(labels)
    return tag("figure", caption, inline(draw, f"{title}: {names}" if names else title), legend(labels))


def legend(labels: Sequence[str]) -> Html:
    """Line and name of each series; nothing for one series."""
    if len(labels) < 2:
        return Html("")
    entries = []
    for i, label in enumerate(labels):
        stroke = {"stroke": f"var(--series-{1 + i % markup.COLOURS})", "stroke_width": "2", "stroke_dasharray": dash(i)}
        line = tag("line", x1="0", y1="4", x2="28", y2="4", **stroke)
        swatch = tag("svg", line, width="28", height="8", viewBox="0 0 28 8", aria_hidden="true")
        entries.append(tag("li", swatch, label))
    return tag("ul", join(entries), class_="legend")


def inline(draw: Any, label: str) -> Html:
    """The picture that `draw(axis)` makes, as an <svg> element that `label` describes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": "lolo", "font.size": 10}
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings | {"axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.8, 3.1), layout="constrained")
        axis = figure.add_subplot()
        figure.patch.set_visible(False)
        axis.patch.set_visible(False)
        draw(axis)
        axis.grid(True, alpha=0.25)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    return Html(_embed(ElementTree.fromstring(buffer.getvalue()), label))


def _embed(root: ElementTree.Element, label: str) -> str:
    """matplotlib's SVG as a part of a page: no names of its own, the page's font and colours, no background."""
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{SVG}metadata", f"{SVG}style"):
                parent.remove(child)
    used = set(re.findall(rb"#([^)\"]+)", ElementTree.tostring(root)))
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        if LINK in element.attrib:
            element.set("href", element.attrib.pop(LINK))
        if element.get("id", "").encode() not in used:
            element.attrib.pop("id", None)
        for name, value in element.attrib.items():
            element.set(name, f"{markup.NAME}{value}" if name == "id" else _page_style(value))
    view = root.get("viewBox", "")
    root.attrib.clear()
    root.attrib |= {"viewBox": view, "role": "img", "aria-label": markup.plain(label)}
    return ElementTree.tostring(root, encoding="unicode")


def _page_style(value: str) -> str:
    value = re.sub(r"^#|(?<=url\()#", f"#{markup.NAME}", value)
    value = re.sub(r"#0000(0[1-9])\b", lambda match: f"var(--series-{int(match[1], 16)})", value)
    value = re.sub(r"#000000\b", "currentColor", value)
    return re.sub(r"font(-family)?: ((?:[\d.]+px )?)'[^;]*", r"font\1: \2system-ui, sans-serif", value)
