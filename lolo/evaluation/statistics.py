"""Rows of an evaluation, and what they say: means, intervals, paired differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special


@dataclasses.dataclass(frozen=True)
class Row:
    """One run: one optimizer, one evaluation seed."""

    task: str
    optimizer: str
    meta_seed: int | None
    seed: int
    steps: int
    train_loss: float  # mean over the last 100 steps; the loss limit if diverged
    train_minimum: float  # lowest mean over 100 steps on the way
    held_loss: float  # on the whole held-out split
    held: dict[str, float]  # all scores on the whole held-out split
    diverged: bool
    train_curve: list[float]  # means over 100 steps
    held_curve: list[float]


class Interval(NamedTuple):
    """A mean with its 95 % t interval over n units; half is NaN for n = 1, and where a value is not finite."""

    mean: float
    half: float
    n: int
    unit: str  # what was counted: "meta-seeds" or "seeds"


def interval(values: Sequence[float], unit: str) -> Interval:
    """Mean and 95 % t interval."""
    array, n = np.asarray(values, np.float64), len(values)
    half = math.nan
    if n > 1 and np.isfinite(array).all():
        half = float(special.stdtrit(n - 1, 0.975) * array.std(ddof=1) / math.sqrt(n))
    with np.errstate(invalid="ignore"):  # ∞ − ∞, of runs that diverged on a task without a loss limit
        return Interval(float(array.mean()), half, n, unit)


def _by_unit(rows: Sequence[Row], field: str, label: str) -> dict[tuple[int | None, int], float]:
    return {(row.meta_seed, row.seed): getattr(row, field) for row in rows if row.optimizer == label}


def summary(rows: Sequence[Row], label: str, field: str = "train_loss") -> Interval:
    """Mean of one optimizer. The unit is the meta-seed; with one meta-seed, or none, the evaluation seed."""
    values = _by_unit(rows, field, label)
    return _interval_by_meta_seed(values)


def _interval_by_meta_seed(values: dict[tuple[int | None, int], float]) -> Interval:
    groups: dict[int | None, list[float]] = {}
    for (meta_seed, _), value in values.items():
        groups.setdefault(meta_seed, []).append(value)
    if len(groups) > 1:
        return interval([float(np.mean(group)) for group in groups.values()], "meta-seeds")
    return interval(next(iter(groups.values())), "seeds")


def paired_difference(rows: Sequence[Row], a: str, b: str, field: str = "train_loss") -> Interval:
    """a − b, paired by evaluation seed and, where both have them, by meta-seed; negative: a is lower.

    An optimizer with one φ, or none, is paired with every meta-seed of the other by evaluation seed alone. Raises
    ValueError where nothing can be paired.
    """
    ours, theirs = _by_unit(rows, field, a), _by_unit(rows, field, b)
    our_seeds, their_seeds = ({meta_seed for meta_seed, _ in values} for values in (ours, theirs))
    by_meta_seed = bool(our_seeds & their_seeds)
    differences = {}
    if by_meta_seed or min(len(our_seeds), len(their_seeds)) == 1:
        for (our_seed, seed), value in ours.items():
            for (their_seed, other_seed), other in theirs.items():
                if seed == other_seed and (our_seed == their_seed or not by_meta_seed):
                    differences[our_seed if len(our_seeds) > 1 else their_seed, seed] = value - other
    if not differences:
        raise ValueError(f"{a!r} and {b!r} have no evaluation seed and meta-seed in common.")
    return _interval_by_meta_seed(differences)
