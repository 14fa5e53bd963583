"""The CPU kernel of `norm_fc` against JAX's operations: one step from the same state, in every form that runs here."""

import ctypes
import json

import helpers
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import LAYER, draw
from optax.contrib import MuonDimensionNumbers

from lolo.kernels import library
from lolo.optimizers import norm_fc_kernel
from lolo.optimizers.norm_fc import norm_fc
from lolo.training import loop as training
from lolo.training import recipes
from lolo.training.how import How
from lolo.training.run_folder import RunError

pytestmark = pytest.mark.skipif(not norm_fc_kernel.register(), reason="this installation has no kernel for XLA")
SHAPES = helpers.SHAPES | {
    "rows of two vectors": (40, 32),
    "an axis between": (4, 40, 9),
    "windows last": (20, 17, 3, 3),
    "embedding": (120, 8),
    "longer than a piece": (2, 4500),
    "empty": (0, 4),
}
STEP, MOMENTS = 1e-5, 1e-6  # of a tensor's norm


@pytest.fixture(params=library.forms())
def form(request, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, request.param)
    return request.param


def draw_phi(seed=0, hidden=8):
    """All weights and biases differ from zero, and b2 outweighs the rest of no network, however narrow."""
    phi = norm_fc(hidden, baseline="none").init(jax.random.key(seed))
    phi = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(seed + 1), x.shape), phi)
    return phi | {"b0": jnp.abs(phi["b0"]) + 0.5, "b1": jnp.abs(phi["b1"]) + 0.5}


PHI = draw_phi()


def make(kernel="auto", phi=PHI, **settings):
    return norm_fc(phi["w0"].shape[1], kernel=kernel, **({"learning_rate": 0.01} | settings)).optimizer(phi)


def warmed(params, steps=3, **settings):
    """A state after steps along gradients of very different scales, by JAX's operations."""
    optimizer = make("plain", **settings)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for t in range(steps):
        grads = draw({n: p.shape for n, p in params.items()}, 50 + t)
        grads = {n: (g * 3.0 ** (i % 7 - 5)).astype(params[n].dtype) for i, (n, g) in enumerate(grads.items())}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def distance(ours, reference):
    """Largest distance of two tensors, in norms of the reference; NaN must meet NaN, and inf the same inf."""
    worst = 0.0
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        odd = ~np.isfinite(b)
        np.testing.assert_array_equal(a[odd], b[odd])
        a, b = np.where(odd, 0, a), np.where(odd, 0, b)
        worst = max(worst, float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) if b.size else 0.0)
    return worst


def compare(params, state, grads, **settings):
    """Largest distances of update and moments after one step, over all forms."""
    reference, expected = jax.jit(make("plain", **settings).update)(grads, state, params)
    worst = (0.0, 0.0)
    for name in library.forms():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(library.VARIABLE, name)
            ours, new = jax.jit(make(**settings).update)(grads, state, params)
        assert int(new.step) == int(expected.step)
        worst = max(worst[0], distance(ours, reference)), max(worst[1], distance(new[1:], expected[1:]))
    return worst


def check(params, grads=None, step=STEP, **settings):
    params, state = warmed(params, **settings)
    grads = draw({n: p.shape for n, p in params.items()}, 9) if grads is None else grads
    grads = {n: g.astype(params[n].dtype) for n, g in grads.items()}
    update, moments = compare(params, state, grads, **settings)
    assert update <= step and moments <= MOMENTS


