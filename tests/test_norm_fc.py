"""`norm_fc` against PyLO's values and the textbook form, and what is promised of its state, dtypes and refusals."""

import pathlib
from typing import NamedTuple

import helpers
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import textbook_norm_fc as textbook
from helpers import LAYER, SHAPES, draw
from optax.contrib import MuonDimensionNumbers

from lolo.optimizers import norm_fc_features as nf
from lolo.optimizers import norm_fc_spec as spec
from lolo.optimizers import pretrained
from lolo.optimizers.norm_fc import norm_fc
from lolo.tasks import small
from lolo.training import build, recipes

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "celo2.npz")
FEW = {name: SHAPES[name] for name in ("scalar", "vector", "tall", "conv")}


def draw_phi(seed=0, hidden=8):
    """All weights and biases differ from zero, so that none can be forgotten."""
    phi = norm_fc(hidden, baseline="none").init(jax.random.key(seed))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed + 1), x.shape), phi)


PHI = draw_phi()


def make(phi=PHI, **settings):
    return norm_fc(phi["w0"].shape[1], **({"learning_rate": 0.01} | settings)).optimizer(phi)


def run(optimizer, params, steps=4, grads=None):
    """Updates of several steps, along gradients whose scale differs between tensors and grows, and the last state."""
    update, state, updates = jax.jit(optimizer.update), optimizer.init(params), []
    for step in range(steps):
        g = grads or draw({n: p.shape for n, p in params.items()}, 100 + step)
        g = {n: (x * (step + 1) * 3.0 ** (i % 5 - 3)).astype(x.dtype) for i, (n, x) in enumerate(g.items())}
        change, state = update(g, state, params)
        params = optax.apply_updates(params, change)
        updates.append(change)
    return updates, state


def assert_close(ours, reference, rtol=2e-4, atol=2e-6):
    for step, (a, b) in enumerate(zip(ours, reference, strict=True)):
        assert a.keys() == b.keys()
        for name in b:
            assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
            x, y = (np.asarray(u[name], np.float32) for u in (a, b))
            np.testing.assert_allclose(x, y, rtol=rtol, atol=atol, err_msg=f"step {step}, {name}")


# PyLO's values

GOLDEN_SETTINGS = {
    "plain": dict(orthogonal=False, adam_scale=20.0),
    "orthogonal": dict(orthogonal=True, adam_scale=20.0, weight_decay=0.1),
    "all": dict(orthogonal=False, is_matrix=lambda name, param: True),
}
GOLDEN_PHI = {n: jnp.asarray(GOLDEN[f"theta/{n}"]) for n in ("w0", "b0", "w1", "b1", "w2", "b2")}


def distance(optimizer, tag, names):
    """Largest absolute distance from the golden parameters, over six steps and the named tensors."""
    params = {n: jnp.asarray(GOLDEN[f"{tag}/p0/{n}"]) for n in names}
    update, state, worst = jax.jit(optimizer.update), optimizer.init(params), 0.0
    for t in range(6):
        updates, state = update({n: jnp.asarray(GOLDEN[f"{tag}/g{t}/{n}"]) for n in names}, state, params)
        params = optax.apply_updates(params, updates)
        worst = max(worst, *(float(np.abs(params[n] - GOLDEN[f"{tag}/p{t + 1}/{n}"]).max()) for n in names))
    return worst


@pytest.mark.parametrize("tag", GOLDEN_SETTINGS)
def test_six_steps_agree_with_pylo(tag):
    # golden/celo2.npz: values computed with PyLO's CELO2_naive at d05c6c1
    names = ["dense", "tall", "square"] + (["bias"] if tag != "orthogonal" else [])
    assert distance(make(GOLDEN_PHI, baseline="none", **GOLDEN_SETTINGS[tag]), tag, names) <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 3), (6, 10), (10, 11), (14, 15), (17, 18), (21, 24), (26, 27)])
def test_the_golden_values_tell_two_inputs_apart(one, other):
    order = np.arange(spec.INPUTS)
    order[[one, other]] = order[[other, one]]
    swapped = GOLDEN_PHI | {"w0": GOLDEN_PHI["w0"][order]}
    optimizer = make(swapped, baseline="none", **GOLDEN_SETTINGS["plain"])
    assert distance(optimizer, "plain", ["dense", "tall", "square"]) > 1e-4


