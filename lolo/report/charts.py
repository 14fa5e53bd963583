"""Pictures inside a page: matplotlib's SVG, whose text the page's style sheet colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from lolo.report import markup
from lolo.report.markup import Html, tag
from lolo.studies import style
from lolo.studies.style import Curve, styled


def curves(title: str, lines: Sequence[Curve], xlabel: str, ylabel: str, log: bool = False) -> Html:
    """Curves over a step, with their names at their ends. Non-finite values are gaps. log: of the y axis."""
    if not any(np.isfinite(style.drawable(line.y)).any() for line in lines):
        return nothing(title)
    return figure(title, panel(lines, xlabel, ylabel, log), [line.label for line in lines])


@styled
def panel(lines: Sequence[Curve], xlabel: str, ylabel: str, log: bool = False) -> Any:
    """One panel of curves. log: of the y axis."""
    drawn, (axis,) = style.panels(1, height=3.0)
    style.draw_lines(axis, lines, style.even([line.label for line in lines]))
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        axis.set_yscale("log")
    else:
        axis.set_ylim(*style.limits(np.concatenate([line.y[len(line.y) // 20 :] for line in lines])))
    if len(lines) > 1:
        style.name_lines(axis, str)
    return drawn


def nothing(title: str) -> Html:
    """What stands instead of a picture without a number."""
    return tag("figure", tag("figcaption", title), tag("p", "There is no finite number to draw.", class_="faint"))


def figure(title: str, drawn: Any, labels: Sequence[str] = ()) -> Html:
    """A picture with a caption; `labels` tell readers that do not see it what is in it."""
    words = ", ".join(filter(None, labels))
    return tag("figure", tag("figcaption", title), inline(drawn, f"{title}: {words}" if words else title))


def inline(drawn: Any, label: str) -> Html:
    """A matplotlib figure as an <svg> element that `label` describes; names in it begin with markup.NAME."""
    text = style.svg(drawn)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[\w.]+"', "<g", text)  # no name of a group is used, and pictures share them
    text = re.sub(r'(?<= id=")|(?<=href="#)|(?<=url\(#)', markup.NAME, text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    return Html(f'<svg {view[0]} role="img" aria-label="{markup.escape(label)}">{text[text.index(">") + 1 :].strip()}')
