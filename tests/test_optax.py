"""`Weights.optimizer()` behaves like any optax optimizer."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import accumulators_per_parameter

import lolo
from lolo.optimizers import weights_file
from lolo.tasks import models
from lolo.trees import count_bytes

WEIGHTS = lolo.load("lolo-small")
PARAMS = {"w": jnp.ones((3, 4)), "deep": [jnp.ones(5), jnp.full((), 2.0, jnp.float32)], "conv": jnp.ones((2, 2, 3, 4))}
GRADS = jax.tree.map(lambda x: jnp.arange(x.size, dtype=x.dtype).reshape(x.shape) / 10 + 0.1, PARAMS)
BASE = WEIGHTS.optimizer()

COMPOSED = {
    "alone": BASE,
    "chain": optax.chain(optax.clip_by_global_norm(1.0), WEIGHTS.optimizer(), optax.scale(0.5)),
    "masked": optax.masked(WEIGHTS.optimizer(), {"w": True, "deep": [True, False], "conv": True}),
    "multi_transform": optax.multi_transform(
        {"learned": WEIGHTS.optimizer(), "adam": optax.adam(1e-3)}, {"w": "learned", "deep": "adam", "conv": "learned"}
    ),
    "multi_steps": optax.MultiSteps(WEIGHTS.optimizer(), every_k_schedule=1).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(WEIGHTS.optimizer(), max_consecutive_errors=3),
    "schedule": WEIGHTS.optimizer(step_scale=optax.cosine_decay_schedule(1.0, 10)),
    "inject_hyperparams": optax.inject_hyperparams(lambda step_scale: optax.chain(BASE, optax.scale(step_scale)))(
        step_scale=0.5
    ),
}


def test_weights_by_default_are_the_named_ones():
    jax.tree.map(
        np.testing.assert_array_equal, lolo.load().meta_params, lolo.load(weights_file.DEFAULT_WEIGHTS).meta_params
    )
    assert lolo.load().learner == lolo.load(weights_file.DEFAULT_WEIGHTS).learner


@pytest.mark.parametrize("name", weights_file.shipped_weights())
def test_shipped_weights_say_what_was_measured_and_what_they_are_not_for(name):
    card = lolo.load(name).card
    assert len(card["limits"]) > 100 and card["data"] and card["results"] and card["rows_sha256"]
    for measured in card["results"].values():
        assert all(np.isfinite(losses["train_loss"]).all() and losses["n"] for losses in measured.values())
        assert {"lolo", "norm-fc", name} & {label.split()[0] for label in measured}
        assert any("adamw" in label for label in measured)


@pytest.mark.parametrize("optimizer", COMPOSED.values(), ids=COMPOSED)
def test_composes_keeps_structure_and_compiles_once(optimizer):
    update = jax.jit(optimizer.update)
    state = optimizer.init(PARAMS)
    params = PARAMS
    for _ in range(3):
        updates, new_state = update(GRADS, state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)
        assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
        assert all(bool(jnp.isfinite(x).all() & (x != 0).any()) for x in jax.tree.leaves(updates))
        params, state = optax.apply_updates(params, updates), new_state
    assert update._cache_size() == 1


@pytest.mark.slow
def test_apply_if_finite_skips_a_bad_step():
    optimizer = COMPOSED["apply_if_finite"]
    bad = {**GRADS, "w": jnp.full((3, 4), jnp.nan)}
    updates, _ = optimizer.update(bad, optimizer.init(PARAMS), PARAMS)
    assert all(not x.any() for x in jax.tree.leaves(updates))
    updates, _ = BASE.update(bad, BASE.init(PARAMS), PARAMS)
    assert not jnp.isfinite(updates["w"]).all(), "the optimizer repairs nothing"


def steps_of(optimizer, params, n=3):
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(GRADS, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=n)[0][0]


def test_scan_and_vmap_equal_the_loop():
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), PARAMS)
    together = jax.jit(jax.vmap(lambda params: steps_of(BASE, params)))(two)
    params, state = PARAMS, BASE.init(PARAMS)
    for _ in range(3):
        updates, state = BASE.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    for one, many in zip(jax.tree.leaves(params), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, many[0], rtol=1e-5, atol=1e-6)


def test_bfloat16_parameters_keep_float32_accumulators():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    state = BASE.init(params)
    assert all(x.dtype in (jnp.float32, jnp.int32) for x in jax.tree.leaves(state))
    updates, _ = BASE.update(jax.tree.map(lambda x: x.astype(jnp.bfloat16), GRADS), state, params)
    assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(updates))


def test_deployment_settings_do_what_they_say():
    state = BASE.init(PARAMS)
    plain, _ = BASE.update(GRADS, state, PARAMS)
    half = WEIGHTS.optimizer(step_scale=0.5)
    for a, b in zip(
        jax.tree.leaves(half.update(GRADS, half.init(PARAMS), PARAMS)[0]), jax.tree.leaves(plain), strict=True
    ):
        np.testing.assert_allclose(a, 0.5 * b, rtol=1e-6)
    decayed, _ = WEIGHTS.optimizer(weight_decay=0.1).update(GRADS, state, PARAMS)
    for new, old, p in zip(*map(jax.tree.leaves, (decayed, plain, PARAMS)), strict=True):
        np.testing.assert_allclose(new - old, -1e-3 * 0.1 * p, rtol=1e-3, atol=1e-8)
    late = state._replace(step=jnp.int32(50_000))
    frozen = WEIGHTS.optimizer(clock_limit=1000.0).update(GRADS, late, PARAMS)[0]
    at_limit = BASE.update(GRADS, state._replace(step=jnp.int32(1000)), PARAMS)[0]
    unlimited = WEIGHTS.optimizer(clock_limit=float("inf")).update(GRADS, late, PARAMS)[0]
    np.testing.assert_allclose(frozen["w"], at_limit["w"], rtol=1e-5)
    assert not np.allclose(unlimited["w"], frozen["w"], rtol=1e-3)
    late = state._replace(step=jnp.int32(300))
    unshrunk = BASE.update(GRADS, late, PARAMS)[0]
    for step_decay, factor in ((100.0, 0.5), (float("inf"), 1.0)):
        shrunk = WEIGHTS.optimizer(step_decay=step_decay).update(GRADS, late, PARAMS)[0]
        np.testing.assert_allclose(shrunk["w"], factor * unshrunk["w"], rtol=1e-5)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="step_decay=.* must be a positive number"):
            WEIGHTS.optimizer(step_decay=wrong)


def test_limits_of_infinity_are_saved_as_none(tmp_path):
    learner = dataclasses.replace(WEIGHTS.learner, clock_limit=float("inf"), step_decay=float("inf"))
    lolo.save(tmp_path / "w.safetensors", WEIGHTS._replace(learner=learner))
    again = lolo.load(tmp_path / "w.safetensors").learner
    assert again == dataclasses.replace(learner, clock_limit=None, step_decay=None)


def test_state_is_a_tree_of_arrays_for_each_moment():
    # As optax's own: flax's nnx.Optimizer would take apart a tuple that stands in a parameter's place.
    state = BASE.init(PARAMS)
    for _ in range(2):
        assert all(jax.tree.structure(moment) == jax.tree.structure(PARAMS) for moment in state.moments)
        _, state = BASE.update(GRADS, state, PARAMS)


MEASURED = {
    "MLP 784-640-640-128-10": models.mlp((784, 640, 640, 128, 10)),
    "ResNet-18, 10 classes": models.resnet18(10),
}


@pytest.mark.parametrize("name", MEASURED)
def test_bytes_of_state_are_those_of_the_docs(name):
    params, _ = jax.eval_shape(MEASURED[name].init, jax.random.key(0))
    entries = sum(x.size for x in jax.tree.leaves(params))
    ours, adamw = (jax.eval_shape(optimizer.init, params) for optimizer in (BASE, optax.adamw(1e-3)))
    stated = sum(4 * x.size * accumulators_per_parameter(x.shape) for x in jax.tree.leaves(params))
    placeholders = sum(4 for x in jax.tree.leaves(params) if x.ndim < 2)  # for a column that vectors do not have
    assert count_bytes(ours) == pytest.approx(stated + placeholders + 4)  # the step count
    each = (count_bytes(ours), count_bytes((ours.moments.row, ours.moments.column)), count_bytes(adamw))
    row = " | ".join([name, f"{entries:,}", *(f"{count / entries:.2f}" for count in each)])
    assert f"| {row} |" in (pathlib.Path(__file__).parent.parent / "docs" / "performance.md").read_text()
