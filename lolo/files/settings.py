"""Settings as frozen dataclasses: dotted names of fields, differences, strict parsing, and "did you mean"."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

S = TypeVar("S")  # a frozen dataclass of settings, sections in it being dataclasses too


class RecipeError(ValueError):
    """A recipe that can't be built; says which field, which value, and what to do."""


def fields(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name: {"tasks": ..., "learner.hidden": 32, ...}."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            flat |= fields(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def diff(a: S, b: S) -> dict[str, tuple[Any, Any]]:
    """The fields in which two recipes differ: dotted name -> (value in a, value in b)."""
    ours, theirs = fields(a), fields(b)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def with_field(recipe: S, name: str, value: Any) -> S:
    """The recipe with one field, named by its dotted name, set to `value`."""
    if name not in fields(recipe):
        raise unknown("recipe field", name, fields(recipe))
    section, _, field = name.rpartition(".")
    if section:
        value = dataclasses.replace(getattr(recipe, section), **{field: value})
    return dataclasses.replace(typing.cast(Any, recipe), **{section or field: value})


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that is most like `name`."""
    return difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the nearest known one as a question, then all of them."""
    known = list(known)
    return f"did you mean {nearest(name, known)!r}? Known: {', '.join(known)}."


def unknown(what: str, name: str, known: Iterable[str]) -> RecipeError:
    """An error for a name that is not in `known`, with the nearest one that is."""
    return RecipeError(f"unknown {what} {name!r}; {did_you_mean(name, known)}")


def pick(table: dict[str, Any], field: str, name: str) -> Any:
    """`table[name]`, or an error that names the field and the nearest name."""
    if name not in table:
        raise unknown(field, name, table)
    return table[name]


def parse(kind: type, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise RecipeError(f"recipe field {prefix.rstrip('.')!r} must be an object, not {type(data).__name__}.")
    hints = typing.get_type_hints(kind)
    for name in data:
        if name not in hints:
            raise unknown("recipe field", prefix + str(name), [prefix + known for known in hints])
    missing = [prefix + name for name in hints if name not in data and prefix + name not in ADDED]
    if missing:
        raise RecipeError(f"recipe field {missing[0]!r} is missing.")
    return kind(**{name: _value(hints[name], data[name], prefix + name) for name in hints if name in data})


ADDED = ("learner.step_decay",)
"""Fields that recipes and weights written before do not have; they mean the default."""


def _value(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(typing.cast(type, hint), value, name + ".")
    if typing.get_origin(hint) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
    elif isinstance(hint, types.UnionType):
        if value is None:
            return None
        return _value(typing.get_args(hint)[0], value, name)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise RecipeError(f"recipe field {name!r} is too large for a float.") from None
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise RecipeError(f"recipe field {name!r} can't be {value!r}: expected {getattr(hint, '__name__', hint)}.")
