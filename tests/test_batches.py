"""Tasks from lists and loaders of batches."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lolo
from lolo.tasks.batches import from_batches

X = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
Y = X @ np.array([1.0, -2.0, 0.5], np.float32)
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in range(0, 50, 8)]  # the last one has two examples


class Loader:
    """As a DataLoader: read again from its start each time; `fail` makes the second epoch shorter."""

    def __init__(self, batches, fail=False):
        self.batches, self.fail, self.read = batches, fail, 0

    def __iter__(self):
        self.read += 1
        yield from self.batches[: 2 if self.fail and self.read > 4 else None]


def splits_of(train, held=BATCHES):
    return from_batches(
        train, held, held, init=lambda key: {"w": jnp.zeros(3)}, loss=lambda p, b: jnp.mean((b[0] @ p["w"] - b[1]) ** 2)
    )


def test_batches_come_in_their_order_epoch_by_epoch_and_from_the_middle():
    stream = splits_of(Loader(BATCHES)).train.stream
    assert stream.size == 48 and [c.shape for c in stream.columns] == [(48, 3), (48,)]
    segments = stream.segments(4, 8, (0,))
    first, second = segments.next(), segments.next()
    np.testing.assert_array_equal(np.concatenate([first[0], second[0]]), [BATCHES[i % 6][0] for i in range(8)])
    assert segments.cursor == (1, 16)  # 64 examples into epochs of 48
    np.testing.assert_array_equal(stream.segments(4, 8, (1,), used=1).next()[1], second[1])


@pytest.mark.parametrize("make", [list, Loader])
def test_training_on_them_is_training_by_hand(make):
    found = lolo.compare({"SGD": optax.sgd(0.1)}, splits_of(make(BATCHES)), steps=100, seeds=1).rows[0]
    w, losses = np.zeros(3, np.float64), []
    for step in range(100):
        x, y = BATCHES[step % 6]
        error = x @ w - y
        losses.append(np.mean(error**2))
        w -= 0.1 * 2 * x.T @ error / len(x)
    np.testing.assert_allclose(found.train_loss, np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(found.held_loss, np.mean((X[:48] @ w - Y[:48]) ** 2), atol=1e-6)


@pytest.mark.torch
def test_a_dataloader_of_pytorch_is_one():
    torch = pytest.importorskip("torch")
    data = torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    ours, theirs = (
        lolo.compare({"SGD": optax.sgd(0.1)}, splits_of(x), steps=20, seeds=1).rows for x in (BATCHES, loader)
    )
    assert ours == theirs


@pytest.mark.slow
def test_a_meta_training_resumes_in_the_middle_of_an_epoch(tmp_path):
    small = {
        "outer.steps": 4,
        "unroll.length": 20,
        "unroll.truncation": 10,
        "validation.every": 0,
        "estimator.pairs": 2,
    }
    whole = lolo.train("lolo", tmp_path / "a", task=splits_of(Loader(BATCHES)), **small)
    stop = lolo.How().stop
    seen = []

    def after_two(progress):
        seen.append(progress)
        if len(seen) == 2:
            stop.requested = "the test"

    part = lolo.train(
        "lolo", tmp_path / "b", lolo.How(stop=stop, on_progress=after_two), task=splits_of(BATCHES), **small
    )
    assert part.step == 2
    rest = lolo.resume(tmp_path / "b", tasks={"task": splits_of(BATCHES)})
    for name, x in whole.weights.meta_params.items():
        np.testing.assert_array_equal(rest.weights.meta_params[name], x)


def test_a_source_that_ends_early_is_noticed():
    splits = splits_of(Loader(BATCHES, fail=True))
    with pytest.raises(lolo.TaskError, match="ended after 16 examples; the first time there were 48"):
        lolo.compare({"SGD": optax.sgd(0.1)}, splits, steps=300, seeds=1)


class Once:
    def __init__(self):
        self.batches = iter([BATCHES[0]] * 4)

    def __iter__(self):
        return self.batches


class Shuffling:
    def __init__(self):
        self.draw = np.random.default_rng(0)

    def __iter__(self):
        return iter([(self.draw.standard_normal((8, 3)).astype(np.float32), Y[:8])])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ((batch for batch in BATCHES), "train is an iterator, or gives the same one twice"),
        (Once(), "train is an iterator, or gives the same one twice"),
        ([], "train has no batches"),
        (Shuffling(), "another first batch"),
        ([(X[:8], Y[:7])], "with one batch size"),
        ([(np.float32(1), np.float32(2))], r"expected \[batch, ...\]"),
    ],
)
def test_what_can_t_be_read_twice_is_refused(source, message):
    with pytest.raises(lolo.TaskError, match=message):
        splits_of(source)
