"""What users of other optimizers reported as bugs does not happen here. Each case names the public thread it is from.

PyTorch's cases are in tests/torch/test_faults_of_others_torch.py.
"""

import subprocess
import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import same

import lolo
from lolo.optimizers import architecture, small_fc
from lolo.optimizers.pretrained import Weights
from lolo.optimizers.small_fc_spec import LARGEST_GRADIENT

pytestmark = pytest.mark.slow  # nearly all of it is compilation

SMALL_FC = lolo.load("lolo-anytime")


def weights_of(name):
    """Shipped weights of small_fc, drawn ones of the others."""
    if name == "small_fc":
        return SMALL_FC
    learner = architecture.ARCHITECTURES[name].settings()
    return Weights(architecture.build_learner(learner).init(jax.random.key(0)), learner, {}, {})


WEIGHTS = {name: weights_of(name) for name in architecture.ARCHITECTURES}
LEARNED = {name: weights for name, weights in WEIGHTS.items() if name != "sgd"}
all_weights = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
learned_weights = pytest.mark.parametrize("weights", LEARNED.values(), ids=LEARNED)

PARAMS = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3), "scalar": jnp.ones(()), "conv": jnp.ones((2, 3, 3, 2))}
GRADS = jax.tree.map(lambda x: (0.1 + jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape)).astype(x.dtype), PARAMS)


def first_update(optimizer, params=PARAMS, grads=GRADS, **extra):
    return optimizer.update(grads, optimizer.init(params), params, **extra)[0]


def changed(tree, **leaves):
    return {**tree, **leaves}


def empty_leaves(state):
    return [jax.tree_util.keystr(path) for path, x in jax.tree_util.tree_leaves_with_path(state) if not x.size]


# State that others can save: google/orbax #2587, #1309; google/flax #4309


@all_weights
def test_no_leaf_of_the_state_is_empty_and_none_has_a_surprising_dtype(weights):
    optimizer = weights.optimizer()
    state = optimizer.init(PARAMS)
    for _ in range(2):
        assert empty_leaves(state) == []
        assert {x.dtype.name for x in jax.tree.leaves(state)} <= {"float32", "int32"}
        _, state = optimizer.update(GRADS, state, PARAMS)


def test_the_state_inside_the_method_stays_as_it_is():
    """Replay buffers and checkpoints hold it; and the test above can tell."""
    learner = architecture.build_learner(SMALL_FC.learner)
    state = learner.optimizer(SMALL_FC.meta_params).init(PARAMS)
    assert len(empty_leaves(state)) == 2 and state.moments["b"].column.shape == (3, 0)


def test_presenting_the_state_changes_no_bit_of_an_update():
    inside = architecture.build_learner(SMALL_FC.learner).optimizer(SMALL_FC.meta_params)
    ours, theirs = SMALL_FC.optimizer(), inside
    state, inner_state = ours.init(PARAMS), theirs.init(PARAMS)
    for _ in range(3):
        updates, state = jax.jit(ours.update)(GRADS, state, PARAMS)
        expected, inner_state = jax.jit(theirs.update)(GRADS, inner_state, PARAMS)
        assert same(updates, expected)


def test_a_state_with_the_former_empty_leaf_is_still_taken():
    optimizer = SMALL_FC.optimizer()
    state = optimizer.init(PARAMS)
    former = state.moments._replace(column=changed(state.moments.column, b=jnp.zeros((3, 0))))
    assert same(optimizer.update(GRADS, state._replace(moments=former), PARAMS), optimizer.update(GRADS, state, PARAMS))


