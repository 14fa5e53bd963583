"""Losses of optimizers on the data and seeds of the search: to choose weights or settings before they are raced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lolo.evaluation.statistics import interval
from lolo.race import search, tuning, workloads
from lolo.race.records import ValidationRow
from lolo.studies import candidates, evaluation_folder
from lolo.studies.tables import markdown


def contents_of(named: candidates.Named) -> str:
    """What tells two optimizers of one name apart: sha256 of a φ or of a user's file; "" for a rival."""
    if isinstance(named, candidates.NamedWeights):
        return evaluation_folder.phi_digest(named.weights)
    return named.sha256 if isinstance(named, candidates.NamedFunction) else ""


def seeds_of(count: int) -> list[int]:
    """That of the search, and those after it. Raises ValueError for more than there are before those of targets."""
    most = tuning.TARGET_SEEDS[0] - search.TRIAL_SEED
    if count > most:
        raise ValueError(f"--seeds {count} must be at most {most} with --validate.")
    return [search.TRIAL_SEED + i for i in range(count)]


def run(
    named: Mapping[str, candidates.Named], workload: str, seeds: Sequence[int], on_steps: tuning.OnSteps
) -> list[ValidationRow]:
    """Each optimizer on a workload and on these seeds, with the search's steps."""
    of, rows = workloads.WORKLOADS[workload], []
    steps = tuning.steps_of_search(of)
    for group in tuning.together(named, of.task, steps):
        curves = tuning.run(of.task, list(group.values()), seeds, steps, on_steps)
        losses = curves.held_loss[:, -1].reshape(len(group), len(seeds))
        for name, mine in zip(group, losses, strict=True):
            contents = contents_of(named[name])
            rows += [
                ValidationRow(workload, name, contents, seed, steps, round(float(loss), 6))
                for seed, loss in zip(seeds, mine, strict=True)
            ]
    return rows


def table(rows: Sequence[ValidationRow], names: Sequence[str]) -> str:
    """Markdown: mean loss of each optimizer on each workload, and how far it is below the first in the mean over them.

    That is the mean of log(loss / loss of the first), with a 95 % t interval over workloads, in per cent.
    """
    chosen = list(dict.fromkeys(row.workload for row in rows))
    losses = np.array(
        [[np.mean([r.loss for r in rows if (r.optimizer, r.workload) == (n, w)]) for w in chosen] for n in names]
    )
    with np.errstate(invalid="ignore"):
        below = 100 * np.log(losses / losses[0])
    lines = [["optimizer", *chosen, "against the first, %"]]
    for name, mine, logs in zip(names, losses, below, strict=True):
        ours = interval(logs.tolist(), "workloads")
        half = f" ± {ours.half:.2f}" if np.isfinite(ours.half) else ""
        lines.append([name, *(f"{x:.4f}" for x in mine), "–" if name == names[0] else f"{ours.mean:+.2f}{half}"])
    return markdown(lines)
