"""Pictures from rows; `style` has their look."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lolo.evaluation.long_runs import WINDOW
from lolo.evaluation.statistics import Row
from lolo.files import settings
from lolo.studies import headline, names, style
from lolo.studies.style import Curve, styled

LOSSES = {"train": "train_loss", "held-out": "held_loss"}


@styled
def curves(
    rows: Sequence[Row],
    unroll: int | None = None,
    labels: Sequence[str] | None = None,
    losses: Sequence[str] = tuple(LOSSES),
) -> Any:
    """Loss against the step (log axis), one panel for each of `losses`; mean and range over runs. The unroll is marked.

    labels: the optimizers drawn; None: those of `headline.few`. Long curves are thinned to means between steps that
    lie evenly on the axis.
    """
    labels = headline.few(rows) if labels is None else labels
    finding = headline.sentence(rows, labels, LOSSES[losses[0]])
    figure, axes = style.panels(len(losses), f"{losses[0].capitalize()} loss: {finding}")
    words, schedule = names.together(labels)
    repeated = len(rows) > len({row.optimizer for row in rows})
    how = ("mean and range over runs" if repeated else "single runs") + f", all with {schedule}" * bool(schedule)
    for axis, name in zip(axes, losses, strict=True):
        field = LOSSES[name].replace("loss", "curve")
        found = {label: [getattr(row, field) for row in rows if row.optimizer == label] for label in labels}
        steps, values = _thinned(np.array([curve for mine in found.values() for curve in mine], np.float64))
        steps = np.minimum(steps, rows[0].steps)  # the last window may be shorter
        lines, first = [], 0
        for label, mine in found.items():
            lines.append(_mean_and_range(label, steps, values[first : first + len(mine)]))
            first += len(mine)
        style.draw_lines(axis, lines)
        marks = [steps[0], steps[-1]]
        if unroll is not None:
            marks.append(unroll)
            style.mark_unroll(axis, unroll)
        style.step_axis(axis, float(min(marks)), float(max(marks)))
        axis.set_ylabel(headline.loss_in_words(rows))
        later = min(unroll or math.inf, steps[-1] / 10) / 2
        axis.set_ylim(*style.limits(values[:, np.searchsorted(steps, later) :]))
        task = settings.without_sha256(rows[0].task)
        style.explain(axis, *([f"{name} loss on {task}", how] if axis is axes[0] else [f"{name} loss"]))
    for axis in axes:
        style.name_lines(axis, words.__getitem__)
    return figure


def _mean_and_range(label: str, steps: NDArray[Any], values: NDArray[Any]) -> Curve:
    """values: [runs, P], NaN where a run has diverged."""
    values = style.drawable(values)
    finite = np.isfinite(values).any(axis=0)
    mine = values[:, finite]
    return Curve(label, steps[finite], np.nanmean(mine, axis=0), np.nanmin(mine, axis=0), np.nanmax(mine, axis=0))


def _thinned(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps at the ends of at most 150 stretches of equal length on a log axis, and means over the finite of each.

    Returns: [P], [runs, P]; NaN where nothing is finite.
    """
    windows = curves.shape[1]
    ends = np.unique(np.round(np.geomspace(1, windows, 150)).astype(int))
    starts = np.concatenate([[0], ends[:-1]])
    finite = np.isfinite(curves)
    sums, counts = (np.add.reduceat(np.where(finite, x, 0.0), starts, axis=1) for x in (curves, 1.0))
    return WINDOW * ends, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@styled
