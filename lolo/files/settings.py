"""Settings as frozen dataclasses: dotted names of fields, differences, strict parsing, and "did you mean"."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

S = TypeVar("S")  # a frozen dataclass of settings, sections in it being dataclasses too
NONE: Mapping[str, Any] = types.MappingProxyType({})


class RecipeError(ValueError):
    """A recipe that can't be built; says which field, which value, and what to do.

    >>> try:
    ...     lolo.build(lolo.with_field(lolo.LOLO, "unroll.truncation", 30))
    ... except lolo.RecipeError as error:
    ...     print(error)
    unroll.length=1000 must be a multiple of unroll.truncation=30; try 990.
    """


NAME = re.compile(r"(?:(?P<path>.+?\.py):)?(?P<function>[\w-]+)(?::(?P<settings>[^@]*))?(?:@(?P<sha256>[0-9a-f]{64}))?")
"""What a user's own function is called: path, function, settings, sha256 of the file."""


class UserCodeError(ValueError):
    """A user's function that can't be found, has changed, or can't be imported."""


@dataclasses.dataclass(frozen=True)
class Alternative:
    """Settings of one of several alternatives, each a subclass with fields of its own; `name` says which one it is.

    A subclass gives `name` its default. All its fields have one.
    """

    name: str

    DROPPED: ClassVar[Mapping[str, Any]] = NONE  # former fields that old files have, with the values that they may have


def alternatives(default: Alternative, kinds: Callable[[], Mapping[str, type[Alternative]]]) -> Any:
    """A section whose type depends on its field `name`: `kinds` gives the types by name, as they are at the time."""
    return dataclasses.field(default=default, metadata={"kinds": kinds})


def added(default: Any) -> Any:
    """A field that files written before there was one do not have; they mean the default."""
    return dataclasses.field(default=default, metadata={"added": True})


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


def kinds_of(recipe: Any, section: str) -> Mapping[str, type[Alternative]]:
    """The types that a section of a recipe may have, by name; {} for one that has no alternatives."""
    found = (field.metadata for field in dataclasses.fields(recipe) if field.name == section)
    return next((metadata["kinds"]() for metadata in found if "kinds" in metadata), {})


def diff(a: S, b: S) -> dict[str, tuple[Any, Any]]:
    """The fields in which two recipes differ: dotted name -> (value in a, value in b).

    Where b has another alternative than a: its name, and the fields of b that differ from a's or, where a has none,
    from their defaults.
    """
    ours, theirs = _defaults(b) | fields(a), fields(b)
    return {name: (ours[name], value) for name, value in theirs.items() if ours[name] != value}


def differences(changed: Mapping[str, tuple[Any, Any]], ours: str, theirs: str) -> str:
    """The fields of a `diff` as words, "seed: 1 there, 2 requested; ..."; `ours` and `theirs` follow the values."""
    return "; ".join(f"{name}: {a!r} {ours}, {b!r} {theirs}" for name, (a, b) in changed.items())


