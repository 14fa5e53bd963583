"""Optimizers compared on a task: their rows, kept as they come, and the report on them.

A comparison's folder holds rows (`rows-TASK.jsonl`), what is known about them (`about-TASK.json`), table, report and
pictures, named alike; `parts/` keeps the rows of each optimizer as they come, `spent.jsonl` the time that each piece
of work took.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

from lolo.evaluation import baselines, long_runs
from lolo.evaluation.statistics import Row
from lolo.method.task import Splits
from lolo.optimizers import pretrained
from lolo.runtime import interrupt
from lolo.studies import candidates, evaluation_folder, time_spent
from lolo.studies.rows import file_name, save_rows
from lolo.tasks import by_name


def evaluate(
    names: Sequence[str | Path],
    task: str,
    steps: int,
    seeds: int,
    told: interrupt.OnProgress = interrupt.no_progress,
    parts: Path | None = None,
    methods: Mapping[str, str] = types.MappingProxyType({}),
    splits: Splits | None = None,
) -> tuple[list[Row], dict[str, pretrained.Weights]]:
    """Every named optimizer on a task, from the same inits and batches.

    Args:
      names: weights (a shipped name or a file, `:clock_limit=10000,weight_decay=0.1,schedule=cosine` after it for other
        use than they came with), `adamw:1e-3`, `adam:…`, `sgdm:…`, `adamw:grid`.
      parts: a folder that keeps the rows of each method as they come; those found there are not made again.
      methods: as `named_weights` takes them.
      splits: of the task, by whoever has resolved it before: a user's task may take long to make.

    Returns: the rows, and the weights by label and meta-seed. Raises ValueError, FileError.
    """
    unique = candidates.distinct(names)  # what is wrong with a name is said now rather than after hours
    long_runs.check_steps(steps)
    named = candidates.named_weights(unique, methods)
    splits = splits or by_name.resolve(task)
    files_of = {} if parts is None else evaluation_folder.part_files(parts, task, unique, named)
    for file in files_of.values():
        file.parent.mkdir(parents=True, exist_ok=True)

    def size(name: str) -> int:
        return (seeds + baselines.grid_size(name)) * steps

    found = {
        name: evaluation_folder.kept_rows(file, task, steps, seeds, named.get(name)) for name, file in files_of.items()
    }
    rows_of = {name: rows for name, rows in found.items() if rows}
    total, done = sum(map(size, unique)), sum(map(size, rows_of))

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        told(f"evaluating on {task}", done, total, "")

    groups: dict[str, list[str]] = {}  # those of one label run together
    for name in unique:
        if name not in rows_of:
            groups.setdefault(named[name].label if name in named else name, []).append(name)
    for members in groups.values():
        with time_spent.timed(parts.parent, f"evaluating {file_name(task)}") if parts else contextlib.nullcontext():
            entries = [candidates.candidate(name, named, splits, steps, advanced) for name in members]
            made = long_runs.compare(task, splits, entries, range(seeds), steps, on_steps=advanced)
        for name, entry in zip(members, entries, strict=True):
            rows_of[name] = [row for row in made if (row.optimizer, row.meta_seed) == (entry.label, entry.meta_seed)]
            if name in files_of:
                save_rows(files_of[name], rows_of[name])
    rows = [row for name in unique for row in rows_of[name]]
    return rows, {f"{label}, meta-seed {seed}": weights for label, seed, weights, _ in named.values()}
