"""Optimizers compared on a task: their rows, kept as they come, and the report on them.

A comparison's folder holds rows (`rows-TASK.jsonl`), what is known about them (`about-TASK.json`), report and pictures,
named alike; `parts/` keeps the rows of each optimizer as they come, `spent.jsonl` the time that each piece
of work took.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from pathlib import Path

from lolo.evaluation import long_runs, rivals
from lolo.evaluation.run_state import RunState
from lolo.evaluation.statistics import Row
from lolo.method.task import Splits
from lolo.optimizers import pretrained
from lolo.runtime import environment, interrupt
from lolo.studies import candidates, evaluation_folder, time_spent
from lolo.studies.rows import file_name, save_rows
from lolo.tasks import by_name


def evaluate(
    optimizers: Mapping[str, candidates.Named],
    task: str,
    steps: int,
    seeds: int,
    on_progress: interrupt.OnProgress = interrupt.no_progress,
    parts: Path | None = None,
    splits: Splits | None = None,
) -> tuple[list[Row], dict[str, pretrained.Weights]]:
    """Every optimizer on a task, from the same inits and batches.

    Args:
      optimizers: by name, as `candidates.read` gives them.
      parts: a folder that keeps the rows of each method as they come, and the state of the one under way; what is
        there is not done again.
      splits: of the task, by whoever has resolved it before: a user's task may take long to make.

    Returns: the rows, and the weights by label and meta-seed. Raises ValueError, FileError.
    """
    long_runs.check_steps(steps)
    splits = splits or by_name.resolve(task)
    files_of = {} if parts is None else evaluation_folder.part_files(parts, task, optimizers)
    for file in files_of.values():
        file.parent.mkdir(parents=True, exist_ok=True)

    def size(name: str) -> int:
        named = optimizers[name]
        picking = rivals.grid_size(named.name, named.learning_rate) if isinstance(named, candidates.NamedRival) else 0
        return (seeds + picking) * steps

    found = {
        name: evaluation_folder.kept_rows(file, task, steps, seeds, optimizers[name]) for name, file in files_of.items()
    }
    rows_of = {name: rows for name, rows in found.items() if rows}
    total, done = sum(map(size, optimizers)), sum(map(size, rows_of))

    def on_steps(count: int) -> None:
        nonlocal done
        done += count
        on_progress(f"evaluating on {task}", done, total, "")

    for members in together(optimizers, rows_of):
        keep = RunState(files_of[members[0]].with_suffix(".safetensors")) if files_of else None
        with time_spent.timed(parts.parent, f"evaluating {file_name(task)}") if parts else contextlib.nullcontext():
            grid = keep and keep.part("grid")
            entries = [candidates.candidate(optimizers[name], splits, steps, on_steps, keep=grid) for name in members]
            made = long_runs.compare(task, splits, entries, range(seeds), steps, on_steps=on_steps, keep=keep)
            environment.forget_programs()
        for name, entry in zip(members, entries, strict=True):
            rows_of[name] = [row for row in made if (row.optimizer, row.meta_seed) == (entry.label, entry.meta_seed)]
            if name in files_of:
                save_rows(files_of[name], rows_of[name])
        if keep is not None:
            keep.remove()
    rows = [row for name in optimizers for row in rows_of[name]]
    learned = [named for named in optimizers.values() if isinstance(named, candidates.NamedWeights)]
    return rows, {f"{named.label}, meta-seed {named.meta_seed}": named.weights for named in learned}


def together(optimizers: Mapping[str, candidates.Named], there: Collection[str]) -> list[list[str]]:
    """The names whose rows are not there; those of one label, which are meta-seeds of one method, run together."""
    groups: dict[str, list[str]] = {}
    for name, named in optimizers.items():
        if name not in there:
            groups.setdefault(named.label if isinstance(named, candidates.NamedWeights) else name, []).append(name)
    return list(groups.values())
