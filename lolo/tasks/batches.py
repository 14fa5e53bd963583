"""Tasks from batches: lists, PyTorch's DataLoader, or any object that gives the same batches each time it is read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lolo.method.task import Splits, Task, TaskError
from lolo.trees import PyTree


class BatchPlace(NamedTuple):
    """The next batch: `position`, in examples, in the `epoch`."""

    epoch: int
    position: int


@dataclasses.dataclass(frozen=True, eq=False)
class BatchFeed:
    """A stream of batches in the order in which their source gives them."""

    source: Iterable[PyTree]
    columns: Sequence[Any]  # shape and dtype of each array, [examples, ...]
    size: int  # examples in an epoch
    batch: int

    def segments(self, steps: int, batch: int, seed: Sequence[int], used: int = 0) -> BatchSegments:
        """Segments of `steps` batches; `used` of them were read before. The source decides the order, not the seed."""
        return BatchSegments(self, steps, used)


class BatchSegments:
    """Segments of a `BatchFeed`, in order; at its end the source is read again from its start."""

    def __init__(self, feed: BatchFeed, steps: int, used: int) -> None:
        self.feed, self.steps, self.used = feed, steps, used
        per_epoch = feed.size // feed.batch
        self._batches = itertools.islice(_epochs(feed), used * steps % per_epoch, None)

    @property
    def cursor(self) -> BatchPlace:
        """The first example of the next segment."""
        return BatchPlace(*divmod(self.used * self.steps * self.feed.batch, self.feed.size))

    def next(self) -> PyTree:
        """The next segment: leaves [steps, batch, ...]."""
        found = list(itertools.islice(self._batches, self.steps))
        self.used += 1
        return jax.tree.map(lambda *x: np.stack(x), *found)

    def close(self) -> None:
        """Nothing to close."""


def _epochs(feed: BatchFeed) -> Iterator[PyTree]:
    while True:
        count = 0
        for batch in whole_batches(feed.source, feed.batch):
            count += 1
            yield batch
        if count * feed.batch != feed.size:
            raise TaskError(
                f"the batches ended after {count * feed.batch:,} examples; the first time there were {feed.size:,}. "
                "Give a list, a DataLoader, or another object that can be read again from its start."
            )


def whole_batches(source: Iterable[PyTree], size: int) -> Iterator[PyTree]:
    """Batches of NumPy arrays, without those that are smaller, such as the last one."""
    for batch in source:
        arrays = jax.tree.map(np.asarray, batch)
        if {x.shape[:1] for x in jax.tree.leaves(arrays)} == {(size,)}:
            yield arrays


def from_batches(
    train: Iterable[PyTree],
    validation: Iterable[PyTree],
    test: Iterable[PyTree],
    *,
    init: Callable[[jax.Array], PyTree],
    loss: Callable[[PyTree, PyTree], jax.Array],
    loss_limit: float | None = None,
) -> Splits:
    """A task from batches.

    Args:
      train: batches of one size, trees of arrays [batch, ...], in the same order each time they are read: a list, a
        DataLoader without shuffling, or your own object with `__iter__`. Smaller batches, such as the last, are left
        out. They are read as meta-training goes on, and again from the start at their end.
      validation, test: likewise; all of them are read at once and kept in memory.
      init: key -> parameters, any tree of arrays.
      loss: parameters, batch -> the mean loss over the batch, [].
      loss_limit: losses enter the meta-gradient clipped to this; None: as they are.

    Raises TaskError: no batches, batches that can't be read twice, or that come in another order the second time.

    >>> batches = [(np.ones((4, 3), np.float32), np.zeros(4, np.float32))] * 5
    >>> splits = lolo.from_batches(batches, batches, batches,
    ...     init=lambda key: jnp.zeros(3), loss=lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2))
    >>> splits.train
    Task(20 examples, batch 4, stream)
    """

    def task(data: PyTree, size: int, batch: int, stream: BatchFeed | None) -> Task:
        return Task(
            data,
            lambda key: (init(key), {}),
            lambda data, indices: jax.tree.map(lambda x: x[indices], data),
            lambda params, stats, batch, key: (loss(params, batch), stats),
            lambda params, stats, batch: {"loss": loss(params, batch)},
            size=size,
            batch=batch,
            loss_limit=loss_limit,
            stream=stream,
        )

    first, size = first_batch(train, "train")
    count = sum(1 for _ in whole_batches(train, size)) * size
    outline = [jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for x in jax.tree.leaves(first)]
    held = []
    for name, source in (("validation", validation), ("test", test)):
        _, held_size = first_batch(source, name)
        arrays = jax.tree.map(lambda *x: jnp.asarray(np.concatenate(x)), *whole_batches(source, held_size))
        held.append(task(arrays, len(jax.tree.leaves(arrays)[0]), size, None))
    # Of a stream the data are the segment at hand; until there is one, an example of it.
    start = jax.tree.map(lambda x: jnp.asarray(x)[None], first)
    return Splits(task(start, count, size, BatchFeed(train, outline, count, size)), *held)


def first_batch(source: Iterable[PyTree], name: str) -> tuple[PyTree, int]:
    """The first batch and its number of examples. Raises TaskError unless it comes again."""
    if iter(source) is iter(source):
        raise TaskError(
            f"{name} is an iterator, or gives the same one twice: it can be read once. Give a list, a DataLoader, or "
            "another object that can be read again from its start."
        )
    twice = [next(iter(source), None) for _ in range(2)]
    if twice[0] is None or twice[1] is None:
        raise TaskError(f"{name} has no batches.")
    first, again = (jax.tree.map(np.asarray, batch) for batch in twice)
    sizes = {x.shape[:1] for x in jax.tree.leaves(first)}
    if len(sizes) != 1 or sizes == {()}:
        raise TaskError(f"{name}: the arrays of a batch have shapes {[x.shape for x in jax.tree.leaves(first)]}; "
                        "expected [batch, ...] with one batch size.")  # fmt: skip
    if not jax.tree.all(jax.tree.map(np.array_equal, first, again)):
        raise TaskError(
            f"{name} gives another first batch when it is read again, and optimizers must see the same batches. Switch "
            "shuffling off, or draw the order from a fixed seed."
        )
    return first, next(iter(sizes))[0]
