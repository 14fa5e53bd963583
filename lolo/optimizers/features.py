"""Accumulators and inputs of `small_fc`, for one tensor.

The textbook builds an [entries, 39] array. Here the inputs stay where they vary: 16 of them per entry, 12 only along
the rows or columns of the factored moments, 11 not at all within a tensor (the time features, `time_inputs`).
Every tensor is seen as k matrices [a, b]: its two largest axes last, in their order, and all others merged into k.
Below two axes k = a = 1. Inputs come first and entries last, so that the arithmetic runs along memory.

Inside shard_map a tensor may be here in part: `Layout` says so, and means are then taken over all parts.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lolo.optimizers import factored, sharding
from lolo.optimizers import small_fc_spec as spec
from lolo.optimizers.base import MetaParams

Entries: TypeAlias = Float[Array, "*shape"]
"""A number for each entry of one tensor."""


class Decays(NamedTuple):
    """Decay of each accumulator; floats, or arrays when learned."""

    momentum: Float[Array, "3"]
    rms: Float[Array, ""]
    factored: Float[Array, "3"]


class Layout(NamedTuple):
    """A tensor, or the part of it that this device holds."""

    shape: tuple[int, ...]  # of the part
    axes: factored.FactoredAxes | None  # of the whole tensor
    sharded: int | None = None  # the axis that is cut in equal parts over the mesh axis `axis_name`
    axis_name: str | None = None


class Moments(NamedTuple):
    """Running averages of one tensor of shape [*shape], none bias-corrected."""

    momentum: Float[Array, "3 *shape"]  # of g
    rms: Entries  # of g²
    row: Float[
        Array, "3 ..."
    ]  # [3, *shape less the largest axis] of the mean of g² over it; [3, *shape] below two axes
    column: Float[Array, "3 ..."]  # the same for the second largest axis; [3, 0] below two axes


class Inputs(NamedTuple):
    """The inputs of one tensor before normalisation, each in the space where it varies."""

    entry: Float[Array, "16 kab"]  # in the order of spec.ENTRY_COLUMNS
    row: Float[Array, "6 k a b"]  # with extent 1 along the largest axis, in the order of spec.ROW_COLUMNS
    column: Float[Array, "6 k a b"]  # with extent 1 along the second largest axis; equal to row below two axes


def decays(meta_params: MetaParams) -> Decays:
    """The standard decays, or 1 − (1 − d)·exp(10·o) clipped to [0, 1] where φ holds learned offsets o.

    The reference does not clip the momentum decays; a decay outside [0, 1] has no meaning as an average.
    """
    numbers = (spec.MOMENTUM_DECAYS, spec.RMS_DECAY, spec.FACTORED_DECAYS)
    standard = Decays(*(jnp.array(each, jnp.float32) for each in numbers))
    if "momentum_decays" not in meta_params:
        return standard

    def learned(decay: jax.Array, offset: jax.Array) -> jax.Array:
        return jnp.clip(1 - (1 - decay) * jnp.exp(10 * offset), 0.0, 1.0)

    return Decays(
        learned(standard.momentum, meta_params["momentum_decays"]),
        learned(standard.rms, meta_params["rms_decays"][0]),
        learned(standard.factored, meta_params["adafactor_decays"]),
    )


def layout(param: jax.Array, axis_name: str | None = None, sharded_axis: int = 0) -> Layout:
    """Of a parameter that differs between the devices of mesh axis `axis_name`, or is the same on all of them.

    Raises ValueError if it differs and has no such axis.
    """
    shape = tuple(param.shape)
    if axis_name is None or axis_name not in sharding.varying_axes(param):
        return Layout(shape, factored.factored_axes(shape))
    if not -len(shape) <= sharded_axis < len(shape):
        raise ValueError(
            f"a parameter of shape {shape} differs between the devices of mesh axis {axis_name!r}, and has no axis "
            f"sharded_axis={sharded_axis} to be sharded along: keep it equal on all devices."
        )
    axis = sharded_axis % len(shape)
    whole = tuple(n * jax.lax.axis_size(axis_name) if i == axis else n for i, n in enumerate(shape))
    return Layout(shape, factored.factored_axes(whole), axis, axis_name)


def init_moments(param: jax.Array, of: Layout) -> Moments:
    """Zero moments in float32, whatever the parameter's dtype, distributed over devices as the parameter is."""

    def zeros(*lead: int, without: int | None = None) -> jax.Array:
        x = sharding.zeros_beside(param, tuple(axis for axis in range(param.ndim) if axis != without), lead)
        differs = of.sharded is not None and of.sharded != without
        return jax.lax.pcast(x, of.axis_name, to="varying") if differs else x

    if of.axes is None:
        return Moments(zeros(3), zeros(), row=zeros(3), column=sharding.zeros_beside(param, (), lead=(3, 0)))
    return Moments(zeros(3), zeros(), row=zeros(3, without=of.axes.largest), column=zeros(3, without=of.axes.second))


def _average(decay: Float[Array, "3"], old: Float[Array, "3 *shape"], new: Entries) -> Float[Array, "3 *shape"]:
    """d·old + (1 − d)·new for several decays."""
    decay = decay.reshape(-1, *(1,) * new.ndim)
    return decay * old + (1 - decay) * new


def over_parts(mean: Float[Array, "*means"], of: Layout, along: int | None = None) -> Float[Array, "*means"]:
    """A mean over the part at hand, along the tensor's axis `along` or over all entries, made one over all parts."""
    crosses = of.sharded is not None and along in (None, of.sharded)
    return jax.lax.pmean(mean, of.axis_name) if crosses else mean


