"""Small models of kinds that people train, against their definitions; the GRU against PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lolo.tasks import compact_models

KEY = jax.random.key(0)
IMAGES = jax.random.normal(jax.random.key(1), (4, 64))


@pytest.mark.slow
def test_the_residual_net_takes_the_batch_s_statistics_in_training_and_the_running_ones_in_scoring():
    model = compact_models.small_resnet(5, width=4, blocks=2)
    params, stats = model.init(KEY)
    logits, new = model.apply(params, stats, IMAGES, training=True)
    assert logits.shape == (4, 5) and new.keys() == stats.keys()
    assert all(not np.array_equal(new[name], stats[name]) for name in stats)
    scored, same = model.apply(params, stats, IMAGES, training=False)
    alone, _ = model.apply(params, stats, IMAGES[:1], training=False)
    np.testing.assert_allclose(scored[:1], alone, rtol=1e-5, atol=1e-6)
    assert same == {} or all(np.array_equal(same[name], stats[name]) for name in same)
    first, _ = model.apply(params, stats, IMAGES[:2], training=True)
    assert not np.allclose(logits[:2], first, atol=1e-3)  # in training others in the batch matter


def test_the_shortcut_of_a_block_is_the_image_itself_where_widths_are_equal():
    model = compact_models.small_resnet(5, width=4, blocks=1)
    params, stats = model.init(KEY)
    assert "block0.shortcut.weight" not in params
    silent = params | {"block0.norm2.weight": jnp.zeros(4)}
    no_block, _ = model.apply(silent, stats, IMAGES)
    x, _ = compact_models.models.batch_norm(
        params,
        stats,
        compact_models.models.convolve(params, IMAGES.reshape(-1, 8, 8, 1), "stem", 1),
        "stem_norm",
        False,
    )
    expected = jnp.mean(jax.nn.relu(x), axis=(1, 2)) @ params["output.weight"]
    np.testing.assert_allclose(no_block, expected, rtol=1e-5, atol=1e-6)


def test_the_vision_transformer_cuts_the_image_into_patches_and_knows_their_places():
    model = compact_models.vision_transformer(5, width=8, layers=1, heads=2)
    params, stats = model.init(KEY)
    logits, _ = model.apply(params, stats, IMAGES)
    patches = np.asarray(IMAGES).reshape(4, 4, 2, 4, 2)
    moved = jnp.asarray(patches[:, ::-1].reshape(4, 64))  # rows of patches upside down, patches as they were
    placeless = params | {"positions.weight": jnp.zeros((16, 8))}
    np.testing.assert_allclose(
        model.apply(placeless, stats, moved)[0], model.apply(placeless, stats, IMAGES)[0], rtol=1e-4, atol=1e-5
    )
    assert not np.allclose(model.apply(params, stats, moved)[0], logits, atol=1e-3)
    inside = jnp.asarray(patches[:, :, ::-1].reshape(4, 64))  # rows within each patch upside down
    assert not np.allclose(
        model.apply(placeless, stats, inside)[0], model.apply(placeless, stats, IMAGES)[0], atol=1e-3
    )


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="heads must divide width"):
        compact_models.vision_transformer(5, width=8, heads=3)


def test_the_gru_sees_only_what_came_before():
    model = compact_models.gru(11, width=8, embedding=4)
    params, _ = model.init(KEY)
    symbols = jax.random.randint(KEY, (2, 6), 0, 11)
    logits, _ = model.apply(params, {}, symbols)
    later, _ = model.apply(params, {}, symbols.at[:, 3].set((symbols[:, 3] + 1) % 11))
    np.testing.assert_array_equal(logits[:, :3], later[:, :3])
    assert np.abs(logits[:, 3:] - later[:, 3:]).max() > 1e-4


@pytest.mark.torch
def test_the_gru_is_pytorch_s():
    import torch

    model = compact_models.gru(11, width=8, embedding=4)
    params, _ = model.init(KEY)
    params = {name: x + 0.1 for name, x in params.items()}  # biases too
    symbols = np.array(jax.random.randint(KEY, (2, 6), 0, 11))
    theirs = torch.nn.GRU(4, 8, batch_first=True)
    tensors = {name: torch.from_numpy(np.array(x)) for name, x in params.items()}
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(tensors["input.weight"].T)
        theirs.weight_hh_l0.copy_(tensors["hidden.weight"].T)
        theirs.bias_ih_l0.copy_(tensors["input.bias"])
        theirs.bias_hh_l0.copy_(tensors["hidden.bias"])
        states, _ = theirs(tensors["embedding.weight"][torch.from_numpy(symbols).long()])
        expected = states @ tensors["output.weight"] + tensors["output.bias"]
    np.testing.assert_allclose(model.apply(params, {}, jnp.asarray(symbols))[0], expected, rtol=1e-4, atol=1e-5)
