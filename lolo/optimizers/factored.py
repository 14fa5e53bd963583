"""What `small_fc` and `norm_fc` have in common on every backend: factored second moments, and inputs by name.

NumPy only, so that `lolo.torch` can read it where JAX is absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

FACTORED_EPSILON = 1e-30  # added to g² before it enters the factored moments
FACTOR_MEAN_EPSILON = 1e-9  # added to the mean of the row moments, and to the diagonal moment
FACTOR_FLOOR = 1e-9  # smallest argument of the factors' inverse square roots
MOMENT_EPSILON = 1e-8  # in rsqrt(R + ε) and rsqrt(C + ε) of row and column moments; in norm_fc's rsqrt(v + ε) too


class FactoredAxes(NamedTuple):
    """The two largest axes of a tensor. Row moments are means over `largest`, column moments over `second`."""

    largest: int
    second: int


def factored_axes(shape: Sequence[int], order: Sequence[int] | None = None) -> FactoredAxes | None:
    """The axes that the second moment is factored over, the two largest ones; None below two axes.

    Args:
      shape: of the whole tensor.
      order: all of its axes; None: as they lie, as in the reference. Among equals the later in this order is the
        larger: named inputs before outputs, a square matrix is treated alike in [in, out] and in [out, in].
    """
    if len(shape) < 2:
        return None
    *_, second, largest = sorted(order if order is not None else range(len(shape)), key=lambda axis: shape[axis])
    return FactoredAxes(largest=largest, second=second)


def row_slices(inputs: Sequence[tuple[str, int]]) -> dict[str, slice]:
    """Where each of the named inputs, (name, count) in their order, lies in the rows of `w0`."""
    slices, start = {}, 0
    for name, count in inputs:
        slices[name] = slice(start, start + count)
        start += count
    return slices
