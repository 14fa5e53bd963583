"""Rows of evaluations on disk."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lolo.evaluation import long_runs
from lolo.evaluation.statistics import Row
from lolo.files import disk, jsonl, settings
from lolo.files.disk import FileError


def slug(text: str) -> str:
    """A text as part of a file's name: "lolo replay.read=pop" -> "lolo-replay.read-pop"."""
    return re.sub(r"[^\w.+]+", "-", text).strip("-")


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines, completely or not at all."""
    disk.write_bytes(path, "".join(jsonl.json_line(dataclasses.asdict(row)) + "\n" for row in rows).encode())


_ROW_FIELDS: dict[str, Callable[[Any], Any]] = {
    "task": jsonl.string,
    "optimizer": jsonl.string,
    "meta_seed": lambda value: None if value is None else jsonl.whole_number(value),
    "seed": jsonl.whole_number,
    "steps": jsonl.whole_number,
    "train_loss": jsonl.number,
    "train_minimum": jsonl.number,
    "held_loss": jsonl.number,
    "held": jsonl.named(jsonl.number),
    "diverged": jsonl.flag,
    "train_curve": jsonl.listed(jsonl.number),
    "held_curve": jsonl.listed(jsonl.number),
}


def _row(row: Any) -> dict[str, Any]:
    row = jsonl.fields(**_ROW_FIELDS)(row)
    other = sorted(set(row) - set(_ROW_FIELDS))
    if other:
        raise ValueError(f"field {other[0]!r} is not of this version of lolo")
    points = len(long_runs.curve_steps(row["steps"]))
    if {len(row["train_curve"]), len(row["held_curve"])} != {points}:
        raise ValueError(f"its curves have no number for each {long_runs.WINDOW} of {row['steps']} steps")
    return row


def load_rows(path: Path) -> list[Row]:
    """Rows of `save_rows`, checked: one task, at least one row, curves of one length. Raises FileError."""
    rows = [Row(**row) for row in jsonl.read_json_lines(path, _row)]
    if not rows:
        raise FileError(f"{path}: holds no whole row.")
    shapes = {(row.task, row.steps, len(row.train_curve), len(row.held_curve)) for row in rows}
    if len(shapes) != 1:
        raise FileError(f"{path}: expected rows of one task and one number of steps, found {len(shapes)} kinds.")
    return rows


def file_name(task: str) -> str:
    """What the files of a task are named after: its name, or the name of the user's file and function; its settings."""
    match = settings.NAME.fullmatch(task)
    if not match:
        return task
    words = (match["path"] and Path(match["path"]).stem, match["function"], match["settings"])
    return "-".join(filter(None, words)).replace("/", "-")


def command_of(out: Path, task: str) -> str | None:
    """The command that wrote the report on a task in `out`; None where there is none. Raises FileError."""
    about = out / f"about-{file_name(task)}.json"
    if not about.exists():
        return None
    return jsonl.checked(jsonl.fields(command=jsonl.string), disk.read_json(about), str(about))["command"]
