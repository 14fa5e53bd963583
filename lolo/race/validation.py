"""Losses of optimizers on the data of the search: to choose weights or settings before they are raced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lolo.evaluation.statistics import interval
from lolo.race import search, tuning, workloads
from lolo.race.records import ValidationRow
from lolo.studies import candidates
from lolo.studies.evaluation_folder import contents_of
from lolo.studies.tables import markdown


def seeds_of(count: int) -> list[int]:
    """The seed of the search and the next ones, `count` in all. Raises ValueError: the next are seeds of targets."""
    most = tuning.TARGET_SEEDS[0] - search.TRIAL_SEED
    if count > most:
        raise ValueError(f"--seeds {count} must be at most {most} with --validate.")
    return [search.TRIAL_SEED + i for i in range(count)]


def run(
    named: Mapping[str, candidates.Named], workload: str, seeds: Sequence[int], on_steps: tuning.OnSteps
) -> dict[str, list[ValidationRow]]:
    """Each optimizer on a workload and on these seeds, with as many steps as a trial of the search."""
    of, rows = workloads.WORKLOADS[workload], dict[str, list[ValidationRow]]()
    steps = tuning.steps_of_search(of)
    for group in tuning.together(named, of.task, steps):
        losses = tuning.run(of.task, list(group.values()), seeds, steps, on_steps).held_loss[:, -1]
        for name, mine in zip(group, losses.reshape(len(group), len(seeds)), strict=True):
            rows[name] = [
                ValidationRow(workload, name, contents_of(named[name]), seed, steps, round(float(loss), 6))
                for seed, loss in zip(seeds, mine, strict=True)
            ]
    return rows


def is_complete(rows: Sequence[ValidationRow], workload: str, seeds: Sequence[int]) -> bool:
    """Whether there is a row of this workload for each seed."""
    steps = tuning.steps_of_search(workloads.WORKLOADS[workload])
    return {(row.workload, row.seed, row.steps) for row in rows} >= {(workload, seed, steps) for seed in seeds}


def table(losses: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: the mean loss of each optimizer on each workload, and how it compares with the first optimizer's.

    losses: optimizer -> workload -> mean loss.
    """
    first, *_ = losses.values()
    lines = [["optimizer", *first, "against the first"]]
    for name, mine in losses.items():
        cells = [f"{x:.4f}" if math.isfinite(x) else "diverged" for x in mine.values()]
        lines.append([name, *cells, "–" if mine is first else _against(mine, first)])
    words = "Against the first: geometric mean over workloads of loss / loss of the first, with a 95 % interval."
    return f"{markdown(lines)}\n\nValidation losses, the lower the better. {words}"


def _against(mine: Mapping[str, float], first: Mapping[str, float]) -> str:
    """-3.1 % (-5.0 to -1.2), or "–" where one of the losses is not finite or not positive."""
    pairs = [(mine[workload], first[workload]) for workload in first]
    if not all(0 < x < math.inf for pair in pairs for x in pair):
        return "–"
    found = interval([math.log(x / y) for x, y in pairs], "workloads")

    def per_cent(log: float) -> str:
        return f"{100 * math.expm1(log):+.1f}"

    ends = f" ({per_cent(found.mean - found.half)} to {per_cent(found.mean + found.half)})"
    return f"{per_cent(found.mean)} %{ends if np.isfinite(found.half) else ''}"
