"""Tasks on prepared data: ImageNet-32, FineWeb, and real stand-ins for machines that have neither.

Each is a function of settings alone; the folder of the data is `$LOLO_DATA`, or `data`. A train split of more than
`resident_gb` gigabytes stays on disk and is streamed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lolo.data import imagenet, sets, stream, tokens
from lolo.files.settings import defaults_of
from lolo.method.task import Splits, TaskError
from lolo.tasks import models
from lolo.tasks.classification import classification
from lolo.trees import PyTree

MakeSplits = Callable[..., Splits]
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
RESIDENT_GB = 4.0
HELD_TOKENS = 10_485_760
"""The first tokens of a held-out split, those that are scored."""


class Sizes(NamedTuple):
    """Settings that every task on prepared data has."""

    batch: int
    micro_batches: int
    resident_gb: float  # a train split larger than this many 1e9 bytes is streamed
    score_examples: int  # see `Task`


def on_prepared(make: MakeSplits) -> MakeSplits:
    """A task function of prepared data, from one that takes their folder, or None for shapes without data.

    It is called with settings alone, and builds once for each folder and settings.
    """
    built = functools.lru_cache(maxsize=4)(make)

    @functools.wraps(make)
    def task(outline: bool = False, **settings: Any) -> Splits:
        return built(None if outline else sets.root(), **defaults_of(make) | settings)

    return task


def _open(where: Path | None, name: str) -> dict[str, dict[str, Any]]:
    return sets.PUBLISHED[name] if where is None else sets.prepared(where, name)


def _resident(column: Any) -> Any:
    if isinstance(column, stream.Outline):
        return jax.ShapeDtypeStruct(column.shape, column.dtype)
    return column[np.arange(len(column))] if isinstance(column, stream.Rows) else column


def _classification_on(
    columns: dict[str, tuple[stream.Column, ...]],
    stream_of: Callable[[tuple[stream.Column, ...]], stream.Stream],
    model: models.Model,
    examples: Callable[[PyTree, jax.Array], tuple[jax.Array, jax.Array]],
    classes: int,
    sizes: Sizes,
) -> Splits:
    """A classifier on columns from disk. Raises TaskError for sizes that do not fit together."""
    if sizes.batch < 1 or sizes.micro_batches < 1 or sizes.batch % sizes.micro_batches:
        raise TaskError(
            f"batch={sizes.batch} must be a multiple of micro_batches={sizes.micro_batches}, both at least 1."
        )
    if sizes.score_examples < 1:
        raise TaskError(f"score_examples={sizes.score_examples} must be at least 1.")
    streams = sum(column.nbytes for column in columns["train"]) > sizes.resident_gb * 1e9
    held = {split: tuple(map(_resident, columns[split])) for split in ("validation", "test")}
    splits = classification(
        {"train": () if streams else tuple(map(_resident, columns["train"])), **held},
        model,
        examples,
        classes=classes,
        batch=sizes.batch,
        sizes={split: len(column[0]) for split, column in columns.items()},
        micro_batches=sizes.micro_batches,
        score_batch=min(1000, sizes.batch // sizes.micro_batches),
        score_examples=sizes.score_examples,
    )
    if streams:
        return splits._replace(train=dataclasses.replace(splits.train, stream=stream_of(columns["train"])))
    return splits


def _pick_rgb(data: PyTree, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, labels = data
    pixels = images[indices].astype(jnp.float32) / 255.0
    return (pixels - jnp.array(imagenet.MEAN)) / jnp.array(imagenet.STD), labels[indices].astype(jnp.int32)


def _stream_images(columns: tuple[stream.Column, ...]) -> stream.Stream:
    """Images stay on disk, labels are read into memory."""
    images, labels = columns
    if isinstance(images, np.memmap):
        images, labels = stream.Rows.of(images), np.array(labels)
    return stream.Stream((images, labels))


def _image_task(where: Path | None, name: str, model: models.Model, sizes: Sizes) -> Splits:
    columns: dict[str, tuple[stream.Column, ...]] = {
        split: (arrays["images"], arrays["labels"]) for split, arrays in _open(where, name).items()
    }
    return _classification_on(columns, _stream_images, model, _pick_rgb, imagenet.CLASSES, sizes)


def _pick_window(data: PyTree, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    windows = data[0][indices].astype(jnp.int32)  # [B, context + 1]
    return windows[:, :-1], windows[:, 1:]


def _windows(column: Any, context: int) -> stream.Rows | stream.Outline:
    if isinstance(column, stream.Outline):
        return stream.Outline(((len(column) - 1) // context, context + 1), column.dtype)
    return stream.Rows.windows(column, context)


def _language_task(where: Path | None, name: str, model: models.Model, context: int, sizes: Sizes) -> Splits:
    """The next token at every place of windows of `context` + 1 tokens, which share one token with their neighbours.

    Documents are not kept apart: a window may hold the end of one and the beginning of the next.
    """
    columns: dict[str, tuple[stream.Column, ...]] = {}
    for split, arrays in _open(where, name).items():
        windows = _windows(arrays["tokens"], context)
        if split != "train":
            windows = dataclasses.replace(windows, shape=(min(len(windows), HELD_TOKENS // context), context + 1))
        if not len(windows):
            raise TaskError(f"the {split} split of {name!r} has fewer than context={context} tokens; lower context.")
        columns[split] = (windows,)
    return _classification_on(columns, stream.Stream, model, _pick_window, tokens.VOCABULARY, sizes)


def pick_dtype(name: str) -> Any:
    """float32 or bfloat16. Raises TaskError."""
    if name not in DTYPES:
        raise TaskError(f"dtype={name!r} must be one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def mlp_on(name: str, batch: int, about: str) -> MakeSplits:
    """3072 → `width`, `depth` times → 1,000 on prepared images."""

    def make(
        where: Path | None,
        *,
        batch: int = batch,
        width: int = 128,
        depth: int = 3,
        dtype: str = "float32",
        micro_batches: int = 1,
        resident_gb: float = RESIDENT_GB,
        score_examples: int = 10_000,
    ) -> Splits:
        if min(width, depth) < 1:
            raise TaskError(f"width={width} and depth={depth} must be at least 1.")
        model = models.mlp((3072, *[width] * depth, imagenet.CLASSES), pick_dtype(dtype))
        return _image_task(where, name, model, Sizes(batch, micro_batches, resident_gb, score_examples))

    make.__doc__ = about
    return on_prepared(make)


def resnet18_on(name: str, batch: int, about: str) -> MakeSplits:
    """ResNet-18 with 1,000 outputs on prepared images; `width` 64 is the full one."""

    def make(
        where: Path | None,
        *,
        batch: int = batch,
        width: int = 64,
        stem: str = "imagenet",
        dtype: str = "float32",
        remat: bool = False,
        micro_batches: int = 1,
        resident_gb: float = RESIDENT_GB,
        score_examples: int = 10_000,
    ) -> Splits:
        if stem not in ("imagenet", "cifar") or width < 1:
            raise TaskError(f"stem={stem!r} must be imagenet or cifar, and width={width} at least 1.")
        kind: Any = stem
        model = models.resnet18(imagenet.CLASSES, kind, width, remat, pick_dtype(dtype))
        return _image_task(where, name, model, Sizes(batch, micro_batches, resident_gb, score_examples))

    make.__doc__ = about
    return on_prepared(make)


def gpt_on(name: str, batch: int, context: int, about: str) -> MakeSplits:
    """GPT-2's architecture on prepared tokens; the defaults of `layers`, `heads` and `width` are gpt2-mini's."""
    mini = models.GPT_SIZES["gpt2-mini"]

    def make(
        where: Path | None,
        *,
        batch: int = batch,
        context: int = context,
        layers: int = mini.layers,
        heads: int = mini.heads,
        width: int = mini.width,
        dtype: str = "float32",
        remat: bool = False,
        attention: str = "xla",
        micro_batches: int = 1,
        resident_gb: float = RESIDENT_GB,
        score_examples: int = 976,
    ) -> Splits:
        if attention not in ("xla", "cudnn"):
            raise TaskError(f"attention={attention!r} must be xla or cudnn.")
        if min(context, layers, heads) < 1 or width % heads:
            raise TaskError(f"width={width} must be a multiple of heads={heads}, and context and layers at least 1.")
        kind: Any = attention
        model = models.gpt(tokens.VOCABULARY, context, layers, heads, width, remat, pick_dtype(dtype), kind)
        return _language_task(where, name, model, context, Sizes(batch, micro_batches, resident_gb, score_examples))

    make.__doc__ = about
    return on_prepared(make)


imagenet32_mlp = mlp_on(
    "imagenet32",
    batch=4096,
    about="ImageNet at 32×32 → 128 → 128 → 128 → 1,000, batch 4,096; 555,368 parameters. Needs prepared imagenet32.",
)
imagenet32_resnet18 = resnet18_on(
    "imagenet32",
    batch=4096,
    about="ImageNet at 32×32, ResNet-18, batch 4,096; 11,689,512 parameters. Needs prepared imagenet32.",
)
fineweb_gpt2_mini = gpt_on(
    "fineweb",
    batch=512,
    context=1024,
    about="FineWeb as GPT-2's tokens, gpt2-mini at batch 512, context 1,024; 12,515,520 parameters. Needs prepared "
    "fineweb.",
)
textures_mlp = mlp_on(
    "textures",
    batch=4096,
    about="Stand-in for imagenet32-mlp-w128-d3, of the same sizes: 748 textures. Needs prepared textures.",
)
textures_resnet18 = resnet18_on(
    "textures",
    batch=256,
    about="Stand-in for imagenet32-resnet18, of the same model: 748 textures, batch 256. Needs prepared textures.",
)
books_gpt2_mini = gpt_on(
    "books",
    batch=8,
    context=256,
    about="Stand-in for fineweb-gpt2-mini, the same model: English books, batch 8, context 256. Needs prepared books.",
)
