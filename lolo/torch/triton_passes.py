"""Triton kernels of `norm_fc`: its passes over a list of tensors. Read together with `triton_table`.

The same function as `lolo.torch.norm_fc`. Four passes over the entries of a tensor [K, A, B]: `add_squares`, `measure`,
`move`, `finish`; between them small kernels bring together what programs have left in the scratch, always in the same
order. A program has a region of up to LOOPS tiles, one below the other; entries outside of the tensor are masked.

Importing this imports Triton. The code is Triton's language, of Python's grammar: no_type_check keeps mypy, and what
checks annotations while tests run, away from it.
"""

from typing import no_type_check

import triton
import triton.language as tl

from lolo.torch.triton_tiles import (
    ALL,
    ALONG_INPUTS,
    BASELINE_EPSILON,
    CLIP,
    COLUMN_ALONG,
    DIAGONAL_INPUTS,
    ENTRY_INPUTS,
    FACTOR_MEAN_EPSILON,
    GAIN_0,
    GRAD,
    GRAD_K,
    INPUTS,
    MOMENT_EPSILON,
    MOMENTUM,
    NORMALIZE_EPSILON,
    PARAM,
    PARAM_K,
    QUANTITIES,
    REGIONS,
    RMS,
    ROW,
    ROW_ALONG,
    SIZE,
    STEP,
    STEP_SUMS,
    SUMS,
    WEIGHTS,
    WORDS,
    address,
    dense,
    factor_of,
    moved,
    read_diagonal,
    read_gradient,
    read_moments,
    read_rate,
    region_of,
    rows_of,
    strided,
    total_of,
)


@triton.jit
@no_type_check
def along_of(row, scratch, place):
    """Addresses of what rows and columns bring: of k's rows, how many rows there are; the same of columns."""
    k, columns, a, b, size = place
    of_rows, of_columns = scratch + tl.load(row + ROW_ALONG) + k * a, scratch + tl.load(row + COLUMN_ALONG) + k * b
    return of_rows, size // b, of_columns + columns, size // a


@triton.jit
@no_type_check
def read_along(along, rows, place, slot):
    """One of the numbers that rows and columns bring, [HEIGHT, 1] and [1, WIDTH]."""
    of_row = tl.load(along[0] + slot * along[1] + rows, mask=rows < place[2], other=0.0)
    return of_row, tl.load(along[2] + slot * along[3], mask=place[1] < place[3], other=0.0)


@triton.jit
@no_type_check
def factors_of(along, rows, place, diagonal, FACTORED: tl.constexpr):
    """What a gradient is multiplied by, for three decays."""
    factors = ()
    for d in tl.static_range(3):
        if FACTORED:
            of_row, of_column = read_along(along, rows, place, d)
            factors = factors + (of_row * of_column,)
        else:
            factors = factors + (factor_of(diagonal[d] + FACTOR_MEAN_EPSILON),)
    return factors


@triton.jit
@no_type_check
def input_of(entries, i: tl.constexpr):
    """Input i of 18 in φ's order, not normalised; 18: Nesterov momentum. One by one, so that few are held at a time."""
    g, p, m, v, root, f = entries
    if i == 0:
        x = g
    elif i == 1:
        x = tl.minimum(tl.maximum(g, -CLIP, propagate_nan=ALL), CLIP, propagate_nan=ALL)
    elif i == 2:
        x = p
    elif i < 6:
        x = m[i - 3]
    elif i == 6:
        x = v
    elif i < 10:
        x = m[i - 7] * root
    elif i == 10:
        x = root
    elif i < 14:
        x = g * f[i - 11]
    elif i == 14:
        x = g * root
    elif i < 18:
        x = m[i - 15] * f[i - 15]
    else:
        x = moved(m[0], g, GAIN_0)
    return x


@triton.jit
@no_type_check
def entries_of(
    row, place, GRAD_TYPE: tl.constexpr, PARAM_TYPE: tl.constexpr, MOMENTUM_TYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Addresses of what a tile reads: gradient, parameter, each with its stride; momenta, second moment, diagonal."""
    grad, grad_stride = strided(row, GRAD, GRAD_K, GRAD_TYPE, place, ALIGNED)
    param, param_stride = strided(row, PARAM, PARAM_K, PARAM_TYPE, place, ALIGNED)
    momentum = dense(address(row, MOMENTUM, MOMENTUM_TYPE, ALIGNED), place)
    rms, diagonal = address(row, RMS, tl.float32, ALIGNED), address(row, ROW, tl.float32, ALIGNED)
    return grad, grad_stride, param, param_stride, momentum, dense(rms, place), dense(diagonal, place)


@triton.jit
@no_type_check
def read_entries(entries, along, place, rows, inside, sign, FACTORED: tl.constexpr):
    """A tile's entries as `input_of` takes them, and, below two axes, the diagonal moments."""
    grad, grad_stride, param, param_stride, momentum, rms, diagonal = entries
    at, size = rows * place[3], place[4]
    g = read_gradient(grad + rows * grad_stride, inside, sign)
    p = tl.load(param + rows * param_stride, mask=inside, other=0.0).to(tl.float32)
    m, v = read_moments(momentum, rms, at, size, g, inside)
    moments = m
    if not FACTORED:
        moments = read_diagonal(diagonal, at, size, g, inside)
    root = tl.where(inside, tl.rsqrt(v + MOMENT_EPSILON), 0.0)
    return (g, p, m, v, root, factors_of(along, rows, place, moments, FACTORED)), moments


@triton.jit
@no_type_check
def folded(x, ALIGNED: tl.constexpr):
    """Sums of what one thread holds side by side, so that it keeps one number of four."""
    if ALIGNED:
        x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 4]), axis=2)
    return x


