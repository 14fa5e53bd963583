"""The table of tasks by name, and the parser of names: settings, files of users, hashes of those files.

`TASKS` names the tasks of the package; your own is a function that returns `Splits`, named on the command line as
`path.py:function`.

A name may be followed by settings, the keyword arguments of the task's function: `fineweb-gpt2-mini:batch=8`,
`quadratic:dimensions=3`, `path.py:function:depth=2,width=64`. Recipes hold them as part of the name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lolo.files.disk import sha256_of
from lolo.files.settings import did_you_mean, nearest
from lolo.method.task import Splits, Task, TaskError
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


OWN_PREFIX = "lolo_task_"  # of the name under which a task's file is imported

ANY_TASK = {"reparametrize": 1.0}
"""Settings of every task; the first is the bound of `augment.reparametrized`."""


def parse_settings(text: str, make: prepared.MakeSplits, task: str) -> dict[str, Any]:
    """`batch=8,dtype=bfloat16` as keyword arguments of `make`, typed like its defaults. Raises TaskError."""
    known, given = {**ANY_TASK, **prepared.settings_of(make)}, {}
    for setting in text.split(",") if text else ():
        name, separator, value = setting.partition("=")
        if name not in known or not separator:
            hint = did_you_mean(name, known)
            raise TaskError(f"{setting!r} is no setting of {task!r}, which takes NAME=VALUE,NAME=VALUE; {hint}")
        given[name] = _typed(value, known[name], f"{task}: setting {name}")
    return given


def _typed(value: str, like: Any, what: str) -> Any:
    if isinstance(like, str):
        return value
    if isinstance(like, bool):
        if value.lower() not in ("true", "false"):
            raise TaskError(f"{what}={value!r} must be true or false.")
        return value.lower() == "true"
    try:
        return type(like)(value)
    except ValueError:
        raise TaskError(f"{what}={value!r} must be a number, such as {like}.") from None


HERE = (Path(),)


def pin(name: str, folders: Sequence[Path] = HERE) -> str:
    """The name that a recipe stores: `path.py:function` gets the file's sha256, named tasks stay as they are.

    folders: where a relative path is looked for; of a pinned name, the first file with its sha256 is taken.
    """
    parts = _parts(name, folders)
    if parts.path is None:
        return name
    actual = sha256_of(parts.path)
    if parts.sha256 is not None and parts.sha256 != actual:
        raise TaskError(
            f"{parts.path} has changed since the recipe was made: its sha256 is {actual}, not {parts.sha256}."
        )
    return name if parts.sha256 else f"{name}@{actual}"


def resolve(name: str, folders: Sequence[Path] = HERE) -> Splits:
    """The splits of a task's name. Runs the code of `path.py:function`. Raises TaskError, DataError.

    The file and its function may import modules of the file's folder. folders: see `pin`.
    """
    pin(name, folders)
    return _build(name, outline=False, folders=folders)


def outline(name: str) -> Splits:
    """The splits of a task's name with shapes instead of arrays; tasks on prepared data need no data for it.

    Leaves are `jax.ShapeDtypeStruct`.
    """
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), _build(name, outline=True))


def _build(name: str, outline: bool, folders: Sequence[Path] = HERE) -> Splits:
    parts = _parts(name, folders)
    if parts.path is None:
        return _made(name, parts, TASKS[parts.function], outline)
    with _neighbours(parts.path.absolute().parent):
        return _made(name, parts, _function_of(parts.path, parts.function), outline)


@contextlib.contextmanager
def _neighbours(folder: Path) -> Iterator[None]:
    """Modules of a folder can be imported, as by a script that lies there; afterwards nothing is left of it.

    So a module of the same name beside another task's file is another module.
    """
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
            if file and folder in Path(file).parents and not name.startswith(OWN_PREFIX):
                del sys.modules[name]


def _made(name: str, parts: Parts, make: prepared.MakeSplits, outline: bool) -> Splits:
    settings = parse_settings(parts.settings, make, parts.function)
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
        raise TaskError(f"{parts.path}:{parts.function} returned {type(splits).__name__}; expected lolo.Splits.")
    for split, task in zip(Splits._fields, splits, strict=True):
        if not isinstance(task, Task) or task.size < 1 or task.batch < 1:
            raise TaskError(f"{name}: its {split} split is no lolo.Task with size and batch of 1 or more.")
    return splits if bound == 1.0 else augment.reparametrized(splits, bound)


def _function_of(path: Path, function: str) -> prepared.MakeSplits:
    spec = importlib.util.spec_from_file_location(f"{OWN_PREFIX}{path.stem}", path)
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
    return make


NAME = re.compile(r"(?:(?P<path>.+?\.py):)?(?P<function>[\w-]+)(?::(?P<settings>[^@]*))?(?:@(?P<sha256>[0-9a-f]{64}))?")


class Parts(NamedTuple):
    """A task's name, taken apart."""

    path: Path | None  # None for named tasks
    function: str
    settings: str  # "batch=8,width=64", or ""
    sha256: str | None


def _parts(name: str, folders: Sequence[Path] = HERE) -> Parts:
    """Raises TaskError for files that are not there, and for unknown names and settings of named tasks."""
    match = NAME.fullmatch(name)
    if match and match["path"]:
        path = _find(Path(match["path"]), folders, match["sha256"])
        return Parts(path, match["function"], match["settings"] or "", match["sha256"])
    known, _, settings = name.partition(":")
    if known not in TASKS:
        near = nearest(known, TASKS)
        raise TaskError(f"unknown task {name!r}; did you mean {near!r}? Your own: path.py:function.")
    parse_settings(settings, TASKS[known], known)
    return Parts(None, known, settings, None)


def _find(path: Path, folders: Sequence[Path], sha256: str | None) -> Path:
    """A task's file: the first with the sha256, else the first. Raises TaskError where there is none."""
    there = [folder / path for folder in folders if (folder / path).is_file()]
    if there:
        return next((file for file in there if len(there) > 1 and sha256_of(file) == sha256), there[0])
    if path.is_absolute():
        raise TaskError(f"task file {path} does not exist; give it as path.py:function.")
    if len(folders) == 1:
        here = Path.cwd() / folders[0]
        raise TaskError(
            f"task file {path} does not exist in {here}, from where it is looked for; give it as path.py:function."
        )
    tried = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in folders))
    raise TaskError(
        f"task file {path} is in none of the folders where it is looked for: {tried}. Put it back into one."
    )