@learned_weights
@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.parametrize("way", ["standard", "pytree", "manager"])
def test_orbax_saves_and_restores_a_run_bit_for_bit(weights, way, tmp_path):
    import orbax.checkpoint as ocp

    optimizer = weights.optimizer()
    update = jax.jit(optimizer.update)
    _, state = update(GRADS, optimizer.init(PARAMS), PARAMS)
    target = jax.eval_shape(optimizer.init, PARAMS)
    if way == "manager":
        with ocp.CheckpointManager(tmp_path / "run") as manager:
            manager.save(1, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
            back = manager.restore(1, args=ocp.args.StandardRestore(target))
    else:
        kind = {"standard": ocp.StandardCheckpointer, "pytree": ocp.PyTreeCheckpointer}[way]
        with kind() as checkpointer:
            checkpointer.save(tmp_path / "state", state)
            if way == "standard":
                checkpointer.wait_until_finished()
                back = checkpointer.restore(tmp_path / "state", target)
            else:
                back = checkpointer.restore(tmp_path / "state", item=state)
    assert same(back, state)
    assert same(update(GRADS, back, PARAMS), update(GRADS, state, PARAMS))


# Gradients of another tree: optax #808, #291; equinox #458


@learned_weights
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (GRADS["w"], r"params\['b'\] has no gradient; gradients are there for: "),
        (
            {"w2": GRADS["w"], **{n: g for n, g in GRADS.items() if n != "w"}},
            r"params\['w'\] has no gradient.*\['w2'\]",
        ),
        (changed(GRADS, b=None), r"params\['b'\] has no gradient"),
        (changed(GRADS, more=jnp.ones(3)), r"grads\['more'\] belongs to no parameter; parameters: .*\['b'\]"),
        (changed(GRADS, w=GRADS["w"].T), r"the gradient of params\['w'\] has shape \(3, 4\); expected \(4, 3\)"),
        (list(GRADS.values()), r"has no gradient"),
    ],
)
def test_gradients_of_another_tree_are_refused_by_name(weights, grads, message):
    optimizer = weights.optimizer()
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match=message):
        optimizer.update(grads, state, PARAMS)
    with pytest.raises(ValueError, match=message):
        jax.jit(optimizer.update)(grads, state, PARAMS)


