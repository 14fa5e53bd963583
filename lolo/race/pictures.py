"""Pictures of a race: performance profiles, and validation curves of every workload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lolo.race import results, scores
from lolo.race.records import Target
from lolo.race.results import Form, Standing
from lolo.studies.plots import COLOURS, STYLES, pyplot


def look_of(standings: Sequence[Standing]) -> dict[str, dict[str, Any]]:
    """Colour and style of each entrant's line, the same in all pictures."""
    return {
        of.entrant: {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i // len(COLOURS) % len(STYLES)]}
        for i, of in enumerate(standings)
    }


def profiles(standings: Sequence[Standing], look: Mapping[str, dict[str, Any]], title: str) -> Any:
    """The share of the workloads that each optimizer finishes within τ times the best steps, and seconds."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True, sharey=True)
    factors = np.linspace(1, scores.FARTHEST, 301)
    for axis, unit in zip(axes, ("steps", "seconds"), strict=True):
        forms = [form for form in standings[0].steps if unit == "steps" or not form[1]]
        times = np.array([[getattr(of, unit)[form] for form in forms] for of in standings])
        known = ~np.isnan(times).any(axis=1)
        for of, shares in zip(np.array(standings, object)[known], scores.profile(times[known], factors), strict=True):
            axis.plot(factors, shares, linewidth=1.5, label=of[0], **look[of[0]])
        axis.set(xlabel=f"τ: times the best {unit} to the target", xlim=(1, scores.FARTHEST), ylim=(-0.02, 1.02))
        axis.grid(True, alpha=0.2)
    axes[0].set_ylabel("share of workloads finished")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(title)
    return figure


def curves(chosen: Mapping[str, results.RowsByForm], targets: Mapping[Form, Target], look: Mapping[str, Any]) -> Any:
    """Validation loss of every workload against the step, means over seeds; the target is the dotted line."""
    plt = pyplot()
    forms = sorted({form for mine in chosen.values() for form in mine if not form[1]})
    columns = min(len(forms), 4)
    rows = math.ceil(len(forms) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.4 * columns, 2.8 * rows + 0.6), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(forms) :]:
        axis.axis("off")
    for axis, form in zip(axes.flat, forms, strict=False):
        ends = []
        for entrant, mine in chosen.items():
            if form in mine and entrant in look:
                mean = np.mean([row.curve for row in mine[form]], axis=0)
                steps = mine[form][0].steps * np.arange(1, len(mean) + 1) / len(mean)
                axis.plot(
                    steps, np.where(np.isfinite(mean), mean, np.nan), linewidth=1.2, label=entrant, **look[entrant]
                )
                ends.append(mean[len(mean) // 5 :])
        target = targets[form].loss
        axis.axhline(target, color="black", linestyle=":", linewidth=1)
        finite = np.concatenate(ends)[np.isfinite(np.concatenate(ends))]
        high = float(np.quantile(finite, 0.9)) if finite.size else 2 * target
        low = min(float(finite.min()), target) if finite.size else target
        axis.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))
        axis.set_title(form[0], fontsize=10)
        axis.grid(True, alpha=0.2)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss")
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure
