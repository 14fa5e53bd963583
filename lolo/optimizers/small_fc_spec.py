"""What every backend of `small_fc` shares: settings, decays, time scales, epsilons and the order of its 39 inputs.

NumPy only, so that `lolo.torch` can read it where JAX is absent. The architecture is Metz et al.,
"Practical tradeoffs between memory, compute, and performance in learned optimizers" (2022).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from lolo.files import settings
from lolo.files.settings import RecipeError
from lolo.optimizers.factored import row_slices

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAY = 0.999
FACTORED_DECAYS = (0.9, 0.99, 0.999)
TIMESCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)

MOMENTUM_EPSILON = 1e-6  # in rsqrt(v + ε), columns 7-10, and in the diagonal columns 26-28
NORMALIZE_EPSILON = 1e-5  # in x · rsqrt(ε + mean x²), columns 1-28

# Entries of a gradient beyond it count as ±LARGEST_GRADIENT: the sum of g² over 2³¹ entries still fits a float32.
LARGEST_GRADIENT = 2.0**48

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


SLICES = row_slices(COLUMNS)

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
TIME_COLUMNS = np.r_[SLICES["time"]]

# Decay offsets of older checkpoints: name -> how many.
DECAY_OFFSETS = {"momentum_decays": 3, "rms_decays": 1, "adafactor_decays": 3}


MAX_HIDDEN = 4096


@dataclasses.dataclass(frozen=True)
class SmallFcSettings(settings.Alternative):
    """The per-parameter network of the paper (Eq. 7)."""

    name: str = "small_fc"  # the architecture: --learner.name NAME --help lists the fields of another one
    hidden: int = 32  # width of the two hidden layers
    step_mult: float = 1e-3  # λ1 of Eq. 7
    exp_mult: float = 1e-3  # λ2 of Eq. 7
    learn_decays: bool = False  # meta-learn the accumulators' decays too
    weight_decay: float = 0.0  # decoupled, times λ1; the expert gets the same
    clock_limit: float | None = None  # the time features see min(t, this)
    step_decay: float | None = settings.added(None)  # updates shrink as 1/√(1 + t/this); at inference only


DEPLOYMENT: Mapping[str, Callable[[Any], float]] = {
    "weight_decay": settings.number,
    "clock_limit": partial(settings.number, endless=True),
    "step_decay": partial(settings.number, positive=True, endless=True),
}
"""The settings that may differ at inference, and what reads each. Infinity switches a limit or a decay off."""


def check(learner: SmallFcSettings) -> None:
    """Raise RecipeError for values that can't be."""
    settings.check_numbers(
        settings.fields(learner, "learner."),
        at_least_one=("learner.hidden",),
        positive=("learner.step_mult",),
        not_negative=("learner.exp_mult", "learner.weight_decay"),
    )
    if learner.hidden > MAX_HIDDEN:
        raise RecipeError(f"learner.hidden={learner.hidden} must be at most {MAX_HIDDEN}.")
    if learner.clock_limit is not None and not learner.clock_limit >= 0:
        raise RecipeError(f"learner.clock_limit={learner.clock_limit} must be 0 or more, or None.")
    if learner.step_decay is not None and not learner.step_decay > 0:
        raise RecipeError(f"learner.step_decay={learner.step_decay} must be a positive number of steps, or None.")


def check_meta_training(learner: SmallFcSettings) -> None:
    """Raise RecipeError for settings that are for inference alone."""
    if learner.step_decay is not None:
        raise RecipeError(
            f"learner.step_decay={learner.step_decay} is for inference: an expert has no such schedule, and imitation "
            "would work against it. Leave it out, and say optimizer(step_decay=...) of the meta-trained weights."
        )


def expert_decay(learner: SmallFcSettings) -> float:
    """What an expert's weights must decay by at each step, as the learner's do."""
    return learner.step_mult * learner.weight_decay


def keeps_adam_moments(learner: SmallFcSettings) -> bool:
    """Whether the averages that Adam needs are among the accumulators."""
    return not learner.learn_decays


def shapes_of(learner: SmallFcSettings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of φ."""
    return weight_shapes(learner.hidden, learn_decays=learner.learn_decays)


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
