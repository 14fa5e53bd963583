"""Triton kernels of `norm_fc`: AdamW's step, and its size. See `triton_passes`, whose notes hold here too."""

from typing import no_type_check

import triton
import triton.language as tl

from lolo.torch.triton_tiles import (
    ADAM_BLOCK,
    ADAM_EPSILON,
    COUNT,
    ENTRY_INPUTS,
    FIRST,
    FIRST_DECAY_LOG,
    GAIN_0,
    GRAD,
    MOMENTUM,
    PARAM,
    REGIONS,
    RMS,
    RMS_DECAY_LOG,
    SIZE,
    STEP_SUMS,
    WEIGHTS,
    WORDS,
    address,
    dense,
    moved,
    read_gradient,
    read_rate,
    region_of,
    rows_of,
    total_of,
)


@triton.jit
@no_type_check
def corrections(row, rms_decay_log):
    """What AdamW's mean is divided by, and its root, after this gradient. rms_decay_log: to base 2."""
    count = tl.load(tl.load(row + COUNT).to(tl.pointer_type(tl.int64))).to(tl.float64)
    first = (1.0 - tl.exp2(count * FIRST_DECAY_LOG)).to(tl.float32)
    return first, tl.sqrt(1.0 - tl.exp2(count * rms_decay_log)).to(tl.float32)


@triton.jit
@no_type_check
def measure_adam(
    table,
    owners,
    scratch,
    MOMENTUM_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The sum of squares of AdamW's step in a region, from the new moments."""
    row, region, first, tiles, place = region_of(table, owners, HEIGHT, WIDTH, ALIGNED)
    momentum = dense(address(row, MOMENTUM, MOMENTUM_TYPE, ALIGNED), place)
    rms = dense(address(row, RMS, tl.float32, ALIGNED), place)
    mean_scale, root_scale = corrections(row, RMS_DECAY_LOG)
    squares = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for tile in range(first, first + tiles):
        rows, inside = rows_of(tile, place, HEIGHT)
        m = tl.load(momentum + rows * place[3], mask=inside, other=0.0).to(tl.float32)
        v = tl.load(rms + rows * place[3], mask=inside, other=0.0)
        step = m / mean_scale / (tl.sqrt(v) / root_scale + ADAM_EPSILON)
        squares += step * step
    tl.store(scratch + tl.load(row + STEP_SUMS) + region, tl.sum(squares))


@triton.jit
@no_type_check
def size_as_adam(table, scratch, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """What `normalize` has left, times the root mean square of AdamW's step."""
    row = table + tl.program_id(0).to(tl.int64) * WORDS
    squares = total_of(scratch + tl.load(row + STEP_SUMS), tl.load(row + REGIONS), BLOCK)
    at = scratch + tl.load(row + WEIGHTS) + ENTRY_INPUTS * HIDDEN + 1
    tl.store(at, tl.load(at) * tl.sqrt((squares / tl.load(row + SIZE)).to(tl.float32)))


@triton.jit
@no_type_check
def adam(
    table,
    owners,
    rate,
    decay,
    adam_scale,
    rms_gain,
    rms_decay_log,
    sign,
    GRAD_TYPE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    RATE_IS_TENSOR: tl.constexpr,
):
    """AdamW (.9, 1 − rms_gain, 1e-8), bias-corrected, of a block of a tensor that is one piece of memory."""
    row = table + tl.load(owners + tl.program_id(0)) * WORDS
    block = tl.program_id(0) - tl.load(row + FIRST)
    at = block * ADAM_BLOCK + tl.arange(0, ADAM_BLOCK)
    size = tl.load(row + SIZE)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    inside = at < size
    mean_scale, root_scale = corrections(row, rms_decay_log)
    grad, param = address(row, GRAD, GRAD_TYPE, ALIGNED), address(row, PARAM, PARAM_TYPE, ALIGNED)
    momentum, rms = address(row, MOMENTUM, MOMENTUM_TYPE, ALIGNED), address(row, RMS, tl.float32, ALIGNED)
    g = read_gradient(grad + at, inside, sign)
    p = tl.load(param + at, mask=inside, other=0.0).to(tl.float32)
    m = moved(tl.load(momentum + at, mask=inside, other=0.0).to(tl.float32), g, GAIN_0)
    v = tl.load(rms + at, mask=inside, other=0.0) * (1.0 - rms_gain) + rms_gain * (g * g)
    change = m / (tl.sqrt(v) / root_scale + ADAM_EPSILON) * (adam_scale / mean_scale)
    tl.store(momentum + at, m.to(MOMENTUM_TYPE), mask=inside)
    tl.store(rms + at, v, mask=inside)
    p -= read_rate(rate, RATE_IS_TENSOR) * (change + decay * p)
    tl.store(param + at, p.to(PARAM_TYPE), mask=inside)
