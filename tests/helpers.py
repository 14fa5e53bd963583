"""Small problems and short runs that several test files share."""

import functools
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lolo.files import settings
from lolo.method import meta
from lolo.method.task import Task
from lolo.optimizers import factored
from lolo.optimizers.base import LearnedOptimizer
from lolo.runtime import interrupt

# N = 12, L = 3: four truncations in an unroll, and nothing that takes long to compile.
SMALL = {
    "tasks": ("quadratic",),
    "learner.name": "sgd",
    "unroll.length": 12,
    "unroll.truncation": 3,
    "estimator.pairs": 3,
    "estimator.sigma": 0.05,
    "imitation.lr": 0.01,
    "outer.steps": 20,
}


# All that the successor of the paper's method chooses otherwise (DESIGN 5), on the smallest network with matrices.
SUCCESSOR = {
    "tasks": ("fashion-mlp:widths=4,batch=8",),
    "learner.name": "norm_fc",
    "imitation.expert": "muon",
    "imitation.loss": "direction",
    "imitation.schedule": "cosine",
    "imitation.final_lr": 1e-3,
    "imitation.decay_steps": 10,
    "imitation.start": 0.1,
    "imitation.end": 0.5,
    "imitation.floor": 0.21,
    "replay.push": "struggle",
    "replay.threshold": 0.2,
    "replay.capacity": 3,
    "unroll.length": 6,
    "estimator.pairs": 2,
    "outer.steps": 8,
    "validation.every": 0,
}


# What every form of norm_fc is tried on.
SHAPES = {
    "scalar": (),
    "vector": (13,),
    "wide": (3, 50),
    "tall": (50, 3),
    "square": (6, 6),
    "last axis 1": (7, 1),
    "all axes 1": (1, 1, 1),
    "conv": (3, 3, 4, 6),
    "ties": (2, 3, 3, 3),
    "largest first": (9, 2, 3, 4),
}
LAYER = {"w": (6, 5), "b": (5,)}


def draw(shapes, seed, scale=1.0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {n: (scale * jax.random.normal(k, s)).astype(dtype) for (n, s), k in zip(shapes.items(), keys, strict=True)}


def small(recipe, changes=None):
    """The recipe in the sizes of `SMALL`, with `changes`: dotted name -> value."""
    for name, value in (SMALL | (changes or {})).items():
        recipe = settings.with_field(recipe, name, value)
    return recipe


class History(NamedTuple):
    """A short meta-training: states[0] is the start, states[i + 1] and metrics[i] are after outer step i."""

    states: list
    metrics: list
    compilations: int  # of the outer step, in all runs of this setup on tasks of this kind


@functools.cache
def compiled(setup, kinds):
    """`meta_init` and `meta_step`, jitted once for all tests that use this setup; `kinds` is the tasks' structure."""
    return jax.jit(partial(meta.meta_init, setup)), jax.jit(partial(meta.meta_step, setup))


def run(setup, task_group, steps, seed=0, meta_params=None, state=None):
    """Outer steps one by one, as the host loop runs them; from `state`, if given."""
    init, step = compiled(setup, jax.tree.structure(task_group))
    states, metrics = [init(task_group, jax.random.key(seed), meta_params) if state is None else state], []
    for _ in range(steps):
        state, measured = step(task_group, states[-1])
        states.append(state)
        metrics.append(measured)
    return History(states, metrics, step._cache_size())


@functools.cache
def recording():
    """An outer optimizer that keeps φ where it is; its state is the last meta-gradient."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradient, state, params=None: (zeros(gradient), gradient))


def make_task(init, loss, data=None, size=64, batch=2, loss_limit=None):
    """A Task from `init(key)` and `loss(params, stats, batch)`, each with stats; data default to N(0, 1) of [size]."""
    if data is None:
        data = jax.random.normal(jax.random.key(5), (size,))
    return Task(
        data,
        init,
        lambda data, indices: data[indices],
        lambda params, stats, batch, key: loss(params, stats, batch),
        lambda params, stats, batch: {"loss": loss(params, stats, batch)[0]},
        size=size,
        batch=batch,
        loss_limit=loss_limit,
    )


def linear_learner(decay, dimensions=3):
    """θ ← decay · θ + w with the meta-parameters w: inner training is a linear system, whatever the task."""

    def optimizer(meta_params):
        def update(grads, state, params):
            return {"x": (decay - 1) * params["x"] + meta_params["w"]}, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    return LearnedOptimizer(lambda key: {"w": jnp.zeros(dimensions)}, optimizer)


def agrees(estimates, exact, sigmas=4.0):
    """Whether independent estimates [n, D] have the mean `exact` [D], within `sigmas` standard errors in each entry."""
    estimates = np.asarray(estimates)
    error = estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))
    return bool(np.all(np.abs(estimates.mean(axis=0) - exact) < sigmas * error))


def assert_close(ours, reference, rtol=1e-6, atol=0.0):
    """Leaf by leaf; the trees must have the same structure."""
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def accumulators_per_parameter(shape):
    """Numbers of optimizer state per parameter of one tensor: momenta, second moment, factored moments."""
    axes = factored.factored_axes(shape)
    return 7.0 if axes is None else 4.0 + 3.0 / shape[axes.largest] + 3.0 / shape[axes.second]


def same(a, b):
    """Whether two trees are equal bit for bit."""
    ours, theirs = jax.tree.leaves(a), jax.tree.leaves(b)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(ours, theirs, strict=True)
    )


def all_finite(tree):
    return all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(tree))


class StopAfter(interrupt.Stop):
    """Asks to stop once progress reports `steps` outer steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_progress(self, progress):
        if progress.step >= self.steps:
            self.requested = "test"


def with_slow(values, slow):
    """The values as parameters of a test, those in `slow` as slow ones."""
    return [pytest.param(value, marks=pytest.mark.slow) if value in slow else value for value in values]
