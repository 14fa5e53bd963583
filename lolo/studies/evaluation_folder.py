"""The folder of an evaluation: rows of each optimizer as they come, kept from being lost or mixed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lolo.evaluation import long_runs, rivals, schedules
from lolo.evaluation.statistics import Row
from lolo.files import disk, jsonl, tensors
from lolo.files.disk import FileError
from lolo.optimizers import architecture, pretrained
from lolo.runtime import environment
from lolo.runtime.process_group import ALONE
from lolo.studies import candidates
from lolo.studies.rows import command_of, file_name, load_rows, slug
from lolo.tasks import by_name
from lolo.training import run_start
from lolo.training.run_folder import RunError


def part_files(parts: Path, task: str, optimizers: Mapping[str, candidates.Named]) -> dict[str, Path]:
    """Where the rows of each name are kept: weights by what is in them, rivals by what they are."""
    place = file_name(task) + "".join(by_name.pin(task).partition("@")[1:])[:9]  # of a user's file: how its sum begins

    def part(named: candidates.Named) -> str:
        if not isinstance(named, candidates.NamedRival):
            return f"{slug(named.label)[:160]}-{contents_of(named)[:8]}.jsonl"
        name, rate, *others = named
        words = [rate if isinstance(rate, str) else f"{rate:g}"]
        if others != [rivals.WEIGHT_DECAY, schedules.WARMUP]:
            words += [f"{x:g}" for x in others]
        return slug("-".join([name, *words])) + ".jsonl"

    return {name: parts / place / part(named) for name, named in optimizers.items()}


def contents_of(named: candidates.Named) -> str:
    """What tells two optimizers of one name apart: sha256 of weights or of a user's file; "" for a rival."""
    if isinstance(named, candidates.NamedWeights):
        return hashlib.sha256(_contents(named).encode()).hexdigest()
    return named.sha256 if isinstance(named, candidates.NamedFunction) else ""


def phi_digest(weights: pretrained.Weights) -> str:
    """Of φ alone."""
    return tensors.digest({name: np.asarray(x) for name, x in weights.meta_params.items()})


def _contents(named: candidates.NamedWeights) -> str:
    """A digest of deployed weights: φ, and the settings that they came with where these are not their recipe's."""
    weights, changes = named.weights, named.deployment.learner
    digest = phi_digest(weights)
    learner, own = dataclasses.asdict(weights.learner), weights.recipe.get("learner", {})
    meta_trained = dataclasses.asdict(architecture.learner_from_dict(own, "recipe")) if own else {}
    return digest if learner | changes == meta_trained | changes else f"{digest} {learner}"


def _part_rows(file: Path) -> list[Row]:
    try:
        return load_rows(file)
    except FileError as error:
        raise FileError(f"{error} Remove it, and its rows are made again.") from error


def kept_rows(file: Path, task: str, steps: int, seeds: int, named: candidates.Named) -> list[Row] | None:
    """Rows of a part, if it is there and holds this task's, `steps` long, one for each seed, of this optimizer."""
    if not file.exists():
        return None
    rows = _part_rows(file)
    label, meta_seed = rows[0].optimizer, None  # of a grid's best, which is not known before
    if isinstance(named, candidates.NamedWeights):
        label, meta_seed = named.label, named.meta_seed
    elif isinstance(named, candidates.NamedFunction):
        label = named.label
    wanted = [(task, steps, label, meta_seed, seed) for seed in range(seeds)]
    there = [(row.task, row.steps, row.optimizer, row.meta_seed, row.seed) for row in rows]
    return rows if sorted(there, key=lambda of: of[-1]) == wanted else None


@contextlib.contextmanager
def evaluation_folder(
    out: Path, task: str, optimizers: Mapping[str, candidates.Named], steps: int, seeds: int
) -> Iterator[Path]:
    """Keep a folder to one evaluation by `lolo eval`. Gives the folder of its parts.

    The folder may be empty, or hold an evaluation of the same task, steps and seeds: this one resumes it, and further
    optimizers come to it. Raises RunError where rows would be lost or mixed with others, FileError for damaged
    ones. What a user's task reads besides its own file is not looked at.
    """
    long_runs.check_steps(steps)
    if (out / "recipe.json").exists():
        raise RunError(f"{out} already holds recipe.json of a run; give another --out.")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise RunError(f"{out} can't be written ({nearest} is in the way); give another --out.")
    out.mkdir(parents=True, exist_ok=True)
    with run_start.exclusive(out, ALONE):
        if (command := command_of(out, task)) and not command.startswith("lolo eval "):
            raise RunError(f"{out} already holds what {command!r} wrote; give another --out.")
        kept = part_files(out / "parts", task, optimizers)
        path = out / f"rows-{file_name(task)}.jsonl"
        before = [file for file in kept.values() if file.exists()]
        found = [*map(_part_rows, before), *([load_rows(path)] if path.exists() else ())]
        for rows in found:
            there = rows[0].task, rows[0].steps, len({row.seed for row in rows})
            if there != (task, steps, seeds):
                words = f"{there[0]}, {there[1]:,} steps, seeds 0 to {there[2] - 1}"
                raise RunError(f"{out} already holds rows of {words}; give another --out.")
        if path.exists():
            require_all(out, found[-1], found[:-1])
        require_versions(out, out / "parts" / "versions.json")
        yield out / "parts"


def require_versions(out: Path, file: Path) -> None:
    """Raise RunError unless `file` names the versions of today; write it where there is none."""
    if not file.exists():
        disk.write_json(file, environment.versions())
    versions = jsonl.checked(jsonl.named(jsonl.string), disk.read_json(file), str(file))
    if versions != environment.versions():
        made_with = environment.in_words(versions)
        raise RunError(f"{out} already holds rows made with {made_with}; give another --out.")


def require_all(out: Path, reported: Sequence[Row], kept: Sequence[Sequence[Row]]) -> None:
    """Raise RunError unless all rows of a report are kept."""
    again = {jsonl.json_line(dataclasses.asdict(row)) for rows in kept for row in rows}
    lost = {row.optimizer for row in reported if jsonl.json_line(dataclasses.asdict(row)) not in again}
    if lost:
        raise RunError(
            f"{out} already holds rows of {', '.join(sorted(lost))} that this command would drop: it does not name "
            "them, or weights or task have changed, or parts/ is incomplete. Name all that it holds and what is to "
            "come to it, or give another --out."
        )