SETTINGS = {
    "network alone": dict(orthogonal=False, baseline="none"),
    "momentum": dict(orthogonal=False, baseline="momentum", weight_decay=0.1, adam_scale=0.5),
    "Newton-Schulz": dict(orthogonal=True, baseline="momentum", weight_decay=0.1),
    "AdamW's size": dict(orthogonal=True, step_rms="adam", weight_decay=0.1),
    "AdamW's size, vectors too": dict(orthogonal=False, step_rms="adam", is_matrix=lambda name, param: True),
    "vectors too": dict(orthogonal=False, baseline="none", is_matrix=lambda name, param: True),
    "AdamW alone": dict(is_matrix=lambda name, param: False, weight_decay=0.1, adam_scale=0.5, adam_beta2=0.999),
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_all_shapes_equal_the_plain_path(settings):
    check(draw(SHAPES, 3), **settings)


def test_the_plain_path_ran_and_the_kernel_did():
    """The comparison compares: what is traced has the kernel's call, and under kernel='plain' it has not."""
    params = draw(LAYER, 3)
    calls = [
        str(jax.make_jaxpr(make(kernel).update)(params, make().init(params), params)).count("ffi_call")
        for kernel in ("auto", "plain")
    ]
    assert calls == [2, 0], "one call, and one after Newton-Schulz"


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [(0, 1), (6, 10), (15, 18), (21, 24), (27, 28)])
def test_the_comparison_tells_inputs_apart(swapped):
    order = np.arange(30)
    order[list(swapped)] = order[list(swapped[::-1])]
    params, state = warmed(draw({"w": (40, 32)}, 3), orthogonal=False)
    ours, _ = make(phi=PHI | {"w0": PHI["w0"][order]}, orthogonal=False).update(params, state, params)
    assert distance(ours, make("plain", orthogonal=False).update(params, state, params)[0]) > 10 * STEP


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [1, 5, 16])
def test_other_widths(hidden):
    check(draw(SHAPES, 3), phi=draw_phi(2, hidden), orthogonal=False, baseline="none")


def test_parts_of_the_weights_are_those_of_the_first_output():
    more = {"w2": jnp.concatenate([PHI["w2"], 9 + PHI["w2"]], axis=1), "b2": jnp.concatenate([PHI["b2"], PHI["b2"]])}
    check(draw(LAYER, 3), phi=PHI | more)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_of_16_bits(dtype):
    check(draw(SHAPES, 3, dtype=dtype), step=1e-3, orthogonal=False)


TREE = {"embedding": (20, 4), "layer": (4, 6), "stack": (3, 6, 4), "bias": (6,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "is_matrix",
    [
        lambda path, param: param.ndim > 1 and "embed" not in path,
        {"embedding": None, "layer": MuonDimensionNumbers(1, 0), "stack": MuonDimensionNumbers(1, 2), "bias": False},
    ],
    ids=["function", "axes"],
)
def test_the_user_says_which_tensors_and_axes(is_matrix):
    check(draw(TREE, 3), is_matrix=is_matrix)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 6), (5, 5, 2)])
def test_ties_are_broken_by_named_axes(shape):
    settings = dict(orthogonal=False, is_matrix={"w": MuonDimensionNumbers(1, 0)})
    check(draw({"w": shape}, 3), **settings)
    params, state = warmed(draw({"w": shape}, 3), **settings)
    other = make(orthogonal=False).update(params, state, params)[0]
    assert distance(other, make("plain", **settings).update(params, state, params)[0]) > 10 * STEP


def test_a_few_shapes_equal_the_plain_path():
    few = {n: SHAPES[n] for n in ("vector", "square", "conv", "tall")}
    check(draw(few, 3), orthogonal=False, weight_decay=0.1)


def test_weight_decay_with_a_mask():
    check(draw(TREE, 3), weight_decay=0.3, mask=lambda params: {n: n != "layer" for n in params})


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-38, 0.0])
@pytest.mark.parametrize("settings", [SETTINGS["momentum"], SETTINGS["vectors too"], SETTINGS["Newton-Schulz"]])
def test_odd_gradients_pass_as_in_the_plain_path(value, settings):
    grads = {n: g.at[(0,) * g.ndim].set(value) for n, g in draw(LAYER, 9).items()}
    check(draw(LAYER, 3), grads, **settings)
    params = draw(LAYER, 3)
    update, moments = compare(params, make().init(params), {n: jnp.full_like(g, value) for n, g in grads.items()})
    assert update <= 10 * STEP and moments <= MOMENTS


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_odd_parameters_pass_as_in_the_plain_path(value):
    params = {n: p.at[(0,) * p.ndim].set(value) for n, p in draw(LAYER, 3).items()}
    assert compare(params, make().init(params), draw(LAYER, 4), orthogonal=False, weight_decay=0.1)[0] <= STEP


def test_entries_that_never_had_a_gradient_get_no_step(form):
    params, grads = draw(LAYER, 3), draw(LAYER, 4)
    grads = {n: g.at[1].set(0) for n, g in grads.items()}
    for orthogonal in (False, True):
        optimizer = make(orthogonal=orthogonal)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        assert not np.asarray(updates["w"][1]).any() and np.asarray(updates["w"][0]).all()


