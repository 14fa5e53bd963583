"""Reparametrised weights: the same losses in other coordinates, with a scale that stays with its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import assert_close, run, small

from lolo.method.task import TaskError
from lolo.tasks import augment, by_name
from lolo.tasks.small import quadratic
from lolo.training import build, recipes

PLAIN = quadratic()
SCALED = augment.reparametrized(PLAIN, 1e3)
KEYS = jax.random.split(jax.random.key(0), 400)


def scales(bound):
    return np.asarray(jax.vmap(lambda key: augment.reparametrized(PLAIN, bound).train.init(key)[1].scale)(KEYS))


def test_scales_are_log_uniform_between_their_bounds():
    logarithms = np.log(scales(1e3)) / np.log(1e3)
    assert np.abs(logarithms).max() <= 1 and np.abs(logarithms).max() > 0.98
    assert abs(logarithms.mean()) < 4 / np.sqrt(3 * len(KEYS))
    assert abs(np.abs(logarithms).mean() - 0.5) < 4 / np.sqrt(12 * len(KEYS))
    assert np.abs(np.log(scales(2.0))).max() <= np.log(2.0)


def test_losses_and_scores_are_those_of_the_problem_itself():
    key_init = jax.random.split(KEYS[0])[1]
    params, stats = SCALED.train.init(KEYS[0])
    theirs, inner = PLAIN.train.init(key_init)
    assert_close(jax.tree.map(lambda x: stats.scale * x, params), theirs, rtol=1e-6)
    batch = PLAIN.train.sample(KEYS[1], jnp.int32(0))
    loss, new = SCALED.train.loss(params, stats, batch, KEYS[2])
    np.testing.assert_allclose(loss, PLAIN.train.loss(theirs, inner, batch, KEYS[2])[0], rtol=1e-6)
    assert new.scale == stats.scale
    np.testing.assert_allclose(
        SCALED.test.score(params, stats, batch)["loss"], PLAIN.test.score(theirs, inner, batch)["loss"], rtol=1e-6
    )


def test_gradients_are_scaled_and_an_optimizer_without_a_scale_sees_other_steps():
    params, stats = SCALED.train.init(KEYS[3])
    batch = PLAIN.train.sample(KEYS[1], jnp.int32(0))
    ours = jax.grad(lambda p: SCALED.train.loss(p, stats, batch, KEYS[2])[0])(params)
    at = jax.tree.map(lambda x: stats.scale * x, params)
    theirs = jax.grad(lambda p: PLAIN.train.loss(p, stats.inner, batch, KEYS[2])[0])(at)
    assert_close(ours, jax.tree.map(lambda x: stats.scale * x, theirs), rtol=1e-5)
    assert abs(float(jnp.log(stats.scale))) > 0.5 and optax.tree.norm(ours) != optax.tree.norm(theirs)


def test_meta_training_keeps_a_states_scale_through_the_buffer():
    recipe = small(recipes.LOLO, {"tasks": ("quadratic:reparametrize=1e3",), "replay.threshold": 0.2})
    task = by_name.resolve(recipe.tasks[0]).train
    history = run(build.build(recipe), (task,), 12)
    slots = history.states[-1].slots[0]
    assert int(slots.local.replay.size.min()) > 0
    drawn = {float(x) for state in history.states[1:] for x in np.ravel(state.slots[0].local.inner.stats.scale)}
    assert len(drawn) >= 3 and all(1e-3 <= x <= 1e3 for x in drawn)
    sizes, rings = np.asarray(slots.local.replay.size), np.asarray(slots.local.replay.states.stats.scale)
    heads = np.asarray(slots.local.replay.head)
    held = {float(ring[(h + i) % len(ring)]) for ring, h, n in zip(rings, heads, sizes, strict=True) for i in range(n)}
    assert held <= drawn


@pytest.mark.parametrize("bound", [0.5, float("nan"), float("inf")])
def test_bounds_that_can_not_be_are_refused(bound):
    with pytest.raises(TaskError, match="reparametrize="):
        augment.reparametrized(PLAIN, bound)
