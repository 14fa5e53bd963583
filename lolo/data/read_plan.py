"""Read plans: the parts of a data set and how to read the rows of each. Readers return one to `lolo.data.prepare`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lolo.data.errors import DataError
from lolo.files import disk

VALIDATION_STRIDE = 20
"""Every 20th example or document of a published training set, counted from its first, is validation: 5 %."""

SplitRows = tuple[str, dict[str, NDArray[Any]]]
"""The name of a split, and the rows to append to each of its arrays."""


class ReadPart(NamedTuple):
    """A part of a data set, such as one archive, read completely or not at all. Rows are in the order of parts."""

    name: str  # the same in every run on the same source
    weight: int  # bytes of source, for the progress bar
    rows: Callable[[Path], Iterator[SplitRows]]  # scratch folder -> pieces of bounded size, in order


class ReadPlan(NamedTuple):
    """All parts of a data set. `info` goes into the manifest: format, kind, classes or vocabulary, notes."""

    parts: list[ReadPart]
    info: dict[str, Any]


@contextlib.contextmanager
def untrusted(file: Path | str, expected: str) -> Iterator[None]:
    """Turn whatever a parser raises about a damaged file into `DataError`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        problem = f"can't be read as {expected} ({reason})"
        raise DataError.at(file, problem, "fetch or make the file again") from error


def split_examples(arrays: dict[str, NDArray[Any]], start: int) -> Iterator[SplitRows]:
    """Rows of a published training set, divided into train and validation.

    arrays: [n, ...] each. start: index of their first row in its source file.
    """
    n = len(next(iter(arrays.values())))
    held_out = (start + np.arange(n)) % VALIDATION_STRIDE == 0
    for split, mask in (("train", ~held_out), ("validation", held_out)):
        if mask.any():
            yield split, {name: array[mask] for name, array in arrays.items()}


def existing(source: Path | None, name: str) -> Path:
    """`source` if there is such a file or folder.

    Raises:
        DataError: none was given, or it is not there.
    """
    if source is None:
        raise DataError(f"{name} is read from files: say which folder or file holds them.")
    if not source.exists():
        raise DataError.at(source, "there is no such file or folder", f"give the one that holds {name}")
    return source


def files_of(place: Path) -> list[Path]:
    """The file itself, or a folder's files in the order of names, without hidden ones."""
    if not place.is_dir():
        return [place]
    shown = (path for path in place.iterdir() if not path.name.startswith(".") and not disk.is_litter(path))
    return sorted(path for path in shown if path.is_file())


def check_labels(labels: NDArray[Any], low: int, high: int, name: Path | str, start: int = 0) -> None:
    """labels: int [n]. Raises DataError, naming the row, if one is outside low..high."""
    wrong = np.flatnonzero((labels < low) | (labels > high))
    if len(wrong):
        row = int(wrong[0])
        problem = f"label {labels[row]}, expected {low}..{high}"
        raise DataError.at(
            name, problem, "fetch the file again, or check that it is this data set", f"row {start + row}"
        )


def grouped(groups: list[Any], rows: int, unpacked_bytes: int = 256 << 20) -> list[list[int]]:
    """Indices of a parquet file's row groups, in runs that one child process reads.

    groups: (rows, unpacked bytes) of each. A run ends when it reaches `rows` or `unpacked_bytes`.
    """
    runs: list[list[int]] = []
    room = (0, 0)
    for i, (n, size) in enumerate(groups):
        if min(room) <= 0:
            runs.append([])
            room = (rows, unpacked_bytes)
        runs[-1].append(i)
        room = (room[0] - n, room[1] - size)
    return runs