def test_pylo_multiplies_the_decay_of_vectors_by_adam_scale_and_ours_does_not():
    settings = dict(baseline="none", **GOLDEN_SETTINGS["orthogonal"])
    assert distance(textbook.norm_fc(GOLDEN_PHI, 0.01, **settings, reference=True), "orthogonal", ["bias"]) <= 2e-5
    assert distance(textbook.norm_fc(GOLDEN_PHI, 0.01, **settings), "orthogonal", ["bias"]) > 1e-3
    assert distance(make(GOLDEN_PHI, **settings), "orthogonal", ["bias"]) > 1e-3


@pytest.mark.parametrize("tag", GOLDEN_SETTINGS)
def test_pylo_normalises_convolutions_over_the_last_two_axes_and_ours_over_the_whole_kernel(tag):
    settings = dict(baseline="none", **GOLDEN_SETTINGS[tag])
    assert distance(textbook.norm_fc(GOLDEN_PHI, 0.01, **settings, reference=True), tag, ["conv"]) <= 2e-5
    assert distance(make(GOLDEN_PHI, **settings), tag, ["conv"]) > 1e-3


# The textbook form


FRAMES = [(False, "none", "one"), (True, "momentum", "one"), (False, "momentum", "adam"), (True, "momentum", "adam")]


@pytest.mark.parametrize(("orthogonal", "baseline", "step_rms"), FRAMES)
@pytest.mark.slow
def test_all_shapes_equal_the_textbook(orthogonal, baseline, step_rms):
    settings = dict(orthogonal=orthogonal, baseline=baseline, step_rms=step_rms, weight_decay=0.1, adam_scale=0.5)
    settings["adam_beta2"] = 0.999
    params = draw(SHAPES, 3)
    reference = run(textbook.norm_fc(PHI, 0.01, **settings), params)[0]
    assert_close(run(make(**settings), params)[0], reference, rtol=2e-3, atol=2e-5)


def test_the_textbook_tells_baselines_apart():
    params = draw({"w": (6, 6)}, 3)
    with pytest.raises(AssertionError):
        assert_close(run(make(), params)[0], run(textbook.norm_fc(PHI, 0.01, baseline="none"), params)[0], rtol=0.1)


@pytest.mark.slow
def test_all_tensors_through_the_network_equal_the_textbook():
    settings = dict(orthogonal=False, baseline="none", is_matrix=lambda name, param: True)
    params = draw(SHAPES, 3)
    assert_close(run(make(**settings), params)[0], run(textbook.norm_fc(PHI, 0.01, **settings), params)[0])


@pytest.mark.parametrize("hidden", [1, 5])
def test_other_widths_equal_the_textbook(hidden):
    phi, params = draw_phi(hidden=hidden), draw(LAYER, 3)
    reference = textbook.norm_fc(phi, 0.01, orthogonal=False)
    assert_close(run(make(phi, orthogonal=False), params)[0], run(reference, params)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_updates_have_the_parameters_dtype_and_accumulators_are_float32(dtype):
    params = draw(LAYER, 3, dtype=dtype)
    ours, state = run(make(orthogonal=False), params)
    assert_close(ours, run(textbook.norm_fc(PHI, 0.01, orthogonal=False), params)[0], rtol=1e-2, atol=1e-4)
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64, jnp.bfloat16])
def test_double_precision_changes_no_dtype(dtype):
    with jax.enable_x64(True):
        phi = norm_fc().init(jax.random.key(0))
        assert {x.dtype for x in jax.tree.leaves(phi)} == {jnp.dtype(jnp.float32)}
        optimizer = make(phi, learning_rate=optax.cosine_decay_schedule(0.1, 10), weight_decay=jnp.float64(0.1))
        params = draw(LAYER, 3, dtype=dtype)
        updates, state = run(optimizer, params, steps=2)
        assert {x.dtype for x in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32), jnp.dtype(jnp.int32)}


