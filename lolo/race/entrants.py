"""Who takes part in the race, and the runs of one entrant on one workload."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

from lolo.evaluation import long_runs
from lolo.race import records, search, tuning, workloads
from lolo.race.records import RaceRow
from lolo.studies import candidates
from lolo.studies.candidates import Named
from lolo.studies.evaluation_folder import contents_of
from lolo.studies.rows import slug

SEEDS = 3


@dataclasses.dataclass(frozen=True)
class Entrant:
    """An optimizer in the race."""

    name: str
    optimizers: tuple[str, ...]  # up to five settings, as `lolo eval` names them; the first is for self-tuning
    meta_tasks: tuple[str, ...] = ()  # that its φ was meta-trained on
    code: tuple[Path, ...] = ()  # files that may be run, of weights whose architecture is a user's function

    def __post_init__(self) -> None:
        if not 1 <= len(self.optimizers) <= search.FIVE:
            raise ValueError(f"{self.name} has {len(self.optimizers)} settings; expected 1 to {search.FIVE}.")


def rival(kind: str, found: Sequence[records.Trial]) -> Entrant:
    """A rival with the settings that the search found."""
    return Entrant(kind, tuple(tuning.names_of(found, tuning.rival(kind))))


def entrant(optimizer: str, settings: Sequence[str] = (), name: str = "", code: Sequence[Path] = ()) -> Entrant:
    """An optimizer as `lolo eval` names it, with several settings if it has some. Raises ValueError.

    name: what it is called in tables and pictures; its optimizer's, if empty. code: as `Entrant` has it.

    >>> entrant("adamw:1e-3").optimizers
    ('adamw:1e-3',)
    >>> entrant("lolo-small", ("schedule=cosine", "schedule=cosine,step_scale=2")).optimizers[1]
    'lolo-small:schedule=cosine,step_scale=2'
    """
    names = [candidates.with_settings(optimizer, words) for words in settings] or [optimizer]
    return _entrant(name or optimizer, names, code)


def searched(of: tuning.Searched, found: Sequence[records.Trial]) -> Entrant:
    """Weights with the settings that the search found."""
    return _entrant(of.name, tuning.names_of(found, of), of.code)


def _entrant(name: str, optimizers: Sequence[str], code: Sequence[Path]) -> Entrant:
    named = candidates.read(optimizers, code=code)
    tuning.check_no_grid(named, "in a race")
    recipe = {task for one in named.values() for task in meta_tasks(one)}
    return Entrant(name, tuple(optimizers), tuple(sorted(recipe)), tuple(code))


def meta_tasks(named: Named) -> tuple[str, ...]:
    """The tasks that an optimizer's φ was meta-trained on, by its recipe; () without one, and for an untrained φ."""
    if not isinstance(named, candidates.NamedWeights) or named.deployment.untrained:
        return ()
    return tuple(named.weights.recipe.get("tasks", ()))


def part_file(out: Path, workload: str, optimizer: str, named: Named, parts: str = "parts") -> Path:
    """Where the rows of one optimizer on one workload are kept: by its name, and what is in its weights or its file."""
    unique = hashlib.sha256(f"{optimizer} {contents_of(named)}".encode()).hexdigest()[:8]
    return out / parts / workload / f"{slug(optimizer)[-120:]}-{unique}.jsonl"


def run_on(
    of: Entrant, workload: str, seeds: int, out: Path, on_steps: tuning.OnSteps = lambda steps: None
) -> list[RaceRow]:
    """All runs of an entrant on a workload: each setting on each seed, the first on the held-out form too.

    Rows are kept in `out` as they come; those found there are not made again. Raises ValueError, FileError.
    """
    named = candidates.read(of.optimizers, code=of.code)
    files = {name: part_file(out, workload, name, one) for name, one in named.items()}
    rows = {name: records.read_part(file, RaceRow) for name, file in files.items()}
    for held_out, names in ((False, list(named)), (True, [of.optimizers[0]])):
        missing = {name: named[name] for name in names if not is_complete(rows[name], workload, seeds, held_out)}
        for group in tuning.together(missing, task_of(workload, held_out), workloads.WORKLOADS[workload].steps):
            for name, made in _rows(of, workload, held_out, group, seeds, on_steps).items():
                rows[name] = [*(row for row in rows[name] if row.held_out != held_out), *made]
                records.write(files[name], rows[name])
    # Entrants may have a setting in common, and its rows; only the first setting's count on the held-out form.
    return [
        dataclasses.replace(row, entrant=of.name)
        for name in named
        for row in rows[name]
        if row.seed < seeds and (not row.held_out or name == of.optimizers[0])
    ]


def is_complete(rows: Sequence[RaceRow], workload: str, seeds: int, held_out: bool) -> bool:
    """Whether there are rows of this workload, or of its held-out form, for all seeds."""
    steps = workloads.WORKLOADS[workload].steps
    there = {(row.workload, row.held_out, row.seed, row.steps) for row in rows}
    return there >= {(workload, held_out, seed, steps) for seed in range(seeds)}


def of_today(rows: Sequence[RaceRow], of: Entrant, out: Path) -> list[RaceRow]:
    """Rows without those that were made under the entrant's name by other settings, other weights or another file."""
    named = candidates.read(of.optimizers, code=of.code)

    def stays(row: RaceRow) -> bool:
        if row.entrant != of.name:
            return True
        if row.optimizer not in named or (row.held_out and row.optimizer != of.optimizers[0]):
            return False
        file = part_file(out, row.workload, row.optimizer, named[row.optimizer])
        before = file.name.rpartition("-")[0]
        return file.exists() or not any(x.name.rpartition("-")[0] == before for x in file.parent.glob("*.jsonl"))

    return [row for row in rows if stays(row)]


def task_of(workload: str, held_out: bool) -> str:
    """The task of a workload, or of its held-out form."""
    of = workloads.WORKLOADS[workload]
    return workloads.variant_of(of) if held_out else of.task


def _rows(
    of: Entrant,
    workload: str,
    held_out: bool,
    group: dict[str, long_runs.Candidate],
    seeds: int,
    on_steps: tuning.OnSteps,
) -> dict[str, list[RaceRow]]:
    steps = workloads.WORKLOADS[workload].steps
    curves = tuning.run(task_of(workload, held_out), list(group.values()), range(seeds), steps, on_steps)
    found: dict[str, list[RaceRow]] = {name: [] for name in group}
    for k, (name, seed) in enumerate((name, seed) for name in group for seed in range(seeds)):
        curve = [round(float(x), records.CURVE_DIGITS) for x in curves.held_loss[k]]
        test = {score: round(float(values[k]), 6) for score, values in curves.final.items()}
        train = round(float(curves.train_loss[k, -1]), 6)
        found[name].append(RaceRow(workload, held_out, of.name, name, seed, steps, curve, train, test))
    return found