class Label:
    """Static data of a node: equal by value, and read as an address."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return self.value == other.value

    def __hash__(self):
        return hash(self.value)


@jax.tree_util.register_pytree_node_class
class Labelled:
    def __init__(self, leaf, label):
        self.leaf, self.label = leaf, label

    def tree_flatten(self):
        return (self.leaf,), self.label

    @classmethod
    def tree_unflatten(cls, label, leaves):
        return cls(*leaves, label)


@learned_weights
def test_equal_trees_are_taken_however_their_static_data_read(weights):
    optimizer, params = weights.optimizer(), Labelled(jnp.ones(3), Label(1))
    assert first_update(optimizer, params, Labelled(jnp.ones(3), Label(1))).leaf.any()
    with pytest.raises(ValueError, match="is not the parameters' tree"):
        first_update(optimizer, params, Labelled(jnp.ones(3), Label(2)))


@learned_weights
@pytest.mark.parametrize(
    ("dtype", "kind", "message"),
    [
        (jnp.complex64, ValueError, r"the gradient of params\['w'\] is complex64.*grad.real"),
        (jax.dtypes.float0, TypeError, r"the gradient of params\['w'\] is float0.*differentiate by"),
        (jnp.float8_e4m3fn, TypeError, r"the gradient of params\['w'\] is float8_e4m3fn.*astype\(jnp.float32\)"),
    ],
)
def test_gradients_that_are_not_real_numbers_are_refused_by_name(weights, dtype, kind, message):
    with pytest.raises(kind, match=message):
        first_update(weights.optimizer(), {"w": jnp.ones(3)}, {"w": np.zeros(3, dtype)})


@learned_weights
def test_parameters_of_eight_bits_are_refused_with_the_cure(weights):
    with pytest.raises(TypeError, match=r"params\['w'\] is float8_e5m2.*bfloat16 or float32, and cast"):
        weights.optimizer().init({"w": jnp.ones(3, jnp.float8_e5m2)})


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (changed(PARAMS, w=jnp.ones((3, 4))), r"the state of params\['w'\] has shape \(3, 4\); expected \(4, 3\)"),
        ({"w": PARAMS["w"]}, r"the state of params\['b'\] has shape None"),
        (changed(PARAMS, more=jnp.ones(3)), r"the state has params\['more'\], which is no parameter"),
    ],
)
def test_the_state_of_other_parameters_is_refused_by_name(others, message):
    optimizer = SMALL_FC.optimizer()
    with pytest.raises(ValueError, match=message):
        optimizer.update(GRADS, optimizer.init(others), PARAMS)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (changed(PARAMS, w=jnp.ones((3, 4))), r"the state of params\['w'\] has momenta of shape \(3, 3, 4\); expected"),
        ({"w": PARAMS["w"]}, "the state belongs to parameters of another tree"),
        (changed(PARAMS, more=jnp.ones(3)), "the state belongs to parameters of another tree"),
    ],
)
def test_norm_fc_refuses_the_state_of_other_parameters(others, message):
    optimizer = WEIGHTS["norm_fc"].optimizer()
    with pytest.raises(ValueError, match=message):
        optimizer.update(GRADS, optimizer.init(others), PARAMS)


# Parameters that are no arrays of real numbers: pytorch #65711; optax #1506; equinox #590

COMPLEX, COMPLEX_GRADIENT = jnp.array([1 + 2j, 3 - 1j]), jnp.array([0.1 + 0.2j, 0.3 - 0.1j])


@learned_weights
def test_complex_parameters_are_refused_with_the_cure(weights):
    optimizer = weights.optimizer()
    for call in (optimizer.init, lambda p: optimizer.update(p, optimizer.init(jnp.ones(2)), p)):
        with pytest.raises(ValueError, match=r"complex64.*optax.contrib.split_real_and_imaginary\(optimizer\)"):
            call(COMPLEX)


@learned_weights
def test_the_cure_for_complex_parameters_moves_both_parts(weights):
    update = first_update(optax.contrib.split_real_and_imaginary(weights.optimizer()), COMPLEX, COMPLEX_GRADIENT)
    assert update.real.all() and update.imag.all()


def test_the_cure_for_complex_parameters_has_the_expected_values():
    update = first_update(optax.contrib.split_real_and_imaginary(SMALL_FC.optimizer()), COMPLEX, COMPLEX_GRADIENT)
    right = np.array([-0.00044092 - 0.00088102j, -0.00128229 + 0.00098402j])
    np.testing.assert_allclose(update, right, rtol=0, atol=1e-7)


@learned_weights
@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jax.nn.relu, r"params\['x'\] is a .*equinox.filter\(model, equinox.is_inexact_array\)"),
        (3.0, r"params\['x'\] is a float.*jnp.asarray"),
        (jnp.arange(3), r"params\['x'\] is int32, which has no gradient. Filter first"),
    ],
)
def test_leaves_that_can_not_move_are_refused_with_the_filter_to_use(weights, leaf, message):
    optimizer, params = weights.optimizer(), changed(PARAMS, x=leaf)
    with pytest.raises(TypeError, match=message):
        optimizer.init(params)
    with pytest.raises(TypeError, match=message):
        optimizer.update(GRADS, optimizer.init(PARAMS), params)


@learned_weights
def test_equinox_modules_train_once_they_are_filtered(weights):
    import equinox

    model = equinox.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    grads = equinox.filter_grad(lambda m: (jax.vmap(m)(jnp.ones((4, 3))) ** 2).mean())(model)
    params, optimizer = equinox.filter(model, equinox.is_inexact_array), weights.optimizer()
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    assert any(x.any() for x in jax.tree.leaves(equinox.apply_updates(model, updates).layers[0].weight - 0.0))
    with pytest.raises(TypeError, match=r"equinox.filter\(model, equinox.is_inexact_array\)"):
        optimizer.update(grads, optimizer.init(params), model)


# Extra arguments: optax #1131; flax #4545


@all_weights
@pytest.mark.parametrize(
    "options",
    [{}, {"step_scale": 0.5}, {"step_scale": optax.constant_schedule(0.5)}],
    ids=["plain", "half", "schedule"],
)
def test_extra_arguments_are_taken(weights, options):
    optimizer = weights.optimizer(**options)
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    assert same(first_update(optimizer, value=1.0, grad_fn=None), first_update(optimizer))


@all_weights
def test_a_wrapper_that_gives_the_loss_works(weights):
    optimizer = optax.chain(weights.optimizer(), optax.contrib.reduce_on_plateau(patience=1))
    assert all(x.any() for x in jax.tree.leaves(first_update(optimizer, value=1.0)))


# Finite gradients of any size: ferx-core #1112; darkflow #381


@learned_weights
@pytest.mark.parametrize("size", [1e15, 1e18, 1e19, 1e30, 3e38])
@pytest.mark.parametrize("shape", [(12,), (4, 3), (3, 3, 4, 6)])
def test_one_huge_finite_gradient_makes_no_nan(weights, size, shape):
    params, grads = jnp.ones(shape), jnp.full(shape, 0.1).at[(0,) * len(shape)].set(size)
    optimizer = weights.optimizer()
    state = optimizer.init(params)
    for gradient in (grads, grads, -grads, jnp.full(shape, size), jnp.full(shape, 0.1)):
        updates, state = optimizer.update(gradient, state, params)
        assert jnp.isfinite(updates).all()
        assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


@learned_weights
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_gradient_that_is_not_finite_is_seen(weights, bad):
    updates = first_update(weights.optimizer(), grads=changed(GRADS, w=GRADS["w"].at[0, 0].set(bad)))
    assert jnp.isnan(updates["w"]).any() and jnp.isfinite(updates["b"]).all()


def test_only_gradients_beyond_the_limit_are_changed():
    optimizer = SMALL_FC.optimizer()

    def second_moment(size):
        return optimizer.update({"x": jnp.full(2, size)}, optimizer.init({"x": jnp.ones(2)}), {"x": jnp.ones(2)})[1]

    limit = second_moment(LARGEST_GRADIENT)
    assert same(second_moment(1e30), limit)
    assert not same(second_moment(0.5 * LARGEST_GRADIENT), limit)


# Settings as hyper-parameters of the state: optax #412

NUMERIC = {
    "small_fc": {"step_scale": 0.5, "weight_decay": 0.3, "clock_limit": 0.0, "step_decay": 2.0},
    "norm_fc": {"step_scale": 0.5, "weight_decay": 0.3, "learning_rate": 0.02, "adam_scale": 0.25, "adam_beta2": 0.4},
}
CASES = [(name, {setting: value}) for name, options in NUMERIC.items() for setting, value in options.items()]
CASES += list(NUMERIC.items())


def three_updates(optimizer, jit):
    update, state = jax.jit(optimizer.update) if jit else optimizer.update, optimizer.init(PARAMS)
    for size in (1.0, 2.0, 3.0):
        updates, state = update(jax.tree.map(partial(jnp.multiply, size), GRADS), state, PARAMS)
    return updates


@pytest.mark.parametrize("jit", [True, False])
def test_half_a_step_has_the_expected_value(jit):
    optimizer = optax.inject_hyperparams(SMALL_FC.optimizer)(step_scale=0.5)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    params, grads = jnp.zeros(3), jnp.full(3, 0.2)
    updates, _ = update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates, -0.00027071, rtol=0, atol=5e-9)


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_every_numeric_setting_may_be_injected(name, options, jit):
    make = WEIGHTS[name].optimizer
    injected = three_updates(optax.inject_hyperparams(make)(**options), jit)
    plain, other = three_updates(make(**options), jit), three_updates(make(), jit)
    assert not same(plain, other)
    for ours, expected in zip(*map(jax.tree.leaves, (injected, plain)), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-9)


@learned_weights
def test_injected_settings_change_without_another_compilation(weights):
    optimizer = optax.inject_hyperparams(weights.optimizer)(step_scale=1.0, weight_decay=0.0)
    update, state = jax.jit(optimizer.update), optimizer.init(PARAMS)
    state.hyperparams["step_scale"] = jnp.float32(1.0)
    whole, _ = update(GRADS, state, PARAMS)
    state.hyperparams["step_scale"] = jnp.float32(0.25)
    quarter, _ = update(GRADS, state, PARAMS)
    np.testing.assert_allclose(4 * quarter["w"], whole["w"], rtol=1e-6)
    assert update._cache_size() == 1


@learned_weights
def test_injected_schedules_are_followed(weights):
    optimizer = optax.inject_hyperparams(weights.optimizer)(step_scale=optax.linear_schedule(0.0, 1.0, 2))
    state, sizes = optimizer.init(PARAMS), []
    for _ in range(3):
        updates, state = optimizer.update(GRADS, state, PARAMS)
        sizes.append(float(jnp.abs(updates["w"]).max()))
    assert sizes[0] == 0 < sizes[1] < sizes[2]


@pytest.mark.parametrize(("name", "options"), NUMERIC.items(), ids=NUMERIC)
def test_settings_may_be_traced_where_the_optimizer_is_made(name, options):
    """A sweep vmaps over them; and a traced setting is none that a program has compiled in."""
    weights, several = WEIGHTS[name], {setting: jnp.array([value, 2 * value]) for setting, value in options.items()}
    together = jax.jit(jax.vmap(lambda each: first_update(weights.optimizer(**each))))(several)
    for i, factor in enumerate((1, 2)):
        alone = first_update(weights.optimizer(**{setting: factor * value for setting, value in options.items()}))
        for ours, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours[i], expected, rtol=1e-4, atol=1e-8)


@learned_weights
def test_injected_settings_leave_the_updates_dtype(weights):
    half = partial(jax.tree.map, lambda x: x.astype(jnp.bfloat16))
    optimizer = optax.inject_hyperparams(weights.optimizer, hyperparam_dtype=jnp.float32)(step_scale=0.5)
    updates = first_update(optimizer, half(PARAMS), half(GRADS))
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"bfloat16"}


@all_weights
def test_a_training_step_may_donate_parameters_and_state(weights):
    optimizer = weights.optimizer()

    def step(params, state):
        updates, state = optimizer.update(GRADS, state, params)
        return optax.apply_updates(params, updates), state

    expected = step(PARAMS, optimizer.init(PARAMS))[0]
    params = jax.tree.map(jnp.copy, PARAMS)
    found, _ = jax.jit(step, donate_argnums=(0, 1))(params, optimizer.init(params))
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "setting", "values"),
    [
        ("small_fc", "weight_decay", (0.5, 0.0)),
        ("norm_fc", "weight_decay", (0.5, 0.0)),
        ("norm_fc", "learning_rate", (1e-2, 1e-3)),
    ],
)
def test_a_setting_may_follow_a_schedule(name, setting, values):
    weights = WEIGHTS[name]
    optimizer = weights.optimizer(**{setting: lambda step: jnp.where(step == 0, *values)})
    state = optimizer.init(PARAMS)
    for value in values:
        expected, _ = weights.optimizer(**{setting: value}).update(GRADS, state, PARAMS)
        updates, state = optimizer.update(GRADS, state, PARAMS)
        for leaf, x in expected.items():
            np.testing.assert_allclose(updates[leaf], x, rtol=1e-5, atol=1e-7)


def test_a_schedule_of_a_setting_that_is_missing_is_refused():
    with pytest.raises(ValueError, match="has no learning_rate"):
        SMALL_FC.optimizer(learning_rate=lambda step: 1e-3)


@learned_weights
@pytest.mark.parametrize("wrong", [True, jnp.ones(6), np.ones((1,))], ids=str)
@pytest.mark.parametrize("name", ["weight_decay", "step_scale"])
def test_several_numbers_are_no_number(weights, name, wrong):
    if not (name == "weight_decay" and isinstance(wrong, np.ndarray)):
        with pytest.raises(ValueError, match=name):
            weights.optimizer(**{name: wrong})


WRONG_KINDS = """
import jax, jax.numpy as jnp, lolo, optax
from lolo.optimizers import architecture
from lolo.optimizers.pretrained import Weights

