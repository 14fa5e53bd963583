"""Named tasks, and a user's own task from a file."""

import hashlib
import importlib
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow

from lolo.data import embedded
from lolo.files import user_code
from lolo.method.task import Splits, TaskError
from lolo.tasks import by_name, compact
from lolo.tasks.by_name import TASKS
from lolo.tasks.small import (
    CONTEXT,
    books_mlp,
    books_transformer,
    fashion_autoencoder,
    fashion_conv,
    fashion_mlp,
    quadratic,
)

# Tasks whose data come with the package; those on prepared data are in test_prepared_tasks.py.
# The digits, which are scikit-learn's, too.
EMBEDDED = (
    "fashion-mlp",
    "fashion-conv",
    "fashion-autoencoder",
    "fashion-resnet",
    "fashion-vit",
    "books-mlp",
    "books-transformer",
    "books-gru",
    "books-words",
    "digits-mlp",
    "digits-finetune",
    "quadratic",
)
CLASSES = {name: 10 for name in EMBEDDED if name.startswith(("fashion", "digits")) and name != "fashion-autoencoder"}
CLASSES |= {"books-mlp": 48, "books-transformer": 48, "books-gru": 48, "books-words": 4096}
SIZES = {name: (57_000, 3_000, 10_000) for name in EMBEDDED if name.startswith("fashion")}
SIZES |= dict.fromkeys(("digits-mlp", "digits-finetune"), (1_285, 256, 256))
WINDOWS = {"books-mlp": CONTEXT, "books-transformer": 8, "books-gru": 32, "books-words": 3}
PARAMETERS = {
    "fashion-mlp": 3_466,
    "fashion-conv": 9 * 8 + 8 + 9 * 8 * 16 + 16 + 4 * 16 * 10 + 10,
    "fashion-autoencoder": 2 * 64 * 32 + 2 * 32 * 8 + 32 + 8 + 32 + 64,
    "books-mlp": 48 * 8 + 64 * 32 + 32 + 32 * 32 + 32 + 32 * 48 + 48,
    "books-transformer": 48 * 16 + 8 * 16 + (16 * 48 + 48) + (16 * 16 + 16) + 2 * 16 * 64 + 64 + 16 + 6 * 16,
    "fashion-resnet": 9 * 8 + 16 + (2 * 9 * 64 + 2 * 16) + (9 * 8 * 16 + 9 * 256 + 8 * 16 + 2 * 32) + 16 * 10 + 10,
    "fashion-vit": 4 * 32 + 32 + 16 * 32 + 2 * (12 * 32 * 32 + 9 * 32 + 4 * 32) + 2 * 32 + 32 * 10 + 10,
    "books-gru": 48 * 16 + (16 + 64) * 192 + 2 * 192 + 64 * 48 + 48,
    "books-words": 4096 * 16 + 48 * 64 + 64 + 64 * 4096 + 4096,
    "digits-mlp": 64 * 64 * 2 + 128 + 64 * 10 + 10,
    "digits-finetune": 9 * 16 + 16 + 9 * 16 * 32 + 32 + 4 * 32 * 10 + 10,
    "quadratic": 8,
}
KEY = jax.random.key(0)


SLOW = (
    "fashion-resnet",
    "fashion-vit",
    "books-transformer",
    "books-gru",
    "books-words",
    "digits-finetune",
)  # to compile


@pytest.fixture(params=with_slow(EMBEDDED, SLOW))
def name(request):
    return request.param


def test_splits_are_the_same_problem_on_other_data(name):
    splits = by_name.resolve(name)
    assert isinstance(splits, Splits)
    for split in splits:
        # Equal but for leaves: another split needs another compilation only where sizes differ.
        for field in ("init", "examples", "loss", "score", "batch", "loss_limit"):
            assert getattr(split, field) == getattr(splits.train, field)
    leaves = [np.asarray(jax.tree.leaves(split.data)[0]) for split in splits]
    for i in range(3):
        for j in range(i):
            shortest = min(len(leaves[i]), len(leaves[j]))
            assert not np.array_equal(leaves[i][:shortest], leaves[j][:shortest])
    sizes = tuple(split.size for split in splits)
    if name in SIZES:
        assert sizes == SIZES[name]
    if name.startswith("books"):
        assert sizes == tuple(len(leaf) - WINDOWS[name] * (leaf.ndim == 1) for leaf in leaves)
        assert sizes[0] > 10 * sizes[1] > 0 and sizes[2] > 10_000