def finals(rows: Sequence[Row]) -> Any:
    """Loss at the last step, one line per optimizer, best first: train and held-out mean, and range over runs."""
    labels = list(dict.fromkeys(row.optimizer for row in rows))
    values = {  # label -> [runs, 2]
        label: np.array([(row.train_loss, row.held_loss) for row in rows if row.optimizer == label], float)
        for label in labels
    }
    ours, look = names.reference(labels), style.looks(labels)
    words, schedule = names.together(labels)
    finding = f"Train loss: {headline.sentence(rows, labels)}"
    figure, (axis,) = style.panels(1, finding, height=1.0 + 0.36 * len(labels))
    best_first = sorted(labels, key=lambda label: values[label][:, 0].mean())
    for height, label in zip(range(len(labels), 0, -1), best_first, strict=True):
        colour, width = look[label]["color"], look[label]["linewidth"]
        for column, fill in enumerate((colour, "none")):
            mine = style.drawable(values[label][:, column])
            if np.isfinite(mine).any():
                axis.plot([np.nanmin(mine), np.nanmax(mine)], [height, height], color=colour, linewidth=width / 2)
                axis.plot(np.nanmean(mine), height, "o", color=colour, markerfacecolor=fill, markersize=2 + 1.5 * width)
        place = {"xycoords": ("axes fraction", "data"), "va": "center"}
        weight = "bold" if label == ours else "normal"
        axis.annotate(style.fill(words[label], 60), (0.01, height + 0.32), fontweight=weight, **place)
    axis.set_xlim(*style.limits(np.concatenate(list(values.values()))))
    axis.set(ylim=(0.4, len(labels) + 0.8), yticks=[])
    axis.set_xlabel(f"{headline.loss_in_words(rows)}: ● train, ○ held-out; line: range over runs")
    how = f"after {rows[0].steps:,} steps" + f", all with {schedule}" * bool(schedule)
    style.explain(axis, f"{settings.without_sha256(rows[0].task)}, {how}")
    return figure


Counts = tuple[NDArray[Any], NDArray[Any]]
"""Values [n], and how often each was seen [n]."""


def starts_by_method(kept: Mapping[str, tuple[str, Counts]]) -> dict[str, Counts]:
    """Start steps of each method, over its meta-seeds, from those of weights: label -> (sha256, counts).

    The same weights may be deployed in several ways: they count once.
    """
    found: dict[str, Counter[float]] = {}
    seen = set()
    for label, (sha256, (values, weights)) in kept.items():
        method = label.partition(", meta-seed ")[0]
        key = sha256, method.split()[0]  # other recipes may give the same bytes
        if key not in seen and weights.sum() > 0:
            found.setdefault(method, Counter()).update(dict(zip(values.tolist(), weights.tolist(), strict=True)))
        seen.add(key)
    return {label: (np.array([*of], float), np.array([*of.values()], float)) for label, of in found.items()}


@styled
def start_steps(counts_of: Mapping[str, Counts]) -> Any:
    """Histogram of the start steps that meta-training realised, by label. Equal histograms are one line."""
    counts_of = {label: counts for label, counts in counts_of.items() if counts[1].sum() > 0}
    known = np.unique(np.concatenate([values for values, _ in counts_of.values()]))
    largest = float(known[-1])
    width = max(bin_width(largest), float(np.diff(known).min(initial=np.inf)) if len(known) > 1 else 0.0)
    edges = width * np.arange(int(largest // width) + 2)
    groups: dict[tuple[float, ...], list[str]] = {}
    for label, (values, weights) in counts_of.items():
        share = np.histogram(values, edges, weights=weights)[0] / weights.sum()
        groups.setdefault(tuple(share), []).append(label)
    ours = names.reference(list(counts_of))
    late = next(1 - share[0] for share, group in groups.items() if ours in group)
    figure, (axis,) = style.panels(
        1, f"{100 * late:.0f}\u00a0% of {names.in_words(ours)}'s unrolls began after step {width:,.0f}"
    )
    first = [names.reference(group) for group in groups.values()]
    look = style.looks(first)
    words = {names.reference(group): ", ".join(map(names.in_words, group)) for group in groups.values()}
    for label, share in zip(first, groups, strict=True):
        last = np.flatnonzero(share)[-1] + 1
        x, y = edges[: last + 1], np.array([*share[:last], share[last - 1]])
        axis.plot(x, np.where(y > 0, y, np.nan), drawstyle="steps-post", label=label, **look[label])
    style.log_axis(axis)
    axis.set(xlabel="start step K of an unroll", ylabel="share of unrolls")
    axis.locator_params(axis="x", nbins=5)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    style.explain(axis, f"where unrolls began, in bins of {width:g} steps")
    style.name_lines(axis, lambda label: words[label])
    return figure


def bin_width(largest: float) -> float:
    """A round width for at most 50 bins.

    >>> bin_width(13_000.0)
    500.0
    """
    rough = max(largest / 50, 1.0)
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(m * power for m in (1, 2.5, 5, 10) if m * power >= rough))


@styled
def meta_losses(runs: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], title: str) -> Any:
    """Task loss in meta-training against wall-clock time: method -> (hours, loss) of each meta-seed."""
    chosen = dict(sorted(runs.items(), key=lambda item: names.method_of(item[0]) != names.OURS)[: headline.FEW])
    last = {method: float(np.mean([losses[-1] for _, losses in seeds])) for method, seeds in chosen.items()}
    lowest = min(last, key=lambda method: (not math.isfinite(last[method]), last[method]))
    finding = f"In meta-training {names.in_words(lowest)} ends at the lowest loss, {last[lowest]:.3f}"
    figure, (axis,) = style.panels(1, finding)
    look = style.looks(list(chosen))
    for method, seeds in chosen.items():
        for i, (hours, losses) in enumerate(seeds):
            line = {**look[method], "linewidth": look[method]["linewidth"] / 2}
            axis.plot(60 * hours, losses, label="_seed" if i else method, **line)
    axis.set(xlabel="minutes of meta-training (outer steps × median time)", ylabel="task loss")
    style.explain(axis, title)
    axis.set_ylim(*style.limits(np.concatenate([losses[1:] for seeds in chosen.values() for _, losses in seeds])))
    style.name_lines(axis)
    return figure


