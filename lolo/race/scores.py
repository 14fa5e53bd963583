"""Scores of the race: how long each optimizer takes to a target, beside the others.

Times are in steps or in seconds, [optimizers, workloads], infinite for a miss. References: Dolan, Moré, "Benchmarking
Optimization Software with Performance Profiles", 2002; Dahl et al., "Benchmarking Neural Network Training Algorithms",
2023.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

FARTHEST = 4.0  # times the best time: what takes longer counts as a miss
MISS = 1 / FARTHEST  # the speed-up that a miss counts as

Times = Float[np.ndarray, "optimizers workloads"]


def steps_to(target: float, curve: Sequence[float], steps: int) -> float:
    """Steps until a loss is at or below the target, infinite if it never is.

    curve: the loss after equal parts of the steps.

    >>> steps_to(0.5, [0.9, 0.6, 0.4, 0.45], steps=200)
    150.0
    """
    reached = np.flatnonzero(np.asarray(curve, np.float64) <= target)
    return float((reached[0] + 1) * steps / len(curve)) if reached.size else math.inf


def ratios(times: Times) -> Times:
    """Each time over the best time on its workload; infinite for a miss, also where all miss."""
    best = times.min(axis=0)
    return np.where(np.isfinite(times), times / np.where(np.isfinite(best), best, 1.0), np.inf)


def profile(times: Times, factors: NDArray[np.float64]) -> NDArray[np.float64]:
    """ρ(τ): the share of the workloads that each optimizer finishes within τ times the best time, [optimizers, τ]."""
    return (ratios(times)[:, :, None] <= factors).mean(axis=1)


def profile_score(times: Times) -> NDArray[np.float64]:
    """B = ⅓∫₁⁴ρ(τ)dτ of each optimizer: 1 if it is the first on every workload, 0 if it misses all."""
    return np.clip((FARTHEST - ratios(times)) / (FARTHEST - 1), 0, 1).mean(axis=1)


def speed_up(times: Float[np.ndarray, "workloads"], reference: Float[np.ndarray, "workloads"]) -> float:
    """The geometric mean over workloads of reference/time; a miss counts as 1/4, and so does what is slower.

    reference: finite.
    """
    found = np.where(np.isfinite(times), reference / times, MISS)
    return float(np.exp(np.log(np.maximum(found, MISS)).mean()))
