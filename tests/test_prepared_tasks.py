"""Tasks on prepared data: what they read, how they are sized, and options that must not change the result."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, make_task

from lolo.data import imagenet, prepare, stream
from lolo.data.errors import DataError
from lolo.data.read_plan import ReadPart, ReadPlan
from lolo.method import inner
from lolo.method.task import TaskError
from lolo.tasks import by_name, prepared
from lolo.tasks.feed import Feed

KEY = jax.random.key(0)
COUNTS = {"train": 40, "validation": 6, "test": 10}
TINY_GPT = "books-gpt2-mini:batch=4,context=16,layers=1,heads=2,width=8"
TINY_RESNET = "textures-resnet18:batch=4,width=2"
TINY_MLP = "textures-mlp:batch=8,width=4,depth=2"


def write_prepared(folder, name, splits):
    """A prepared folder of the arrays in `splits`, as `prepare` writes it."""

    def rows(scratch):
        yield from splits.items()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(prepare.PLANS, name, lambda source: ReadPlan([ReadPart("all", 1, rows)], {"kind": "test"}))
        prepare.prepare(name, None, folder / name)


def images(seed=0, classes=1000):
    rng = np.random.default_rng(seed)
    return {
        split: {
            "images": rng.integers(0, 256, (n, 32, 32, 3), np.uint8),
            "labels": rng.integers(0, classes, n).astype(np.uint16),
        }
        for split, n in COUNTS.items()
    }


def tokens(seed=0, **counts):
    rng = np.random.default_rng(seed)
    counts = {"train": 700, "validation": 100, "test": 120} | counts
    return {split: {"tokens": rng.integers(0, 50_257, n).astype(np.uint16)} for split, n in counts.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_prepared(folder, "textures", images(0))
    write_prepared(folder, "imagenet32", images(1))
    write_prepared(folder, "books", tokens(0))
    write_prepared(folder, "fineweb", tokens(1))
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.setenv("LOLO_DATA", str(folder))


@pytest.mark.parametrize("name", ["imagenet32-mlp-w128-d3", "textures-resnet18"])
def test_images_are_normalised_on_the_device_and_keep_their_labels(name):
    arrays = images(1 if name.startswith("imagenet") else 0)
    splits = by_name.resolve(f"{name}:batch=4")
    for split, task in zip(splits._fields, splits, strict=True):
        pixels, labels = task.data
        assert pixels.dtype == jnp.uint8 and task.size == COUNTS[split]
        batch, batch_labels = task.examples(task.data, jnp.array([0, task.size - 1]))
        expected = (arrays[split]["images"][[0, -1]] / 255 - np.array(imagenet.MEAN)) / np.array(imagenet.STD)
        np.testing.assert_allclose(batch, expected, atol=1e-6)
        np.testing.assert_array_equal(batch_labels, arrays[split]["labels"][[0, -1]])
    assert splits.train.loss_limit == pytest.approx(1.5 * np.log(1000))


@pytest.mark.parametrize("name", ["books", "fineweb"])
def test_windows_follow_each_other_and_labels_are_the_next_tokens(name):
    arrays = tokens(0 if name == "books" else 1)
    splits = by_name.resolve(f"{name}-gpt2-mini:batch=2,context=16,layers=1,heads=2,width=8")
    for split, task in zip(splits._fields, splits, strict=True):
        row = arrays[split]["tokens"].astype(np.int32)
        assert task.size == (len(row) - 1) // 16
        inputs, labels = task.examples(task.data, jnp.arange(task.size))
        end = task.size * 16
        np.testing.assert_array_equal(np.ravel(inputs), row[:end])
        np.testing.assert_array_equal(np.ravel(labels), row[1 : end + 1])


def test_a_set_beyond_its_budget_is_streamed_in_the_order_of_its_epoch():
    arrays = images(0)["train"]
    splits = by_name.resolve("textures-mlp:batch=8,width=4,depth=1,resident_gb=0")
    with contextlib.closing(Feed(splits.train, 2, (7,))) as feed:
        task = feed.next()
        assert feed.place_in_stream() == {"epoch": 0, "position": 16, "size": 40}
    order = stream.order((7,), 0, 40)[:16].reshape(2, 8)
    for step in (0, 1, 5):
        pixels, labels = task.sample(KEY, jnp.int32(step))
        chosen = order[step % 2]
        np.testing.assert_array_equal(labels, arrays["labels"][chosen])
        np.testing.assert_array_equal(task.data[0][step % 2], arrays["images"][chosen])
        assert pixels.shape == (8, 32, 32, 3)
    resident = by_name.resolve("textures-mlp:batch=8,width=4,depth=1").train
    assert resident.stream is None and Feed(resident, 2, (7,)).next() is resident
    assert splits.validation.stream is None


def test_held_out_tokens_are_capped(monkeypatch):
    monkeypatch.setattr(prepared, "HELD_TOKENS", 40)
    splits = by_name.resolve("books-gpt2-mini:batch=3,context=16,layers=1,heads=2,width=8")
    assert [task.size for task in splits] == [43, 2, 2]


def test_the_papers_tasks_have_the_papers_sizes():
    sizes = {"imagenet32-mlp-w128-d3": 555_368, "imagenet32-resnet18": 11_689_512, "fineweb-gpt2-mini": 12_515_520}
    for name, parameters in sizes.items():
        train = by_name.outline(name).train
        params, _ = jax.eval_shape(train.init, KEY)
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
        assert train.batch == (512 if name.startswith("fineweb") else 4096)
        assert f"{parameters:,} parameters" in by_name.TASKS[name].__doc__


def test_an_outline_of_prepared_data_needs_no_data(tmp_path, monkeypatch):
    monkeypatch.setenv("LOLO_DATA", str(tmp_path))
    splits = by_name.outline("imagenet32-resnet18")
    assert splits.train.data[0].shape == (1_217_106, 32, 32, 3) and splits.train.stream is None
    streamed = by_name.outline("fineweb-gpt2-mini:context=256").train
    assert streamed.stream.columns[0].shape == (9_784_999_999 // 256, 257) and streamed.data == ()


@pytest.mark.parametrize(
    "name,words",
    [
        ("imagenet32-mlp-w128-d3", "lolo data prepare imagenet32 --from FOLDER_WITH_THE_FILES --to {}/imagenet32"),
        ("textures-resnet18", "lolo data prepare textures --to {}/textures"),
        ("books-gpt2-mini", "lolo data prepare books --to {}/books"),
    ],
)
def test_missing_data_are_answered_with_the_command_that_makes_them(tmp_path, monkeypatch, name, words):
    monkeypatch.setenv("LOLO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="LOLO_DATA") as caught:
        by_name.resolve(name)
    assert words.format(tmp_path) in str(caught.value)


def test_a_folder_that_holds_another_set_is_named(tmp_path, monkeypatch):
    write_prepared(tmp_path, "books", tokens())
    (tmp_path / "books").rename(tmp_path / "fineweb")
    monkeypatch.setenv("LOLO_DATA", str(tmp_path))
    with pytest.raises(DataError, match="holds 'books', expected 'fineweb'"):
        by_name.resolve("fineweb-gpt2-mini")


@pytest.mark.parametrize(
    "name,words",
    [
        ("textures-mlp:batch=10,micro_batches=4", "batch=10 must be a multiple of micro_batches=4"),
        ("textures-mlp:depth=0", "depth=0 must be at least 1"),
        ("textures-mlp:dtype=float16", "dtype='float16' must be one of float32, bfloat16"),
        ("textures-resnet18:stem=vgg", "stem='vgg' must be imagenet or cifar"),
        ("books-gpt2-mini:heads=5", "width=192 must be a multiple of heads=5"),
        ("books-gpt2-mini:attention=flash", "attention='flash' must be xla or cudnn"),
        ("books-gpt2-mini:context=128", "the test split of 'books' has fewer than context=128 tokens"),
        ("textures-mlp:score_examples=0", "score_examples=0"),
    ],
)
def test_settings_that_can_not_be_are_named(name, words):
    with pytest.raises(TaskError, match=words):
        by_name.resolve(name)


def test_a_task_is_built_once_for_its_folder_and_settings(tmp_path, monkeypatch):
    first = by_name.resolve(TINY_MLP)
    assert by_name.resolve(TINY_MLP) is first
    assert by_name.resolve(TINY_MLP.replace("batch=8", "batch=4")) is not first
    write_prepared(tmp_path, "textures", images(5))
    monkeypatch.setenv("LOLO_DATA", str(tmp_path))
    assert not np.array_equal(by_name.resolve(TINY_MLP).train.data[0], first.train.data[0])


# --- options that change memory and time, not the problem -----------------------------------------------------------


def gradient(name):
    """Loss, gradient and new statistics at the init of key 0 on the batch of key 1."""

    @jax.jit
    def compute(task):
        params, stats = task.init(KEY)
        batch = task.sample(jax.random.key(1), jnp.int32(0))
        return inner.loss_and_gradient(task, params, stats, batch, KEY)

    return compute(by_name.resolve(name).train)


@pytest.mark.parametrize("name", [TINY_MLP, pytest.param(TINY_GPT, marks=pytest.mark.slow)])
def test_micro_batches_give_the_same_gradient(name):
    plain, parts = gradient(name), gradient(f"{name},micro_batches=4")
    assert_close(parts, plain, rtol=1e-4, atol=1e-6)


def test_micro_batches_that_see_their_own_statistics_are_another_problem():
    """As BatchNorm does: the loss of a batch is not the mean of its parts' losses, and statistics move in order."""

    def loss(params, stats, batch):
        mean = jnp.mean(batch)
        return jnp.mean((params["x"] * (batch - mean)) ** 2), {"mean": 0.5 * stats["mean"] + 0.5 * mean}

    task = make_task(lambda key: ({"x": jnp.ones(())}, {"mean": jnp.zeros(())}), loss)
    batch = jnp.array([0.0, 2.0, 4.0, 6.0])
    whole = inner.loss_and_gradient(task, *task.init(KEY), batch, KEY)
    parts = inner.loss_and_gradient(dataclasses.replace(task, micro_batches=2), *task.init(KEY), batch, KEY)
    assert (float(whole[0]), float(parts[0])) == (5.0, 1.0)
    assert (float(whole[1]["mean"]), float(parts[1]["mean"])) == (1.5, 2.75)
    assert (float(whole[2]["x"]), float(parts[2]["x"])) == (10.0, 2.0)


@pytest.mark.parametrize("name", [TINY_RESNET, TINY_GPT])
def test_remat_and_bfloat16_reach_the_model(name):
    """That they agree with the plain models is tested in test_models.py."""

    def program(name):
        task = by_name.resolve(name).train
        params, stats = jax.eval_shape(task.init, KEY)
        batch = jax.eval_shape(task.examples, task.data, jnp.arange(4))
        return str(jax.make_jaxpr(task.loss)(params, stats, batch, KEY))

    plain = program(name)
    assert "remat" not in plain and "bf16" not in plain
    assert "remat" in program(f"{name},remat=true") and "bf16" in program(f"{name},dtype=bfloat16")


def test_bfloat16_activations_give_the_gradient_to_their_rounding():
    plain, rounded = gradient(TINY_MLP), gradient(f"{TINY_MLP},dtype=bfloat16")
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rounded))
    np.testing.assert_allclose(rounded[0], plain[0], rtol=0.01)
    ours, theirs = (jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(x[2])]) for x in (rounded, plain))
    distance = jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)
    assert 0 < distance < 0.1  # rounded, and no more than that