def loop(phi, kernel, params, steps=3):
    optimizer = make(kernel, phi)

    def step(carry, scale):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(lambda p: scale * jnp.sin(3 * p), params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.linspace(0.5, 2.0, steps))[0]


@pytest.mark.slow
@pytest.mark.parametrize("many", ["vmap", "map", "phi alone", "params alone"])
def test_many_at_once_equal_one_after_the_other(form, many):
    runs = [(draw_phi(k), draw(LAYER, k)) for k in range(3)]
    phis, params = ([run[i] for run in runs] for i in (0, 1))
    stack = lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)  # noqa: E731
    if many == "map":
        together = jax.jit(lambda *a: jax.lax.map(lambda a: loop(a[0], "auto", a[1]), a))(stack(phis), stack(params))
    elif many == "vmap":
        together = jax.jit(jax.vmap(lambda phi, p: loop(phi, "auto", p)))(stack(phis), stack(params))
    elif many == "phi alone":
        params = [params[0]] * 3
        together = jax.jit(jax.vmap(lambda phi: loop(phi, "auto", params[0])))(stack(phis))
    else:
        phis = [phis[0]] * 3
        together = jax.jit(jax.vmap(lambda p: loop(phis[0], "auto", p)))(stack(params))
    for k in range(3):
        alone = jax.jit(lambda phi, p: loop(phi, "auto", p))(phis[k], params[k])
        jax.tree.map(np.testing.assert_array_equal, jax.tree.map(lambda x, k=k: x[k], together), alone)
        assert distance(alone[0], jax.jit(lambda phi, p: loop(phi, "plain", p))(phis[k], params[k])[0]) < 1e-5


def test_threads_that_share_the_tensors_change_no_bit(form):
    """A call on one tensor has nothing to share, one on these has."""
    shapes = {"w": (300, 400), "tall": (500, 90), "b": (4000,), "small": (7, 5)}
    params, grads = draw(shapes, 3), draw(shapes, 4)
    optimizer = make(orthogonal=False, weight_decay=0.1, is_matrix=lambda name, param: name != "b")
    update = jax.jit(optimizer.update)
    together = update(grads, optimizer.init(params), params)
    for name in shapes:
        (mine,), (grad,) = ([{name: x[name]}] for x in (params, grads))
        updates, state = update(grad, optimizer.init(mine), mine)
        np.testing.assert_array_equal(together[0][name], updates[name])
        np.testing.assert_array_equal(together[1].momentum[name], state.momentum[name])


def test_arguments_are_left_as_they_were():
    params, grads = draw(LAYER, 3), draw(LAYER, 4)
    state = make().init(params)
    kept = jax.tree.map(np.array, (params, grads, state))
    first, _ = jax.jit(make().update)(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, (params, grads, state), kept)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(make().update)(grads, state, params)[0], first)


@pytest.mark.slow
def test_derivatives_are_those_of_the_plain_path():
    params = draw(LAYER, 3)

    def loss(phi, kernel):
        return sum(jnp.sum(x**2) for x in loop(phi, kernel, params)[0].values())

    ours, plain = (jax.jit(jax.grad(loss), static_argnums=1)(PHI, kernel) for kernel in ("auto", "plain"))
    assert distance(ours, plain) < 1e-5


def test_where_the_kernel_does_not_serve_the_plain_path_runs():
    def traced(dtype=jnp.float32, **settings):
        params = draw(LAYER, 3, dtype=dtype)
        return "ffi_call" in str(jax.make_jaxpr(make(**settings).update)(params, make(**settings).init(params), params))

    assert traced() and traced(jnp.bfloat16) and not traced(state_dtype=jnp.bfloat16)
    with jax.enable_x64(True):
        assert not traced(jnp.float64)


def test_moments_of_another_shape_or_dtype_never_reach_the_kernel():
    params = {"w": jnp.ones((6, 4))}
    optimizer = norm_fc(kernel="auto").optimizer(norm_fc().init(jax.random.key(0)))
    state = optimizer.init(params)
    with pytest.raises(ValueError, match="has shapes .*; expected"):
        optimizer.update(params, state._replace(row={"w": jnp.zeros((3, 2))}), params)
    half = state._replace(momentum={"w": state.momentum["w"].astype(jnp.bfloat16)})
    for ours, theirs in zip(*(optimizer.update(params, x, params)[0].values() for x in (half, state)), strict=True):
        np.testing.assert_array_equal(ours, theirs)  # zeros in either


