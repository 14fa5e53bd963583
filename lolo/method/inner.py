"""One inner step: lines 10-15 of Algorithm 1."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from lolo.method import imitation
from lolo.method.experts import Expert
from lolo.method.task import Task
from lolo.trees import PyTree


class InnerState(NamedTuple):
    """s = (θ, ζ): all that an inner problem carries from step to step, and what the replay buffer holds."""

    params: PyTree  # θ
    stats: PyTree  # model statistics, such as BatchNorm's
    learner: PyTree  # state of the learned optimizer
    expert: PyTree  # state of the expert; () without one
    step: Int[Array, ""]  # int32, inner steps since the random init


class StepRecord(NamedTuple):
    """Raw numbers of one inner step, before any repair."""

    task: Float[Array, ""]  # loss of the training batch before the update
    bc: PyTree  # [] for each part of the imitation loss, such as ‖u_O − u_H‖² (Eq. 2); 0 without an expert
    gradient: Float[Array, ""]  # squared norm of the inner gradient


def begin(task: Task, learner: optax.GradientTransformation, expert: Expert | None, key: Key[Array, ""]) -> InnerState:
    """A fresh random init."""
    params, stats = task.init(key)
    expert_state = () if expert is None else expert.init(params)
    return InnerState(params, stats, learner.init(params), expert_state, jnp.int32(0))


def squared_norm(tree: PyTree) -> Float[Array, ""]:
    """Sum of squares of all leaves, in float32."""
    leaves = [leaf.astype(jnp.float32).ravel() for leaf in jax.tree.leaves(tree)]
    return sum((jnp.vdot(leaf, leaf) for leaf in leaves), jnp.zeros(()))


def loss_and_gradient(
    task: Task, params: PyTree, stats: PyTree, batch: PyTree, key: Key[Array, ""]
) -> tuple[Float[Array, ""], PyTree, PyTree]:
    """Mean loss over a batch, new statistics, and the gradient, in `task.micro_batches` equal parts of the batch.

    More parts need less memory and give the same sums in another order. A model with BatchNorm sees each part as a
    batch of its own, so there the parts are another problem.
    """
    of_part = jax.value_and_grad(task.loss, has_aux=True)
    parts = task.micro_batches
    if parts == 1:
        (loss, stats), grads = of_part(params, stats, batch, key)
        return loss, stats, grads

    def add(carry: tuple, part: tuple[jax.Array, PyTree]) -> tuple[tuple, None]:
        stats, *sums = carry
        i, batch = part
        (loss, stats), grads = of_part(params, stats, batch, jax.random.fold_in(key, i))
        return (stats, *jax.tree.map(lambda total, x: total + x / parts, sums, [loss, grads])), None

    batch = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    start = (stats, jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    (stats, loss, grads), _ = jax.lax.scan(add, start, (jnp.arange(parts), batch))
    return loss, stats, grads


def inner_step(
    task: Task,
    learner: optax.GradientTransformation,
    expert: Expert | None,
    alpha: Float[Array, ""],
    state: InnerState,
    key: Key[Array, ""],
    imitation_loss: imitation.ImitationLoss = imitation.SQUARED,
) -> tuple[InnerState, StepRecord]:
    """Train one step with the mixture of learned optimizer and expert (Eq. 1).

    Args:
      alpha: weight of the learned optimizer. Without an expert the learned optimizer steps alone.
      key: decides the batch, the same for both signs of a pair.
      imitation_loss: how far the learned update is from the expert's.
    """
    key_batch, key_loss = jax.random.split(key)
    batch = task.sample(key_batch, state.step)
    loss, stats, grads = loss_and_gradient(task, state.params, state.stats, batch, key_loss)
    updates, learner_state = learner.update(grads, state.learner, state.params)
    expert_state, bc = state.expert, jax.tree.map(lambda _: jnp.zeros(()), imitation_loss.weights)
    if expert is not None:
        expert_updates, expert_state = expert.update(grads, state.expert, state.params, learner_state=learner_state)
        bc = imitation_loss.parts(updates, expert_updates)
        updates = imitation.mix_updates(alpha, updates, expert_updates)
    params = optax.apply_updates(state.params, updates)
    record = StepRecord(task=loss, bc=bc, gradient=squared_norm(grads))
    return InnerState(params, stats, learner_state, expert_state, state.step + 1), record
