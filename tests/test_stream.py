"""Examples that stay on disk: every one once per epoch, exact resume, bounded memory, and the loops that read them."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import StopAfter, make_task, small
from hypothesis import given, settings
from hypothesis import strategies as st

from lolo.data import npy, stream
from lolo.data.errors import DataError
from lolo.data.stream import Cursor, Rows, SegmentReader, Stream
from lolo.evaluation import long_runs, rivals
from lolo.method.task import Splits
from lolo.tasks.small import quadratic
from lolo.training import checkpoints, loop, recipes
from lolo.training.how import How
from lolo.training.run_folder import RunError

SEED = (0, 3)


@given(size=st.integers(1, 40), chunks=st.lists(st.integers(0, 25), max_size=12), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_each_example_comes_once_per_epoch_however_the_stream_is_cut(size, chunks, seed):
    taken, read = [], 0
    for count in chunks:
        part = stream.indices((seed,), stream.cursor_after(read, size), count, size)
        assert len(part) == count
        taken.extend(part.tolist())
        read += count
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))
    rest = taken[len(taken) // size * size :]
    assert len(set(rest)) == len(rest)
    np.testing.assert_array_equal(taken, stream.indices((seed,), Cursor(0, 0), read, size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(stream.order(seed, epoch, 50)) for seed in ((0,), (1,), (0, 1)) for epoch in (0, 1)]
    assert len(set(orders)) == 6


@given(size=st.integers(1, 12), batch=st.integers(1, 5), steps=st.integers(1, 4), stop=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_feed_that_continues_gives_what_the_first_would_have_given(size, batch, steps, stop):
    source = Stream((np.arange(size, dtype=np.int64), np.arange(2 * size).reshape(size, 2)))
    whole = SegmentReader(source, steps, batch, SEED)
    segments = [whole.next() for _ in range(6)]
    whole.close()
    later = SegmentReader(source, steps, batch, SEED, used=stop)
    assert later.cursor == stream.cursor_after(stop * steps * batch, size)
    for expected in segments[stop:]:
        for ours, theirs in zip(later.next(), expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    later.close()
    first, second = segments[0]
    assert first.shape == (steps, batch) and second.shape == (steps, batch, 2)
    np.testing.assert_array_equal(second[..., 0], 2 * first)


def mapped(path, array):
    """`array` as a prepared file, mapped."""
    with path.open("wb") as out:
        out.write(npy.format_header(array.shape, array.dtype))
        array.tofile(out)
    return np.lib.format.open_memmap(path, mode="r")


def test_rows_are_those_of_the_array(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (7, 4, 3), np.uint8)
    rows = Rows.of(mapped(tmp_path / "a.npy", array))
    assert len(rows) == 7 and rows.nbytes == array.nbytes
    chosen = np.array([6, 0, 3, 3])
    np.testing.assert_array_equal(rows[chosen], array[chosen])
    assert rows[np.array([], np.int64)].shape == (0, 4, 3)


@pytest.mark.parametrize("n,count", [(12, 2), (13, 3), (14, 3), (16, 3), (17, 4)])
def test_windows_share_one_token_and_reach_over_what_were_shards(tmp_path, n, count):
    row = np.arange(n, dtype=np.uint16)
    windows = Rows.windows(mapped(tmp_path / "a.npy", row), context=4)
    assert windows.shape == (count, 5)
    np.testing.assert_array_equal(windows[np.arange(count)], row[np.arange(count)[:, None] * 4 + np.arange(5)])


def test_a_file_that_became_shorter_or_is_gone_is_an_error(tmp_path):
    path = tmp_path / "a.npy"
    rows = Rows.of(mapped(path, np.zeros((8, 16), np.uint8)))
    path.write_bytes(path.read_bytes()[:-20])
    np.testing.assert_array_equal(rows[np.array([0])], 0)
    with pytest.raises(DataError, match="ends within row 7"):
        rows[np.array([7])]
    feed = SegmentReader(Stream((rows,)), 1, 8, SEED)
    with pytest.raises(DataError, match=r"a\.npy: ends within row"):
        feed.next()
    feed.close()
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        rows[np.array([0])]


PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from lolo.data.stream import Rows, SegmentReader, Stream

shards = np.load(sys.argv[1], mmap_mode="r")
rows = Rows.windows(shards, 1024)
feed = SegmentReader(Stream((rows,)), steps=50, batch=64, seed=(0,))
seen, done = 0, 0
while done < len(rows):
    (windows,) = feed.next()
    seen += int((windows[..., 0] != 0).sum())
    done += windows.shape[0] * windows.shape[1]
feed.close()
assert "jax" not in sys.modules
# Not ru_maxrss: it begins with the memory of the process that started this one.
status = Path("/proc/self/status").read_text().splitlines()
print(seen, done, next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_a_gigabyte_of_tokens_is_read_within_200_megabytes(tmp_path):
    path, count = tmp_path / "tokens.npy", 500_000_000
    with path.open("wb") as out:
        out.write(npy.format_header((count,), "<u2"))
        out.truncate(npy.HEADER_BYTES + 2 * count)
    marked = np.lib.format.open_memmap(path, mode="r+")
    marked[: 1024 * 1000 * 400 : 1024 * 1000] = 7  # the first token of every thousandth window
    marked.flush()
    del marked
    asked = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=600)
    seen, read, peak_kilobytes = map(int, done.stdout.split())
    assert 400 <= seen <= 403 and read >= count // 1024 - 1  # each once; the last segment begins the next epoch
    assert peak_kilobytes < 200 * 1024


# --- in the loops ----------------------------------------------------------------------------------------------------


def streamed(splits, size=30):
    """The same problem with its first `size` train examples as a stream."""
    column = np.asarray(splits.train.data)[:size]
    train = dataclasses.replace(
        splits.train, data=(), stream=Stream((column,)), examples=lambda data, i: data[0][i], size=size
    )
    return Splits(train, splits.validation, splits.test)


def test_a_segments_batches_are_taken_in_order_and_step_counts_modulo_its_length():
    task = dataclasses.replace(streamed(quadratic()).train, data=(jnp.arange(12.0).reshape(4, 3),))
    for step in (0, 3, 4, 9):
        np.testing.assert_array_equal(task.sample(jax.random.key(step), jnp.int32(step)), task.data[0][step % 4])


def test_a_streamed_run_resumes_in_the_middle_of_an_epoch_with_the_same_bytes(tmp_path):
    recipe = small(recipes.LOLO, {"outer.steps": 6, "validation.every": 0, "estimator.pairs": 2})
    group = {"streamed": streamed(quadratic())}  # 3 steps of 4 examples a segment: 30 examples end mid-segment
    whole = loop.train(recipe, tmp_path / "whole", tasks=group)
    stop = StopAfter(3)
    loop.train(
        recipe, tmp_path / "run", How(stop=stop, on_progress=stop.on_progress, log=lambda text: None), tasks=group
    )
    _, manifest = checkpoints.newest_checkpoint(tmp_path / "run", print)
    assert manifest["streams"] == {"streamed": {"epoch": 1, "position": 6, "size": 30}}
    resumed = loop.resume(tmp_path / "run", How(log=lambda text: None), tasks=group)
    assert resumed.finished
    for name, array in whole.weights.meta_params.items():
        assert np.asarray(array).tobytes() == np.asarray(resumed.weights.meta_params[name]).tobytes()
    with pytest.raises(RunError, match="they are not the same data"):
        loop.resume(tmp_path / "run", tasks={"streamed": streamed(quadratic(), size=29)})


def test_evaluation_reads_one_stream_for_each_seed_and_every_optimizer():
    values = np.arange(700, dtype=np.float32)
    task = make_task(lambda key: ({"x": jnp.zeros(())}, {}), lambda params, stats, batch: (jnp.mean(batch), stats))
    task = dataclasses.replace(
        task, data=(), stream=Stream((values,)), examples=lambda data, i: data[0][i], size=700, batch=4
    )
    held = dataclasses.replace(task, stream=None, data=(jnp.ones(5),), size=5)
    lr = {"lr": 0.1, "weight_decay": 0.0}
    curves = long_runs.run(task, held, rivals.maker("sgdm"), [lr] * 4, [1, 2, 1, 2], 200)
    for k, seed in enumerate([1, 2, 1, 2]):
        order = stream.indices((long_runs.EVAL_STREAM, seed), Cursor(0, 0), 800, 700)
        expected = values[order].reshape(2, 400).mean(axis=1)
        np.testing.assert_allclose(curves.train_loss[k], expected, rtol=1e-5)
    assert not np.allclose(curves.train_loss[0], curves.train_loss[1])
    np.testing.assert_array_equal(curves.final["loss"], 1.0)
