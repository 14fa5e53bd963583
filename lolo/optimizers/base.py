"""Learned optimizers: functions from meta-parameters φ to an `optax.GradientTransformation`.

`learned_sgd` is the smallest member of the family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lolo.trees import PyTree


class LearnedOptimizer(NamedTuple):
    """An architecture: how φ is drawn, and the optimizer that a φ is."""

    init: Callable[[jax.Array], PyTree]  # key -> meta_params
    optimizer: Callable[[PyTree], optax.GradientTransformation]  # meta_params -> optimizer


def learned_sgd() -> LearnedOptimizer:
    """SGD with momentum whose log learning rate and logit of momentum are the two meta-parameters."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {"log_learning_rate": jnp.log(jnp.float32(0.1)), "momentum_logit": jnp.zeros(())}

    def optimizer(meta_params: dict[str, jax.Array]) -> optax.GradientTransformation:
        decay = jax.nn.sigmoid(meta_params["momentum_logit"])
        return optax.chain(optax.trace(decay=decay), optax.scale(-jnp.exp(meta_params["log_learning_rate"])))

    return LearnedOptimizer(init, optimizer)


def truncated_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal with σ = 1/√fan_in, truncated at ±2σ, variance not corrected."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / jnp.sqrt(jnp.float32(fan_in))
