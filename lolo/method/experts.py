"""Experts that a learned optimizer can imitate (u_H in Eq. 1): ordinary optax optimizers.

An expert's `update` is called with the learner's new state as `learner_state`; most ignore it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lolo.trees import PyTree

Expert: TypeAlias = optax.GradientTransformationExtraArgs
Rate: TypeAlias = float | jax.Array | Callable[[jax.Array], jax.Array]  # constant, or of the inner steps done


def constant(learning_rate: float, final: float, steps: int) -> Rate:
    """The same rate at every inner step (the paper's)."""
    return learning_rate


def cosine(learning_rate: float, final: float, steps: int) -> Rate:
    """From `learning_rate` to `final` along half a cosine of `steps` inner steps, counted from the random init."""
    return optax.cosine_decay_schedule(learning_rate, steps, alpha=final / learning_rate)


RATES: dict[str, Callable[[float, float, int], Rate]] = {"constant": constant, "cosine": cosine}


def adam(learning_rate: Rate) -> Expert:
    """Adam with β .9 and .999, eps 1e-8 (the paper's expert, with a constant learning rate)."""
    return optax.with_extra_args_support(optax.adam(learning_rate))


def adam_of_learner(learning_rate: Rate) -> Expert:
    """The same Adam, read from the accumulators of `small_fc`: no state of its own, equal to rounding.

    `small_fc` keeps the averages of g (decay .9) and g² (decay .999) that Adam needs. Not for learned decays.
    """

    def update(
        grads: PyTree, state: optax.EmptyState, params: PyTree = None, *, learner_state: Any, **extra: Any
    ) -> tuple[PyTree, optax.EmptyState]:
        count = learner_state.step.astype(jnp.float32)
        mean_correction, square_correction = 1 - 0.9**count, 1 - 0.999**count
        # The learner's count is after this step, and a schedule wants the steps done before it.
        rate = learning_rate(learner_state.step - 1) if callable(learning_rate) else learning_rate

        def one(grad: jax.Array, moments: Any) -> jax.Array:
            mean, square = moments.momentum[0] / mean_correction, moments.rms / square_correction
            return (-rate * mean / (jnp.sqrt(square) + 1e-8)).astype(grad.dtype)

        return jax.tree.map(one, grads, learner_state.moments), state

    return Expert(lambda params: optax.EmptyState(), update)


def sgdm(learning_rate: Rate) -> Expert:
    """SGD with momentum 0.9."""
    return optax.with_extra_args_support(optax.sgd(learning_rate, momentum=0.9))


IsMatrix: TypeAlias = Callable[[str, Any], bool]  # path and parameter -> whether Muon moves it, or AdamW


def has_two_axes(path: str, param: Any) -> bool:
    """Whether a parameter has two axes or more: what counts as a matrix where nobody says otherwise."""
    return param.ndim > 1


def muon(
    learning_rate: Rate,
    weight_decay: float | jax.Array = 0.0,
    is_matrix: IsMatrix = has_two_axes,
    rms: float = 1.0,
) -> Expert:
    """optax's Muon: Nesterov momentum .95, five Newton-Schulz iterations, times rms·√max(rows, columns).

    That gives a step of root mean square rms, times the rate, where all singular values come out as 1: .8 to 1 for a
    full rank, less for a low one, such as an embedding's of which few rows were read. A tensor that `is_matrix` names
    is the matrix [all other axes, last axis]; the others are on AdamW (.9, .999), with Nesterov too, as optax has it.
    Weights decay by weight_decay times the rate, the others too.
    """
    muon_ = optax.contrib.muon(
        learning_rate,
        weight_decay=weight_decay,
        adam_weight_decay=weight_decay,
        consistent_rms=rms,
        muon_weight_dimension_numbers=functools.partial(last_axis_is_output, is_matrix),
    )
    return optax.with_extra_args_support(muon_)


def last_axis_is_output(is_matrix: IsMatrix, params: PyTree) -> PyTree:
    """Muon's axes for every tensor that is a matrix: the last one is the output, all others are inputs."""

    def axes(path: Any, param: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        last = param.ndim - 1
        known = is_matrix(jax.tree_util.keystr(path, simple=True, separator="/"), param)
        return optax.contrib.MuonDimensionNumbers(tuple(range(last)), last) if known else None

    return jax.tree_util.tree_map_with_path(axes, params)


EXPERTS: dict[str, Callable[[Rate], Expert]] = {
    "adam": adam,
    "adam-of-learner": adam_of_learner,
    "sgdm": sgdm,
    "muon": muon,
}


def with_decay(expert: Expert, rate: float) -> Expert:
    """The expert with −rate·θ added to its update.

    A learner with decoupled weight decay is compared with an expert that decays alike: the term then cancels in
    Eq. 2, and imitation does not teach the learner to undo its own decay.
    """
    return optax.with_extra_args_support(optax.chain(expert, optax.add_decayed_weights(-rate)))
