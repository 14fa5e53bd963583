"""Pictures from rows. matplotlib is imported when a picture is asked for."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lolo.evaluation.long_runs import WINDOW
from lolo.evaluation.statistics import Row
from lolo.files import disk

# Paul Tol's "bright" colours: told apart by readers with any colour vision.
COLOURS = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377", "#BBBBBB", "#000000")
STYLES = ("-", "--", ":")  # for a ninth line, and a seventeenth


def pyplot() -> Any:
    """matplotlib's pyplot, without a display where the caller has not chosen one, as a notebook has."""
    import matplotlib

    if "MPLBACKEND" not in os.environ and "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def closed(figure: Any) -> Any:
    """A figure to return: pyplot forgets it, so that a notebook shows it once."""
    pyplot().close(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure completely or not at all; the format follows the file's ending."""
    import io

    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150, bbox_inches="tight")
    disk.write_bytes(path, buffer.getvalue())
    pyplot().close(figure)


def curves(rows: Sequence[Row], unroll: int | None, title: str) -> Any:
    """Train and held-out loss against the step (log axis), mean and range over runs; the unroll is marked.

    Long curves are thinned to means between steps that lie evenly on the axis.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    labels = list(dict.fromkeys(row.optimizer for row in rows))
    for axis, field, name in ((axes[0], "train_curve", "train loss"), (axes[1], "held_curve", "held-out loss")):
        steps, values = _thinned(np.array([getattr(row, field) for row in rows], np.float64))
        steps = np.minimum(steps, rows[0].steps)  # the last window may be shorter
        for i, label in enumerate(labels):
            colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
            mine = values[[row.optimizer == label for row in rows]]
            mine = np.where(np.isfinite(mine), mine, np.nan)
            finite = np.isfinite(mine).any(axis=0)
            axis.plot(
                steps[finite], np.nanmean(mine[:, finite], axis=0), style, color=colour, label=label, linewidth=1.5
            )
            low, high = np.nanmin(mine[:, finite], axis=0), np.nanmax(mine[:, finite], axis=0)
            axis.fill_between(steps[finite], low, high, color=colour, alpha=0.15, linewidth=0)
        if unroll is not None:
            axis.axvline(unroll, color="black", linestyle=":", linewidth=1)
            axis.annotate(
                "unroll in meta-training", (unroll, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top",
                ha="right", fontsize=8,
            )  # fmt: skip
        axis.set(xscale="log", xlabel="inner step", ylabel=f"{name} (nats)")
        marks = [steps[0], steps[-1], unroll or steps[0]]
        axis.set_xlim(min(marks) / 1.2, 1.2 * max(marks))
        first = min(unroll or math.inf, steps[-1] / 10) / 2
        axis.set_ylim(*_range(values[:, np.searchsorted(steps, first) :]))
        axis.grid(True, which="both", alpha=0.2)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


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


def _range(values: np.ndarray) -> tuple[float, float]:
    """Limits that show all but extreme values: a diverging run leaves through the top, however many there are."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, most, high = (float(np.quantile(finite, share)) for share in (0.0, 0.75, 0.98))
    high = min(high, low + max(4 * (most - low), 0.5))
    margin = 0.06 * max(high - low, 1e-6)
    return low - margin, high + 2 * margin


def finals(rows: Sequence[Row], title: str) -> Any:
    """Train and held-out loss at the last step, one line per optimizer, best first: mean and range over runs."""
    plt = pyplot()
    values: dict[str, np.ndarray] = {}  # label -> [runs, 2]
    for label in dict.fromkeys(row.optimizer for row in rows):
        values[label] = np.array([(row.train_loss, row.held_loss) for row in rows if row.optimizer == label], float)
    labels = sorted(values, key=lambda label: values[label][:, 0].mean())
    heights = np.arange(len(labels))[::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.22 * len(labels)), sharey=True, constrained_layout=True)
    for column, (axis, name) in enumerate(zip(axes, ("train loss", "held-out loss"), strict=True)):
        for label, height in zip(labels, heights, strict=True):
            mine = values[label][:, column]
            axis.plot([mine.min(), mine.max()], [height, height], color=COLOURS[0], linewidth=1)
            axis.plot(mine.mean(), height, "o", color=COLOURS[0], markersize=4)
        axis.set(xlabel=f"{name} (nats)")
        axis.set_xlim(*_range(np.concatenate([values[label][:, column] for label in labels])))
        axis.grid(True, alpha=0.2)
    axes[0].set_yticks(heights, labels, fontsize=8)
    figure.suptitle(title)
    return figure


