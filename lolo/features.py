"""Accumulators and inputs of `small_fc`, for one tensor.

The textbook builds an [entries, 39] array. Here the inputs stay where they vary: 16 of them per entry, 12 only along
the rows or columns of the factored moments, 11 not at all within a tensor (the time features, `time_inputs`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lolo import small_fc_spec as spec


class Decays(NamedTuple):
    """Decay of each accumulator; floats, or arrays when learned."""

    momentum: jax.Array  # [3]
    rms: jax.Array  # []
    factored: jax.Array  # [3]


class Moments(NamedTuple):
    """Running averages of one tensor of shape [*shape], none bias-corrected."""

    momentum: jax.Array  # [3, *shape] of g
    rms: jax.Array  # [*shape] of g²
    row: jax.Array  # [3, *shape less the largest axis] of the mean of g² over it; [3, *shape] below two axes
    column: jax.Array  # [3, *shape less the second largest axis]; [3, 0] below two axes


class Inputs(NamedTuple):
    """The inputs of one tensor before normalisation, each in the space where it varies."""

    entry: jax.Array  # [16, *shape], in the order of spec.ENTRY_COLUMNS
    row: jax.Array  # [6, *shape with extent 1 along the largest axis], spec.ROW_COLUMNS
    column: jax.Array | None  # [6, *shape with extent 1 along the second axis]; None below two axes: equal to row


def decays(meta_params: dict[str, jax.Array]) -> Decays:
    """The standard decays, or 1 − (1 − d)·exp(10·o) clipped to [0, 1] where φ holds learned offsets o.

    The reference does not clip the momentum decays; a decay outside [0, 1] has no meaning as an average.
    """
    standard = Decays(jnp.array(spec.MOMENTUM_DECAYS), jnp.array(spec.RMS_DECAY), jnp.array(spec.FACTORED_DECAYS))
    if "momentum_decays" not in meta_params:
        return standard

    def learned(decay: jax.Array, offset: jax.Array) -> jax.Array:
        return jnp.clip(1 - (1 - decay) * jnp.exp(10 * offset), 0.0, 1.0)

    return Decays(
        learned(standard.momentum, meta_params["momentum_decays"]),
        learned(standard.rms, meta_params["rms_decays"][0]),
        learned(standard.factored, meta_params["adafactor_decays"]),
    )


def init_moments(param: jax.Array) -> Moments:
    """Zero moments in float32, whatever the parameter's dtype."""
    shape, axes = param.shape, spec.factored_axes(param.shape)
    if axes is None:
        row, column = shape, (0,)
    else:
        row = tuple(n for axis, n in enumerate(shape) if axis != axes.largest)
        column = tuple(n for axis, n in enumerate(shape) if axis != axes.second)
    return Moments(jnp.zeros((3, *shape)), jnp.zeros(shape), row=jnp.zeros((3, *row)), column=jnp.zeros((3, *column)))


def _average(decay: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
    """d·old + (1 − d)·new for several decays. decay: [3]; old: [3, *shape]; new: [*shape]."""
    decay = decay.reshape(-1, *(1,) * new.ndim)
    return decay * old + (1 - decay) * new


def accumulate(moments: Moments, grad: jax.Array, decay: Decays) -> Moments:
    """One step of all moments. grad: [*shape] float32."""
    squared = grad**2
    axes, floored = spec.factored_axes(grad.shape), squared + spec.FACTORED_EPSILON
    if axes is None:
        row, column = _average(decay.factored, moments.row, floored), moments.column
    else:
        row = _average(decay.factored, moments.row, jnp.mean(floored, axis=axes.largest))
        column = _average(decay.factored, moments.column, jnp.mean(floored, axis=axes.second))
    return Moments(
        _average(decay.momentum, moments.momentum, grad),
        decay.rms * moments.rms + (1 - decay.rms) * squared,
        row,
        column,
    )


def inputs(grad: jax.Array, param: jax.Array, moments: Moments) -> Inputs:
    """Everything but the time features, from the updated moments. grad, param: [*shape] float32."""
    axes, momentum = spec.factored_axes(grad.shape), moments.momentum
    inverse_root = jax.lax.rsqrt(moments.rms + spec.MOMENTUM_EPSILON)
    if axes is None:
        row, column = moments.row, None
        factor = jax.lax.rsqrt(jnp.maximum(row + spec.FACTOR_MEAN_EPSILON, spec.FACTOR_FLOOR))
        factored_gradient = grad * factor
        factored_momentum = momentum * jax.lax.rsqrt(row + spec.MOMENTUM_EPSILON)
    else:
        row = jnp.expand_dims(moments.row, axes.largest + 1)
        column = jnp.expand_dims(moments.column, axes.second + 1)
        mean = jnp.mean(row, axis=axes.second + 1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.maximum(row / (mean + spec.FACTOR_MEAN_EPSILON), spec.FACTOR_FLOOR))
        factor = factor * jax.lax.rsqrt(jnp.maximum(column, spec.FACTOR_FLOOR))
        factored_gradient, factored_momentum = grad * factor, momentum * factor
    entry = jnp.concatenate(
        [
            grad[None],
            param[None],
            momentum,
            moments.rms[None],
            momentum * inverse_root,
            inverse_root[None],
            factored_gradient,
            factored_momentum,
        ]
    )

    def with_root(moment: jax.Array) -> jax.Array:
        return jnp.concatenate([moment, jax.lax.rsqrt(moment + spec.MOMENT_EPSILON)])

    return Inputs(entry, with_root(row), None if column is None else with_root(column))


def time_inputs(step: jax.Array) -> jax.Array:
    """tanh(t/τ − 1), [11]; `step` counts from 0."""
    return jnp.tanh(step.astype(jnp.float32) / jnp.array(spec.TIMESCALES) - 1.0)
