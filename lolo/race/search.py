"""The search for an optimizer's settings: the same quasi-random trials on every workload."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import qmc

TRIALS = 20
SEARCH_SEED = 20_261_129  # of the points
TRIAL_SEED = 1_000_003  # the evaluation seed of every trial, which no race has
FIVE = 5  # settings of an optimizer under the tuned rules


class Setting(NamedTuple):
    """The numbers of an optimizer that the search varies."""

    learning_rate: float  # or what stands for it: `Space.rate`
    weight_decay: float
    warmup: float  # share of the steps


class Space(NamedTuple):
    """What the search draws from, and the schedule that the optimizer is searched and raced with."""

    learning_rate: tuple[float, float]  # log-uniform
    weight_decay: tuple[float, float] = (1e-3, 0.5)  # log-uniform; decoupled unless said otherwise
    warmup: tuple[float, float] = (0.02, 0.1)  # uniform
    schedule: str = "warmup-cosine"
    rate: str = "learning_rate"  # of weights: the setting that multiplies their step
    fixed: str = ""  # of weights: further settings, the same in all trials


SPACES: dict[str, Space] = {
    "adamw": Space((3e-4, 3e-2)),
    "nadamw": Space((3e-4, 3e-2)),
    "nesterov": Space((3e-3, 1.0), weight_decay=(1e-6, 1e-3)),  # L2
    "lion": Space((1e-5, 3e-3), weight_decay=(1e-2, 5.0)),  # ten times the decay at a tenth of the rate, as advised
    "muon": Space((1e-4, 3e-2)),
    "muon-matched": Space((3e-4, 3e-2)),
    "schedule-free": Space((3e-4, 3e-2), schedule="warmup"),  # as it is meant
    "prodigy": Space((0.3, 3.0)),  # multiplies the rate that it finds
}
"""Rivals in the race."""

SPACES_OF_WEIGHTS: dict[str, Space] = {
    "norm_fc": Space((1e-4, 3e-2)),
    "small_fc": Space((0.1, 10.0), rate="step_scale", fixed="step_decay=inf"),
}
"""What the search draws from for weights, by architecture."""

REFERENCES = ("adamw", "nadamw", "nesterov")  # the best of these sets a workload's target


def settings_of(space: Space, count: int = TRIALS) -> list[Setting]:
    """The trials of an optimizer: a scrambled Halton sequence over its space, with three digits.

    >>> len(settings_of(SPACES["adamw"]))
    20
    """
    points = qmc.Halton(3, rng=np.random.default_rng(SEARCH_SEED)).random(count)

    def log_uniform(share: float, bounds: tuple[float, float]) -> float:
        low, high = map(math.log, bounds)
        return float(f"{math.exp(low + share * (high - low)):.3g}")

    low, high = space.warmup
    return [
        Setting(
            log_uniform(rate, space.learning_rate),
            log_uniform(decay, space.weight_decay),
            round(low + warmup * (high - low), 3),
        )
        for rate, decay, warmup in points
    ]


def ranks(losses: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Rank of each trial on each workload, [W, trials], 0 for the lowest loss; one that is not finite is the last.

    losses: workload -> loss of each trial.
    """
    table = np.array(list(losses.values()), np.float64)
    return np.argsort(np.argsort(np.where(np.isfinite(table), table, np.inf), axis=1, kind="stable"), axis=1)


def one_for_all(losses: Mapping[str, Sequence[float]]) -> int:
    """The trial of the lowest mean rank over workloads: the setting of the self-tuning rules."""
    return int(np.argmin(ranks(losses).mean(axis=0)))


def five_for_all(losses: Mapping[str, Sequence[float]]) -> list[int]:
    """Five trials for all workloads, the setting of the self-tuning rules first.

    Each of the others is the one that lowers most the mean over workloads of the best rank among those taken.
    """
    table, taken = ranks(losses), [one_for_all(losses)]
    while len(taken) < min(FIVE, table.shape[1]):
        best = table[:, taken].min(axis=1, keepdims=True)
        means = np.minimum(table, best).mean(axis=0)
        means[taken] = np.inf
        taken.append(int(np.argmin(means)))
    return taken