@triton.jit
@no_type_check
def measure(
    table,
    owners,
    scratch,
    sign,
    GRAD_TYPE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FACTORED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Pass 2: sums of squares of all inputs and of Nesterov momentum over a region."""
    row, region, first, tiles, place = region_of(table, owners, HEIGHT, WIDTH, ALIGNED)
    entries, along = (
        entries_of(row, place, GRAD_TYPE, PARAM_TYPE, MOMENTUM_TYPE, ALIGNED),
        along_of(row, scratch, place),
    )
    zero = folded(tl.zeros([HEIGHT, WIDTH], tl.float32), ALIGNED)
    totals = ()
    for i in tl.static_range(QUANTITIES):  # noqa: B007
        totals = totals + (zero,)
    for tile in range(first, first + tiles):
        rows, inside = rows_of(tile, place, HEIGHT)
        here, diagonal = read_entries(entries, along, place, rows, inside, sign, FACTORED)
        added = ()
        for i in tl.static_range(QUANTITIES):
            x = input_of(here, i)
            added = added + (totals[i] + folded(x * x, ALIGNED),)
        totals = added
    sums, regions = scratch + tl.load(row + SUMS) + region, tl.load(row + REGIONS)
    for i in tl.static_range(QUANTITIES):
        tl.store(sums + i * regions, tl.sum(totals[i]))


@triton.jit
@no_type_check
def scale(table, scratch, phi, HIDDEN: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """An input's weights over the input's root mean square; of the last quantity, one over the root mean square."""
    row, i = table + tl.program_id(0).to(tl.int64) * WORDS, tl.program_id(1)
    regions, weights = tl.load(row + REGIONS), scratch + tl.load(row + WEIGHTS)
    squares = total_of(scratch + tl.load(row + SUMS) + i * regions, regions, BLOCK)
    mean = (squares / tl.load(row + SIZE)).to(tl.float32)
    if i < ENTRY_INPUTS:
        h = tl.arange(0, PADDED)
        place = tl.where(i < DIAGONAL_INPUTS, i, i + ALONG_INPUTS) * HIDDEN
        own = tl.load(phi + place + h, mask=h < HIDDEN, other=0.0)
        tl.store(weights + i * HIDDEN + h, own * tl.rsqrt(mean + NORMALIZE_EPSILON), mask=h < HIDDEN)
    else:
        tl.store(weights + ENTRY_INPUTS * HIDDEN, tl.rsqrt(mean + BASELINE_EPSILON))


@triton.jit
@no_type_check
def steps_of(row, scratch, ALIGNED: tl.constexpr):
    """Where the tensor's step lies."""
    steps = scratch + tl.load(row + STEP)
    if ALIGNED:
        steps = tl.multiple_of(steps, 16)
    return steps


@triton.jit
@no_type_check
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=ALL)


@triton.jit
@no_type_check
def network(weights, rest, along, place, rows, here, FACTORED: tl.constexpr, HIDDEN: tl.constexpr):
    """What φ says of a tile's entries. here: of `read_entries`; weights: of inputs; rest: φ after w0."""
    x, second = (), ()
    for i in tl.static_range(ENTRY_INPUTS if FACTORED else DIAGONAL_INPUTS):
        x = x + (input_of(here, i),)
    for j in tl.static_range(HIDDEN):
        second = second + (tl.zeros_like(here[0]) + tl.load(rest + HIDDEN + HIDDEN * HIDDEN + j),)
    # A loop that stays one: written out, the compiler would hold all of φ in registers, and spill.
    for h in range(0, HIDDEN):
        if FACTORED:
            of_row, of_column = read_along(along, rows, place, 3 + h)
            total = of_row + of_column
        else:
            total = tl.zeros_like(here[0]) + tl.load(rest + h)
        for i in tl.static_range(ENTRY_INPUTS if FACTORED else DIAGONAL_INPUTS):
            total += tl.load(weights + i * HIDDEN + h) * x[i]
        total, added = relu(total), ()
        for j in tl.static_range(HIDDEN):
            added = added + (second[j] + tl.load(rest + HIDDEN + h * HIDDEN + j) * total,)
        second = added
    last = rest + 2 * HIDDEN + HIDDEN * HIDDEN
    out = tl.zeros_like(here[0]) + tl.load(last + HIDDEN)
    for j in tl.static_range(HIDDEN):
        out += tl.load(last + j) * relu(second[j])
    return out


