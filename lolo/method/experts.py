"""Experts that a learned optimizer can imitate (u_H in Eq. 1): ordinary optax optimizers.

An expert's `update` is called with the learner's new state as `learner_state`; most ignore it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lolo.trees import PyTree

Expert: TypeAlias = optax.GradientTransformationExtraArgs


def adam(learning_rate: float) -> Expert:
    """Adam with β .9 and .999, eps 1e-8, constant learning rate (the paper's expert)."""
    return optax.with_extra_args_support(optax.adam(learning_rate))


def adam_of_learner(learning_rate: float) -> Expert:
    """The same Adam, read from the accumulators of `small_fc`: no state of its own, equal to rounding.

    `small_fc` keeps the averages of g (decay .9) and g² (decay .999) that Adam needs. Not for learned decays.
    """

    def update(
        grads: PyTree, state: optax.EmptyState, params: PyTree = None, *, learner_state: Any, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        count = learner_state.step.astype(jnp.float32)
        mean_correction, square_correction = 1 - 0.9**count, 1 - 0.999**count

        def one(grad: jax.Array, moments: Any) -> jax.Array:
            mean, square = moments.momentum[0] / mean_correction, moments.rms / square_correction
            return (-learning_rate * mean / (jnp.sqrt(square) + 1e-8)).astype(grad.dtype)

        return jax.tree.map(one, grads, learner_state.moments), state

    return Expert(lambda params: optax.EmptyState(), update)


def sgdm(learning_rate: float) -> Expert:
    """SGD with momentum 0.9."""
    return optax.with_extra_args_support(optax.sgd(learning_rate, momentum=0.9))


EXPERTS: dict[str, Callable[[float], Expert]] = {"adam": adam, "adam-of-learner": adam_of_learner, "sgdm": sgdm}


def with_decay(expert: Expert, rate: float) -> Expert:
    """The expert with −rate·θ added to its update.

    A learner with decoupled weight decay is compared with an expert that decays alike: the term then cancels in
    Eq. 2, and imitation does not teach the learner to undo its own decay.
    """
    return optax.with_extra_args_support(optax.chain(expert, optax.add_decayed_weights(-rate)))
