"""Tasks of kinds that people train, at the size of a laptop: what `lolo race` compares optimizers on.

Fashion-MNIST and books come with the package; the handwritten digits are scikit-learn's (`pip install 'lolo[race]'`).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from lolo.data import embedded
from lolo.method import inner
from lolo.method.task import Splits, Task, TaskError
from lolo.tasks import compact_models, models
from lolo.tasks.classification import classification
from lolo.tasks.small import fashion, fashion_conv, next_symbols, parse_widths, pick_image, pick_next
from lolo.trees import PyTree

VALIDATION, TEST = 5, 6  # of seven digits in a row, the places of those that are held out


@functools.cache
def fashion_resnet(width: int = 8, blocks: int = 2, batch: int = 32) -> Splits:
    """Fashion-MNIST at 8×8 through two residual blocks with BatchNorm, 8 and 16 channels, batch 32."""
    return fashion(compact_models.small_resnet(10, width, blocks), batch)


@functools.cache
def fashion_vit(width: int = 32, layers: int = 2, heads: int = 2, batch: int = 32) -> Splits:
    """Fashion-MNIST at 8×8 through a vision transformer of 16 tokens, 2 blocks of width 32, batch 32."""
    return fashion(compact_models.vision_transformer(10, width, layers, heads), batch)


@functools.cache
def books_gru(width: int = 64, context: int = 32, batch: int = 16) -> Splits:
    """The next character after each of 32, by a gated recurrent unit of width 64, batch 16."""
    return next_symbols(compact_models.gru(embedded.SYMBOLS, width), context, batch)


@functools.cache
def books_words(vocabulary: int = 4096, embedding: int = 16, widths: str = "64", batch: int = 64) -> Splits:
    """The next word of 4,096 from the 3 before it: most rows of the embedding are rarely seen. Batch 64."""
    data, context = embedded.books_words(vocabulary), 3
    return classification(
        data,
        models.char_mlp(vocabulary, context, embedding, parse_widths(widths)),
        pick_next(context),
        classes=vocabulary,
        batch=batch,
        sizes={split: len(words) - context for split, words in data.items()},
    )


@functools.cache
def digits() -> dict[str, tuple[NDArray[np.float32], NDArray[np.int32]]]:
    """Handwritten digits at 8×8: for each split images [N, 64] from 0 to 255, labels [N]; N = 1,285, 256 and 256.

    Of seven digits in a row the sixth is validation and the seventh test. Raises TaskError without scikit-learn.
    Reference: Alpaydin, Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (CC BY 4.0).
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise TaskError("the handwritten digits come with scikit-learn: pip install 'lolo[race]'.") from None
    images, labels = datasets.load_digits(return_X_y=True)
    place = np.arange(len(images)) % 7
    chosen = {"train": place < VALIDATION, "validation": place == VALIDATION, "test": place == TEST}
    return {
        split: ((images[mask] * 255 / 16).astype(np.float32), labels[mask].astype(np.int32))
        for split, mask in chosen.items()
    }


def _digits(model: models.Model, batch: int) -> Splits:
    data = digits()
    sizes = {split: len(labels) for split, (_, labels) in data.items()}
    return classification(data, model, pick_image, classes=10, batch=batch, sizes=sizes)


@functools.cache
def digits_mlp(widths: str = "64-64", batch: int = 4) -> Splits:
    """Handwritten digits at 8×8 → 64 → 64 → 10, in small batches of 4."""
    return _digits(models.mlp((64, *parse_widths(widths), 10)), batch)


@functools.cache
def digits_finetune(widths: str = "16-32", batch: int = 32, pretraining: int = 500) -> Splits:
    """Handwritten digits, from a convolution net that was trained on Fashion-MNIST; a new output layer. Batch 32."""
    channels = parse_widths(widths)
    model = models.small_convolution(10, channels)
    trained = _trained(fashion_conv(widths, 64).train, pretraining)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        fresh, stats = model.init(key)
        new = {name: 0.1 * fresh[name] for name in fresh if name.startswith("layers.")}  # so that no class is sure
        return {**fresh, **jax.tree.map(jnp.asarray, trained), **new}, stats

    return _digits(model._replace(init=init), batch)


def _trained(task: Task, steps: int) -> PyTree:
    """Parameters after AdamW with a cosine from 3e-3, from a fixed key."""
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps))

    def run(task: Task) -> PyTree:
        def step(state: inner.InnerState, i: jax.Array) -> tuple[inner.InnerState, None]:
            key = jax.random.fold_in(jax.random.key(1), i)
            return inner.inner_step(task, optimizer, None, jnp.ones(()), state, key)[0], None

        return jax.lax.scan(step, inner.begin(task, optimizer, None, jax.random.key(0)), jnp.arange(steps))[0].params

    return {name: np.asarray(x) for name, x in jax.jit(run)(task).items()}