def test_bfloat16_momenta_are_stored_and_little_is_lost():
    params = draw(LAYER, 3)
    exact, _ = run(make(), params)
    rounded, state = run(make(state_dtype="bfloat16"), params)
    assert {x.dtype for x in jax.tree.leaves(state.momentum)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(state[2:])} == {jnp.dtype(jnp.float32)}
    assert_close(rounded, exact, rtol=0.2, atol=2e-3)


def test_untrained_it_is_muon_with_steps_of_fixed_size():
    phi, params = norm_fc().init(jax.random.key(0)), draw({"tall": (50, 3), "square": (6, 6)}, 3)
    optimizer, mean = make(phi), jax.tree.map(jnp.zeros_like, params)
    muon = optax.contrib.scale_by_muon(
        beta=0.0, nesterov=False, weight_dimension_numbers=dict.fromkeys(params, MuonDimensionNumbers())
    )
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for step in range(3):
        grads = draw({n: p.shape for n, p in params.items()}, step)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        nesterov = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        theirs, _ = muon.update(nesterov, muon.init(params), params)
        ours, state = update(grads, state, params)
        for name in params:
            size = np.sqrt(np.mean(theirs[name] ** 2))
            np.testing.assert_allclose(ours[name], -0.01 * theirs[name] / size, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kernel", ["plain", "auto"])
@pytest.mark.parametrize("beta2", [0.0, 0.95, 0.999])
def test_vectors_get_adamw(beta2, kernel):
    params = draw({"vector": (13,), "scalar": ()}, 3)
    adam = optax.chain(optax.scale_by_adam(0.9, beta2, 1e-8), optax.scale(0.5), optax.add_decayed_weights(0.1))
    reference = run(optax.chain(adam, optax.scale(-0.01)), params)[0]
    settings = dict(adam_scale=0.5, weight_decay=0.1, kernel=kernel)
    assert_close(run(make(adam_beta2=beta2, **settings), params)[0], reference, rtol=1e-4)
    assert not np.allclose(run(make(adam_beta2=0.9, **settings), params)[0][-1]["vector"], reference[-1]["vector"])


@pytest.mark.parametrize("step_rms", ["one", "adam"])
def test_the_memory_of_vectors_is_not_that_of_matrices(step_rms):
    params = draw({"matrix": (7, 5)}, 3)
    for ours, other in zip(
        *(run(make(step_rms=step_rms, adam_beta2=b), params)[0] for b in (0.95, 0.999)), strict=True
    ):
        np.testing.assert_array_equal(ours["matrix"], other["matrix"])


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_matrix_may_step_as_far_as_adamw_would(orthogonal):
    """Root mean square of each update, tensor by tensor; gradients that are noise make it small, steady ones do not."""
    params = draw({"tall": (30, 6), "window": (3, 3, 4, 8)}, 3)
    adam = optax.chain(optax.scale_by_adam(0.9, 0.95, 1e-8), optax.scale(-0.01))

    def sizes(optimizer, drawn):
        update, state, found = jax.jit(optimizer.update), optimizer.init(params), []
        for seed in drawn:
            change, state = update(draw({n: p.shape for n, p in params.items()}, seed), state, params)
            found.append({name: float(jnp.sqrt(jnp.mean(x * x))) for name, x in change.items()})
        return found[-1]

    ours = make(orthogonal=orthogonal, step_rms="adam")
    noisy, steady = (sizes(ours, drawn) for drawn in (range(40), [1] * 40))
    for drawn, found in ((range(40), noisy), ([1] * 40, steady)):
        assert found == pytest.approx(sizes(adam, drawn), rel=1e-4)
        assert sizes(make(orthogonal=orthogonal), drawn) == pytest.approx({"tall": 0.01, "window": 0.01}, rel=1e-2)
    assert all(noisy[name] < 0.4 * steady[name] for name in params)


@pytest.mark.parametrize("kernel", [pytest.param("auto", marks=pytest.mark.slow), "plain"])
@pytest.mark.parametrize("step_rms", [pytest.param("one", marks=pytest.mark.slow), "adam"])
def test_derivatives_are_finite_where_a_gradient_is_zero(step_rms, kernel):
    params = draw({"w": (4, 3), "b": (3,)}, 3)

    def moved(phi):
        optimizer = make(phi, step_rms=step_rms, kernel=kernel)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
        return updates

    for x in jax.tree.leaves(jax.jvp(moved, (PHI,), (PHI,))):
        assert np.isfinite(x).all()


@pytest.mark.parametrize(("step_rms", "stops"), [("adam", True), ("one", False)])
def test_without_a_gradient_a_matrix_stops_as_under_adamw_if_its_step_is_as_large(step_rms, stops):
    params, optimizer = draw({"w": (12, 7)}, 3), make(step_rms=step_rms)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for step in range(150):
        change, state = update(jax.tree.map(lambda x, step=step: x * (step < 10), params), state, params)
    size = float(jnp.sqrt(jnp.mean(change["w"] ** 2)))
    assert size < 1e-4 * 0.01 if stops else size == pytest.approx(0.01, rel=1e-2)


# Which tensors, and which of their axes

TREE = {"embedding": (20, 4), "layer": (4, 6), "bias": (6,)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "is_matrix",
    [
        lambda path, param: param.ndim > 1 and "embed" not in path,
        {"embedding": False, "layer": True, "bias": None},
        {"embedding": None, "layer": MuonDimensionNumbers(0, 1), "bias": False},
    ],
    ids=["function", "mask", "axes"],
)
def test_the_user_says_which_tensors_take_adamw(is_matrix):
    params = draw(TREE, 3)
    chosen, all_of_them = run(make(is_matrix=is_matrix), params), run(make(), params)
    adamw = run(optax.chain(optax.scale_by_adam(0.9, 0.95, 1e-8), optax.scale(-0.01)), params)[0]
    for ours, default, adam in zip(chosen[0], all_of_them[0], adamw, strict=True):
        np.testing.assert_array_equal(ours["layer"], default["layer"])
        np.testing.assert_allclose(ours["embedding"], adam["embedding"], rtol=1e-4)
        assert not np.allclose(default["embedding"], adam["embedding"], rtol=0.1)
    assert chosen[1].momentum["embedding"].shape == (1, 20, 4), "AdamW needs one momentum, not three"


def test_weights_take_is_matrix_and_state_dtype_as_norm_fc_does():
    settings, params = spec.NormFcSettings(learning_rate=0.01), draw(TREE, 3)
    weights = pretrained.Weights(norm_fc().init(jax.random.key(0)), settings, {}, {})
    optimizer = weights.optimizer(is_matrix=lambda path, param: path == "layer", state_dtype=jnp.bfloat16)
    state = optimizer.init(params)
    assert {name: x.shape[0] for name, x in state.momentum.items()} == {"embedding": 1, "layer": 3, "bias": 1}
    assert {x.dtype for x in jax.tree.leaves(state.momentum)} == {jnp.dtype(jnp.bfloat16)}
    with pytest.raises(ValueError, match="step_rms='sgd' must be one of 'one', 'adam'"):
        weights.optimizer(step_rms="sgd")
    for beta2 in (1.0, jnp.float32(1.0)):
        with pytest.raises(ValueError, match="adam_beta2=.*must be 0 or a positive number below 1"):
            weights.optimizer(adam_beta2=beta2)
    for words in ({"is_matrix": TREE}, {"state_dtype": jnp.bfloat16}, {"step_rms": "adam"}):
        with pytest.raises(ValueError, match=f"'small_fc' has no {next(iter(words))}; leave it out"):
            pretrained.load("lolo-small").optimizer(**words)


def test_is_matrix_sees_paths_and_may_be_a_prefix():
    params = {"decoder": {"a": jnp.ones((2, 3)), "b": [jnp.ones((3, 2))]}, "c": jnp.ones((2, 2))}
    seen = []
    make(is_matrix=lambda path, param: seen.append(path) or True).init(params)
    assert seen == ["c", "decoder/a", "decoder/b/0"]
    state = make(is_matrix={"decoder": False, "c": True}).init(params)
    assert [x.shape[0] for x in jax.tree.leaves(state.momentum)] == [3, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 6), (9, 4), (4, 9)])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_named_axes_make_both_layouts_of_a_layer_agree(shape, orthogonal):
    params, grads = draw({"w": shape}, 3), draw({"w": shape}, 4)
    turned = jax.tree.map(jnp.transpose, (params, grads))
    ours = run(make(orthogonal=orthogonal), params, grads=grads)[0]
    named = run(make(orthogonal=orthogonal, is_matrix={"w": MuonDimensionNumbers(1, 0)}), turned[0], grads=turned[1])[0]
    assert_close([{"w": u["w"].T} for u in named], ours)
    if shape == (6, 6):  # only the names tell input from output
        unnamed = run(make(orthogonal=orthogonal), turned[0], grads=turned[1])[0]
        with pytest.raises(AssertionError):
            assert_close([{"w": u["w"].T} for u in unnamed], ours)


