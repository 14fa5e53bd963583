"""Accumulators and network of `norm_fc`, for one tensor.

The textbook builds an [entries, 30] array. Here no such array exists: an input is an expression over the few arrays
that it is made of, the sums over inputs are written out, and XLA turns all of it into one loop over the entries. Inputs
that are constant along an axis pass the first layer in their own small spaces, and an input's normaliser is a factor of
its row of the first weight matrix.

Working in blocks, as `small_fc` does, made this form three times slower on a CPU and saved a third of its memory, which
is seven arrays of the tensor's size while it is worked on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lolo.optimizers import factored, features, sharding
from lolo.optimizers import norm_fc_spec as spec
from lolo.optimizers.base import MetaParams
from lolo.optimizers.features import Entries, Layout, over_parts

# On GPUs the default precision of a float32 matrix product is lower than float32.
HIGHEST = jax.lax.Precision.HIGHEST


class NormFcMoments(NamedTuple):
    """Running averages of one tensor of shape [*shape], none bias-corrected; float32, the momentum as the user says."""

    momentum: Float[Array, "D *shape"]  # of g; D = 3, under AdamW 1
    rms: Entries  # of g²
    row: jax.Array  # [3, *shape less the largest axis] of g²'s mean over it; [3, *shape] below two axes; else [1]
    column: jax.Array  # [3, *shape less the second largest axis]; [1] where there is none


class NormFcMatrices(NamedTuple):
    """The network's matrices, transposed, the first one by the space in which its inputs vary."""

    entry: Float[Array, "H 18"]  # in the order of spec.ENTRY_ROWS
    row: Float[Array, "H 6"]
    column: Float[Array, "H 6"]
    b0: Float[Array, "H"]
    w1: Float[Array, "H H"]
    b1: Float[Array, "H"]
    w2: Float[Array, "H"]
    b2: Float[Array, ""]


class NormFcInputs(NamedTuple):
    """What the network reads of one tensor: [..., *shape], with extent 1 where it is constant along an axis."""

    grad: Entries
    param: Entries
    momentum: Float[Array, "3 *shape"]
    rms: Entries
    row_factor: Float[Array, "3 ..."]  # below two axes the whole factor
    column_factor: Float[Array, "3 ..."]  # below two axes 1
    row: Float[Array, "H ..."]  # of the first layer's sums
    column: Float[Array, "H ..."]


def arrange(meta_params: MetaParams) -> NormFcMatrices:
    """φ as the sums take it."""
    w0, w1, w2, b0, b1, b2 = (meta_params[name].astype(jnp.float32) for name in ("w0", "w1", "w2", "b0", "b1", "b2"))
    rows = (spec.ENTRY_ROWS, spec.ROW_ROWS, spec.COLUMN_ROWS)
    entry, row, column = (w0[of].T for of in rows)
    return NormFcMatrices(entry, row, column, b0, w1.T, b1, w2[:, 0], b2[0])


def layout(param: jax.Array, order: Sequence[int], axis_name: str | None, sharded_axis: int) -> Layout:
    """`features.layout`, with ties between axes broken by `order`: the axes, inputs before outputs."""
    of = features.layout(param, axis_name, sharded_axis)
    whole = list(of.shape)
    if of.sharded is not None:
        whole[of.sharded] *= jax.lax.axis_size(axis_name)
    return of._replace(axes=factored.factored_axes(whole, order))


