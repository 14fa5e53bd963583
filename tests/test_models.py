"""Models have the published numbers of parameters, the stated initial values, and behave as their names say.

Forward passes are compared with PyTorch in tests/torch/test_model_parity.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import with_slow

from lolo.tasks import models

KEY = jax.random.key(0)


def shapes(model):
    return jax.eval_shape(model.init, KEY)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


SMALL = {
    "mlp": (models.mlp((12, 5, 3)), jnp.linspace(-1, 1, 24).reshape(2, 2, 6)),
    "char_mlp": (models.char_mlp(symbols=6, context=4, embedding=3, widths=(5,)), jnp.arange(8).reshape(2, 4) % 6),
    "resnet18, imagenet": (models.resnet18(5, "imagenet", width=4), jnp.linspace(-1, 1, 1536).reshape(2, 16, 16, 3)),
    "resnet18, cifar": (models.resnet18(5, "cifar", width=4), jnp.linspace(-1, 1, 1536).reshape(2, 16, 16, 3)),
    "gpt": (models.gpt(11, context=8, layers=2, heads=2, width=8), jnp.arange(12).reshape(2, 6) % 11),
}
"""Every kind of model, small, with a batch of two."""
SLOW = {"resnet18", "resnet18, imagenet", "resnet18, cifar"}  # each of its layers is compiled


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (models.mlp((3072, 128, 128, 128, 1000)), 555_368),
        (models.mlp((64, 32, 32, 10)), 3_466),
        (models.char_mlp(), 48 * 8 + 64 * 32 + 32 + 32 * 32 + 32 + 32 * 48 + 48),
        (models.resnet18(10), 11_181_642),
        (models.resnet18(1000), 11_689_512),  # torchvision's resnet18
        (models.resnet18(10, "cifar"), 11_173_962),
        (models.gpt(**models.GPT_SIZES["gpt2-small"]._asdict()), 124_439_808),
        (models.gpt(**models.GPT_SIZES["gpt2-medium"]._asdict()), 354_823_168),
        (models.gpt(**models.GPT_SIZES["gpt2-large"]._asdict()), 774_030_080),
        (models.gpt(**models.GPT_SIZES["gpt2-xl"]._asdict()), 1_557_611_200),
        (models.gpt(**models.GPT_SIZES["gpt2-mini"]._asdict()), 12_515_520),
    ],
)
def test_number_of_parameters_is_the_published_one(model, parameters):
    assert count(shapes(model)[0]) == parameters


def test_gpt2_mini_is_minGPTs_gpt_mini_with_gpt2s_vocabulary():
    assert models.GPT_SIZES["gpt2-mini"] == (6, 6, 192, 1024, 50_257)


@pytest.mark.parametrize("name", with_slow(SMALL, SLOW))
def test_models_run_differentiate_and_keep_the_shape_of_their_stats(name):
    model, inputs = SMALL[name]
    params, stats = model.init(KEY)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient_of(params):
        outputs, new_stats = model.apply(params, stats, inputs, training=True)
        return jnp.sum(outputs**2), (outputs, new_stats)

    gradient, (outputs, new_stats) = gradient_of(params)
    assert outputs.shape[0] == 2 and outputs.dtype == jnp.float32 and jnp.isfinite(outputs).all()
    assert jax.tree.map(jnp.shape, new_stats) == jax.tree.map(jnp.shape, stats)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", with_slow(SMALL, SLOW))
def test_parameters_are_a_flat_dict_of_float32_arrays(name):
    params, stats = SMALL[name][0].init(KEY)
    assert all(isinstance(key, str) and leaf.dtype == jnp.float32 for key, leaf in [*params.items(), *stats.items()])


@pytest.mark.parametrize("name", with_slow(SMALL, SLOW))
def test_scoring_does_not_depend_on_the_rest_of_the_batch(name):
    model, inputs = SMALL[name]
    params, stats = model.init(KEY)
    both, same_stats = model.apply(params, stats, inputs, training=False)
    first, _ = model.apply(params, stats, inputs[:1], training=False)
    np.testing.assert_allclose(both[:1], first, rtol=1e-5, atol=1e-5)
    assert all((same_stats[key] == stats[key]).all() for key in stats)


@pytest.mark.parametrize("name", with_slow(["mlp", "char_mlp", "resnet18, cifar", "gpt"], SLOW))
def test_models_vmap_over_slots_of_parameters(name):
    model, inputs = SMALL[name]
    params, stats = jax.vmap(model.init)(jax.random.split(KEY, 2))
    apply = functools.partial(model.apply, training=True)
    outputs, _ = jax.jit(jax.vmap(apply, (0, 0, None)))(params, stats, inputs)
    alone, _ = jax.jit(apply)(*jax.tree.map(lambda leaf: leaf[1], (params, stats)), inputs)
    np.testing.assert_allclose(outputs[1], alone, rtol=1e-4, atol=1e-5)


def test_mlp_starts_from_cut_normals_without_variance_correction():
    weight = models.mlp((400, 500, 2)).init(KEY)[0]["layers.0.weight"]
    sigma = 1 / np.sqrt(400)
    assert jnp.abs(weight).max() <= 2 * sigma
    # A normal cut at ±2σ has a standard deviation of 0.8796 σ; corrected, it would be σ.
    assert abs(float(weight.std()) / sigma - 0.8796) < 0.01
    assert not models.mlp((400, 500, 2)).init(KEY)[0]["layers.0.bias"].any()


def test_mlp_is_affine_with_relu_between():
    params = {"layers.0.weight": jnp.array([[1.0, -1.0]]), "layers.0.bias": jnp.array([0.0, 0.5])}
    params |= {"layers.1.weight": jnp.array([[2.0], [3.0]]), "layers.1.bias": jnp.array([1.0])}
    outputs, _ = models.mlp((1, 2, 1)).apply(params, {}, jnp.array([[2.0], [-2.0]]), training=False)
    assert outputs.tolist() == [[5.0], [8.5]]  # 2·2 + 1, and 3·2.5 + 1


def test_char_mlp_embeds_with_unit_normals_and_keeps_the_order_of_characters():
    model = models.char_mlp(symbols=3000, context=2, embedding=8)
    params, stats = model.init(KEY)
    assert abs(float(params["embedding.weight"].std()) - 1) < 0.02
    one, _ = model.apply(params, stats, jnp.array([[1, 2]]), training=False)
    other, _ = model.apply(params, stats, jnp.array([[2, 1]]), training=False)
    assert one.shape == (1, 3000) and jnp.abs(one - other).max() > 1e-3


@pytest.mark.slow
def test_resnet_running_statistics_decay_by_a_tenth():
    model, inputs = SMALL["resnet18, imagenet"]
    params, stats = model.init(KEY)
    first = model.apply(params, stats, inputs, training=True)[1]["bn1.running_mean"]
    second = model.apply(params, {**stats, "bn1.running_mean": jnp.ones(4)}, inputs, training=True)[1]
    np.testing.assert_allclose(second["bn1.running_mean"], first + 0.9, rtol=1e-5)


@pytest.mark.slow
def test_resnet_normalises_by_the_batch_in_training_only():
    model, inputs = SMALL["resnet18, cifar"]
    params, stats = model.init(KEY)
    trained, _ = model.apply(params, stats, inputs, training=True)
    scaled, _ = model.apply(params, stats, 10 * inputs, training=True)
    np.testing.assert_allclose(trained, scaled, rtol=1e-2, atol=1e-2)  # equal up to epsilon
    scored, _ = model.apply(params, stats, inputs, training=False)
    assert jnp.abs(trained - scored).max() > 1e-2


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 1), ("cifar", 4)])
def test_resnet_stems_see_a_32x32_image_at_their_own_resolution(stem, side):
    model = models.resnet18(5, stem, width=4)
    text = str(
        jax.make_jaxpr(lambda p, s, x: model.apply(p, s, x, training=False)[0])(
            *shapes(model), jnp.zeros((1, 32, 32, 3))
        )
    )
    assert f"f32[1,{side},{side},32]" in text and f"f32[1,{2 * side},{2 * side},32]" not in text


def test_gpt_does_not_see_the_future():
    model, inputs = SMALL["gpt"]
    params, stats = model.init(KEY)
    outputs, _ = model.apply(params, stats, inputs, training=False)
    changed, _ = model.apply(params, stats, inputs.at[:, 4].set(5), training=False)
    np.testing.assert_allclose(outputs[:, :4], changed[:, :4], atol=1e-6)
    assert jnp.abs(outputs[:, 4:] - changed[:, 4:]).max(axis=-1).min() > 1e-6


def test_gpt_starts_from_small_normals_smaller_in_residual_projections():
    params, _ = models.gpt(500, context=64, layers=8, heads=2, width=64).init(KEY)
    for name, std in {"wte": 0.02, "h.3.attn.c_attn": 0.02, "h.3.attn.c_proj": 0.005, "h.3.mlp.c_proj": 0.005}.items():
        assert abs(float(params[f"{name}.weight"].std()) / std - 1) < 0.05, name
    assert all(not leaf.any() for name, leaf in params.items() if name.endswith(".bias"))
    assert all((leaf == 1).all() for name, leaf in params.items() if ".ln_" in name and name.endswith("weight"))


def test_a_fresh_gpt_is_as_wrong_as_chance():
    model, inputs = SMALL["gpt"]
    outputs, _ = model.apply(*model.init(KEY), inputs, training=True)
    assert abs(float(models.cross_entropy(outputs, (inputs + 3) % 11)) - np.log(11)) < 0.05


@pytest.mark.parametrize("name", with_slow(["resnet18", "gpt"], SLOW))
def test_remat_changes_no_output_and_no_gradient(name):
    build = {
        "resnet18": lambda remat: models.resnet18(5, "cifar", width=4, remat=remat),
        "gpt": lambda remat: models.gpt(11, context=8, layers=2, heads=2, width=8, remat=remat),
    }[name]
    inputs = SMALL["gpt"][1] if name == "gpt" else SMALL["resnet18, cifar"][1]
    params, stats = build(False).init(KEY)

    def gradient(model):
        return jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, stats, inputs, training=True)[0] ** 2)))(params)

    plain, remat = gradient(build(False)), gradient(build(True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, remat)


@pytest.mark.parametrize("name", with_slow(["resnet18", "gpt"], SLOW))
def test_bfloat16_activations_stay_close_and_leave_outputs_and_stats_in_float32(name):
    build = {
        "resnet18": lambda dtype: models.resnet18(5, "cifar", width=4, dtype=dtype),
        "gpt": lambda dtype: models.gpt(11, context=8, layers=2, heads=2, width=8, dtype=dtype),
    }[name]
    inputs = SMALL["gpt"][1] if name == "gpt" else SMALL["resnet18, cifar"][1]
    params, stats = build(jnp.float32).init(KEY)
    exact, _ = build(jnp.float32).apply(params, stats, inputs, training=False)
    rounded, new_stats = build(jnp.bfloat16).apply(params, stats, inputs, training=True)
    assert rounded.dtype == jnp.float32 and all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new_stats))
    rounded, _ = build(jnp.bfloat16).apply(params, stats, inputs, training=False)
    error = float(jnp.abs(rounded - exact).max() / jnp.abs(exact).max())
    assert 0 < error < 0.05


def test_gpt_learns_a_repeated_pattern():
    model = models.gpt(11, context=8, layers=1, heads=2, width=16)
    tokens = jnp.tile(jnp.arange(3), 3)[None, :]
    params, stats = model.init(KEY)
    optimizer = optax.adam(1e-2)

    def loss(params):
        return models.cross_entropy(model.apply(params, stats, tokens[:, :-1], training=True)[0], tokens[:, 1:])

    @jax.jit
    def step(params, state):
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(60):
        params, state, value = step(params, state)
    assert value < 0.1


def test_cross_entropy_is_the_mean_over_all_positions():
    logits = jax.random.normal(KEY, (2, 3, 5))
    labels = jnp.array([[0, 1, 2], [3, 4, 0]])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    np.testing.assert_allclose(models.cross_entropy(logits, labels), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.mlp((3,)), "at least 1, such as"),
        (lambda: models.mlp((3, 0, 2)), "at least 1, such as"),
        (lambda: models.gpt(11, context=8, layers=1, heads=3, width=16), "multiple of heads=3; try width=15"),
    ],
)
def test_impossible_sizes_are_refused_with_the_cure(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_more_tokens_than_the_context_are_refused():
    model, _ = SMALL["gpt"]
    with pytest.raises(ValueError, match=r"9 tokens do not fit into gpt\(context=8\)"):
        model.apply(*model.init(KEY), jnp.zeros((1, 9), jnp.int32), training=False)


def test_the_small_convolution_sees_neighbours_and_halves_the_image():
    model = models.small_convolution(5, channels=(4, 6), pixels=8)
    params, stats = model.init(jax.random.key(0))
    assert {name: leaf.shape for name, leaf in params.items() if name.endswith("weight")} == {
        "convolutions.0.weight": (3, 3, 1, 4),
        "convolutions.1.weight": (3, 3, 4, 6),
        "layers.0.weight": (2 * 2 * 6, 5),
    }
    images = jax.random.normal(jax.random.key(1), (3, 64))
    logits, _ = model.apply(params, stats, images)
    assert logits.shape == (3, 5)
    np.testing.assert_allclose(model.apply(params, stats, images.reshape(3, 8, 8))[0], logits, rtol=1e-6)
    # An MLP would not care which pixel is where, given permuted weights; a convolution does.
    shuffled = images[:, jax.random.permutation(jax.random.key(2), 64)]
    assert np.abs(model.apply(params, stats, shuffled)[0] - logits).max() > 1e-2
