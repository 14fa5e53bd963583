"""ES, PES and NRES on a linear system, whose gradient has a closed form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import agrees

from lolo.method import estimators
from lolo.method.estimators import ESTIMATORS, antithetic_gradient

# x_{n+1} = DECAY x_n + w, with the loss WEIGHTS · x_n before each step; J truncations of L steps.
DECAY, TRUNCATIONS, STEPS = 0.9, 5, 4
WEIGHTS = jnp.array([1.0, -0.5, 2.0])
START = jnp.array([0.3, -1.0, 0.7])


def exact_gradient():
    """Gradient of the mean loss: x_n depends on w by the factor (1 - DECAY^n) / (1 - DECAY)."""
    factors = (1 - DECAY ** np.arange(TRUNCATIONS * STEPS)) / (1 - DECAY)
    return np.mean(factors) * np.asarray(WEIGHTS)


def one_pair(estimator, meta_params, key):
    """deltas [J, L] and directions [J, D] of one pair through one unroll."""
    key_init, key_noise = jax.random.split(key)

    def truncation(carry, key):
        states, memory = carry
        noise, direction, memory = estimator.sample(key, memory)

        def step(states, _):
            losses = states @ WEIGHTS
            return DECAY * states + jnp.stack([meta_params + noise, meta_params - noise]), losses[0] - losses[1]

        states, deltas = jax.lax.scan(step, states, length=STEPS)
        return (states, memory), (deltas, direction)

    start = (jnp.stack([START, START]), estimator.init(key_init, meta_params))
    return jax.lax.scan(truncation, start, jax.random.split(key_noise, TRUNCATIONS))[1]


@partial(jax.jit, static_argnums=0)
def gradient_estimates(kind, keys):
    """Independent estimates [n, D], each from 100 pairs."""
    estimator = ESTIMATORS[kind](0.1, 100)

    def estimate(key):
        pairs = jax.vmap(lambda key: one_pair(estimator, jnp.zeros(3), key))(jax.random.split(key, estimator.pairs))
        deltas, directions = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), pairs)
        return antithetic_gradient(deltas, directions, estimator.sigma)

    return jax.lax.map(estimate, keys)


@pytest.mark.parametrize("kind", ["pes", "nres"])
def test_pes_and_nres_are_unbiased(kind):
    estimates, exact = gradient_estimates(kind, jax.random.split(jax.random.key(0), 100)), exact_gradient()
    assert agrees(estimates, exact)
    # The test can tell: from the other sign, from a gradient that is 10 % too large, and from a sum over steps.
    assert not agrees(-estimates, exact)
    assert not agrees(1.1 * estimates, exact)
    assert not agrees(TRUNCATIONS * STEPS * estimates, exact)


def test_truncated_es_is_biased_and_the_test_can_tell():
    estimates, exact = gradient_estimates("es", jax.random.split(jax.random.key(0), 100)), exact_gradient()
    assert not agrees(estimates, exact)
    # What it estimates instead: each truncation's loss sees that truncation's noise only.
    factors = np.tile((1 - DECAY ** np.arange(STEPS)) / (1 - DECAY), TRUNCATIONS)
    assert agrees(estimates, np.mean(factors) * np.asarray(WEIGHTS))


def test_directions_are_those_of_the_three_rules():
    keys = jax.random.split(jax.random.key(3), 4)
    for kind in ESTIMATORS:
        estimator = ESTIMATORS[kind](0.3, 1)
        state, noises, directions = estimator.init(keys[0], {"w": jnp.zeros(2)}), [], []
        for key in keys[1:]:
            noise, direction, state = estimator.sample(key, state)
            noises.append(np.asarray(noise["w"]))
            directions.append(np.asarray(direction["w"]))
        expected = {"es": noises, "pes": np.cumsum(noises, axis=0), "nres": noises}[kind]
        np.testing.assert_allclose(directions, expected, rtol=1e-6)
        reused = [np.array_equal(noise, noises[0]) for noise in noises[1:]]
        assert all(reused) if kind == "nres" else not any(reused)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_an_estimator_starts_its_sum_at_nothing_and_keeps_shapes(kind):
    estimator = ESTIMATORS[kind](0.3, 8)
    meta_params = {"w": jnp.ones((2, 3)), "b": jnp.ones(())}
    assert (estimator.sigma, estimator.pairs) == (0.3, 8)
    noise, direction, _ = estimator.sample(jax.random.key(1), estimator.init(jax.random.key(0), meta_params))
    assert jax.tree.map(jnp.shape, noise) == jax.tree.map(jnp.shape, direction) == jax.tree.map(jnp.shape, meta_params)
    for a, b in zip(jax.tree.leaves(noise), jax.tree.leaves(direction), strict=True):
        np.testing.assert_array_equal(a, b)  # the first truncation's direction is its noise, whatever the rule


def test_noise_is_normal_with_the_stated_deviation_and_independent_in_every_entry():
    like = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(())}
    noise = jax.vmap(lambda key: estimators.gaussian(key, like, 0.2))(jax.random.split(jax.random.key(0), 4000))
    flat = np.concatenate([np.asarray(noise["a"]).reshape(4000, 4), np.asarray(noise["b"])[:, None]], axis=1)
    covariance = flat.T @ flat / 4000
    np.testing.assert_allclose(covariance, 0.04 * np.eye(5), atol=4 * 0.04 * np.sqrt(2 / 4000))


# J = 1 truncation, P = 2 pairs, L = 2 steps.
DELTAS = jnp.array([[[1.0, 3.0], [-2.0, 0.0]]])
DIRECTIONS = {"w": jnp.array([[[1.0, 0.0], [0.0, 2.0]]]), "b": jnp.array([[0.5, 1.0]])}


def test_antithetic_gradient_by_hand():
    gradient = antithetic_gradient(DELTAS, DIRECTIONS, 0.5)
    # mean over 4 steps of Δ · direction / (2 · 0.25): slot 0 has ΣΔ = 4, slot 1 has ΣΔ = -2
    np.testing.assert_allclose(gradient["w"], [4 * 1 / 4 / 0.5, -2 * 2 / 4 / 0.5])
    np.testing.assert_allclose(gradient["b"], (4 * 0.5 - 2 * 1.0) / 4 / 0.5)


@pytest.mark.parametrize("junk", [0.0, 1e30, np.inf, np.nan])
def test_invalid_steps_count_neither_in_the_sum_nor_in_the_mean(junk):
    valid = jnp.array([[[True, True], [False, False]]])
    gradient = antithetic_gradient(jnp.where(valid, DELTAS, junk), DIRECTIONS, 0.5, valid)
    np.testing.assert_allclose(gradient["w"], [4 * 1 / 2 / 0.5, 0.0])
    np.testing.assert_allclose(gradient["b"], 4 * 0.5 / 2 / 0.5)


def test_no_valid_step_gives_no_gradient():
    gradient = antithetic_gradient(DELTAS * jnp.nan, DIRECTIONS, 0.5, jnp.zeros(DELTAS.shape, bool))
    assert all(np.array_equal(leaf, np.zeros_like(leaf)) for leaf in jax.tree.leaves(gradient))


def test_truncations_are_averaged_like_pairs():
    deltas = jnp.concatenate([DELTAS, 2 * DELTAS])
    directions = jax.tree.map(lambda d: jnp.concatenate([d, d]), DIRECTIONS)
    once, twice = antithetic_gradient(DELTAS, DIRECTIONS, 0.5), antithetic_gradient(deltas, directions, 0.5)
    np.testing.assert_allclose(twice["w"], 1.5 * once["w"])
