"""Functions in a user's own file, by name: `path.py:function`, `path.py:function:depth=2,width=64`, `…@sha256`.

`kind` says what the function makes, for messages: "task", "optimizer".
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lolo.files.disk import sha256_of
from lolo.files.settings import did_you_mean

NAME = re.compile(r"(?:(?P<path>.+?\.py):)?(?P<function>[\w-]+)(?::(?P<settings>[^@]*))?(?:@(?P<sha256>[0-9a-f]{64}))?")
HERE = (Path(),)
PREFIX = "lolo_user_"  # of the names under which files are imported
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages, which are no user's neighbours


class UserCodeError(ValueError):
    """A user's function that can't be found, has changed, or can't be imported."""


class Name(NamedTuple):
    """A function's name, taken apart."""

    path: Path
    function: str
    settings: str  # "batch=8,width=64", or ""
    sha256: str | None


def parse(name: str, kind: str, folders: Sequence[Path] = HERE) -> Name | None:
    """None for a name without a file. Raises UserCodeError where the file is in none of `folders`."""
    match = NAME.fullmatch(name)
    if not match or not match["path"]:
        return None
    path = _find(Path(match["path"]), kind, folders, match["sha256"])
    return Name(path, match["function"], match["settings"] or "", match["sha256"])


def _find(path: Path, kind: str, folders: Sequence[Path], sha256: str | None) -> Path:
    """The first file with the sha256, else the first."""
    there = [folder / path for folder in folders if (folder / path).is_file()]
    if there:
        return next((file for file in there if len(there) > 1 and sha256_of(file) == sha256), there[0])
    if path.is_absolute():
        raise UserCodeError(f"{kind} file {path} does not exist; give it as path.py:function.")
    if len(folders) == 1:
        here = Path.cwd() / folders[0]
        raise UserCodeError(
            f"{kind} file {path} does not exist in {here}, from where it is looked for; give it as path.py:function."
        )
    tried = ", ".join(dict.fromkeys(str(folder.absolute()) for folder in folders))
    raise UserCodeError(
        f"{kind} file {path} is in none of the folders where it is looked for: {tried}. Put it back into one."
    )


def checked_sha256(name: Name) -> str:
    """The file's sha256. Raises UserCodeError if the name has another one."""
    actual = sha256_of(name.path)
    if name.sha256 is not None and name.sha256 != actual:
        raise UserCodeError(
            f"{name.path} has changed since the recipe was made: its sha256 is {actual}, not {name.sha256}."
        )
    return actual


def function_of(name: Name, kind: str, returns: str) -> Callable[..., Any]:
    """Import the file, under a module name of its own, and give the function. Runs the file's code.

    returns: what the function should return, for the message where there is none. Raises UserCodeError.
    """
    module_name = f"{PREFIX}{kind}_{name.path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, name.path)
    if spec is None or spec.loader is None:
        raise UserCodeError(f"{name.path} can't be imported; a {kind} file is Python source, named path.py:function.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # as import does: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserCodeError(f"{name.path} can't be imported: {type(error).__name__}: {error}.") from error
    function = getattr(module, name.function, None)
    if not callable(function):
        raise UserCodeError(f"{name.path} has no function {name.function!r}; define one that returns {returns}.")
    return function


@contextlib.contextmanager
def neighbours(folder: Path) -> Iterator[None]:
    """Modules of a folder can be imported, as by a script that lies there; afterwards nothing is left of it.

    So a module of the same name beside another user's file is another module. Installed packages stay, wherever they
    lie, and so do packages of which a part was imported before.
    """
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in set(sys.modules) - before:
            if name.partition(".")[0] not in before and _lies_in(folder, name):
                del sys.modules[name]


def _lies_in(folder: Path, name: str) -> bool:
    """Whether a module is a file of the folder, or of a package there: what lies deeper was found in another place.

    So is `.venv/lib/python3.12/site-packages/scipy`, most often, and a package with compiled parts loads only once.
    """
    module = sys.modules[name]
    file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", [])), None)
    if not file or folder not in Path(file).parents or INSTALLED.intersection(Path(file).parts):
        return False
    return Path(file).relative_to(folder).parts[0].partition(".")[0] == name.partition(".")[0]


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments of a function that a name may set: those with a default of a plain type."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str)}


def parse_settings(text: str, known: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`batch=8,dtype=bfloat16` as keyword arguments, typed like the `known` ones. Raises UserCodeError."""
    given = {}
    for setting in text.split(",") if text else ():
        name, separator, value = setting.partition("=")
        if name not in known or not separator:
            hint = did_you_mean(name, known)
            raise UserCodeError(f"{setting!r} is no setting of {what!r}, which takes NAME=VALUE,NAME=VALUE; {hint}")
        given[name] = _typed(value, known[name], f"{what}: setting {name}")
    return given


def _typed(value: str, like: Any, what: str) -> Any:
    if isinstance(like, str):
        return value
    if isinstance(like, bool):
        if value.lower() not in ("true", "false"):
            raise UserCodeError(f"{what}={value!r} must be true or false.")
        return value.lower() == "true"
    try:
        return type(like)(value)
    except ValueError:
        raise UserCodeError(f"{what}={value!r} must be a number, such as {like}.") from None