@pytest.mark.parametrize("name", ["books-transformer", "books-gru"])
def test_a_character_that_is_scored_is_predicted_once(name):
    context = WINDOWS[name]
    symbols = embedded.books_symbols()["validation"]
    task = by_name.resolve(name).validation
    inputs, following = task.examples(task.data, jnp.arange(task.size))
    assert np.array_equal(following.ravel(), symbols[1 : 1 + following.size])
    assert np.array_equal(inputs[1:, 0], following[:-1, -1]) and len(symbols) - following.size <= context


def test_examples_of_the_quadratic_are_in_one_split_only():
    rows = [{row.tobytes() for row in np.asarray(split.data)} for split in quadratic()]
    assert [len(split) for split in rows] == [1000, 1000, 1000] and len(set.union(*rows)) == 3000


def test_loss_and_gradient_at_the_start(name):
    task = by_name.resolve(name).train
    params, stats = task.init(KEY)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == PARAMETERS[name]
    batch = task.sample(jax.random.key(1), jnp.int32(0))
    assert all(leaf.shape[0] == task.batch for leaf in jax.tree.leaves(batch))
    (loss, new_stats), gradient = jax.value_and_grad(task.loss, has_aux=True)(params, stats, batch, KEY)
    assert loss.shape == () and np.isfinite(loss)
    assert jax.tree.structure(new_stats) == jax.tree.structure(stats)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, name
    if name in CLASSES:
        chance = math.log(CLASSES[name])
        assert abs(float(loss) - chance) < 0.5
        assert task.loss_limit == pytest.approx(1.5 * chance) and task.loss_limit > loss
    else:
        assert task.loss_limit == {"fashion-autoencoder": 1.5, "quadratic": None}[name]


@pytest.mark.parametrize("name", with_slow([name for name in EMBEDDED if name != "quadratic"], SLOW))
def test_batch_and_widths_are_settings(name):
    others = {"fashion-conv": "widths=4", "fashion-resnet": "width=4", "digits-finetune": "widths=4-8"}
    others |= dict.fromkeys(("books-transformer", "books-gru", "fashion-vit"), "width=8")
    widths = others.get(name, "widths=8")
    task, plain = by_name.resolve(f"{name}:batch=3,{widths}").train, by_name.resolve(name).train
    assert task.batch == 3
    count = lambda task: sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(task.init, KEY)))  # noqa: E731
    assert count(task) < count(plain)
    loss = task.loss(*task.init(KEY), task.sample(KEY, jnp.int32(0)), KEY)[0]
    assert np.isfinite(loss) and loss < task.loss_limit


def test_the_autoencoder_is_scored_on_the_image_it_was_given():
    task = fashion_autoencoder().train
    images = task.sample(KEY, jnp.int32(0))
    nothing = jax.tree.map(jnp.zeros_like, task.init(KEY)[0])
    np.testing.assert_allclose(task.loss(nothing, {}, images, KEY)[0], np.mean(np.asarray(images) ** 2), rtol=1e-6)
    assert 0.8 < float(np.mean(np.asarray(images) ** 2)) < 1.2  # what "predict the mean gray" costs; the limit is 1.5


def test_rare_words_are_rarely_seen():
    counts = np.bincount(np.asarray(by_name.resolve("books-words").train.data), minlength=4096)
    assert counts[:-1].argmax() == 0 and counts.min() > 0  # the last stands for all words beyond
    # A batch of 64 has 192 words of context: half of the rows are seen less than once in 100 steps.
    assert np.mean(counts / counts.sum() * 192 * 100 < 1) > 0.5


