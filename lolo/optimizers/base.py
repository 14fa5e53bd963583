"""Learned optimizers: functions from meta-parameters φ to an `optax.GradientTransformation`.

`learned_sgd` is the smallest member of the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lolo.files.settings import Alternative
from lolo.trees import PyTree


class LearnedOptimizer(NamedTuple):
    """An architecture: how φ is drawn, and the optimizer that a φ is."""

    init: Callable[[jax.Array], PyTree]  # key -> meta_params
    optimizer: Callable[[PyTree], optax.GradientTransformation]  # meta_params -> optimizer


@dataclasses.dataclass(frozen=True)
class SgdSettings(Alternative):
    """SGD with momentum, whose two numbers are meta-learned: it has nothing to set."""

    name: str = "sgd"  # the architecture: --learner.name NAME --help lists the fields of another one

    # Recipes and weights were written with small_fc's fields, which meant nothing.
    DROPPED: ClassVar[Mapping[str, Any]] = {
        **{"hidden": 32, "step_mult": 1e-3, "exp_mult": 1e-3, "learn_decays": False},
        **{"weight_decay": 0.0, "clock_limit": None, "step_decay": None},
    }


SGD_SHAPES: dict[str, tuple[int, ...]] = {"log_learning_rate": (), "momentum_logit": ()}


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
