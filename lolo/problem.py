"""What an inner problem is: a model, a loss and one split of a data set, as a `Task`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lolo import models
from lolo.data import stream
from lolo.trees import PyTree


class TaskError(ValueError):
    """A task that can't be found or used; says which, and what to do."""


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """One inner problem on one split of its data. The arrays in `data` are leaves; all else is static.

    Another split, or the next segment of a stream, is the same Task with other leaves.
    """

    data: PyTree  # arrays; leaves [examples, ...] unless the task says otherwise
    init: Callable[[jax.Array], tuple[PyTree, PyTree]] = _static()  # key -> params, stats
    examples: Callable[[PyTree, jax.Array], PyTree] = _static()  # data, indices [B] -> batch
    loss: Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]] = _static()
    # params, stats, batch, key -> loss [], stats; the mean over the batch
    score: Callable[[PyTree, PyTree, PyTree], dict[str, jax.Array]] = _static()
    # params, stats, batch -> means over the batch by name; "loss" is always there
    size: int = _static()  # number of examples
    batch: int = _static()  # examples per inner step
    loss_limit: float | None = _static()  # losses enter the meta-gradient clipped to this; None: as they are
    micro_batches: int = _static(1)  # the gradient of a batch is computed in so many equal parts, one after the other
    score_batch: int = _static(1000)  # examples scored together
    score_examples: int = _static(10_000)  # of the held-out split, scored on the way through a long run
    stream: stream.Stream | None = _static(None)  # where segments come from; None: `data` is the whole split

    def sample(self, key: jax.Array, step: jax.Array) -> PyTree:
        """The batch of inner step `step`.

        From resident data it is drawn with replacement by `key`. Of a stream, `data` is a segment, leaves
        [steps, batch, ...], and the batch is the one at `step` modulo its length.
        """
        if self.stream is not None:
            return self.examples(self.data, step % jax.tree.leaves(self.data)[0].shape[0])
        return self.examples(self.data, jax.random.randint(key, (self.batch,), 0, self.size))


class Feed:
    """A task with the data of its next steps: always the same, or of a stream the next segment."""

    def __init__(self, task: Task, steps: int, seed: Sequence[int], used: int = 0) -> None:
        """A segment holds `steps` batches, in the order that `seed` decides; `used` of them were taken before."""
        self.task = task
        self.segments = None
        if task.stream is not None:
            self.segments = stream.Feed(task.stream, steps, task.batch, seed, used)

    def next(self, place: Callable[[PyTree], PyTree] = jax.device_put) -> Task:
        """The task for the next `steps` steps; `place` puts a segment where it is used."""
        if self.segments is None:
            return self.task
        return dataclasses.replace(self.task, data=place(self.segments.next()))

    def place_in_stream(self) -> dict[str, int] | None:
        """Epoch, position and size of the stream, for checkpoints; None: resident."""
        if self.segments is None or self.task.stream is None:
            return None
        return {**self.segments.cursor._asdict(), "size": self.task.stream.size}

    def close(self) -> None:
        """Stop reading ahead."""
        if self.segments is not None:
            self.segments.close()


class Splits(NamedTuple):
    """The same problem on data that never mix: meta-training, choices, and the one final report."""

    train: Task
    validation: Task
    test: Task


def classification(
    splits: dict[str, PyTree],
    model: models.Model,
    examples: Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]],
    *,
    classes: int,
    batch: int,
    sizes: dict[str, int],
    **more: Any,
) -> Splits:
    """Splits of a classifier from arrays, a model and the way to pick examples.

    Args:
      splits: "train", "validation", "test" -> arrays.
      model: maps inputs [B, ...] to logits [B, classes].
      examples: data, indices [B] -> (inputs [B, ...], labels [B]).
      classes: C; the loss limit is 1.5·ln C.
      batch: examples per inner step.
      sizes: number of examples in each split.
      more: further fields of `Task`, the same for every split.
    """

    def loss(params: PyTree, stats: PyTree, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        inputs, labels = batch
        logits, stats = model.apply(params, stats, inputs, training=True)
        return models.cross_entropy(logits, labels), stats

    def score(params: PyTree, stats: PyTree, batch: PyTree) -> dict[str, jax.Array]:
        inputs, labels = batch
        logits, _ = model.apply(params, stats, inputs, training=False)
        return {
            "loss": models.cross_entropy(logits, labels),
            "accuracy": jnp.mean(jnp.argmax(logits, axis=-1) == labels),
        }

    def task(split: str) -> Task:
        data = jax.tree.map(_on_device, splits[split])
        limit = 1.5 * math.log(classes)
        return Task(data, model.init, examples, loss, score, size=sizes[split], batch=batch, loss_limit=limit, **more)

    return Splits(*(task(split) for split in Splits._fields))


def _on_device(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
