"""What Triton's kernels of `norm_fc` share: tiles and addresses of a tensor's entries. See `triton_passes`."""

import math
from typing import no_type_check

import triton
import triton.language as tl

from lolo.optimizers import factored
from lolo.optimizers import norm_fc_spec as spec
from lolo.torch import triton_table as layout

# Kernels see global names that are constexpr only. GRAD, PARAM, …: where a tensor's row has its fields.
globals().update({name.upper(): tl.constexpr(index) for name, index in layout.AT.items()})
WORDS, LOOPS, STRETCH = map(tl.constexpr, (len(layout.FIELDS), layout.LOOPS, layout.STRETCH))
ENTRY_INPUTS, QUANTITIES, ADAM_BLOCK = map(tl.constexpr, (layout.ENTRY_INPUTS, layout.QUANTITIES, layout.ADAM_BLOCK))
GAIN_0, GAIN_1, GAIN_2 = (tl.constexpr(1 - decay) for decay in spec.MOMENTUM_DECAYS)
FACTORED_GAIN_0, FACTORED_GAIN_1, FACTORED_GAIN_2 = (tl.constexpr(1 - decay) for decay in spec.FACTORED_DECAYS)
RMS_DECAY, RMS_GAIN = map(tl.constexpr, (spec.RMS_DECAY, 1 - spec.RMS_DECAY))
FIRST_DECAY_LOG, RMS_DECAY_LOG = map(tl.constexpr, (math.log2(spec.MOMENTUM_DECAYS[0]), math.log2(spec.RMS_DECAY)))
CLIP, LARGEST_GRADIENT = map(tl.constexpr, (spec.GRADIENT_CLIP, spec.LARGEST_GRADIENT))
NORMALIZE_EPSILON, BASELINE_EPSILON = map(tl.constexpr, (spec.NORMALIZE_EPSILON, spec.BASELINE_EPSILON))
MOMENT_EPSILON, ADAM_EPSILON = map(tl.constexpr, (factored.MOMENT_EPSILON, spec.ADAM_EPSILON))
FACTORED_EPSILON, FACTOR_MEAN_EPSILON = map(tl.constexpr, (factored.FACTORED_EPSILON, factored.FACTOR_MEAN_EPSILON))
FACTOR_FLOOR = tl.constexpr(factored.FACTOR_FLOOR)
# Rows of φ's first matrix: 0 to 14 and 27 to 29 are the inputs of entries, between them those of rows and columns.
INPUTS, DIAGONAL_INPUTS = map(tl.constexpr, (spec.INPUTS, spec.DIAGONAL_INPUTS))
ALONG_INPUTS = tl.constexpr(spec.SLICES["factored_momentum"].start - spec.DIAGONAL_INPUTS)
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
@no_type_check
def address(row, FIELD: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    found = tl.load(row + FIELD).to(tl.pointer_type(TYPE))
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
@no_type_check
def region_of(table, owners, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr):
    """The row of the program's tensor, its region's number there, its tiles, and (k, columns, A, B, size)."""
    row = table + tl.load(owners + tl.program_id(0)) * WORDS
    a, b = tl.load(row + A), tl.load(row + B)
    if ALIGNED:
        b = tl.multiple_of(b, 4)
    region = tl.program_id(0) - tl.load(row + FIRST).to(tl.int32)
    tiles, across = tl.cdiv(a, HEIGHT).to(tl.int32), tl.cdiv(b, WIDTH).to(tl.int32)
    down = tl.cdiv(tiles, LOOPS)
    first = region // across % down * LOOPS
    columns = (region % across).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    place = ((region // (across * down)).to(tl.int64), columns[None, :], a, b, tl.load(row + SIZE))
    return row, region, first, tl.minimum(tiles - first, LOOPS), place


@triton.jit
@no_type_check
def rows_of(tile, place, HEIGHT: tl.constexpr):
    """Numbers of the rows of a tile, [HEIGHT, 1], and which of its entries there are."""
    rows = (tile * HEIGHT + tl.arange(0, HEIGHT)).to(tl.int64)[:, None]
    return rows, (rows < place[2]) & (place[1] < place[3])


@triton.jit
@no_type_check
def strided(row, FIELD: tl.constexpr, FIRST_STRIDE: tl.constexpr, TYPE: tl.constexpr, place, ALIGNED: tl.constexpr):
    """Addresses of a gradient's or parameter's columns, and from row to row.

    Aligned: the last axis is dense, other strides are multiples of 4.
    """
    start, k_stride, a_stride = (
        address(row, FIELD, TYPE, ALIGNED),
        tl.load(row + FIRST_STRIDE),
        tl.load(row + FIRST_STRIDE + 1),
    )
    if ALIGNED:
        a_stride = tl.multiple_of(a_stride, 4)
        start = start + tl.multiple_of(k_stride, 4) * place[0] + place[1]
    else:
        start = start + k_stride * place[0] + tl.load(row + FIRST_STRIDE + 2) * place[1]
    return start, a_stride


@triton.jit
@no_type_check
def dense(start, place):
    """Addresses of the columns of what lies as [K, A, B]; from row to row it is B."""
    return start + place[0] * place[2] * place[3] + place[1]


@triton.jit
@no_type_check
def read_gradient(at, inside, sign):
    """Finite entries within ±2²⁴, all others NaN."""
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    clipped = tl.minimum(tl.maximum(x, -LARGEST_GRADIENT), LARGEST_GRADIENT)
    return sign * tl.where(tl.abs(x) < float("inf"), clipped, float("nan"))


@triton.jit
@no_type_check
def moved(old, new, GAIN: tl.constexpr):
    return old + GAIN * (new - old)


@triton.jit
@no_type_check
def factor_of(moment):
    return tl.rsqrt(tl.maximum(moment, FACTOR_FLOOR, propagate_nan=ALL))


@triton.jit
@no_type_check
def total_of(start, count, BLOCK: tl.constexpr):
    """The sum of numbers one after the other."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(start + at, mask=at < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
@no_type_check
def read_rate(rate, RATE_IS_TENSOR: tl.constexpr):
    if RATE_IS_TENSOR:  # its address; a captured graph reads it anew
        rate = tl.load(rate)
    return rate


@triton.jit
@no_type_check
def read_moments(momentum, rms, at, size, g, inside):
    """Momenta and second moment with this gradient."""
    m = (
        moved(tl.load(momentum + at, mask=inside, other=0.0).to(tl.float32), g, GAIN_0),
        moved(tl.load(momentum + size + at, mask=inside, other=0.0).to(tl.float32), g, GAIN_1),
        moved(tl.load(momentum + 2 * size + at, mask=inside, other=0.0).to(tl.float32), g, GAIN_2),
    )
    return m, moved(tl.load(rms + at, mask=inside, other=0.0), g * g, RMS_GAIN)


@triton.jit
@no_type_check
def read_diagonal(moment, at, size, g, inside):
    """Below two axes: the factored moments with this gradient."""
    squared = g * g + FACTORED_EPSILON
    return (
        moved(tl.load(moment + at, mask=inside, other=0.0), squared, FACTORED_GAIN_0),
        moved(tl.load(moment + size + at, mask=inside, other=0.0), squared, FACTORED_GAIN_1),
        moved(tl.load(moment + 2 * size + at, mask=inside, other=0.0), squared, FACTORED_GAIN_2),
    )