def test_axes_without_a_name_count_matrices():
    phi, shape = norm_fc().init(jax.random.key(0)), (3, 4, 5)
    params, grads = draw({"w": shape}, 3), draw({"w": shape}, 4)
    (stacked,), _ = run(make(phi, is_matrix={"w": MuonDimensionNumbers(1, 2)}), params, 1, grads)
    for i in range(3):
        (alone,), _ = run(make(phi), {"w": params["w"][i]}, 1, {"w": grads["w"][i]})
        a, b = (x / np.linalg.norm(x) for x in (stacked["w"][i], alone["w"]))
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)
    (one_matrix,), _ = run(make(phi), params, 1, grads)
    assert not np.allclose(one_matrix["w"], stacked["w"], rtol=0.1)


@pytest.mark.parametrize(
    ("is_matrix", "message"),
    [
        ({"w": "yes", "b": True}, "is_matrix says 'yes' of 'w'"),
        ({"w": True}, "neither the parameters' tree nor a prefix"),
        ({"w": MuonDimensionNumbers(0, 2), "b": False}, "name different axes"),
        ({"w": MuonDimensionNumbers(0, 0), "b": False}, "name different axes"),
        ({"w": True, "b": MuonDimensionNumbers(0, 1)}, r"'b', which has shape \(3,\) and no two axes"),
    ],
)
def test_answers_without_sense_are_refused(is_matrix, message):
    with pytest.raises(ValueError, match=message):
        make(is_matrix=is_matrix).init({"w": jnp.ones((2, 3)), "b": jnp.ones(3)})