def zero_moments(param: jax.Array, of: Layout, learned: bool, momentum_dtype: jax.typing.DTypeLike) -> NormFcMoments:
    """Distributed over devices as the parameter is. Without the network (`learned`) only what AdamW needs."""

    def zeros(*lead: int, without: int | None = None, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        x = sharding.zeros_beside(param, tuple(axis for axis in range(param.ndim) if axis != without), lead, dtype)
        differs = of.sharded is not None and of.sharded != without
        return jax.lax.pcast(x, of.axis_name, to="varying") if differs else x

    def none() -> jax.Array:
        """[1], not [0], where a moment does not exist: Orbax can't save an empty array. Each its own, to be donated."""
        return jnp.zeros(1, jnp.float32)

    momentum, rms = zeros(3 if learned else 1, dtype=momentum_dtype), zeros()
    if not learned:
        return NormFcMoments(momentum, rms, none(), none())
    if of.axes is None:
        return NormFcMoments(momentum, rms, zeros(3), none())
    return NormFcMoments(momentum, rms, zeros(3, without=of.axes.largest), zeros(3, without=of.axes.second))


def average(decays: Sequence[float], old: Float[Array, "D *shape"], new: Entries) -> Float[Array, "D *shape"]:
    """d·old + (1 − d)·new for several decays, in float32. old: [D, *shape]; new: [*shape]."""
    # One by one: as one product with the decays XLA would first write `new` out D times, twice the time of all.
    return jnp.stack([d * old[i].astype(jnp.float32) + (1 - d) * new for i, d in enumerate(decays)])


def accumulate(
    moments: NormFcMoments, grad: Entries, of: Layout, gain: float | jax.Array = spec.RMS_GAIN
) -> NormFcMoments:
    """One step of all moments that the tensor has, in float32. gain: of the second moment, 1 − its decay."""
    if grad.size == 0:
        return moments
    squared = grad * grad
    row, column, floored = moments.row, moments.column, squared + factored.FACTORED_EPSILON
    learned = len(moments.momentum) > 1
    if learned and of.axes is None:
        row = average(spec.FACTORED_DECAYS, row, floored)
    elif learned:
        row, column = (
            average(spec.FACTORED_DECAYS, old, over_parts(jnp.mean(floored, axis=axis), of, axis))
            for old, axis in zip((row, column), of.axes or (), strict=True)
        )
    momentum = average(spec.MOMENTUM_DECAYS[: len(moments.momentum)], moments.momentum, grad)
    rms = (1 - gain) * moments.rms + gain * squared
    return NormFcMoments(momentum, rms, row, column)


def floored_rsqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jax.lax.rsqrt(jnp.maximum(x, factored.FACTOR_FLOOR))


def reciprocal(x: Float[Array, "*shape"], least: float | jax.Array) -> Float[Array, "*shape"]:
    """1/x, to be multiplied with: of few numbers, for many entries. x: at least `least`, which is positive.

    Of a division by x XLA makes a product with 1/x in some programs and not in others: those for one and for two
    devices had other last bits. The minimum changes no value; it stands between the product and its reciprocal, so that
    no rule for divisions fits.
    """
    return jnp.minimum(1 / x, 2 / least)


def product(a: Float[Array, "*batch m k"], b: Float[Array, "*batch k n"]) -> Float[Array, "*batch m n"]:
    return jnp.matmul(a, b, precision=HIGHEST, preferred_element_type=jnp.float32)


def inputs_of(
    weights: NormFcMatrices,
    grad: Entries,
    param: Entries,
    moments: NormFcMoments,
    of: Layout,
) -> NormFcInputs:
    """What the network reads of one tensor. grad, param: [*shape] float32; moments: after this gradient."""
    axes, row, column = of.axes, moments.row, moments.column
    bias = weights.b0.reshape(-1, *(1,) * grad.ndim)
    if axes is None:
        factor = floored_rsqrt(row + factored.FACTOR_MEAN_EPSILON)
        return NormFcInputs(
            grad, param, moments.momentum, moments.rms, factor, jnp.ones_like(factor), bias, jnp.zeros_like(bias)
        )
    mean = over_parts(
        jnp.mean(row, axis=axes.second + 1 - (axes.second > axes.largest), keepdims=True), of, axes.second
    )
    scale = reciprocal(mean + factored.FACTOR_MEAN_EPSILON, least=factored.FACTOR_MEAN_EPSILON)
    row_factor = floored_rsqrt(row * scale)
    row_factor, row = (jnp.expand_dims(x, axes.largest + 1) for x in (row_factor, row))
    column = jnp.expand_dims(column, axes.second + 1)

    def first_layer(weight: jax.Array, moment: jax.Array, constant_along: int) -> jax.Array:
        x = jnp.concatenate([moment, jax.lax.rsqrt(moment + factored.MOMENT_EPSILON)])
        flat = x.reshape(len(x), -1)
        # A mean over entries is one over the space where the input varies, and over the parts of that space.
        mean = jnp.mean(flat * flat, axis=1)
        mean = over_parts(mean, of) if of.sharded != constant_along else mean
        return product(weight * jax.lax.rsqrt(spec.NORMALIZE_EPSILON + mean), flat).reshape(-1, *x.shape[1:])

    row_sum = first_layer(weights.row, row, axes.largest) + bias
    column_sum = first_layer(weights.column, column, axes.second)
    return NormFcInputs(
        grad, param, moments.momentum, moments.rms, row_factor, floored_rsqrt(column), row_sum, column_sum
    )


def entry_squares(x: NormFcInputs, of: Layout) -> list[jax.Array]:
    """Squares of the entry inputs, in the order of spec.ENTRY_ROWS: arrays [1 or 3, *shape]."""
    root = jax.lax.rsqrt(x.rms + factored.MOMENT_EPSILON)
    factor = x.row_factor * x.column_factor
    groups = [
        x.grad[None],
        jnp.clip(x.grad, -spec.GRADIENT_CLIP, spec.GRADIENT_CLIP)[None],
        x.param[None],
        x.momentum,
        x.rms[None],
        x.momentum * root,
        root[None],
        x.grad * factor,
        (x.grad * root)[None],
    ]
    if of.axes is not None:
        groups.append(x.momentum * factor)
    return [y * y for y in groups]


def network(weights: NormFcMatrices, entry: Float[Array, "H F"], x: NormFcInputs) -> Float[Array, "*shape"]:
    """The network's output for every entry. entry: [H, 18 or 15], the normalisers folded in. Returns: [*shape].

    All sums are written out: XLA then makes one vectorised loop of them, four times as fast on a CPU as products,
    which need the inputs side by side in memory. Terms are grouped so that no product is formed twice.
    """
    g, m = x.grad, list(x.momentum)
    clipped, root = jnp.clip(g, -spec.GRADIENT_CLIP, spec.GRADIENT_CLIP), jax.lax.rsqrt(x.rms + factored.MOMENT_EPSILON)
    factors = list(x.row_factor * x.column_factor)
    factored_momentum = entry.shape[1] > spec.DIAGONAL_INPUTS

    def first(unit: int) -> jax.Array:
        w = entry[unit]
        total = x.row[unit] + x.column[unit] + w[0] * g + w[1] * clipped + w[2] * x.param + w[6] * x.rms
        total = total + w[3] * m[0] + w[4] * m[1] + w[5] * m[2]
        total = total + root * (w[10] + w[7] * m[0] + w[8] * m[1] + w[9] * m[2] + w[14] * g)
        for i, factor in enumerate(factors):
            total = total + factor * (w[11 + i] * g + w[15 + i] * m[i] if factored_momentum else w[11 + i] * g)
        return jax.nn.relu(total)

    def layer(weight: jax.Array, bias: jax.Array, inputs: list[jax.Array]) -> jax.Array:
        return sum((weight[i] * y for i, y in enumerate(inputs)), bias)

    width = range(len(weights.b0))
    hidden = [first(unit) for unit in width]
    hidden = [jax.nn.relu(layer(weights.w1[unit], weights.b1[unit], hidden)) for unit in width]
    return layer(weights.w2, weights.b2, hidden)


def direction(
    weights: NormFcMatrices,
    grad: Entries,
    param: Entries,
    moments: NormFcMoments,
    of: Layout,
) -> Entries:
    """The network's output for one tensor with entries, from its updated moments."""
    x = inputs_of(weights, grad, param, moments, of)
    means = jnp.concatenate([jnp.mean(y, axis=tuple(range(1, y.ndim))) for y in entry_squares(x, of)])
    normalizer = jax.lax.rsqrt(spec.NORMALIZE_EPSILON + over_parts(means, of))
    return network(weights, weights.entry[:, : len(means)] * normalizer, x)