params = {"w": jnp.ones((3, 2))}
small = lolo.load("lolo-anytime")
learner = architecture.ARCHITECTURES["norm_fc"].settings()
norm = Weights(architecture.build_learner(learner).init(jax.random.key(0)), learner, {}, {})
adamw = optax.adamw(1e-3).init(params)
for call in (
    lambda: small.optimizer(freeze_unseen="false"),
    lambda: small.optimizer(freeze_unseen=0),
    lambda: small.optimizer(weight_decay="0.1"),
    lambda: norm.optimizer(learning_rate="1e-3"),
    lambda: small.optimizer(step_scale="0.5"),
    lambda: small.optimizer().update(params, adamw, params),
    lambda: norm.optimizer().update(params, adamw, params),
    lambda: norm.optimizer().update(params, small.optimizer().init(params), params),
    lambda: small.optimizer().update(params, norm.optimizer().init(params), params),
):
    try:
        call()
        print("taken")
    except ValueError as error:
        print(error)
"""


def test_words_flags_and_states_of_another_kind_are_refused_by_name():
    """In a process of its own: here the types are checked before the package does."""
    done = subprocess.run([sys.executable, "-c", WRONG_KINDS], capture_output=True, text=True, check=True)
    expected = [
        "freeze_unseen='false'; expected True or False",
        "freeze_unseen=0; expected True or False",
        "weight_decay='0.1' must be a number",
        "learning_rate='1e-3' must be a number",
        "step_scale='0.5' must be",
        "small_fc: the state is a tuple; expected what init(params) gives",
        "norm_fc: the state is a tuple; expected what init(params) gives",
        "norm_fc: the state is a SmallFcState; expected",
        "small_fc: the state is a NormFcState; expected",
    ]
    lines = done.stdout.splitlines()
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert words in line


def test_a_multiple_of_the_step_as_norm_fc_s_learning_rate_warns():
    with pytest.warns(UserWarning, match="learning_rate=1 is no multiple of the shipped rate"):
        WEIGHTS["norm_fc"].optimizer(learning_rate=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        WEIGHTS["norm_fc"].optimizer(learning_rate=0.1)


# Rates of other optimizers: prodigy #27; kohya_ss #950


@pytest.mark.parametrize("scale", [1e-3, 3e-4, np.float32(1e-3), 0.019, np.array(1e-3)])
def test_a_step_scale_that_looks_like_a_learning_rate_warns_once(scale):
    with pytest.warns(UserWarning, match=r"step_scale=.* is no learning rate.*times slower") as seen:
        optimizer = SMALL_FC.optimizer(step_scale=scale)
        first_update(optimizer)
    assert len(seen) == 1


QUIET = {
    "0.02": 0.02,
    "half": 0.5,
    "whole": 1,
    "zero": 0.0,
    "schedule": optax.constant_schedule(1e-3),
    "array": jnp.float32(0.5),
}


@pytest.mark.parametrize("scale", QUIET.values(), ids=QUIET)
def test_other_scales_and_the_values_of_schedules_do_not_warn(scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_update(SMALL_FC.optimizer(step_scale=scale))


@pytest.mark.parametrize(
    ("scale", "size"),
    [(optax.scale_by_learning_rate(1e-3), -1e-3), (optax.scale(1e-3), 1e-3)],
    ids=["climbs", "is slow"],
)
def test_a_learning_rate_behind_it_climbs_or_is_slow_as_docs_use_says(scale, size):
    grads = jnp.linspace(0.1, 1.0, 3)
    alone = first_update(SMALL_FC.optimizer(), jnp.ones(3), grads)
    chained = first_update(optax.chain(SMALL_FC.optimizer(), scale), jnp.ones(3), grads)
    np.testing.assert_allclose(chained, size * alone, rtol=1e-6)


def test_the_values_of_an_injected_schedule_do_not_warn():
    warm_up = optax.linear_schedule(1e-3, 1.0, 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_update(optax.inject_hyperparams(SMALL_FC.optimizer)(step_scale=warm_up), jnp.ones(3), jnp.ones(3))


def test_a_learning_rate_by_position_is_refused_with_the_cure():
    with pytest.raises(TypeError, match=r"optimizer\(0.001\).*no learning rate: leave it out"):
        SMALL_FC.optimizer(1e-3)


@pytest.mark.parametrize("wrong", [-1.0, np.nan, np.inf, True, np.array([1.0]), jnp.float32(-1), jnp.float32(np.nan)])
def test_a_step_scale_without_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="step_scale=.* must be 0 or a positive number, or a schedule"):
        SMALL_FC.optimizer(step_scale=wrong)


@pytest.mark.parametrize("name", ["weight_decay", "clock_limit", "step_decay"])
@pytest.mark.parametrize("wrong", [-1.0, np.nan, True, jnp.float32(-1), jnp.float32(np.nan)])
def test_a_setting_without_sense_is_refused_by_name(name, wrong):
    with pytest.raises(ValueError, match=f"{name}=.* must be"):
        SMALL_FC.optimizer(**{name: wrong})


# Entries that never had a gradient: pytorch #3711; NVIDIA-NeMo/Speech #5726; open_lth #6

MASK = {"table": jnp.zeros((6, 4)).at[:3].set(1.0), "half": jnp.zeros(5).at[1].set(1.0), "none": jnp.zeros((2, 3, 4))}
TABLES = jax.tree.map(lambda x: 0.5 + jnp.arange(x.size, dtype=jnp.float32).reshape(x.shape) / 20, MASK)


def moved(optimizer, steps=20):
    params, state, update = TABLES, optimizer.init(TABLES), jax.jit(optimizer.update)
    for step in range(steps):
        noise = jax.tree.map(lambda x, step=step: jax.random.normal(jax.random.key(step), x.shape), MASK)
        updates, state = update(jax.tree.map(jnp.multiply, noise, MASK), state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda a, b: np.asarray(a != b), params, TABLES)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"weight_decay": 0.5, "step_scale": 0.5}], ids=str)
def test_entries_without_a_gradient_stand_still_if_asked_to_and_all_others_move(options):
    for name, done in moved(SMALL_FC.optimizer(freeze_unseen=True, **options)).items():
        np.testing.assert_array_equal(done, np.asarray(MASK[name], bool))


def test_without_being_asked_they_move():
    """So that published numbers stay; and the test above can tell."""
    assert all(done.all() for done in moved(SMALL_FC.optimizer()).values())


def test_an_entry_moves_on_from_its_first_gradient_on():
    optimizer, params = SMALL_FC.optimizer(freeze_unseen=True), jnp.ones(3)
    state, steps = optimizer.init(params), []
    for gradient in (jnp.array([1.0, 0, 0]), jnp.array([0, 1.0, 0]), jnp.zeros(3)):
        updates, state = optimizer.update(gradient, state, params)
        steps.append((updates != 0).tolist())
    assert steps == [[True, False, False], [True, True, False], [True, True, False]]


def test_entries_that_had_gradients_move_as_they_do_without_the_option():
    ours, plain = (first_update(SMALL_FC.optimizer(freeze_unseen=asked)) for asked in (True, False))
    assert same(ours, plain)


def test_what_is_not_finite_is_seen_beside_frozen_entries():
    updates = first_update(SMALL_FC.optimizer(freeze_unseen=True), jnp.ones(3), jnp.array([jnp.nan, 1.0, 0.0]))
    assert jnp.isnan(updates[:2]).all()


def test_freezing_fits_the_state_inside_the_method_too():
    inside = architecture.build_learner(SMALL_FC.learner).optimizer(SMALL_FC.meta_params)
    assert not moved(small_fc.freeze_unseen(inside))["none"].any()


@pytest.mark.parametrize("name", ["norm_fc", "sgd"])
def test_architectures_without_the_option_say_so(name):
    with pytest.raises(ValueError, match=f"learner '{name}' has no freeze_unseen; leave it out"):
        WEIGHTS[name].optimizer(freeze_unseen=True)


# Settings of the process


@learned_weights
@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.default_matmul_precision("bfloat16"),
        lambda: jax.numpy_rank_promotion("raise"),
        lambda: jax.numpy_dtype_promotion("strict"),
    ],
    ids=["x64", "matmul precision", "rank promotion", "dtype promotion"],
)
def test_settings_of_the_process_change_neither_numbers_nor_dtypes(weights, setting):
    def run():
        optimizer = weights.optimizer(step_scale=0.5)
        state = optimizer.init(PARAMS)
        for _ in range(2):
            updates, state = optimizer.update(GRADS, state, PARAMS)
        return updates, state

    plain = run()
    with setting():
        ours = run()
    assert [x.dtype for x in jax.tree.leaves(ours)] == [x.dtype for x in jax.tree.leaves(plain)]
    assert same(ours, plain)


@all_weights
def test_meta_parameters_are_float32_under_x64(weights):
    with jax.enable_x64(True):
        drawn = architecture.build_learner(weights.learner).init(jax.random.key(0))
    assert {x.dtype.name for x in drawn.values()} == {"float32"}
