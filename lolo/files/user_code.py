"""Functions in a user's own file, by name: `path.py:function`, `path.py:function:depth=2,width=64`, `…@sha256`.

`kind` says what the function makes, for messages: "task", "optimizer".
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lolo.files.disk import sha256_of
from lolo.files.settings import NAME, UserCodeError, defaults_of, failures_of, key_of, parse_settings

HERE = (Path(),)
PREFIX = "lolo_user_"  # of the names under which files are imported
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages, which are no user's neighbours

# (path as it was given, function, sha256 of the file) -> it. Equal files in two folders may have other neighbours.
_LOADED: dict[tuple[str | None, ...], Callable[..., Any]] = {}


class Name(NamedTuple):
    """A function's name, taken apart."""

    path: Path
    function: str
    settings: str  # "batch=8,width=64", or ""
    sha256: str | None


def load(name: str, kind: str, returns: str, folders: Sequence[Path] = HERE) -> str:
    """Run the file of `path.py:function`; `loaded` finds the function from then on.

    A name with a sha256 means the function that it meant before, if it did; where `folders` are given, the file is
    looked for and run again. Returns the name with the file's sha256. Raises UserCodeError: no such file or function, a
    file that has changed, settings that the function does not have.
    """
    if tuple(folders) == HERE and key_of(name) in _LOADED:
        return name
    own = parse(name, kind, folders)
    if own is None:
        raise UserCodeError(f"{name!r} is no {kind} of a file; give path.py:function.")
    sha256 = checked_sha256(own)
    with neighbours(own.path.absolute().parent):
        function = function_of(own, kind, returns)
    parse_settings(own.settings, defaults_of(function), own.function)
    pinned = name if own.sha256 else f"{name}@{sha256}"
    _LOADED[key_of(pinned)] = _beside_neighbours(function, own)
    return pinned


def loaded(name: str) -> Callable[..., Any]:
    """The function that a name from `load` means. Raises UserCodeError: `load` has not run its file."""
    function = _LOADED.get(key_of(name))
    if function is None:
        raise UserCodeError(f"{name}: its file has not been run.")
    return function


def _beside_neighbours(function: Callable[..., Any], own: Name) -> Callable[..., Any]:
    """The function, which may import its file's neighbours when it is called. Its exceptions become UserCodeError."""
    folder = own.path.absolute().parent

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with failures_of(f"{own.path}:{own.function}"), neighbours(folder):
            return function(*args, **kwargs)

    return call


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
    module_name = f"{PREFIX}{kind.replace('.', '_')}_{name.path.stem}"
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