def start_steps(counts_of: Mapping[str, Mapping[str, int]]) -> Any:
    """Histogram of the start steps that meta-training realised: label -> first step of a bin of 250 -> unrolls."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    # Lines of methods without a buffer lie on one another: the first drawn are the widest.
    widths = np.linspace(min(1.2 * len(counts_of), 6.0), 1.2, len(counts_of))
    colours = COLOURS * (len(counts_of) // len(COLOURS) + 1)
    for (label, found), colour, width in zip(counts_of.items(), colours, widths, strict=False):
        counts = {int(k): v for k, v in found.items()}
        if counts:
            steps = np.arange(0, max(counts) + 500, 250)
            share = np.array([counts.get(int(s), 0) for s in steps], float)
            axis.step(steps, share / share.sum(), where="post", label=label, color=colour, linewidth=width)
    axis.set(xlabel="start step K of an unroll (bins of 250)", ylabel="share of unrolls", yscale="log")
    axis.grid(True, alpha=0.2)
    axis.legend(fontsize=8, frameon=False)
    return figure


def meta_losses(runs: dict[str, list[tuple[np.ndarray, np.ndarray]]], title: str) -> Any:
    """Task loss in meta-training against wall-clock time: method -> (hours, loss) of each meta-seed."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6, 4), constrained_layout=True)
    for (method, seeds), colour in zip(runs.items(), COLOURS * (len(runs) // len(COLOURS) + 1), strict=False):
        for i, (hours, losses) in enumerate(seeds):
            axis.plot(60 * hours, losses, color=colour, linewidth=1, alpha=0.8, label=method if i == 0 else None)
    axis.set(
        xlabel="minutes of meta-training (outer steps × median time)",
        ylabel="task loss (nats)",
        title=title,
    )
    axis.set_ylim(*_range(np.concatenate([losses[1:] for seeds in runs.values() for _, losses in seeds])))
    axis.grid(True, alpha=0.2)
    axis.legend(fontsize=8, frameon=False)
    return figure


def meta_training(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Task loss and imitation loss of every outer step of one meta-training, and α: rows of its log."""
    plt = pyplot()
    steps = [row for row in rows if "task_loss" in row]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, field, name in ((axes[0], "task_loss", "task loss"), (axes[1], "bc_loss", "imitation loss")):
        values = np.array([row[field] for row in steps], float)
        for i, of_task in enumerate(values.T):
            axis.plot([row["step"] for row in steps], of_task, color=COLOURS[i % len(COLOURS)], linewidth=1)
        axis.set(xlabel="outer step", ylabel=f"{name}, mean over pairs")
        axis.set_ylim(*_range(values[len(values) // 20 :]))
        axis.grid(True, alpha=0.2)
    weight = axes[1].twinx()
    weight.plot([row["step"] for row in steps], [row["alpha_loss"] for row in steps], color="black", linestyle=":")
    weight.set(ylabel="α (dotted)", ylim=(-0.02, 1.02))
    figure.suptitle(title)
    return figure


def growth(curves: dict[str, list[tuple[float, float]]]) -> Any:
    """Time of an outer step (ms) against each thing that it grows with; the dotted line is proportional growth."""
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(curves), figsize=(3.2 * len(curves), 3.2), constrained_layout=True, squeeze=False
    )
    for axis, (what, points) in zip(axes[0], curves.items(), strict=True):
        x, y = np.array(points).T
        axis.plot(x, y, marker="o", color=COLOURS[0])
        axis.plot(x, y[-1] * x / x[-1], color="black", linestyle=":", linewidth=1, label="proportional")
        axis.set(xscale="log", yscale="log", xlabel=what, ylabel="outer step (ms)")
        axis.set_xticks(x, [f"{value:,.0f}" for value in x], rotation=30)
        apart = [value for i, value in enumerate(y) if i == 0 or abs(value / y[i - 1] - 1) > 0.1]
        axis.set_yticks(apart, [f"{value:,.0f}" for value in apart])
        axis.minorticks_off()
        axis.grid(True, alpha=0.2)
    axes[0, 0].legend(fontsize=8, frameon=False)
    return figure
