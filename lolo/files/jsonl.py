"""JSON lines: rows of logs and results, one JSON object per line, each field checked when it is read."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lolo.files import disk
from lolo.files.disk import FileError

MAX_LOG_BYTES = 1 << 30


def json_line(row: dict[str, Any]) -> str:
    """One JSON object as a line. A number that JSON can't hold (NaN, inf) is written as a string."""
    return json.dumps(disk.json_safe(row), allow_nan=False)


def append_json_line(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON object to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_line(row) + "\n")


def number(value: Any) -> float:
    """A number of a row, where NaN and infinities are stored as strings. Raises ValueError."""
    if value in ("nan", "inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool)):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError(f"{str(value)[:40]!r} is not a number")


def whole_number(value: Any) -> int:
    """A whole number of a row, at least 0. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53:
        return value
    raise ValueError(f"{str(value)[:40]!r} is not a whole number from 0 to 2⁵³")


def string(value: Any) -> str:
    """A string of a row. Raises ValueError."""
    if isinstance(value, str):
        return value
    raise ValueError(f"{str(value)[:40]!r} is not a string")


def flag(value: Any) -> bool:
    """True or false in a row. Raises ValueError."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{str(value)[:40]!r} is neither true nor false")


def checked(read: Callable[[Any], Any], value: Any, what: str) -> Any:
    """The value that `read` returns. Raises FileError, which names `what`."""
    try:
        return read(value)
    except ValueError as error:
        raise FileError(f"{what}: {error}.") from error


def listed(item: Callable[[Any], Any], least: int = 0) -> Callable[[Any], list[Any]]:
    """A list in a row of at least `least` elements, each read by `item`."""

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise ValueError(f"{str(value)[:40]!r} is not a list{f' of at least {least}' if least else ''}")
        return [item(element) for element in value]

    return read


def named(item: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """An object in a row, each of its values read by `item`."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{str(value)[:40]!r} is not an object")
        return {key: item(element) for key, element in value.items()}

    return read


def fields(**readers: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """A row that must have these fields, each read by its reader; other fields are kept as they are."""

    def read(row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise ValueError("is not a JSON object")
        for name, reader in readers.items():
            if name not in row:
                raise ValueError(f"field {name!r} is missing")
            try:
                row[name] = reader(row[name])
            except ValueError as error:
                raise ValueError(f"field {name!r}: {error}") from error
        return row

    return read


def read_json_lines(path: Path, read: Callable[[Any], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a log, each checked by `read`, which raises ValueError (see `fields`). Raises FileError.

    A half-written last line, as a killed run leaves it, is skipped. A name that ends in .gz is of a gzipped log.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(MAX_LOG_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FileError(f"{path}: can't be read ({getattr(error, 'strerror', None) or error}).") from error
    if len(content) > MAX_LOG_BYTES:
        raise FileError(f"{path}: over {MAX_LOG_BYTES} bytes, the most that are read.")
    lines = content.split(b"\n")
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if count == len(lines):
                return
            raise FileError(f"{path}, line {count}: not valid JSON ({error}).") from error
        try:
            checked = read(row)
        except ValueError as error:
            raise FileError(f"{path}, line {count}: {error}.") from error
        yield checked
