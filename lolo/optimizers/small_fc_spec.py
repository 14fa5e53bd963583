"""What every backend of `small_fc` shares: decays, time scales, epsilons and the order of its 39 inputs.

NumPy only, so that `lolo.torch` can read it where JAX is absent. The architecture is Metz et al.,
"Practical tradeoffs between memory, compute, and performance in learned optimizers" (2022).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAY = 0.999
FACTORED_DECAYS = (0.9, 0.99, 0.999)
TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)

FACTORED_EPSILON = 1e-30  # added to g² before it enters the factored moments
FACTOR_MEAN_EPSILON = 1e-9  # added to the mean of the row moments, and to the diagonal moment
FACTOR_FLOOR = 1e-9  # smallest argument of the factors' inverse square roots
MOMENTUM_EPSILON = 1e-6  # in rsqrt(v + ε), columns 7-10, and in the diagonal columns 26-28
MOMENT_EPSILON = 1e-8  # in rsqrt(R + ε) and rsqrt(C + ε), columns 20-25
NORMALIZE_EPSILON = 1e-5  # in x · rsqrt(ε + mean x²), columns 1-28

# Column order of the first weight matrix, as (name, columns). Everything before "time" is divided by its root
# mean square over the tensor.
COLUMNS = (
    ("gradient", 1),
    ("parameter", 1),
    ("momentum", 3),
    ("second_moment", 1),
    ("scaled_momentum", 3),
    ("inverse_root", 1),
    ("factored_gradient", 3),
    ("row", 3),
    ("column", 3),
    ("inverse_root_row", 3),
    ("inverse_root_column", 3),
    ("factored_momentum", 3),
    ("time", len(TIMESCALES)),
)
INPUTS = sum(count for _, count in COLUMNS)


def column_slices() -> dict[str, slice]:
    """Where each named input lies in the rows of `w0`."""
    slices, start = {}, 0
    for name, count in COLUMNS:
        slices[name] = slice(start, start + count)
        start += count
    return slices


SLICES = column_slices()

# Inputs that differ from entry to entry; the others are constant along an axis, or over the tensor.
ENTRY_COLUMNS = np.r_[
    tuple(
        SLICES[name]
        for name in (
            "gradient",
            "parameter",
            "momentum",
            "second_moment",
            "scaled_momentum",
            "inverse_root",
            "factored_gradient",
            "factored_momentum",
        )
    )
]
ROW_COLUMNS = np.r_[SLICES["row"], SLICES["inverse_root_row"]]
COLUMN_COLUMNS = np.r_[SLICES["column"], SLICES["inverse_root_column"]]
NETWORK_COLUMNS = np.r_[ENTRY_COLUMNS, ROW_COLUMNS, COLUMN_COLUMNS]
TIME_COLUMNS = np.r_[SLICES["time"]]

# Decay offsets of older checkpoints: name -> how many.
DECAY_OFFSETS = {"momentum_decays": 3, "rms_decays": 1, "adafactor_decays": 3}


class FactoredAxes(NamedTuple):
    """The two largest axes of a tensor. Row moments are means over `largest`, column moments over `second`."""

    largest: int
    second: int


def factored_axes(shape: tuple[int, ...]) -> FactoredAxes | None:
    """The axes that the second moment is factored over; None below two axes. Ties: the later axis is the larger."""
    if len(shape) < 2:
        return None
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])  # stable, as argsort in the reference
    return FactoredAxes(largest=order[-1], second=order[-2])


def weight_shapes(hidden: int, *, learn_decays: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the meta-parameters φ."""
    shapes: dict[str, tuple[int, ...]] = {
        "w0": (INPUTS, hidden),
        "b0": (hidden,),
        "w1": (hidden, hidden),
        "b1": (hidden,),
        "w2": (hidden, 2),
        "b2": (2,),
    }
    if learn_decays:
        shapes |= {name: (count,) for name, count in DECAY_OFFSETS.items()}
    return shapes


def accumulators_per_parameter(shape: tuple[int, ...]) -> float:
    """float32 numbers of optimizer state per parameter of one tensor: momenta, second moment, factored moments."""
    entries = math.prod(shape)
    axes = factored_axes(shape)
    if axes is None:
        return 7.0
    return 4.0 + 3.0 / shape[axes.largest] + 3.0 / shape[axes.second] if entries else 4.0
