"""Classifiers as tasks: one function that makes `Splits` from arrays and a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lolo.method.task import Splits, Task, check_array
from lolo.tasks import models
from lolo.trees import PyTree


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

    >>> x = np.random.default_rng(0).standard_normal((60, 20)).astype(np.float32)
    >>> y = (x[:, 0] > 0).astype(np.int32)
    >>> splits = lolo.classification(
    ...     {"train": (x[:40], y[:40]), "validation": (x[40:50], y[40:50]), "test": (x[50:], y[50:])},
    ...     models.mlp((20, 16, 2)),
    ...     lambda data, indices: (data[0][indices], data[1][indices]),
    ...     classes=2,
    ...     batch=8,
    ...     sizes={"train": 40, "validation": 10, "test": 10},
    ... )
    >>> splits.train
    Task(40 examples, batch 8, resident data)
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
        data = jax.tree.map(lambda x: _on_device(x, f"the {split} data"), splits[split])
        limit = 1.5 * math.log(classes)
        return Task(data, model.init, examples, loss, score, size=sizes[split], batch=batch, loss_limit=limit, **more)

    return Splits(*(task(split) for split in Splits._fields))


def _on_device(x: Any, what: str) -> Any:
    check_array(x, what)
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x)
