"""Antithetic evolution strategies: ES, PES and NRES as rules for the direction, and the gradient they share (Eq. 9).

A pair evaluates φ + ε and φ − ε on the same inner problem. With Δ = loss(φ + ε) − loss(φ − ε),
g = mean Δ · direction / (2σ²). Which direction Δ is credited to is all that tells the estimators apart:
ES (this truncation's noise), PES (the sum of noises since the unroll began; Vicol et al. 2021),
NRES (one noise kept for the unroll; Li et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from lolo.trees import PyTree

EstimatorState = Any


class Estimator(NamedTuple):
    """A rule for the direction, written for one pair and vmapped over pairs where it is used.

    >>> estimator = lolo.pes(sigma=0.01, pairs=4)
    >>> isinstance(estimator, lolo.Estimator), estimator.pairs
    (True, 4)
    """

    init: Callable[[jax.Array, PyTree], EstimatorState]  #: key, meta_params -> state, at each unroll's start
    sample: Callable[[jax.Array, EstimatorState], tuple[PyTree, PyTree, EstimatorState]]  #: -> noise, direction, state
    sigma: float
    pairs: int


def gaussian(key: Key[Array, ""], like: PyTree, sigma: float) -> PyTree:
    """Noise N(0, σ²) in the shapes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    flat = sigma * jax.random.normal(key, (sum(leaf.size for leaf in leaves),))
    splits = [0]
    for leaf in leaves:
        splits.append(splits[-1] + leaf.size)
    pieces = [flat[a:b].reshape(leaf.shape) for a, b, leaf in zip(splits, splits[1:], leaves, strict=False)]
    return jax.tree.unflatten(structure, pieces)


def no_noise_yet(key: Key[Array, ""], meta_params: PyTree) -> EstimatorState:
    """Zeros like φ: the sum of no noises."""
    return jax.tree.map(jnp.zeros_like, meta_params)


def es(sigma: float = 0.01, pairs: int = 8) -> Estimator:
    """Truncated evolution strategies: fresh noise each truncation, credited to that noise only (biased).

    >>> estimator = lolo.es(sigma=0.01, pairs=4)
    >>> noise, direction, state = estimator.sample(jax.random.key(1), {"w": jnp.zeros(3)})
    >>> bool(jnp.all(noise["w"] == direction["w"]))
    True
    """

    def sample(key: Key[Array, ""], state: EstimatorState) -> tuple[PyTree, PyTree, EstimatorState]:
        noise = gaussian(key, state, sigma)
        return noise, noise, state

    return Estimator(no_noise_yet, sample, sigma, pairs)


def pes(sigma: float = 0.01, pairs: int = 8) -> Estimator:
    """Persistent evolution strategies: fresh noise each truncation, credited to the sum since the unroll began.

    >>> estimator = lolo.pes(sigma=0.01, pairs=4)
    >>> state = estimator.init(jax.random.key(0), {"w": jnp.zeros(3)})
    >>> noise, direction, state = estimator.sample(jax.random.key(1), state)
    >>> noise, direction, state = estimator.sample(jax.random.key(2), state)  # direction: the sum of both noises
    """

    def sample(key: Key[Array, ""], state: EstimatorState) -> tuple[PyTree, PyTree, EstimatorState]:
        noise = gaussian(key, state, sigma)
        direction = jax.tree.map(jnp.add, state, noise)
        return noise, direction, direction

    return Estimator(no_noise_yet, sample, sigma, pairs)


def nres(sigma: float = 0.01, pairs: int = 8) -> Estimator:
    """Noise-reuse evolution strategies: one noise for the whole unroll.

    >>> estimator = lolo.nres(sigma=0.01, pairs=4)
    >>> state = estimator.init(jax.random.key(0), {"w": jnp.zeros(3)})
    >>> first, _, state = estimator.sample(jax.random.key(1), state)
    >>> second, _, state = estimator.sample(jax.random.key(2), state)
    >>> bool(jnp.all(first["w"] == second["w"]))
    True
    """

    def init(key: Key[Array, ""], meta_params: PyTree) -> EstimatorState:
        return gaussian(key, meta_params, sigma)

    def sample(key: Key[Array, ""], state: EstimatorState) -> tuple[PyTree, PyTree, EstimatorState]:
        return state, state, state

    return Estimator(init, sample, sigma, pairs)


ESTIMATORS: dict[str, Callable[[float, int], Estimator]] = {"es": es, "pes": pes, "nres": nres}


def antithetic_gradient(
    deltas: Float[Array, "J P L"], directions: PyTree, sigma: float, valid: Bool[Array, "J P L"] | None = None
) -> PyTree:
    """Antithetic gradient (Eq. 9). J truncations, P pairs, L steps.

    Args:
      deltas: loss of +ε minus loss of −ε at each inner step.
      directions: leaves [J, P, *shape].
      sigma: standard deviation of the noise.
      valid: steps that are not valid count neither in the sum nor in the mean. All, if None.

    Returns: leaves [*shape]: the mean over valid steps of Δ · direction / (2σ²); 0 if no step is valid.

    The paper prints a sum over n; we take the mean, so that clipping does not depend on the unroll's length.

    >>> deltas, directions = jnp.ones((1, 2, 5)), {"w": jnp.ones((1, 2, 3))}
    >>> lolo.antithetic_gradient(deltas, directions, sigma=1.0)
    {'w': Array([0.5, 0.5, 0.5], dtype=float32)}
    """
    if valid is None:
        valid = jnp.ones_like(deltas, dtype=bool)
    weights = jnp.sum(jnp.where(valid, deltas, 0.0), axis=-1)
    weights = weights / (2 * sigma**2 * jnp.maximum(jnp.sum(valid), 1))

    # One order of summation, whatever holds the pairs: a matrix product may choose its own.
    def contract(total: PyTree, item: tuple[jax.Array, PyTree]) -> tuple[PyTree, None]:
        weight, direction = item
        return jax.tree.map(lambda t, d: t + weight * d, total, direction), None

    flat = jax.tree.map(lambda d: d.reshape(-1, *d.shape[2:]), directions)
    zeros = jax.tree.map(lambda d: jnp.zeros(d.shape[2:], d.dtype), directions)
    return jax.lax.scan(contract, zeros, (weights.ravel(), flat))[0]
