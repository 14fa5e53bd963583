"""Inner problems: what a learned optimizer is meta-trained on and evaluated with.

A `Task` is a model, a loss and a data set in one. `TASKS` names those that come with the package; your own is a
function that returns `Splits`, named on the command line as `path.py:function`.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lolo import models
from lolo.data import embedded
from lolo.trees import PyTree


def _static() -> Any:
    return dataclasses.field(metadata={"static": True})


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

    def sample(self, key: jax.Array, step: jax.Array) -> PyTree:
        """A batch drawn with replacement. `step` is the inner step: streams use it, resident data do not."""
        del step
        return self.examples(self.data, jax.random.randint(key, (self.batch,), 0, self.size))


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
) -> Splits:
    """Splits of a classifier from arrays, a model and the way to pick examples.

    Args:
      splits: "train", "validation", "test" -> arrays.
      model: maps inputs [B, ...] to logits [B, classes].
      examples: data, indices [B] -> (inputs [B, ...], labels [B]).
      classes: C; the loss limit is 1.5·ln C.
      batch: examples per inner step.
      sizes: number of examples in each split.
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
        data = jax.tree.map(jnp.asarray, splits[split])
        limit = 1.5 * math.log(classes)
        return Task(data, model.init, examples, loss, score, size=sizes[split], batch=batch, loss_limit=limit)

    return Splits(*(task(split) for split in Splits._fields))


def _pick_image(data: PyTree, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, labels = data
    return (images[indices].astype(jnp.float32) - 73.0) / 85.0, labels[indices]


@functools.cache
def fashion_mlp() -> Splits:
    """Fashion-MNIST at 8×8 → 32 → 32 → 10, batch 128; 3,466 parameters."""
    data = embedded.fashion_mnist()
    return classification(
        data,
        models.mlp((64, 32, 32, 10)),
        _pick_image,
        classes=10,
        batch=128,
        sizes={split: len(labels) for split, (_, labels) in data.items()},
    )


CONTEXT = 8  # characters that books_mlp sees


def _pick_characters(symbols: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    windows = symbols[indices[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
    return windows[:, :CONTEXT], windows[:, CONTEXT]


@functools.cache
def books_mlp() -> Splits:
    """The next character of English books from the 8 before it: embeddings of 8, → 32 → 32 → 48, batch 128."""
    data = embedded.books_symbols()
    return classification(
        data,
        models.char_mlp(symbols=embedded.SYMBOLS, context=CONTEXT, embedding=8, widths=(32, 32)),
        _pick_characters,
        classes=embedded.SYMBOLS,
        batch=128,
        sizes={split: len(symbols) - CONTEXT for split, symbols in data.items()},
    )


@functools.cache
def quadratic(dimensions: int = 8) -> Splits:
    """½ mean_i h_i (θ_i − x_i)² with noisy targets x ~ N(0, 0.1²) and h from 0.5 to 2: the smallest task, for tests."""
    curvature = jnp.linspace(0.5, 2.0, dimensions)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        return {"x": jax.random.normal(key, (dimensions,))}, {}

    def examples(data: jax.Array, indices: jax.Array) -> jax.Array:
        return data[indices]

    def loss(params: PyTree, stats: PyTree, batch: jax.Array, key: jax.Array) -> tuple[jax.Array, PyTree]:
        return 0.5 * jnp.mean(curvature * (params["x"] - batch) ** 2), stats

    def score(params: PyTree, stats: PyTree, batch: jax.Array) -> dict[str, jax.Array]:
        return {"loss": 0.5 * jnp.mean(curvature * (params["x"] - batch) ** 2)}

    def task(seed: int) -> Task:
        data = 0.1 * np.random.Generator(np.random.PCG64(seed)).standard_normal((1000, dimensions))
        return Task(jnp.asarray(data, jnp.float32), init, examples, loss, score, size=1000, batch=4, loss_limit=None)

    return Splits(task(0), task(1), task(2))


TASKS: dict[str, Callable[[], Splits]] = {
    "fashion-mlp": fashion_mlp,
    "books-mlp": books_mlp,
    "quadratic": quadratic,
}


class TaskError(ValueError):
    """A task that can't be found or used; says which, and what to do."""


def pin(name: str) -> str:
    """The name that a recipe stores: `path.py:function` gets the file's sha256, named tasks stay as they are."""
    path, function, stated = _parts(name)
    if path is None:
        return name
    found = _sha256(path)
    if stated is not None and stated != found:
        raise TaskError(f"{path} has changed since the recipe was made: its sha256 is {found}, not {stated}.")
    return f"{path}:{function}@{found}"


def resolve(name: str) -> Splits:
    """The splits of a named task, or of `path.py:function[@sha256]`. Runs the code of that file. Raises TaskError."""
    path, function, _ = _parts(name)
    if path is None:
        return TASKS[name]()
    pin(name)
    spec = importlib.util.spec_from_file_location(f"lolo_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise TaskError(f"{path} can't be imported; a task file is Python source, named path.py:function.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # as import does: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise TaskError(f"{path} can't be imported: {type(error).__name__}: {error}.") from error
    make = getattr(module, function, None)
    if not callable(make):
        raise TaskError(f"{path} has no function {function!r}; define one that returns lolo.Splits.")
    try:
        splits = make()
    except Exception as error:
        raise TaskError(f"{path}:{function} failed with {type(error).__name__}: {error}.") from error
    if not isinstance(splits, Splits):
        raise TaskError(f"{path}:{function} returned {type(splits).__name__}; expected lolo.Splits.")
    for split, task in zip(Splits._fields, splits, strict=True):
        if not isinstance(task, Task) or task.size < 1 or task.batch < 1:
            raise TaskError(f"{path}:{function}: its {split} split is no lolo.Task with size and batch of 1 or more.")
    return splits


USER_TASK = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)(?:@(?P<sha256>[0-9a-f]{64}))?")


def _parts(name: str) -> tuple[Path | None, str, str | None]:
    """Path, function and stated sha256 of a task's name; path is None for named tasks."""
    user = USER_TASK.fullmatch(name)
    if user:
        if not Path(user["path"]).is_file():
            where = "" if Path(user["path"]).is_absolute() else f" in {Path.cwd()}, from where it is looked for"
            raise TaskError(f"task file {user['path']} does not exist{where}; give it as path.py:function.")
        return Path(user["path"]), user["function"], user["sha256"]
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise TaskError(f"unknown task {name!r}; did you mean {near!r}? Your own: path.py:function.")
    return None, name, None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