def test_the_environment_chooses(monkeypatch):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert library.path() == f"kernel {library.forms()[-1]}" and library.path("plain") == "plain"
    monkeypatch.setenv(library.VARIABLE, "0")
    assert library.path() == "plain"
    monkeypatch.setenv(library.VARIABLE, "mmx")
    with pytest.raises(ValueError, match="LOLO_KERNEL=mmx does not run here; use one of 0, portable"):
        library.path()
    with pytest.raises(ValueError, match="kernel='fast' must be one of 'auto', 'plain'"):
        make("fast")


def test_a_library_of_another_version_is_not_used(monkeypatch):
    monkeypatch.setattr(library, "VERSION", library.VERSION + 1)
    library.load.cache_clear()
    try:
        assert library.load() is None
    finally:
        library.load.cache_clear()


def test_the_library_numbers_its_forms_as_python_does():
    built = library.load()
    built.lolo_norm_fc_widest.restype = ctypes.c_int64
    assert library.FORMS[built.lolo_norm_fc_widest()] == library.forms()[-1]


shape = st.one_of(
    st.lists(st.integers(1, 40), max_size=2), st.lists(st.integers(1, 9), max_size=4), st.tuples(st.integers(1, 2000))
)


@pytest.mark.slow
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(
    shapes=st.lists(shape.map(tuple), min_size=2, max_size=2),
    scale=st.sampled_from([1e-12, 1e-4, 1.0, 1e6]),
    orthogonal=st.booleans(),
    vectors=st.booleans(),
)
def test_shapes_and_scales_of_any_kind(shapes, scale, orthogonal, vectors):
    named = {str(i): tuple(each) for i, each in enumerate(shapes)}
    more = {"is_matrix": lambda name, param: True} if vectors else {}
    grads = draw(named, 9, scale)
    # Newton-Schulz of a matrix of low rank amplifies last bits.
    check(draw(named, 3), grads, step=1e-2 if orthogonal else 1e-4, orthogonal=orthogonal, **more)


# In a meta-training


def recipe(kernel="auto", **changes):
    return helpers.small(recipes.LOLO, helpers.SUCCESSOR | {"learner.kernel": kernel, "outer.steps": 2} | changes)


def test_recipes_keep_the_plain_path_unless_they_say_otherwise():
    assert recipes.RECIPES["lolo"].learner.name == "small_fc"
    kernels = [each.learner.kernel for each in recipes.RECIPES.values() if each.learner.name == "norm_fc"]
    assert kernels and set(kernels) == {"plain"}


@pytest.mark.slow
def test_a_run_records_its_path_and_resumes_on_no_other_one(tmp_path, monkeypatch):
    messages = []
    widest = f"kernel {library.forms()[-1]}"
    training.train(recipe(), tmp_path / "run", How(log=messages.append))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["path"] == widest
    training.resume(tmp_path / "run", How(log=messages.append))
    monkeypatch.setenv(library.VARIABLE, "0")
    with pytest.raises(RunError, match=f"on the path '{widest}'..*'plain'.*--other-path"):
        training.resume(tmp_path / "run", How(log=messages.append))
    training.resume(tmp_path / "run", How(log=messages.append, other_path=True))
    assert any(f"the path differs from the checkpoint's ({widest}; now plain)" in text for text in messages)


@pytest.mark.slow
@pytest.mark.parametrize("orthogonal", [False, True])
def test_meta_training_is_that_of_the_plain_path_but_for_last_bits(orthogonal):
    phis = [
        training.train(recipe(kernel, **{"learner.orthogonal": orthogonal})).weights.meta_params
        for kernel in ("auto", "plain", "auto")
    ]
    jax.tree.map(np.testing.assert_array_equal, phis[0], phis[2])
    assert 0 < distance(phis[0], phis[1]) < 1e-3


@pytest.mark.slow
def test_slots_in_blocks_are_batches_of_one_call():
    blocks = {"estimator.slots_per_block": 2}
    one, two = (training.train(recipe(**more)).weights.meta_params for more in ({}, blocks))
    assert distance(one, two) < 1e-3