def test_digits_are_split_evenly_and_no_image_is_in_two_splits():
    splits = by_name.resolve("digits-mlp")
    images = [{row.tobytes() for row in np.asarray(split.data[0])} for split in splits]
    assert not images[0] & images[1] and not images[0] & images[2] and not images[1] & images[2]
    for split in splits:
        shares = np.bincount(np.asarray(split.data[1]), minlength=10) / split.size
        assert shares.min() > 0.06 and shares.max() < 0.14


def test_without_scikit_learn_the_digits_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(TaskError, match=r"pip install 'lolo\[race\]'"):
        compact.digits.__wrapped__()


@pytest.mark.slow
def test_fine_tuning_begins_at_a_trained_net_with_a_new_output_layer():
    task = by_name.resolve("digits-finetune").train
    (first, _), (second, _) = task.init(KEY), task.init(jax.random.key(1))
    fashion = by_name.resolve("fashion-conv:widths=16-32,batch=64").validation
    kept = [name for name in first if np.array_equal(first[name], second[name]) and not name.endswith("bias")]
    assert kept == ["convolutions.0.weight", "convolutions.1.weight"]
    trained = jax.tree.map(jnp.asarray, compact._trained(fashion_conv("16-32", 64).train, 500))
    scores = fashion.score(trained, {}, fashion.examples(fashion.data, jnp.arange(1000)))
    assert scores["accuracy"] > 0.75 and all(np.array_equal(trained[name], first[name]) for name in kept)


def test_the_transformer_predicts_the_character_after_each():
    task = books_transformer().train
    inputs, labels = task.examples(task.data, jnp.array([task.size - 1]))
    np.testing.assert_array_equal(inputs[0, 1:], labels[0, :-1])
    assert labels[0, -1] == task.data[-1]


def test_a_step_along_the_gradient_lowers_the_loss(name):
    task = by_name.resolve(name).train
    params, stats = task.init(KEY)
    batch = task.sample(jax.random.key(1), jnp.int32(0))
    loss = lambda params: task.loss(params, stats, batch, KEY)[0]  # noqa: E731
    before, gradient = jax.value_and_grad(loss)(params)
    assert loss(jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient)) < before
    assert loss(jax.tree.map(lambda p, g: p + 0.05 * g, params, gradient)) > before


