"""`small_fc` against google/learned_optimization's values and against the textbook form, in every shape and setting."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lolo.bench import textbook
from lolo.optimizers import architecture, base, small_fc
from lolo.optimizers import small_fc_spec as spec

GOLDEN = pathlib.Path(__file__).parent / "golden" / "small_fc.npz"

# One tree of everything: below two axes, wide, tall, square, size-1 axes, convolutions, ties.
SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (13,),
    "wide": (3, 50),
    "tall": (50, 3),
    "square": (6, 6),
    "first axis 1": (1, 7),
    "last axis 1": (7, 1),
    "all axes 1": (1, 1, 1),
    "middle axis 1": (4, 1, 5),
    "rank 3": (5, 2, 3),
    "conv": (3, 3, 4, 6),
    "ties": (2, 3, 3, 3),
    "all ties": (3, 3, 3),
    "largest first": (9, 2, 3, 4),
}
FEW_SHAPES = {name: SHAPES[name] for name in ("scalar", "vector", "wide", "conv", "all ties")} | {"cut": (40, 33)}
# Large enough to be cut in blocks, with and without remainders, along every kind of axis.
LARGE_SHAPES = {
    "long vector": (20_011,),
    "tall and narrow": (9_001, 4),
    "wide and flat": (3, 9_001),
    "even": (512, 64),
    "odd": (301, 77),
    "wide": (61, 1_031),
    "conv": (3, 3, 61, 70),
    "conv with large kernel": (31, 33, 5, 7),
    "rank 3": (7, 90, 101),
}


def draw_params(shapes, key, dtype=jnp.float32):
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, s).astype(dtype) for (name, s), k in zip(shapes.items(), keys, strict=True)}


def draw_meta_params(learner, key=0):
    """φ with biases and decay offsets that are not zero, so that none can be forgotten."""
    meta_params = learner.init(jax.random.key(key))
    keys = jax.random.split(jax.random.key(key + 1), len(meta_params))
    noise = {n: 0.1 * jax.random.normal(k, meta_params[n].shape) for n, k in zip(meta_params, keys, strict=True)}
    return {n: x + (0.5 if n.endswith("decays") else 1.0) * noise[n] for n, x in meta_params.items()}


def trajectory(optimizer, params, steps=4):
    """Updates of several steps along gradients whose scale differs between tensors and grows with the step."""
    update, state, updates = jax.jit(optimizer.update), optimizer.init(params), []
    for step in range(steps):
        grads = draw_params({n: p.shape for n, p in params.items()}, jax.random.key(100 + step))
        grads = {
            n: (g * (step + 1) * 3.0 ** (i % 5 - 3)).astype(params[n].dtype) for i, (n, g) in enumerate(grads.items())
        }
        change, state = update(grads, state, params)
        params = optax.apply_updates(params, change)
        updates.append(change)
    return updates, state


def assert_same_updates(ours, reference, rtol=2e-4, atol=2e-6):
    for step, (a, b) in enumerate(zip(ours, reference, strict=True)):
        for name in b:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
            x, y = (np.asarray(u[name], np.float32) for u in (a, b))
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=f"step {step}, {name}")


def compare_with_textbook(shapes, hidden=32, learn_decays=False, dtype=jnp.float32, rtol=2e-4, **options):
    learner = small_fc.small_fc(hidden, 1.0, 0.1, learn_decays, **options)
    meta_params = draw_meta_params(learner)
    reference = textbook.small_fc(meta_params, step_mult=1.0, exp_mult=0.1, **options)
    params = draw_params(shapes, jax.random.key(3), dtype)
    ours, state = trajectory(learner.optimizer(meta_params), params)
    assert_same_updates(ours, trajectory(reference, params)[0], rtol=rtol, atol=rtol)
    return state


def golden_trajectory(meta_params=None):
    """Largest absolute distance from the golden parameters, over all steps and tensors."""
    golden = np.load(GOLDEN)
    names = [key.removeprefix("p0/") for key in golden if key.startswith("p0/")]
    assert set(names) == {"w", "b", "s", "conv", "sq"}
    meta_params = meta_params or golden_meta_params()
    optimizer = small_fc.small_fc(step_mult=0.01, exp_mult=0.001, learn_decays=True).optimizer(meta_params)
    params = {n: jnp.asarray(golden[f"p0/{n}"]) for n in names}
    state, worst = optimizer.init(params), 0.0
    for step in range(6):
        grads = {n: jnp.asarray(golden[f"g{step}/{n}"]) for n in names}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        worst = max(worst, *(float(np.abs(params[n] - golden[f"p{step + 1}/{n}"]).max()) for n in names))
    return worst


def golden_meta_params():
    golden = np.load(GOLDEN)
    return {k.removeprefix("theta/"): jnp.asarray(golden[k]) for k in golden if k.startswith("theta/")}


def test_six_steps_agree_with_learned_optimization():
    # golden/small_fc.npz: values computed with learned_optimization at 32186aa
    assert golden_trajectory() <= 1e-5


@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 3), (13, 16), (16, 19), (19, 22), (25, 26), (28, 29)])
def test_the_golden_values_tell_two_columns_apart(one, other):
    meta_params = golden_meta_params()
    order = np.arange(spec.INPUTS)
    order[[one, other]] = order[[other, one]]
    assert golden_trajectory({**meta_params, "w0": meta_params["w0"][order]}) > 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_tensor_equals_the_textbook(shape):
    compare_with_textbook({"x": shape})


@pytest.mark.slow
@pytest.mark.parametrize("shape", LARGE_SHAPES.values(), ids=LARGE_SHAPES)
def test_one_large_tensor_equals_the_textbook(shape):
    compare_with_textbook({"x": shape})


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"clock_limit": 2.0},
        {"learn_decays": True},
        {"hidden": 4},
        {"weight_decay": 0.1, "step_decay": 2.0},
        {"hidden": 5, "learn_decays": True, "weight_decay": 0.5, "clock_limit": 1.0, "step_decay": 1.0},
    ],
    ids=str,
)
def test_many_tensors_equal_the_textbook_under_every_option(options):
    compare_with_textbook(FEW_SHAPES, **options)


def test_the_textbook_tells_options_apart():
    learner = small_fc.small_fc(weight_decay=0.1)
    meta_params = draw_meta_params(learner)
    params = draw_params(FEW_SHAPES, jax.random.key(3))
    ours = trajectory(learner.optimizer(meta_params), params)[0]
    with pytest.raises(AssertionError):
        assert_same_updates(ours, trajectory(textbook.small_fc(meta_params), params)[0])


def test_bfloat16_parameters_get_bfloat16_updates_from_float32_accumulators():
    state = compare_with_textbook(FEW_SHAPES, dtype=jnp.bfloat16, rtol=1e-2)
    assert {x.dtype for x in jax.tree.leaves(state.moments)} == {jnp.dtype(jnp.float32)}


def test_mixed_dtypes_in_one_tree():
    params = draw_params(FEW_SHAPES, jax.random.key(3))
    params = {n: p.astype(jnp.bfloat16 if i % 2 else jnp.float32) for i, (n, p) in enumerate(params.items())}
    learner = small_fc.small_fc()
    meta_params = draw_meta_params(learner)
    ours = trajectory(learner.optimizer(meta_params), params)[0]
    assert_same_updates(ours, trajectory(textbook.small_fc(meta_params), params)[0], rtol=1e-2, atol=1e-5)


def test_tensors_without_entries_and_empty_trees_pass_through():
    learner = small_fc.small_fc()
    optimizer = learner.optimizer(draw_meta_params(learner))
    assert trajectory(optimizer, {})[0] == [{}] * 4
    params = {"none": jnp.zeros((0,)), "no rows": jnp.zeros((0, 3)), "some": jnp.ones((2,))}
    updates = trajectory(optimizer, params)[0][-1]
    assert {n: u.shape for n, u in updates.items()} == {n: p.shape for n, p in params.items()}
    assert np.isfinite(updates["some"]).all()


@pytest.mark.parametrize(("options", "count"), [({}, 2402), ({"learn_decays": True}, 2409)])
def test_number_of_meta_parameters(options, count):
    meta_params = small_fc.small_fc(**options).init(jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(meta_params)) == count


def test_weights_are_truncated_normal_and_biases_zero():
    meta_params = small_fc.small_fc(hidden=200).init(jax.random.key(0))
    for name in ("w0", "w1", "w2"):
        x = np.asarray(meta_params[name])
        assert np.abs(x).max() <= 2 / np.sqrt(x.shape[0])
        # A normal truncated at ±2σ has standard deviation 0.8796σ.
        stderr = 1 / np.sqrt(2 * x.size)
        assert abs(x.std() * np.sqrt(x.shape[0]) - 0.8796) < 4 * stderr
    assert all(not meta_params[n].any() for n in ("b0", "b1", "b2"))


def test_momentum_and_second_moment_are_adams():
    """The expert may read them: momentum[0] has decay .9 and rms .999."""
    params = draw_params(FEW_SHAPES, jax.random.key(3))
    learner = small_fc.small_fc()
    optimizer, adam = learner.optimizer(draw_meta_params(learner)), optax.scale_by_adam()
    state, adam_state = optimizer.init(params), adam.init(params)
    for step in range(3):
        grads = draw_params(FEW_SHAPES, jax.random.key(step))
        _, state = jax.jit(optimizer.update)(grads, state, params)
        _, adam_state = adam.update(grads, adam_state)
    for name in params:
        np.testing.assert_allclose(state.moments[name].momentum[0], adam_state.mu[name], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(state.moments[name].rms, adam_state.nu[name], rtol=1e-5, atol=1e-7)


def test_an_update_under_jit_gives_the_same_bits_twice():
    params = draw_params({**FEW_SHAPES, "odd": LARGE_SHAPES["odd"], "conv": LARGE_SHAPES["conv"]}, jax.random.key(3))
    learner = small_fc.small_fc()
    meta_params = draw_meta_params(learner)
    first, second = (trajectory(learner.optimizer(meta_params), params)[0] for _ in range(2))
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "batched", [jax.vmap, lambda f: lambda *args: jax.lax.map(lambda a: f(*a), args)], ids=["vmap", "map"]
)
def test_many_optimizers_at_once_equal_the_loop(batched):
    shapes = {**FEW_SHAPES, "odd": LARGE_SHAPES["odd"], "long": LARGE_SHAPES["long vector"]}
    learner = small_fc.small_fc(learn_decays=True)
    runs = [(draw_meta_params(learner, k), draw_params(shapes, jax.random.key(k))) for k in range(3)]

    def two_steps(meta_params, params):
        optimizer = learner.optimizer(meta_params)
        state = optimizer.init(params)
        for scale in (0.3, 0.2):
            updates, state = optimizer.update(jax.tree.map(lambda p, s=scale: s * p, params), state, params)
        return updates

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *runs)
    together = jax.jit(batched(two_steps))(*stacked)
    for k, run in enumerate(runs):
        alone = jax.jit(two_steps)(*run)
        assert_same_updates([jax.tree.map(lambda x, k=k: x[k], together)], [alone], rtol=1e-4, atol=1e-8)


def test_missing_params_are_named():
    optimizer = small_fc.small_fc().optimizer(small_fc.small_fc().init(jax.random.key(0)))
    params = {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"small_fc reads the parameters: call update\(grads, state, params\)"):
        optimizer.update(params, optimizer.init(params))


@pytest.mark.parametrize("name", architecture.ARCHITECTURES)
def test_every_learner_is_an_optax_optimizer(name):
    learner = architecture.build_learner(architecture.ARCHITECTURES[name].settings())
    optimizer = learner.optimizer(learner.init(jax.random.key(0)))
    params = draw_params(FEW_SHAPES, jax.random.key(1))
    state = optimizer.init(params)
    updates, after = jax.jit(optimizer.update)(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_learned_sgd_is_sgd_with_momentum():
    meta_params = {"log_learning_rate": jnp.log(jnp.float32(0.2)), "momentum_logit": jnp.zeros(())}
    params = draw_params(FEW_SHAPES, jax.random.key(1))
    ours = trajectory(base.learned_sgd().optimizer(meta_params), params)[0]
    assert_same_updates(ours, trajectory(optax.sgd(0.2, momentum=0.5), params)[0], rtol=1e-5)