@styled
def meta_training(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> Any:
    """Task loss and imitation loss of every outer step of one meta-training, and α: rows of its log."""
    steps = [row for row in rows if "task_loss" in row]
    x = np.array([row["step"] for row in steps])
    fields = {"task_loss": "task loss", "bc_loss": "imitation loss (Eq. 2)"}
    tenth = max(len(steps) // 10, 1)
    first, last = (np.mean([row["task_loss"] for row in part]) for part in (steps[:tenth], steps[-tenth:]))
    title = f"The task loss goes from {first:.3f} to {last:.3f} in {len(steps):,} outer steps"
    figure, axes = style.panels(3, title, height=2.2)
    for axis, (field, name) in zip(axes, fields.items(), strict=False):
        values = np.array([row[field] for row in steps], float)
        lines = [Curve(task, x, of_task) for task, of_task in zip(tasks, values.T, strict=True)]
        style.draw_lines(axis, lines, style.even(tasks))
        axis.set(title=f"{name}, mean over pairs")
        axis.set_ylim(*style.limits(values[len(values) // 20 :]))
    alpha = np.array([row["alpha_loss"] for row in steps], float)
    style.draw_lines(axes[2], [Curve("α", x, alpha)], style.even(["α"]))
    axes[2].set(xlabel="outer step", title="α, the weight of the task loss", ylim=(-0.02, 1.05))
    if len(tasks) > 1:
        for axis in axes[:2]:
            style.name_lines(axis, settings.without_sha256)
    return figure


@styled
def growth(curves: Mapping[str, Sequence[tuple[float, float]]]) -> Any:
    """Time of an outer step (ms) against each thing that it grows with; the dotted line is proportional growth."""
    most = max(curves, key=lambda what: _slope(curves[what]))
    title = f"Twice the {most}, {2 ** _slope(curves[most]):.1f} times the time of an outer step: the most of these"
    figure, axes = style.panels(len(curves), title, height=2.4, columns=2)
    for axis, (what, points) in zip(axes, curves.items(), strict=True):
        x, y = np.array(points).T
        axis.plot(x, y, marker="o", color=style.COLOURS[names.OURS])
        axis.plot(x, y[-1] * x / x[-1], color=style.INK, linestyle=":", linewidth=1)
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel="outer step (ms)")
        axis.set_xticks(x, [f"{value:,.0f}" for value in x], rotation=30)
        apart = [value for i, value in enumerate(y) if i == 0 or abs(value / y[i - 1] - 1) > 0.1]
        axis.set_yticks(apart, [f"{value:,.0f}" for value in apart])
        axis.minorticks_off()
    axes[0].set_title("dotted: proportional")
    return figure


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Of a straight line through the points on log axes."""
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])