# State


def test_state_is_one_tree_of_arrays_for_each_moment_and_none_is_empty():
    """As optax's own: Orbax refuses empty arrays, and flax's nnx.Optimizer tuples in a parameter's place."""
    params = draw(SHAPES, 3)
    for is_matrix in (None, lambda path, param: True, lambda path, param: False):
        state = make(is_matrix=is_matrix).init(params)
        for moment in state[1:]:
            assert jax.tree.structure(moment) == jax.tree.structure(params)
        assert all(isinstance(x, jax.Array) and x.size for x in jax.tree.leaves(state))
        after = jax.eval_shape(make(is_matrix=is_matrix).update, params, state, params)[1]
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)


def test_bytes_of_state_are_those_of_the_spec():
    state = make().init(draw({"w": (40, 30)}, 0))
    assert sum(x.size for x in jax.tree.leaves(state)) == 1200 * helpers.accumulators_per_parameter((40, 30)) + 1


def test_a_state_made_for_something_else_is_refused():
    params = draw(TREE, 3)
    state = make(is_matrix=lambda path, param: False).init(params)
    with pytest.raises(ValueError, match=r"params\['embedding'\].*another is_matrix"):
        make().update(params, state, params)
    with pytest.raises(ValueError, match="another tree"):
        make().update(params, make().init({"x": params["bias"]}), params)


def test_tensors_without_entries_and_empty_trees_pass_through():
    assert run(make(), {})[0] == [{}] * 4
    params = {
        "none": jnp.zeros((0,)),
        "no rows": jnp.zeros((0, 3)),
        "no columns": jnp.zeros((3, 0)),
        "some": jnp.ones(2),
    }
    for is_matrix in (None, lambda path, param: True):
        updates = run(make(is_matrix=is_matrix), params)[0][-1]
        assert {n: u.shape for n, u in updates.items()} == {n: p.shape for n, p in params.items()}
        assert np.isfinite(updates["some"]).all() and np.asarray(updates["some"]).any()


# optax's interface


