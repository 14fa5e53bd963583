"""Small tasks on the data inside the package, and a quadratic."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lolo.data import embedded
from lolo.method.task import Splits, Task, TaskError
from lolo.tasks import models
from lolo.tasks.classification import classification
from lolo.trees import PyTree


def _pick_image(data: PyTree, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, labels = data
    return (images[indices].astype(jnp.float32) - 73.0) / 85.0, labels[indices]


def _widths(words: str) -> tuple[int, ...]:
    """Widths of hidden layers: "128-64" -> (128, 64). Raises TaskError."""
    try:
        widths = tuple(map(int, words.split("-")))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise TaskError(f"widths={words!r} must be whole numbers with - between them, such as 128-128-128.")
    return widths


@functools.cache
def fashion_mlp(widths: str = "32-32") -> Splits:
    """Fashion-MNIST at 8×8 → 32 → 32 → 10, batch 128; 3,466 parameters."""
    data = embedded.fashion_mnist()
    return classification(
        data,
        models.mlp((64, *_widths(widths), 10)),
        _pick_image,
        classes=10,
        batch=128,
        sizes={split: len(labels) for split, (_, labels) in data.items()},
    )


CONTEXT = 8  # characters that books_mlp predicts the next one from


def _pick_characters(symbols: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    windows = symbols[indices[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
    return windows[:, :CONTEXT], windows[:, CONTEXT]


@functools.cache
def books_mlp(widths: str = "32-32") -> Splits:
    """The next character of English books from the 8 before it: embeddings of 8, → 32 → 32 → 48, batch 128."""
    data = embedded.books_symbols()
    return classification(
        data,
        models.char_mlp(symbols=embedded.SYMBOLS, context=CONTEXT, embedding=8, widths=_widths(widths)),
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
