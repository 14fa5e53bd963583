"""Triton kernels of `norm_fc` for row and column moments: pass 1, and what comes of it. See `triton_passes`."""

from typing import no_type_check

import triton
import triton.language as tl

from lolo.torch.triton_tiles import (
    COLUMN,
    COLUMN_PART,
    DIAGONAL_INPUTS,
    FACTOR_MEAN_EPSILON,
    FACTORED_EPSILON,
    FACTORED_GAIN_0,
    FACTORED_GAIN_1,
    FACTORED_GAIN_2,
    FIRST_ROW,
    GRAD,
    GRAD_K,
    INPUTS,
    LAST_IS_LARGEST,
    LOOPS,
    MOMENT_EPSILON,
    NORMALIZE_EPSILON,
    ROW,
    ROW_ALONG,
    ROW_PART,
    ROW_SUMS,
    SIZE,
    STRETCH,
    WORDS,
    A,
    B,
    factor_of,
    moved,
    read_gradient,
    region_of,
    rows_of,
    strided,
    total_of,
)


@triton.jit
@no_type_check
def add_squares(
    table,
    owners,
    scratch,
    sign,
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Pass 1: sums of g² over the rows and the columns of a region."""
    row, region, first, tiles, place = region_of(table, owners, HEIGHT, WIDTH, ALIGNED)
    k, columns, a, b, size = place
    grad, grad_stride = strided(row, GRAD, GRAD_K, GRAD_TYPE, place, ALIGNED)
    across = region % tl.cdiv(b, WIDTH)
    of_rows = scratch + tl.load(row + ROW_PART) + across * (size // b) + k * a
    of_columns = scratch + tl.load(row + COLUMN_PART) + first // LOOPS * (size // a) + k * b
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for tile in range(first, first + tiles):
        rows, inside = rows_of(tile, place, HEIGHT)
        g = read_gradient(grad + rows * grad_stride, inside, sign)
        total += g * g
        tl.store(of_rows + rows, tl.sum(g * g, axis=1, keep_dims=True), mask=rows < a)
    tl.store(of_columns + columns, tl.sum(total, axis=0, keep_dims=True), mask=columns < b)


@triton.jit
@no_type_check
def stretch_of(table, stretches, scratch):
    """Row of the tensor, 0 for rows and 1 for columns, whether these are the row moments, k, entries, the extents."""
    found = tl.load(stretches + tl.program_id(0))
    row, axis = table + found // 2 * WORDS, found % 2
    extent, other = tl.load(row + A + axis), tl.load(row + B - axis)
    number = tl.program_id(0) - tl.load(row + FIRST_ROW + axis).to(tl.int32)
    each = tl.cdiv(extent, STRETCH).to(tl.int32)
    entries = (number % each).to(tl.int64) * STRETCH + tl.arange(0, STRETCH)
    is_row = (tl.load(row + LAST_IS_LARGEST) != 0) != (axis != 0)
    return row, axis, is_row, (number // each).to(tl.int64), entries, extent, other, number


@triton.jit
@no_type_check
def average(table, stretches, scratch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Row or column moments from the sums over regions, and sums of their squares, for a stretch of them."""
    row, axis, is_row, k, entries, extent, other, number = stretch_of(table, stretches, scratch)
    inside = entries < extent
    moments, size = tl.load(row + SIZE) // other, tl.load(row + SIZE)
    parts = tl.cdiv(other, tl.where(axis == 0, WIDTH, HEIGHT * LOOPS))
    start = scratch + tl.load(row + ROW_PART + axis) + k * extent
    total = tl.zeros([STRETCH], tl.float64)
    for part in range(0, parts):
        total += tl.load(start + part * moments + entries, mask=inside, other=0.0)
    new = (total / other).to(tl.float32) + FACTORED_EPSILON
    moment = tl.load(row + tl.where(is_row, ROW, COLUMN)).to(tl.pointer_type(tl.float32)) + k * extent + entries
    count = size // (extent * other) * tl.cdiv(extent, STRETCH)
    sums = scratch + tl.load(row + ROW_SUMS + axis) + number
    for d in tl.static_range(3):
        old = tl.load(moment + d * moments, mask=inside, other=0.0)
        if d == 0:
            kept = moved(old, new, FACTORED_GAIN_0)
        elif d == 1:
            kept = moved(old, new, FACTORED_GAIN_1)
        else:
            kept = moved(old, new, FACTORED_GAIN_2)
        tl.store(moment + d * moments, kept, mask=inside)
        kept = tl.where(inside, kept, 0.0)
        root = tl.where(inside, tl.rsqrt(kept + MOMENT_EPSILON), 0.0)
        tl.store(sums + d * count, tl.sum(kept * kept, axis=0))
        tl.store(sums + (3 + d) * count, tl.sum(root * root, axis=0))


@triton.jit
@no_type_check
def project(table, stretches, scratch, phi, HIDDEN: tl.constexpr):
    """Factors, and shares of the first layer, for a stretch of row or column moments."""
    row, axis, is_row, k, entries, extent, other, number = stretch_of(table, stretches, scratch)
    inside = entries < extent
    moments = tl.load(row + SIZE) // other
    start = tl.load(row + tl.where(is_row, ROW, COLUMN)).to(tl.pointer_type(tl.float32)) + k * extent
    along = scratch + tl.load(row + ROW_ALONG + axis) + k * extent + entries
    count = moments // extent * tl.cdiv(extent, STRETCH)
    sums = scratch + tl.load(row + ROW_SUMS + axis)
    weights = phi + (DIAGONAL_INPUTS + tl.where(is_row, 0, 3)) * HIDDEN
    inputs = ()
    for d in tl.static_range(3):
        moment = tl.load(start + d * moments + entries, mask=inside, other=0.0)
        relative = moment
        if is_row:
            mean = (total_of(start + d * moments, extent, STRETCH) / extent).to(tl.float32)
            relative = moment / (mean + FACTOR_MEAN_EPSILON)
        tl.store(along + d * moments, factor_of(relative), mask=inside)
        scale = tl.rsqrt((total_of(sums + d * count, count, STRETCH) / moments).to(tl.float32) + NORMALIZE_EPSILON)
        inputs = inputs + (moment * scale,)
    for d in tl.static_range(3):
        moment = tl.load(start + d * moments + entries, mask=inside, other=0.0)
        scale = tl.rsqrt(
            (total_of(sums + (3 + d) * count, count, STRETCH) / moments).to(tl.float32) + NORMALIZE_EPSILON
        )
        inputs = inputs + (tl.rsqrt(moment + MOMENT_EPSILON) * scale,)
    for h in tl.static_range(HIDDEN):
        share = tl.zeros([STRETCH], tl.float32)
        if axis == 0:  # the bias enters once
            share += tl.load(phi + INPUTS * HIDDEN + h)
        for d in tl.static_range(6):
            share += tl.load(weights + (d % 3 + d // 3 * 6) * HIDDEN + h) * inputs[d]
        tl.store(along + (3 + h) * moments, share, mask=inside)