def test_extra_arguments_are_accepted_and_ignored():
    params = draw(LAYER, 3)
    optimizer = make()
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    state = optimizer.init(params)
    assert_close([optimizer.update(params, state, params, value=1.0)[0]], [optimizer.update(params, state, params)[0]])


def test_numbers_may_be_traced():
    params = draw(LAYER, 3)

    def build(learning_rate, weight_decay=0.1, adam_scale=0.5, adam_beta2=0.999):
        return make(
            learning_rate=learning_rate, weight_decay=weight_decay, adam_scale=adam_scale, adam_beta2=adam_beta2
        )

    injected = optax.inject_hyperparams(build)(learning_rate=0.01)
    state, update = injected.init(params), jax.jit(injected.update)
    ours, state = update(params, state, params)
    assert_close([ours], [build(0.01).update(params, build(0.01).init(params), params)[0]], rtol=1e-5)
    state.hyperparams["learning_rate"] = jnp.float32(0.02)
    second, _ = update(params, state, params)
    first = update(params, state._replace(hyperparams=state.hyperparams | {"learning_rate": 0.01}), params)[0]
    assert_close([second], [jax.tree.map(lambda u: 2 * u, first)], rtol=1e-4)


def test_a_schedule_is_called_with_the_steps_done_so_far():
    params, rates = draw(LAYER, 3), jnp.array([0.5, 0.0, 2.0])
    scheduled = run(make(learning_rate=lambda step: rates[step]), params, 3, grads=params)[0]
    assert all(np.asarray(u).any() for u in scheduled[0].values())
    assert not any(np.asarray(u).any() for u in scheduled[1].values())


