"""What every backend of `norm_fc` shares: decays, epsilons, the order of its 30 inputs, the Newton-Schulz iteration.

NumPy only, so that `lolo.torch` can read it where JAX is absent. The architecture is that of Celo2 (arXiv 2602.19142)
and ELO-Celo2 (arXiv 2607.06772).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lolo.files import settings
from lolo.files.settings import RecipeError
from lolo.kernels import library
from lolo.optimizers.factored import row_slices

MOMENTUM_DECAYS = (0.9, 0.99, 0.999)
RMS_DECAY = 0.95  # of a vector's second moment it is the default
RMS_GAIN = 1 - RMS_DECAY
FACTORED_DECAYS = (0.9, 0.99, 0.999)

# AdamW reads the first momentum and the second moment, so its decays are theirs.
ADAM_EPSILON = 1e-8

GRADIENT_CLIP = 0.1  # of the second input
NORMALIZE_EPSILON = 1e-9  # in x · rsqrt(ε + mean x²), of every input and of the step
BASELINE_EPSILON = 1e-30  # the same in the momentum baseline, so that it has root mean square 1 for small gradients too

# Entries beyond it count as ±LARGEST_GRADIENT: the mean of v², that is of g⁴, over 10⁹ entries still fits a float32.
# (The reference stops at 1,000.)
LARGEST_GRADIENT = 2.0**24

BASELINES = ("momentum", "none")
STEP_RMS = ("one", "adam")
MAX_HIDDEN = 16  # sums over hidden units are written out: XLA needs gigabytes to compile 32 of them on a tiny tensor
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_EPSILON = 1e-8  # added to the Frobenius norm

# Order of the rows of the first weight matrix, as (name, rows). Below two axes a tensor has the first nine only.
GROUPS = (
    ("gradient", 1),
    ("clipped_gradient", 1),
    ("parameter", 1),
    ("momentum", 3),
    ("second_moment", 1),
    ("scaled_momentum", 3),
    ("inverse_root", 1),
    ("factored_gradient", 3),
    ("scaled_gradient", 1),
    ("row", 3),
    ("column", 3),
    ("inverse_root_row", 3),
    ("inverse_root_column", 3),
    ("factored_momentum", 3),
)
INPUTS = sum(count for _, count in GROUPS)
DIAGONAL_INPUTS = sum(count for _, count in GROUPS[:9])


SLICES = row_slices(GROUPS)

# Inputs that differ from entry to entry, the diagonal ones first, and those that are constant along an axis.
ENTRY_ROWS = np.r_[0:DIAGONAL_INPUTS, SLICES["factored_momentum"]]
ROW_ROWS = np.r_[SLICES["row"], SLICES["inverse_root_row"]]
COLUMN_ROWS = np.r_[SLICES["column"], SLICES["inverse_root_column"]]


def weight_shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the meta-parameters φ."""
    return {
        "w0": (INPUTS, hidden),
        "b0": (hidden,),
        "w1": (hidden, hidden),
        "b1": (hidden,),
        "w2": (hidden, 1),
        "b2": (1,),
    }


@functools.cache
def hidden_of(numbers: int) -> int:
    """The width of the hidden layers of a φ, from how many numbers it has.

    >>> hidden_of(329)
    8
    """
    counts = {sum(map(math.prod, weight_shapes(hidden).values())): hidden for hidden in range(1, MAX_HIDDEN + 1)}
    return counts[numbers]


@dataclasses.dataclass(frozen=True)
class NormFcSettings(settings.Alternative):
    """A learned direction; the size of a step is fixed, or AdamW's."""

    name: str = "norm_fc"  # the architecture: --learner.name NAME --help lists the fields of another one
    hidden: int = 8  # width of the two hidden layers
    learning_rate: float = 1e-3  # root mean square of a matrix's step, if step_rms is one; about 8e-3 if it is adam
    weight_decay: float = 0.0  # decoupled, times the learning rate; the expert gets the same
    orthogonal: bool = True  # orthogonalise directions by Newton-Schulz, as Muon does
    baseline: str = "momentum"  # what the network corrects: momentum or none
    step_rms: str = settings.added("one")  # root mean square of a matrix's step: one, or adam: that of AdamW's step
    adam_scale: float = 1.0  # learning rate of vectors' AdamW, in learning rates of matrices
    adam_beta2: float = settings.added(RMS_DECAY)  # decay of the second moment in vectors' AdamW, from 0 to below 1
    # auto: the CPU kernel where it serves, with other last bits; plain: JAX's operations
    kernel: str = settings.added("plain")


def learning_rate(value: Any) -> Any:
    """A positive number. Raises ValueError."""
    return settings.number(value, positive=True)


def adam_beta2(value: Any, name: str = "") -> float:
    """A number from 0 to below 1. Raises ValueError, which begins with the name and the value if it is given."""
    with contextlib.suppress(ValueError):
        if settings.number(value) < 1:
            return settings.number(value)
    raise ValueError(f"{name and f'{name}={value!r} '}must be 0 or a positive number below 1.")


def one_of(words: Sequence[str], value: Any, name: str = "") -> str:
    """A value that is one of some words. Raises ValueError, which begins with the name and the value if it is given."""
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name and f'{name}={value!r} '}must be one of {', '.join(map(repr, words))}.")
    return value


def kernel(value: Any) -> str:
    """One of `library.CHOICES`. Raises ValueError."""
    return one_of(library.CHOICES, value)


def step_rms(value: Any) -> str:
    """One of `STEP_RMS`. Raises ValueError."""
    return one_of(STEP_RMS, value)


DEPLOYMENT: Mapping[str, Callable[[Any], Any]] = {
    "learning_rate": learning_rate,
    "weight_decay": settings.number,
    "step_rms": step_rms,
    "adam_scale": settings.number,
    "adam_beta2": adam_beta2,
    "kernel": kernel,
}
"""The settings that may differ at inference, and what reads each."""


def shapes_of(learner: NormFcSettings) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the meta-parameters φ."""
    return weight_shapes(learner.hidden)


def check(learner: NormFcSettings) -> None:
    """Raise RecipeError for values that can't be."""
    settings.check_numbers(
        settings.fields(learner, "learner."),
        at_least_one=("learner.hidden",),
        positive=("learner.learning_rate",),
        not_negative=("learner.weight_decay", "learner.adam_scale"),
    )
    try:
        adam_beta2(learner.adam_beta2, "learner.adam_beta2")
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if learner.hidden > MAX_HIDDEN:
        raise RecipeError(f"learner.hidden={learner.hidden} must be at most {MAX_HIDDEN}.")
    settings.pick(dict.fromkeys(BASELINES), "learner.baseline", learner.baseline)
    settings.pick(dict.fromkeys(STEP_RMS), "learner.step_rms", learner.step_rms)
    settings.pick(dict.fromkeys(library.CHOICES), "learner.kernel", learner.kernel)


def expert_decay(learner: NormFcSettings) -> float:
    """What an expert's weights must decay by at each step, as the learner's do."""
    return learner.learning_rate * learner.weight_decay