def _defaults(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """Fields of the alternatives in a recipe, or of one that stands alone, with their default values."""
    if isinstance(recipe, Alternative):
        return fields(typing.cast(Any, type(recipe))(), prefix)
    sections = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    found = [_defaults(x, f"{prefix}{name}.") for name, x in sections.items() if dataclasses.is_dataclass(x)]
    return {name: value for flat in found for name, value in flat.items()}


def with_field(recipe: S, name: str, value: Any) -> S:
    """The recipe with one field, named by its dotted name, set to `value`.

    The name of another alternative changes the type of its section, whose fields then have their defaults. Raises
    RecipeError for an unknown name, and for a value of another type than the field's.

    >>> recipe = lolo.with_field(lolo.LOLO, "outer.steps", 200)
    >>> recipe.outer.steps
    200
    >>> lolo.with_field(recipe, "learner.name", "norm_fc").learner.hidden
    8
    """
    if name not in fields(recipe):
        raise unknown_field(recipe, name)
    section, _, field = name.rpartition(".")
    old: Any = getattr(recipe, section) if section else recipe
    kinds = kinds_of(recipe, section)
    if kinds and field == "name":
        new = old if value == old.name else typing.cast(Any, kind_named(kinds, name, value))(name=value)
    else:
        new = dataclasses.replace(old, **{field: _value(typing.get_type_hints(type(old))[field], value, name)})
    return dataclasses.replace(typing.cast(Any, recipe), **{section: new}) if section else new


OWN = "path.py:function"
"""The name of the alternative that a user's function is, whatever its own name."""


def is_own(name: Any) -> bool:
    """Whether a name is of a user's function: it has a file."""
    match = NAME.fullmatch(name) if isinstance(name, str) else None
    return match is not None and match["path"] is not None


def key_of(name: str) -> tuple[str | None, ...]:
    """What of a name says which function it is: all but the settings."""
    match = NAME.fullmatch(name)
    return match.group("path", "function", "sha256") if match else (name,)


def without_sha256(name: str) -> str:
    """The name as people write it."""
    return name.rpartition("@")[0] if is_own(name) and key_of(name)[-1] else name


@contextlib.contextmanager
def failures_of(what: str) -> Iterator[None]:
    """Turn what a user's code raises into a UserCodeError that names it. UserCodeError and RecipeError stay."""
    try:
        yield
    except (UserCodeError, RecipeError):
        raise
    except Exception as error:
        raise UserCodeError(f"{what} failed with {type(error).__name__}: {error}.") from error


def kind_named(kinds: Mapping[str, type[Alternative]], field: str, name: Any) -> type[Alternative]:
    """The type of an alternative. Raises RecipeError, which names the nearest one that there is."""
    if not isinstance(name, str):
        raise RecipeError(f"recipe field {field!r} can't be {name!r}: expected str.")
    if OWN in kinds and is_own(name):
        return kinds[OWN]
    return pick(dict(kinds), field, name)


def unknown_field(recipe: Any, name: str) -> RecipeError:
    """An error for a dotted name that is no field of a recipe: says which alternative has it, or what is near."""
    return field_of_another(recipe, name) or unknown("recipe field", name, fields(recipe))


def field_of_another(recipe: Any, name: str) -> RecipeError | None:
    """An error for a field that another alternative than the recipe's has; None where none has it."""
    section, _, field = name.rpartition(".")
    kinds = kinds_of(recipe, section)
    return _of_another(kinds, getattr(recipe, section).name, section, field) if kinds else None


def _of_another(kinds: Mapping[str, type[Alternative]], mine: Any, section: str, field: str) -> RecipeError | None:
    """An error for a field that this alternative lacks and another one has; None where none has it."""
    owners = [name for name, kind in kinds.items() if field in {known.name for known in dataclasses.fields(kind)}]
    if not owners:
        return None
    return RecipeError(
        f"{section}.name={mine!r} has no {field}; leave it out, or use {section}.name={' or '.join(map(repr, owners))}."
    )


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


def parse(kind: type, data: Any, prefix: str, kinds: Mapping[str, type[Alternative]] = NONE) -> Any:
    """Settings of this type, one of `kinds` if there are any, from JSON data. Raises RecipeError, which names fields by
    `prefix` and their name."""
    section = prefix.rstrip(".")
    if not isinstance(data, dict):
        raise RecipeError(f"recipe field {section!r} must be an object, not {type(data).__name__}.")
    known = {field.name: field for field in dataclasses.fields(kind)}
    dropped = kind.DROPPED if issubclass(kind, Alternative) else {}
    data = {name: value for name, value in data.items() if name not in dropped or value != dropped[name]}
    for name in data:
        if name not in known:
            raise _of_another(kinds, data.get("name"), section, str(name)) or unknown(
                "recipe field", prefix + str(name), [prefix + field for field in known]
            )
    missing = [prefix + name for name, field in known.items() if name not in data and "added" not in field.metadata]
    if missing:
        raise RecipeError(f"recipe field {missing[0]!r} is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _field(known[name], hints[name], value, prefix + name) for name, value in data.items()})


def parse_alternative(kinds: Mapping[str, type[Alternative]], data: Any, section: str) -> Any:
    """Settings of the alternative that the data name. Raises RecipeError."""
    if not isinstance(data, dict):
        return parse(Alternative, data, f"{section}.")
    if "name" not in data:
        raise RecipeError(f"recipe field '{section}.name' is missing.")
    return parse(kind_named(kinds, f"{section}.name", data["name"]), data, f"{section}.", kinds)


def _field(field: dataclasses.Field, hint: Any, value: Any, name: str) -> Any:
    if "kinds" in field.metadata:
        return parse_alternative(field.metadata["kinds"](), value, name)
    return _value(hint, value, name)


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
    elif hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise RecipeError(f"recipe field {name!r} is too large for a float.") from None
    elif hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)  # of NumPy too
    elif hint is not int and isinstance(value, hint):
        return value
    raise RecipeError(f"recipe field {name!r} can't be {value!r}: expected {getattr(hint, '__name__', hint)}.")


def check_numbers(
    values: Mapping[str, Any],
    at_least_one: Collection[str] = (),
    positive: Collection[str] = (),
    not_negative: Collection[str] = (),
) -> None:
    """Raise RecipeError unless the named values are in their ranges; NaN and infinity are in none."""
    for name in at_least_one:
        if values[name] < 1:
            raise RecipeError(f"{name}={values[name]} must be at least 1.")
    for name in positive:
        if not (math.isfinite(values[name]) and values[name] > 0):
            raise RecipeError(f"{name}={values[name]} must be a positive number.")
    for name in not_negative:
        if not (math.isfinite(values[name]) and values[name] >= 0):
            raise RecipeError(f"{name}={values[name]} must be 0 or a positive number.")


def number(value: Any, *, positive: bool = False, endless: bool = False) -> float:
    """The number that a value is, or a word of a command line. Raises ValueError, which says what it must be.

    `positive`: not 0. `endless`: infinity counts as a number.
    """
    try:
        found = float(value)
    except (ValueError, OverflowError):
        found = -1.0
    if not found >= 0 or (positive and not found) or not (endless or math.isfinite(found)):
        raise ValueError(f"must be {'0 or ' * (not positive)}a positive number.")
    return found


def defaults_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword arguments of a function that a name may set: those with a default of a plain type."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, bool | int | float | str)}


def parse_settings(text: str, known: Mapping[str, Any], what: str) -> dict[str, Any]:
    """`batch=8,dtype=bfloat16` as keyword arguments, typed like the `known` ones. Raises UserCodeError."""
    given = {}
    for setting in text.split(",") if text else ():
        name, separator, value = setting.partition("=")
        if name in given:
            raise UserCodeError(f"{what}: setting {name} is given twice.")
        if name not in known or not separator:
            none = "which has none: a setting is an argument whose default is a number, a word, or True or False."
            takes = f"which takes NAME=VALUE,NAME=VALUE; {did_you_mean(name, known)}" if known else none
            raise UserCodeError(f"{setting!r} is no setting of {what!r}, {takes}")
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


def with_settings(function: Callable[..., Any], words: str | None) -> Callable[..., Any]:
    """A user's function with the settings that stand in its name. Raises UserCodeError."""
    given = parse_settings(words or "", defaults_of(function), getattr(function, "__name__", "the function"))
    return functools.partial(function, **given) if given else function