def accumulate(moments: Moments, grad: Entries, decay: Decays, of: Layout) -> Moments:
    """One step of all moments, in float32."""
    if grad.size == 0:
        return moments
    squared = grad**2
    axes, floored = of.axes, squared + factored.FACTORED_EPSILON
    if axes is None:
        row, column = _average(decay.factored, moments.row, floored), moments.column
    else:
        row, column = (
            _average(decay.factored, old, over_parts(jnp.mean(floored, axis=axis), of, axis))
            for old, axis in zip((moments.row, moments.column), axes, strict=True)
        )
    return Moments(
        _average(decay.momentum, moments.momentum, grad),
        decay.rms * moments.rms + (1 - decay.rms) * squared,
        row,
        column,
    )


def _matrix_order(of: Layout) -> list[int]:
    last = sorted(of.axes or ())
    return [axis for axis in range(len(of.shape)) if axis not in last] + last


def matrix_shape(of: Layout) -> tuple[int, int, int]:
    """k, a, b."""
    if of.axes is None:
        return 1, 1, math.prod(of.shape)
    *kept, a, b = (of.shape[axis] for axis in _matrix_order(of))
    return math.prod(kept), a, b


def as_matrices(x: Float[Array, "..."], of: Layout) -> Float[Array, "*lead k a b"]:
    """[*lead, *shape] -> [*lead, k, a, b]. Axes of `x` may have extent 1 where the tensor has more."""
    lead = x.ndim - len(of.shape)
    x = jnp.transpose(x, [*range(lead), *(lead + axis for axis in _matrix_order(of))])
    last = (1, math.prod(x.shape[lead:])) if of.axes is None else x.shape[-2:]
    return x.reshape(*x.shape[:lead], math.prod(x.shape[lead:-2]) if of.axes else 1, *last)


def from_matrices(x: Float[Array, "kab"], of: Layout) -> Entries:
    """The inverse, of flat entries: [k·a·b] -> [*shape]."""
    order = _matrix_order(of)
    x = x.reshape([of.shape[axis] for axis in order])
    return jnp.transpose(x, [order.index(axis) for axis in range(len(of.shape))])


def inputs(grad: Entries, param: Entries, moments: Moments, of: Layout) -> Inputs:
    """Everything but the time features, from the updated moments, in float32."""
    axes, row, column = of.axes, moments.row, moments.column
    if axes is None:
        row = column = as_matrices(row, of)
        factor = jax.lax.rsqrt(jnp.maximum(row + factored.FACTOR_MEAN_EPSILON, factored.FACTOR_FLOOR))
        momentum_factor = jax.lax.rsqrt(row + spec.MOMENTUM_EPSILON)
    else:
        mean = jnp.mean(row, axis=axes.second + 1 - (axes.second > axes.largest), keepdims=True)
        mean = over_parts(mean, of, axes.second)
        factor = jax.lax.rsqrt(jnp.maximum(row / (mean + factored.FACTOR_MEAN_EPSILON), factored.FACTOR_FLOOR))
        factor = as_matrices(jnp.expand_dims(factor, axes.largest + 1), of)
        row = as_matrices(jnp.expand_dims(row, axes.largest + 1), of)
        column = as_matrices(jnp.expand_dims(column, axes.second + 1), of)
        factor = momentum_factor = factor * jax.lax.rsqrt(jnp.maximum(column, factored.FACTOR_FLOOR))
    grad, param, momentum, rms = (as_matrices(x, of) for x in (grad, param, moments.momentum, moments.rms))
    inverse_root = jax.lax.rsqrt(rms + spec.MOMENTUM_EPSILON)
    entry = jnp.concatenate(
        [
            grad[None],
            param[None],
            momentum,
            rms[None],
            momentum * inverse_root,
            inverse_root[None],
            grad * factor,
            momentum * momentum_factor,
        ]
    )

    def with_root(moment: Float[Array, "3 k a b"]) -> Float[Array, "6 k a b"]:
        return jnp.concatenate([moment, jax.lax.rsqrt(moment + factored.MOMENT_EPSILON)])

    return Inputs(entry.reshape(len(entry), -1), with_root(row), with_root(column))


def normalizer(x: Float[Array, "F *space"], of: Layout) -> Float[Array, "F"]:
    """One over the root mean square of each input, over the tensor."""
    x = x.reshape(x.shape[0], -1)
    return jax.lax.rsqrt(spec.NORMALIZE_EPSILON + over_parts(jnp.sum(x * x, axis=1) / max(x.shape[1], 1), of))


def normalized_inputs(grad: Entries, param: Entries, moments: Moments, of: Layout) -> Float[Array, "28 kab"]:
    """The same inputs entry by entry, normalised: spec.ENTRY_COLUMNS, then ROW_COLUMNS, then COLUMN_COLUMNS."""
    x, shape = inputs(grad, param, moments, of), matrix_shape(of)
    row, column = (jnp.broadcast_to(y, (len(y), *shape)).reshape(len(y), -1) for y in (x.row, x.column))
    full = jnp.concatenate([x.entry, row, column])
    return full * normalizer(full, of)[:, None]


def time_inputs(step: Int[Array, ""] | Float[Array, ""]) -> Float[Array, "11"]:
    """tanh(t/τ − 1); `step` counts from 0."""
    return jnp.tanh(step.astype(jnp.float32) / jnp.array(spec.TIMESCALES, jnp.float32) - 1.0)