def test_batches_and_inits_are_decided_by_their_key(name):
    task = by_name.resolve(name).train
    sample = lambda key: np.concatenate(  # noqa: E731
        [np.ravel(leaf).astype(np.float64) for leaf in jax.tree.leaves(task.sample(key, jnp.int32(3)))]
    )
    np.testing.assert_array_equal(sample(KEY), sample(KEY))
    assert not np.array_equal(sample(KEY), sample(jax.random.key(1)))
    inits = [jax.tree.leaves(task.init(key)) for key in (KEY, KEY, jax.random.key(1))]
    assert all(np.array_equal(a, b) for a, b in zip(inits[0], inits[1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(inits[0], inits[2], strict=True))


def test_score_is_the_loss_and_more(name):
    for task in by_name.resolve(name):
        params, stats = task.init(KEY)
        batch = task.examples(task.data, jnp.array([0, 1, task.size - 1]))
        score = task.score(params, stats, batch)
        if not stats:  # with BatchNorm training takes the batch's statistics, scoring the running ones
            np.testing.assert_allclose(score["loss"], task.loss(params, stats, batch, KEY)[0], rtol=1e-6)
        assert all(value.shape == () for value in score.values())
        if name in CLASSES:
            assert set(score) == {"loss", "accuracy"} and 0 <= score["accuracy"] <= 1


def test_the_last_example_of_the_books_ends_with_the_last_character():
    task = books_mlp().validation
    inputs, labels = task.examples(task.data, jnp.array([0, task.size - 1]))
    np.testing.assert_array_equal(inputs[0], task.data[:8])
    assert labels[0] == task.data[8]
    np.testing.assert_array_equal(inputs[1], task.data[-9:-1])
    assert labels[1] == task.data[-1]


def test_images_are_normalised():
    task = fashion_mlp().train
    images, labels = task.sample(KEY, jnp.int32(0))
    assert images.shape == (128, 64) and images.dtype == jnp.float32
    assert abs(float(images.mean())) < 0.15 and abs(float(images.std()) - 1) < 0.15
    assert set(np.unique(labels).tolist()) == set(range(10))


# --- a user's own task ----------------------------------------------------------------------------------------------

SOURCE = """
from lolo.tasks import quadratic

def make():
    return quadratic(3)

def wrong():
    return 7

def sized(dimensions: int = 4, scale: float = 1.0):
    return quadratic(dimensions)

number = 3
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    return path


def test_a_task_file_may_define_dataclasses_and_lie_in_a_folder_with_an_at_sign(tmp_path):
    folder = tmp_path / "me@work"
    folder.mkdir()
    head = (
        "from __future__ import annotations\nimport dataclasses\n\n@dataclasses.dataclass\nclass Sizes:\n    x: int\n"
    )
    (folder / "mine.py").write_text(head + SOURCE)
    pinned = by_name.pin(f"{folder}/mine.py:make")
    assert pinned.startswith(f"{folder}/mine.py:make@")
    assert by_name.resolve(pinned).train.data.shape == (1000, 3)


def error(call, name):
    with pytest.raises(TaskError) as caught:
        call(name)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_users_task_is_resolved_and_pinned_by_its_hash(source):
    name = f"{source}:make"
    pinned = by_name.pin(name)
    assert pinned == f"{name}@{hashlib.sha256(SOURCE.encode()).hexdigest()}"
    assert by_name.pin(pinned) == pinned
    for known in (name, pinned):
        assert by_name.resolve(known).train.data.shape == (1000, 3)


def test_named_tasks_are_pinned_as_they_are():
    for known in TASKS:
        assert by_name.pin(known) == known


def test_settings_are_arguments_of_the_tasks_function(source):
    for name in ("quadratic:dimensions=3", f"{source}:sized:dimensions=3,scale=2.5"):
        pinned = by_name.pin(name)
        assert pinned.startswith(name) and by_name.pin(pinned) == pinned
        assert by_name.resolve(pinned).train.data.shape == (1000, 3)
    assert by_name.resolve(f"{source}:sized").train.data.shape == (1000, 4)


@pytest.mark.parametrize(
    "name,words",
    [
        ("quadratic:dimension=3", ["'dimension=3'", "did you mean 'dimensions'?"]),
        ("quadratic:dimensions=three", ["dimensions='three'", "a number, such as 8"]),
        ("quadratic:dimensions", ["'dimensions'", "NAME=VALUE"]),
        ("books-gpt2-mini:remat=yes", ["remat='yes'", "true or false"]),
        ("quadratic:reparametrize=0.5", ["reparametrize=0.5", "at least 1"]),
    ],
)
def test_settings_that_can_not_be_are_named_with_a_cure(name, words):
    text = error(by_name.resolve, name)
    for word in words:
        assert word in text


def test_an_outline_has_the_shapes_of_the_splits():
    for name in EMBEDDED:
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), [split.data for split in by_name.outline(name)])
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), [split.data for split in by_name.resolve(name)])
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(by_name.outline(name)))


def test_a_file_that_changed_is_refused(source):
    pinned = by_name.pin(f"{source}:make")
    ran = source.parent / "ran"
    source.write_text(SOURCE + f"\nopen({str(ran)!r}, 'w').close()\n")
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    for call in (by_name.pin, by_name.resolve):
        text = error(call, pinned)
        assert str(source) in text and "has changed" in text and found in text
    assert not ran.exists()  # refused before its code ran


@pytest.mark.parametrize(
    "name,words",
    [
        ("fashion-ml", ["'fashion-ml'", "did you mean 'fashion-mlp'?", "path.py:function"]),
        ("book-mlp", ["'book-mlp'", "did you mean 'books-mlp'?"]),
        ("", ["unknown task ''"]),
        ("nowhere.py:make", ["nowhere.py does not exist", "path.py:function"]),
        ("mine.txt:make", ["'mine.txt:make'", "path.py:function"]),
    ],
)
def test_an_unknown_task_is_named_with_a_cure(name, words):
    for call in (by_name.pin, by_name.resolve):
        text = error(call, name)
        for word in words:
            assert word in text


def test_a_function_that_is_missing_or_returns_something_else_is_named(source):
    assert "no function 'absent'" in error(by_name.resolve, f"{source}:absent")
    assert "no function 'number'" in error(by_name.resolve, f"{source}:number")
    assert "returned int; expected lolo.Splits" in error(by_name.resolve, f"{source}:wrong")


def test_resolving_a_file_leaves_the_import_path_alone(source):
    before = list(sys.path)
    by_name.resolve(f"{source}:make")
    assert sys.path == before


def test_a_task_file_imports_its_neighbours_and_those_of_another_folder_are_others(tmp_path):
    before = set(sys.modules)
    for folder, size in (("a", 3), ("b", 5)):
        (tmp_path / folder / "inside").mkdir(parents=True)
        (tmp_path / folder / "helper.py").write_text(f"from inside.sizes import SIZE\nassert SIZE == {size}\n")
        (tmp_path / folder / "inside" / "sizes.py").write_text(f"SIZE = {size}\n")
        text = "from helper import SIZE\nfrom lolo.tasks import quadratic\n\ndef make():\n    import later\n"
        (tmp_path / folder / "mine.py").write_text(text + "    return quadratic(SIZE + later.MORE)\n")
        (tmp_path / folder / "later.py").write_text("MORE = 1\n")
    for folder, size in (("a", 4), ("b", 6), ("a", 4)):
        assert by_name.resolve(f"{tmp_path}/{folder}/mine.py:make").train.data.shape == (1000, size)
    assert set(sys.modules) - before <= {"lolo_user_task_mine"}


def test_a_neighbour_that_is_missing_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("import absent_neighbour")
    assert "can't be imported: ModuleNotFoundError: No module named 'absent_neighbour'" in error(
        by_name.resolve, f"{tmp_path}/mine.py:make"
    )


def test_a_pinned_file_is_found_in_the_first_folder_that_has_these_bytes(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pinned = by_name.pin("mine.py:make")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text("raise ValueError('another file')")
    monkeypatch.chdir(tmp_path / "other")
    assert "has changed" in error(by_name.resolve, pinned)  # found here alone
    folders = [tmp_path / "other", tmp_path]
    assert by_name.pin(pinned, folders) == pinned and by_name.resolve(pinned, folders).train.data.shape == (1000, 3)
    text = error(lambda name: by_name.resolve(name, [tmp_path / "x", tmp_path / "y"]), pinned)
    assert f"{tmp_path}/x, {tmp_path}/y" in text and "Put it back" in text


def test_packages_of_an_environment_below_the_folder_stay_imported(tmp_path, monkeypatch):
    packages = tmp_path / ".venv" / "lib" / "python3" / "site-packages"
    (packages / "installed_one").mkdir(parents=True)
    (packages / "installed_one" / "__init__.py").write_text("from installed_one import part")
    (packages / "installed_one" / "part.py").write_text("")
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "part.py").write_text("")
    (tmp_path / "own_module.py").write_text("")
    monkeypatch.syspath_prepend(packages)
    names = ("installed_one", "installed_one.part", "own_package", "own_package.part", "own_module")
    try:
        with user_code.neighbours(tmp_path):
            for name in names:
                importlib.import_module(name)
        assert [name for name in names if name in sys.modules] == ["installed_one", "installed_one.part"]
    finally:
        for name in names:
            sys.modules.pop(name, None)
