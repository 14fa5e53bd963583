"""From words on the command line to arguments of a function; what is wrong is one ValueError with tyro's words."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import re
from collections.abc import Callable, Collection
from typing import Any, TypeVar

import tyro

T = TypeVar("T")


def one_line(read: Callable[[], T]) -> T:
    """What `read` makes of the arguments. Where tyro draws a box and exits, a ValueError with the same words."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return read()
    except SystemExit as stopped:
        if stopped.code == 0:  # help was asked for, and is printed
            raise
        raise ValueError(re.sub(r"[\u2500-\u257f]|\+?-{3,}\+?", " ", heard.getvalue())) from None


def deferred(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """The command with the same arguments, which are bound: it runs when it is called again."""

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return bind


def as_flags(words: list[str], names: Collection[str]) -> list[str]:
    """Words in which the options of these names are `--name` or `--no-name`; `--name True`, `--name=False` come too."""
    found, words = [], list(words)
    while words:
        word = words.pop(0)
        name, separator, value = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_") in names:
            if not separator and words[:1] in (["True"], ["False"]):
                value = words.pop(0)
            elif separator and value not in ("True", "False"):
                option = name.replace("_", "-")
                raise ValueError(f"{option}={value}: {option} takes True or False, or nothing, which is True.")
            word = f"--no-{name[2:]}" if value == "False" else name
        found.append(word)
    return found


def call(command: Callable[..., int], argv: list[str], prog: str) -> int:
    """Run a function with the arguments of the command line. Raises ValueError for those that don't fit it."""
    parameters = inspect.signature(command).parameters.items()
    words = as_flags(argv, [name for name, parameter in parameters if isinstance(parameter.default, bool)])
    return one_line(lambda: tyro.cli(deferred(command), args=words, prog=prog))()
