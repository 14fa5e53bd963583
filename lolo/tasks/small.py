"""Small tasks on the data inside the package, and a quadratic."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from lolo.data import embedded
from lolo.method.task import Splits, Task, TaskError
from lolo.tasks import models
from lolo.tasks.classification import classification
from lolo.trees import PyTree


def scaled(images: jax.Array) -> jax.Array:
    """Gray values from 0 to 255, with mean 0 and variance 1 on Fashion-MNIST at 8×8."""
    return (images.astype(jnp.float32) - 73.0) / 85.0


def pick_image(data: PyTree, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images and their labels."""
    images, labels = data
    return scaled(images[indices]), labels[indices]


def parse_widths(words: str) -> tuple[int, ...]:
    """Widths of hidden layers: "128-64" -> (128, 64). Raises TaskError."""
    try:
        widths = tuple(map(int, words.split("-")))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise TaskError(f"widths={words!r} must be whole numbers with - between them, such as 128-128-128.")
    return widths


@functools.cache
def fashion_mlp(widths: str = "32-32", batch: int = 128) -> Splits:
    """Fashion-MNIST at 8×8 → 32 → 32 → 10, batch 128; 3,466 parameters.

    >>> tasks.fashion_mlp(widths="64-64").train
    Task(57,000 examples, batch 128, resident data)
    """
    return fashion(models.mlp((64, *parse_widths(widths), 10)), batch)


@functools.cache
def fashion_conv(widths: str = "8-16", batch: int = 32) -> Splits:
    """Fashion-MNIST at 8×8 through 3×3 convolutions of stride 2 with 8 and 16 channels, batch 32; 1,898 parameters."""
    return fashion(models.small_convolution(10, parse_widths(widths)), batch)


def fashion(model: models.Model, batch: int) -> Splits:
    """Fashion-MNIST at 8×8 through a model of gray images [B, 64]."""
    data = embedded.fashion_mnist()
    sizes = {split: len(labels) for split, (_, labels) in data.items()}
    return classification(data, model, pick_image, classes=10, batch=batch, sizes=sizes)


@functools.cache
def fashion_autoencoder(widths: str = "32-8-32", batch: int = 64) -> Splits:
    """Fashion-MNIST at 8×8 → 32 → 8 → 32 → the same image, mean squared error, batch 64; 4,744 parameters."""
    model = models.mlp((64, *parse_widths(widths), 64))

    def examples(images: jax.Array, indices: jax.Array) -> jax.Array:
        return scaled(images[indices])

    def error(params: PyTree, stats: PyTree, images: jax.Array) -> jax.Array:
        return jnp.mean((model.apply(params, stats, images)[0] - images) ** 2)

    def loss(params: PyTree, stats: PyTree, batch: jax.Array, key: jax.Array) -> tuple[jax.Array, PyTree]:
        return error(params, stats, batch), stats

    def score(params: PyTree, stats: PyTree, batch: jax.Array) -> dict[str, jax.Array]:
        return {"loss": error(params, stats, batch)}

    def task(images: np.ndarray) -> Task:
        # Predicting the mean image's gray costs about 1, so 1.5 of that is the limit, as with classifiers.
        data = jnp.asarray(images)
        return Task(data, model.init, examples, loss, score, size=len(images), batch=batch, loss_limit=1.5)

    data = embedded.fashion_mnist()
    return Splits(*(task(data[split][0]) for split in Splits._fields))


CONTEXT = 8  # characters that books_mlp predicts the next one from


@functools.cache
def pick_next(context: int) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`context` symbols in a row, and the one after them."""

    def pick(symbols: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        windows = symbols[indices[:, None] + jnp.arange(context + 1)].astype(jnp.int32)
        return windows[:, :context], windows[:, context]

    return pick


@functools.cache
def books_mlp(widths: str = "32-32", batch: int = 128) -> Splits:
    """The next character of English books from the 8 before it: embeddings of 8, → 32 → 32 → 48, batch 128.

    >>> tasks.books_mlp(batch=64).train.batch
    64
    """
    data = embedded.books_symbols()
    return classification(
        data,
        models.char_mlp(symbols=embedded.SYMBOLS, context=CONTEXT, embedding=8, widths=parse_widths(widths)),
        pick_next(CONTEXT),
        classes=embedded.SYMBOLS,
        batch=batch,
        sizes={split: len(symbols) - CONTEXT for split, symbols in data.items()},
    )


@functools.cache
def books_transformer(width: int = 16, heads: int = 2, context: int = 8, batch: int = 8, layers: int = 1) -> Splits:
    """The next character after each of 8, by one block of a GPT of width 16 with 2 heads, batch 8; 4,208 parameters."""
    return next_symbols(models.gpt(embedded.SYMBOLS, context, layers, heads, width), context, batch)


def next_symbols(model: models.Model, context: int, batch: int) -> Splits:
    """The next character of English books after each of `context`; the model gives logits [B, context, SYMBOLS].

    An example for training begins at any character. Those that are scored lie one behind the other, so that each
    character is predicted once; on the way through a long run about 10,000 characters are.
    """
    data: dict[str, np.ndarray] = dict(embedded.books_symbols())
    for split in ("validation", "test"):
        count = (len(data[split]) - 1) // context
        data[split] = data[split][np.arange(count)[:, None] * context + np.arange(context + 1)]

    def examples(symbols: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        windows = symbols[indices] if symbols.ndim == 2 else symbols[indices[:, None] + jnp.arange(context + 1)]
        windows = windows.astype(jnp.int32)
        return windows[:, :-1], windows[:, 1:]

    sizes = {split: len(symbols) - (context if symbols.ndim == 1 else 0) for split, symbols in data.items()}
    return classification(
        data,
        model,
        examples,
        classes=embedded.SYMBOLS,
        batch=batch,
        sizes=sizes,
        score_examples=max(10_000 // context, 1),
    )


@functools.cache
def quadratic(dimensions: int = 8) -> Splits:
    """½ mean_i h_i (θ_i − x_i)² with noisy targets x ~ N(0, 0.1²) and h from 0.5 to 2: the smallest task, for tests.

    >>> params, stats = tasks.quadratic(dimensions=3).train.init(jax.random.key(0))
    >>> jax.tree.map(jnp.shape, params)
    {'x': (3,)}
    """
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