@triton.jit
@no_type_check
def move(
    table,
    owners,
    scratch,
    phi,
    sign,
    GRAD_TYPE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    MOMENTUM_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    FACTORED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BASELINE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Pass 3: the new moments, the step, not normalised, and the sum of its squares, of a region.

    MASKED: entries that never had a gradient get no step; Newton-Schulz sees all.
    """
    row, region, first, tiles, place = region_of(table, owners, HEIGHT, WIDTH, ALIGNED)
    entries, along = (
        entries_of(row, place, GRAD_TYPE, PARAM_TYPE, MOMENTUM_TYPE, ALIGNED),
        along_of(row, scratch, place),
    )
    steps = dense(steps_of(row, scratch, ALIGNED), place)
    weights, size = scratch + tl.load(row + WEIGHTS), place[4]
    squares = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for tile in range(first, first + tiles):
        rows, inside = rows_of(tile, place, HEIGHT)
        here, diagonal = read_entries(entries, along, place, rows, inside, sign, FACTORED)
        step = network(weights, phi + INPUTS * HIDDEN, along, place, rows, here, FACTORED, HIDDEN)
        if BASELINE:
            step += input_of(here, ENTRY_INPUTS) * tl.load(weights + ENTRY_INPUTS * HIDDEN)
        if MASKED:
            step = step * tl.where(here[3] > 0.0, 1.0, 0.0)  # NaN stays NaN
        at = rows * place[3]
        for d in tl.static_range(3):
            tl.store(entries[4] + d * size + at, here[2][d].to(MOMENTUM_TYPE), mask=inside)
            if not FACTORED:
                tl.store(entries[6] + d * size + at, diagonal[d], mask=inside)
        tl.store(entries[5] + at, here[3], mask=inside)
        tl.store(steps + at, step, mask=inside)
        squares += tl.where(inside, step * step, 0.0)
    tl.store(scratch + tl.load(row + STEP_SUMS) + region, tl.sum(squares))


@triton.jit
@no_type_check
def measure_orthogonal(table, owners, scratch, ALIGNED: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """After Newton-Schulz: the sum of squares of a region's steps, without the entries that never had a gradient."""
    row, region, first, tiles, place = region_of(table, owners, HEIGHT, WIDTH, ALIGNED)
    steps, rms = dense(steps_of(row, scratch, ALIGNED), place), dense(address(row, RMS, tl.float32, ALIGNED), place)
    squares = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for tile in range(first, first + tiles):
        rows, inside = rows_of(tile, place, HEIGHT)
        step = tl.load(steps + rows * place[3], mask=inside, other=0.0)
        v = tl.load(rms + rows * place[3], mask=inside, other=0.0)
        step = step * tl.where(v > 0.0, 1.0, 0.0)
        squares += step * step
    tl.store(scratch + tl.load(row + STEP_SUMS) + region, tl.sum(squares))


@triton.jit
@no_type_check
def normalize(table, scratch, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    """One over the root mean square of a tensor's step."""
    row = table + tl.program_id(0).to(tl.int64) * WORDS
    squares = total_of(scratch + tl.load(row + STEP_SUMS), tl.load(row + REGIONS), BLOCK)
    mean = (squares / tl.load(row + SIZE)).to(tl.float32)
    tl.store(scratch + tl.load(row + WEIGHTS) + ENTRY_INPUTS * HIDDEN + 1, tl.rsqrt(mean + NORMALIZE_EPSILON))


@triton.jit
@no_type_check
def finish(
    table,
    owners,
    scratch,
    rate,
    decay,
    PARAM_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    MASKED: tl.constexpr,
    RATE_IS_TENSOR: tl.constexpr,
):
    """Pass 4: the parameters of a region. MASKED: whether entries that never had a gradient have no step already."""
    row, region, first, tiles, place = region_of(table, owners, HEIGHT, WIDTH, ALIGNED)
    steps, rms = dense(steps_of(row, scratch, ALIGNED), place), dense(address(row, RMS, tl.float32, ALIGNED), place)
    param, param_stride = strided(row, PARAM, PARAM_K, PARAM_TYPE, place, ALIGNED)
    normalizer = tl.load(scratch + tl.load(row + WEIGHTS) + ENTRY_INPUTS * HIDDEN + 1)
    for tile in range(first, first + tiles):
        rows, inside = rows_of(tile, place, HEIGHT)
        step = tl.load(steps + rows * place[3], mask=inside, other=0.0)
        if not MASKED:
            v = tl.load(rms + rows * place[3], mask=inside, other=0.0)
            step = step * tl.where(v > 0.0, 1.0, 0.0)
        p = tl.load(param + rows * param_stride, mask=inside, other=0.0).to(tl.float32)
        p -= read_rate(rate, RATE_IS_TENSOR) * (step * normalizer + decay * p)
        tl.store(param + rows * param_stride, p.to(PARAM_TYPE), mask=inside)


@triton.jit
@no_type_check
def probe(out):
    """Nothing but a store: whether kernels can be compiled and launched."""
    tl.store(out, 1.0)
