"""What the race keeps on disk: trials of the search, targets, rows of runs. Large tables are gzipped JSON lines."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lolo.files import disk, jsonl

KEPT = Path(__file__).parent / "kept"
"""The published race: trials, targets, rows and step times, which come with the package."""

CURVE_DIGITS = 4  # behind the point, of the losses in a curve


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of the search."""

    workload: str
    kind: str  # a rival in `search.SPACES`
    learning_rate: float
    weight_decay: float
    warmup: float
    loss: float  # validation loss at the end


@dataclasses.dataclass(frozen=True)
class Target:
    """The validation loss that a workload's clock stops at, and where it comes from."""

    task: str  # in its held-out form, if it is one
    loss: float  # the median of `reruns`
    reference: str  # the optimizer that it comes from, as `lolo eval` names it
    reruns: list[float]  # its validation loss at the end, on five seeds


@dataclasses.dataclass(frozen=True)
class RaceRow:
    """One run of the race."""

    workload: str
    held_out: bool  # whether it ran on the workload's held-out form
    entrant: str
    optimizer: str  # with its settings, as `lolo eval` names it
    seed: int
    steps: int
    curve: list[float]  # validation loss after equal parts of the steps
    train_loss: float  # mean over the last of these parts
    test: dict[str, float]  # scores on the whole test split, at the end


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one training step on one core: model, gradient and optimizer."""

    workload: str
    entrant: str
    seconds: float  # a median
    device: str  # where it was measured


@dataclasses.dataclass(frozen=True)
class TransferRow:
    """One run of a transformer at one learning rate."""

    entrant: str
    contents: str  # sha256 of weights; "" for a rival
    optimizer: str  # with its learning rate, as `lolo eval` names it
    width: int
    depth: int
    seed: int
    steps: int
    loss: float  # validation loss at the end


@dataclasses.dataclass(frozen=True)
class ValidationRow:
    """One run on the data of the search, with as many steps."""

    workload: str
    optimizer: str  # with its settings, as `lolo eval` names it
    contents: str  # sha256 of weights or of a user's file; "" for a rival
    seed: int
    steps: int
    loss: float  # validation loss at the end


Record = TypeVar("Record", Trial, Target, RaceRow, StepTime, TransferRow, ValidationRow)

_READERS: dict[str, Callable[[Any], Any]] = {
    "str": jsonl.string,
    "int": jsonl.whole_number,
    "float": jsonl.number,
    "bool": jsonl.flag,
    "list[float]": jsonl.listed(jsonl.number),
    "dict[str, float]": jsonl.named(jsonl.number),
}


def write(path: Path, records: Sequence[Record]) -> None:
    """Records as JSON lines, completely or not at all; gzipped where the name ends in .gz."""
    content = "".join(jsonl.json_line(dataclasses.asdict(record)) + "\n" for record in records).encode()
    disk.write_bytes(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def with_new(there: Sequence[Record], new: Sequence[Record], key: Callable[[Any], Any]) -> list[Record]:
    """The records that are there, without those that have a new one's key, and the new ones behind them."""
    replaced = set(map(key, new))
    return [record for record in there if key(record) not in replaced] + list(new)


def read_part(path: Path, kind: type[Record]) -> list[Record]:
    """The same, of rows that a command makes again where their file is not there. Raises FileError, which says so."""
    try:
        return read(path, kind)
    except disk.FileError as error:
        raise disk.FileError(f"{error} Remove it, and its rows are made again.") from error


def read(path: Path, kind: type[Record]) -> list[Record]:
    """The records of `write`, each field checked; [] where there is no file. Raises FileError."""
    if not path.exists():
        return []
    fields = {field.name: _READERS[str(field.type)] for field in dataclasses.fields(kind)}
    found = []
    for row in jsonl.read_json_lines(path, jsonl.fields(**fields)):
        other = sorted(set(row) - set(fields))
        if other:
            raise disk.FileError(f"{path}: field {other[0]!r} is not of this version of lolo.")
        found.append(kind(**row))
    return found
