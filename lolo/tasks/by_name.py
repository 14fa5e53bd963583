"""The table of tasks by name, and the parser of names: settings, files of users, hashes of those files.

`TASKS` names the tasks of the package; your own is a function that returns `Splits`, named on the command line as
`path.py:function`.

A name may be followed by settings, the keyword arguments of the task's function: `fineweb-gpt2-mini:batch=8`,
`quadratic:dimensions=3`, `path.py:function:depth=2,width=64`. Recipes hold them as part of the name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax

from lolo.files import user_code
from lolo.files.settings import UserCodeError, defaults_of, nearest, parse_settings
from lolo.files.user_code import HERE
from lolo.method.task import Splits, TaskError, check_splits
from lolo.tasks import augment, compact, prepared
from lolo.tasks.small import (
    books_mlp,
    books_transformer,
    fashion_autoencoder,
    fashion_conv,
    fashion_mlp,
    quadratic,
)

TASKS: dict[str, prepared.MakeSplits] = {
    "fashion-mlp": fashion_mlp,
    "books-mlp": books_mlp,
    "fashion-conv": fashion_conv,
    "fashion-autoencoder": fashion_autoencoder,
    "books-transformer": books_transformer,
    "quadratic": quadratic,
    "fashion-resnet": compact.fashion_resnet,
    "fashion-vit": compact.fashion_vit,
    "books-gru": compact.books_gru,
    "books-words": compact.books_words,
    "digits-mlp": compact.digits_mlp,
    "digits-finetune": compact.digits_finetune,
    "imagenet32-mlp-w128-d3": prepared.imagenet32_mlp,
    "imagenet32-resnet18": prepared.imagenet32_resnet18,
    "fineweb-gpt2-mini": prepared.fineweb_gpt2_mini,
    "textures-mlp": prepared.textures_mlp,
    "textures-resnet18": prepared.textures_resnet18,
    "books-gpt2-mini": prepared.books_gpt2_mini,
}


ANY_TASK = {"reparametrize": 1.0}
"""Settings of every task; the first is the bound of `augment.reparametrized`."""


@contextlib.contextmanager
def _task_errors() -> Iterator[None]:
    """What is wrong with a user's file is a TaskError."""
    try:
        yield
    except UserCodeError as error:
        raise TaskError(str(error)) from error


def pin(name: str, folders: Sequence[Path] = HERE) -> str:
    """The name that a recipe stores: `path.py:function` gets the file's sha256, named tasks stay as they are.

    folders: where a relative path is looked for; of a pinned name, the first file with its sha256 is taken.

    >>> tasks.pin("fashion-mlp"), "fashion-mlp" in tasks.TASKS
    ('fashion-mlp', True)
    """
    with _task_errors():
        own = user_code.parse(name, "task", folders)
        if own is None:
            _named(name)
            return name
        sha256 = user_code.checked_sha256(own)
    return name if own.sha256 else f"{name}@{sha256}"


def resolve(name: str, folders: Sequence[Path] = HERE) -> Splits:
    """The splits of a task's name. Runs the code of `path.py:function`. Raises TaskError, DataError.

    The file and its function may import modules of the file's folder; its losses, which are traced later, may not: put
    such imports at the top of the file. folders: see `pin`.

    >>> tasks.resolve("fashion-mlp:batch=32").train
    Task(57,000 examples, batch 32, resident data)
    """
    pin(name, folders)
    return _build(name, outline=False, folders=folders)


def outline(name: str) -> Splits:
    """The splits of a task's name with shapes instead of arrays; tasks on prepared data need no data for it.

    Leaves are `jax.ShapeDtypeStruct`.

    >>> tasks.outline("fashion-mlp").train.data[0]
    ShapeDtypeStruct(shape=(57000, 64), dtype=uint8)
    """
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _build(name, outline=True))


def _build(name: str, outline: bool, folders: Sequence[Path] = HERE) -> Splits:
    with _task_errors():
        own = user_code.parse(name, "task", folders)
        if own is None:
            function, words = _named(name)
            return _made(name, function, words, TASKS[function], outline)
        with user_code.neighbours(own.path.absolute().parent):
            make = user_code.function_of(own, "task", "lolo.Splits")
            return _made(name, f"{own.path}:{own.function}", own.settings, make, outline)


def _made(name: str, function: str, words: str, make: prepared.MakeSplits, outline: bool) -> Splits:
    """What a task's function returns for these settings, checked. function: its name, for messages."""
    settings = parse_settings(words, {**ANY_TASK, **defaults_of(make)}, function)
    bound = settings.pop("reparametrize", 1.0)
    if outline and "where" in inspect.signature(make).parameters:
        settings["outline"] = True
    try:
        splits = make(**settings)
    except ValueError:  # TaskError, DataError: their messages are complete
        raise
    except Exception as error:
        raise TaskError(f"{name} failed with {type(error).__name__}: {error}.") from error
    if not isinstance(splits, Splits):
        raise TaskError(f"{function} returned {type(splits).__name__}; expected lolo.Splits.")
    check_splits(splits, name)
    return splits if bound == 1.0 else augment.reparametrized(splits, bound)


def _named(name: str) -> tuple[str, str]:
    """A task of the table, and its settings. Raises TaskError, UserCodeError for what is none."""
    known, _, words = name.partition(":")
    if known not in TASKS:
        near = nearest(known, TASKS)
        raise TaskError(f"unknown task {name!r}; did you mean {near!r}? Your own: path.py:function.")
    parse_settings(words, {**ANY_TASK, **defaults_of(TASKS[known])}, known)
    return known, words