def loop(optimizer, params, steps=3):
    def step(carry, scale):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(lambda p: scale * jnp.sin(3 * p), params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), jnp.linspace(0.5, 2.0, steps))[0][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "batched", [jax.vmap, lambda f: lambda *args: jax.lax.map(lambda a: f(*a), args)], ids=["vmap", "map"]
)
def test_many_optimizers_at_once_equal_one_after_the_other(batched):
    runs = [(draw_phi(k), draw(LAYER, k)) for k in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *runs)
    together = jax.jit(batched(lambda phi, params: loop(make(phi, orthogonal=False), params)))(*stacked)
    for k, (phi, params) in enumerate(runs):
        alone = loop(make(phi, orthogonal=False), params)
        assert_close([jax.tree.map(lambda x, k=k: x[k], together)], [alone], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_update_under_jit_gives_the_same_bits_twice():
    params = draw(FEW, 3)
    first, second = (jax.jit(lambda p: loop(make(), p))(params) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_composes_with_masks_and_chains():
    params = draw(TREE, 3)
    masked = optax.masked(
        make(is_matrix={"embedding": False, "layer": True, "bias": False}),
        {"embedding": True, "layer": True, "bias": False},
    )
    updates, _ = masked.update(params, masked.init(params), params)
    np.testing.assert_array_equal(updates["bias"], params["bias"])
    assert not np.allclose(updates["layer"], params["layer"])


def dots(jaxpr):
    """The precisions of all matrix products, also those in inner programs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"], equation.params["preferred_element_type"]
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from dots(inner)


def test_matrix_products_are_float32_whatever_the_default_precision():
    params = draw({"w": (6, 6), "tall": (50, 3)}, 3)
    optimizer = make()
    with jax.default_matmul_precision("bfloat16"):
        program = jax.make_jaxpr(optimizer.update)(params, optimizer.init(params), params)
    found = list(dots(program.jaxpr))
    highest = jax.lax.Precision.HIGHEST
    assert len(found) > 20 and set(found) == {((highest, highest), jnp.dtype(jnp.float32))}


# What is refused


class Module(NamedTuple):
    """As an equinox module: a function among its leaves."""

    weight: jax.Array
    activation: object = jax.nn.relu
    absent: object = None


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ({"a": jnp.ones(3)}, r"params\['b'\] has no gradient"),
        ({"a": jnp.ones(3), "b": None}, r"params\['b'\] has no gradient"),
        ({"a": jnp.ones(3), "b": jnp.ones(3), "c": jnp.ones(3)}, r"grads\['c'\] belongs to no parameter"),
        ({"x": jnp.ones(3), "a": jnp.ones(3)}, r"params\['b'\] has no gradient.*there for: \['a'\], \['x'\]"),
        ({"a": jnp.ones(3), "b": jnp.ones((3, 1))}, r"params\['b'\] has shape \(3, 1\); expected \(3,\)"),
        (jnp.ones((3, 3)), r"params\['a'\] has no gradient"),
    ],
)
def test_gradients_of_another_tree_are_refused(grads, message):
    params = {"a": jnp.ones(3), "b": jnp.zeros(3)}
    with pytest.raises(ValueError, match=message):
        make().update(grads, make().init(params), params)


def test_another_container_is_another_tree():
    with pytest.raises(ValueError, match="the gradients' tree"):
        make().update([jnp.ones(3)], make().init((jnp.ones(3),)), (jnp.ones(3),))


def test_missing_params_are_named():
    with pytest.raises(ValueError, match=r"norm_fc reads the parameters: call update\(grads, state, params\)"):
        make().update({"w": jnp.ones(3)}, make().init({"w": jnp.ones(3)}))


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({"w": jnp.ones(3, jnp.complex64)}, ValueError, r"params\['w'\] is complex64.*split_real_and_imaginary"),
        ({"w": jnp.ones(3, jnp.int32)}, TypeError, r"params\['w'\] is int32.*equinox.filter"),
        (Module(jnp.ones(3)), TypeError, r"params.activation is a .*equinox.filter\(model"),
        ({"w": 1.0}, TypeError, r"params\['w'\] is a float.*jnp.asarray"),
    ],
)
def test_parameters_that_it_can_not_move_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        make().init(params)


def test_the_cures_work():
    model, params = Module(jnp.ones(3)), Module(jnp.ones(3), None)
    with pytest.raises(TypeError, match="equinox.filter"):
        make().update(params, make().init(params), model)
    assert np.asarray(make().update(params, make().init(params), params)[0].weight).any()
    wrapped, z = optax.contrib.split_real_and_imaginary(make()), {"w": jnp.array([1 + 2j, 3 - 1j])}
    update = wrapped.update(z, wrapped.init(z), z)[0]["w"]
    assert np.asarray(update.real).all() and np.asarray(update.imag).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden": 0}, "hidden=0"),
        ({"baseline": "adam"}, "must be one of 'momentum', 'none'"),
        ({"step_rms": "muon"}, "step_rms='muon' must be one of 'one', 'adam'"),
        ({"adam_beta2": 1.0}, "adam_beta2=1.0 must be 0 or a positive number below 1"),
        ({"adam_beta2": -0.1}, "adam_beta2=-0.1 must be"),
        ({"adam_beta2": jnp.float32(1)}, "adam_beta2=.* must be"),
        ({"adam_beta2": float("nan")}, "adam_beta2=nan must be"),
        ({"state_dtype": "float16"}, "state_dtype=float16 must be float32 or bfloat16"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        norm_fc(**settings)


# Gradients of every size


@pytest.mark.slow
@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("baseline", ["none", "momentum"])
def test_finite_gradients_of_any_size_give_finite_updates(orthogonal, baseline):
    shapes = LAYER | {"scalar": (), "conv": (2, 3, 4)}
    params, small = draw(shapes, 3), draw(shapes, 4, 0.1)
    optimizer = make(orthogonal=orthogonal, baseline=baseline)
    update, start = jax.jit(optimizer.update), optimizer.init(params)
    for size in (1e-38, 1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e19, 1e30, 3e38):
        for large in (
            jax.tree.map(lambda g, size=size: jnp.full_like(g, size), small),
            jax.tree.map(lambda g, size=size: g.at[(0,) * g.ndim].set(size), small),
        ):
            state = start
            for grads in (large, small, large):
                updates, state = update(grads, state, params)
                assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state))), size


def test_limiting_gradients_does_not_touch_ordinary_ones():
    params = draw(FEW, 3)
    grads = draw(FEW, 4, 1e4)
    ours = run(make(orthogonal=False, baseline="none"), params, 2, grads)[0]
    assert_close(ours, run(textbook.norm_fc(PHI, 0.01, orthogonal=False, baseline="none"), params, 2, grads)[0])


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_gradients_that_are_not_finite_show_in_their_tensor_and_no_other(bad, orthogonal):
    params, grads = draw(FEW, 3), draw(FEW, 4)
    update, state = jax.jit(make(orthogonal=orthogonal).update), make().init(params)
    for name in FEW:
        spoiled = grads | {name: grads[name].at[(0,) * grads[name].ndim].set(bad)}
        updates, _ = update(spoiled, state, params)
        assert {n for n, u in updates.items() if np.isnan(u).any()} == {name}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_gradient_without_one_finite_entry_shows_and_so_do_the_steps_after_it(bad, orthogonal):
    params = draw({"matrix": (3, 4), "vector": (4,)}, 3)
    update, state = jax.jit(make(orthogonal=orthogonal).update), make().init(params)
    for grads in (jax.tree.map(lambda x: jnp.full_like(x, bad), params), jax.tree.map(jnp.ones_like, params)):
        updates, state = update(grads, state, params)
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["none", "momentum"])
@pytest.mark.parametrize("orthogonal", [False, True])
def test_entries_that_never_had_a_gradient_do_not_move(orthogonal, baseline):
    params = draw({"rows": (8, 5), "entries": (6, 6), "vector": (9,), "untouched": (4, 3)}, 3)
    seen = jax.tree.map(jnp.ones_like, params)
    seen = {
        "rows": seen["rows"].at[3:].set(0),
        "entries": jnp.triu(seen["entries"]),
        "vector": seen["vector"].at[::2].set(0),
        "untouched": jnp.zeros((4, 3)),
    }
    optimizer = make(orthogonal=orthogonal, baseline=baseline)
    update, state, start = jax.jit(optimizer.update), optimizer.init(params), params
    for step in range(5):
        grads = jax.tree.map(jnp.multiply, draw({n: p.shape for n, p in params.items()}, step), seen)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name in params:
        moved = np.asarray(params[name] != start[name])
        np.testing.assert_array_equal(moved, np.asarray(seen[name]) > 0, err_msg=name)


# φ


def test_number_of_meta_parameters_and_a_last_layer_that_starts_at_zero():
    phi = norm_fc().init(jax.random.key(0))
    assert {n: x.shape for n, x in phi.items()} == spec.weight_shapes(8)
    assert sum(x.size for x in phi.values()) == 329
    assert not phi["w2"].any() and phi["w0"].any() and phi["w1"].any()
    assert norm_fc(baseline="none").init(jax.random.key(0))["w2"].any()


def test_the_size_of_a_matrix_step_is_the_learning_rate():
    params = draw({"w": (20, 30), "conv": (3, 3, 4, 6)}, 3)
    for updates in run(make(learning_rate=0.03), params)[0]:
        for update in updates.values():
            np.testing.assert_allclose(np.sqrt(np.mean(update**2)), 0.03, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [recipes.NAIVE, recipes.LOLO], ids=["naive", "lolo"])
def test_it_meta_trains(recipe):
    # The quadratic has one vector, which is AdamW's unless we say otherwise.
    learned = norm_fc(learning_rate=0.1, is_matrix=lambda path, param: True)
    setup = build.build(helpers.small(recipe))._replace(learned=learned)
    states, metrics, _ = helpers.run(setup, (small.quadratic().train,), 3)
    assert helpers.all_finite(states[-1].meta_params) and not helpers.same(
        states[0].meta_params, states[-1].meta_params
    )


@pytest.mark.slow
def test_meta_gradients_are_finite():
    params = draw(LAYER, 3)

    def loss(phi):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(loop(make(phi), params, 2)))

    gradient = jax.jit(jax.grad(loss))(norm_fc().init(jax.random.key(0)))
    assert all(np.isfinite(x).all() for x in gradient.values()) and gradient["w2"].any()


def test_a_factor_of_one_over_x_is_that_for_all_x_from_the_least_on():
    x = jnp.geomspace(1e-8, 1e38, 1000, dtype=jnp.float32)
    assert jnp.array_equal(nf.reciprocal(x, least=1e-8), 1 / x)
    assert not jnp.array_equal(nf.reciprocal(x, least=1.0), 1 / x)  # smaller ones are cut off
    assert jnp.isnan(nf.reciprocal(jnp.float32(jnp.nan), least=1e-8))
