"""`small_fc` in textbook form: one [*shape, 39] tensor per parameter, the network along its last axis.

Written from the description in docs and paper alone (Metz et al. 2022; Eq. 7), in the plainest form, and independent of
`lolo.optimizers.features`: the reference that the fast form is compared with, in values and in speed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

DECAYS = (0.9, 0.99, 0.999)
RMS_DECAY = 0.999
TIMESCALES = (1, 3, 10, 30, 100, 300, 1e3, 3e3, 1e4, 3e4, 1e5)


class TextbookState(NamedTuple):
    """One entry per leaf in each list; a tensor's several decays lie along the last axis."""

    momentum: list  # [*shape, 3]
    rms: list  # [*shape]
    factored: list  # (r [*shape less d0, 3], c [*shape less d1, 3]); below two axes (f [*shape, 3],)
    step: jax.Array  # []


def small_fc(meta_params, step_mult=1e-3, exp_mult=1e-3, weight_decay=0.0, clock_limit=None, step_decay=None):
    """The optimizer that φ is. meta_params: w0 [39, H], b0 [H], w1 [H, H], b1, w2 [H, 2], b2, and decay offsets."""

    def shifted(decay, name):
        if name not in meta_params:
            return jnp.array(decay)
        return jnp.clip(1 - (1 - jnp.array(decay)) * jnp.exp(10 * meta_params[name]), 0, 1)

    def init(params):
        leaves = [at_least_1d(p) for p in jax.tree.leaves(params)]
        factored = [[jnp.zeros((*s, 3)) for s in factored_shapes(p.shape)] for p in leaves]
        momentum = [jnp.zeros((*p.shape, 3)) for p in leaves]
        return TextbookState(momentum, [jnp.zeros(p.shape) for p in leaves], factored, jnp.zeros((), jnp.int32))

    def update(grads, state, params):
        momentum_decay = shifted(DECAYS, "momentum_decays")
        rms_decay = shifted(RMS_DECAY, "rms_decays").reshape(())
        factored_decay = shifted(DECAYS, "adafactor_decays")
        clock = state.step if clock_limit is None else jnp.minimum(state.step, clock_limit)
        time = jnp.tanh(clock / jnp.array(TIMESCALES, jnp.float32) - 1)

        def one(grad, param, m, v, factored):
            g, p = at_least_1d(grad.astype(jnp.float32)), at_least_1d(param.astype(jnp.float32))
            m = momentum_decay * m + (1 - momentum_decay) * g[..., None]
            v = rms_decay * v + (1 - rms_decay) * g**2
            factored = [
                factored_decay * old + (1 - factored_decay) * new[..., None]
                for old, new in zip(factored, factored_means(g**2 + 1e-30), strict=True)
            ]
            x = jnp.concatenate([inputs(g, p, m, v, factored), jnp.broadcast_to(time, (*g.shape, 11))], axis=-1)
            h = jax.nn.relu(x @ meta_params["w0"] + meta_params["b0"])
            h = jax.nn.relu(h @ meta_params["w1"] + meta_params["b1"])
            out = h @ meta_params["w2"] + meta_params["b2"]
            scale = step_mult if step_decay is None else step_mult / jnp.sqrt(1 + state.step / step_decay)
            u = -scale * (out[..., 0] * jnp.exp(exp_mult * out[..., 1]) + weight_decay * p)
            return u.reshape(param.shape).astype(param.dtype), m, v, factored

        leaves, structure = jax.tree.flatten(params)
        done = [one(*leaf) for leaf in zip(jax.tree.leaves(grads), leaves, *state[:3], strict=True)]
        updates, momentum, rms, factored = (list(part) for part in zip(*done, strict=True))
        return jax.tree.unflatten(structure, updates), TextbookState(momentum, rms, factored, state.step + 1)

    return optax.GradientTransformation(init, update)


def inputs(g, p, m, v, factored):
    """Columns 1-28, each divided by its root mean square over the tensor. Returns: [*shape, 28]."""
    axes = two_largest_axes(g.shape)
    if axes is None:
        (f,) = factored
        row = column = f
        factor = jax.lax.rsqrt(jnp.maximum(f + 1e-9, 1e-9))
        momentum_factor = jax.lax.rsqrt(f + 1e-6)
    else:
        d0, d1 = axes
        row, column = (jnp.expand_dims(x, axis) for x, axis in zip(factored, axes, strict=True))
        mean = jnp.mean(row, axis=d1, keepdims=True)
        factor = jax.lax.rsqrt(jnp.maximum(row / (mean + 1e-9), 1e-9)) * jax.lax.rsqrt(jnp.maximum(column, 1e-9))
        momentum_factor = factor
        row, column = (jnp.broadcast_to(x, (*g.shape, 3)) for x in (row, column))
    root = jax.lax.rsqrt(v + 1e-6)[..., None]
    columns = [
        *(g[..., None], p[..., None], m, v[..., None], m * root, root, g[..., None] * factor, row, column),
        *(jax.lax.rsqrt(row + 1e-8), jax.lax.rsqrt(column + 1e-8), m * momentum_factor),
    ]
    x = jnp.concatenate(columns, axis=-1)
    return x * jax.lax.rsqrt(1e-5 + jnp.mean(x**2, axis=tuple(range(g.ndim)), keepdims=True))


def two_largest_axes(shape):
    """(d0, d1): axes of the largest and second largest extent; among equals the later is the larger. None below 2."""
    if len(shape) < 2:
        return None
    order = np.argsort(shape, kind="stable")
    return int(order[-1]), int(order[-2])


def factored_shapes(shape):
    axes = two_largest_axes(shape)
    return [shape] if axes is None else [tuple(np.delete(shape, axis)) for axis in axes]


def factored_means(squared):
    axes = two_largest_axes(squared.shape)
    return [squared] if axes is None else [jnp.mean(squared, axis=axis) for axis in axes]


def at_least_1d(x):
    """Scalars are tensors of shape (1,)."""
    return x.reshape(1) if x.ndim == 0 else x
