"""The stages of a race, each resumed where it was stopped: search, targets, runs, step times."""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from lolo.files import disk
from lolo.files.disk import FileError
from lolo.race import entrants, records, results, search, step_times, transfer, tuning, validation, workloads
from lolo.race.entrants import Entrant
from lolo.race.records import KEPT, RaceRow, StepTime, Target, TransferRow, Trial, ValidationRow
from lolo.race.results import Form
from lolo.runtime import environment, interrupt, parallel
from lolo.studies import candidates, style
from lolo.studies.rows import slug

TRIALS_FILE, ROWS_FILE, TRANSFER_FILE = "trials.jsonl.gz", "rows.jsonl.gz", "transfer.jsonl.gz"
TARGETS_FILE, TIMES_FILE = "targets.jsonl", "step-times.jsonl"


RUN_OF = operator.attrgetter("entrant", "workload")  # of rows and step times; new ones replace those of equal keys


class Race(NamedTuple):
    """All that is known of a race."""

    trials: list[Trial]
    targets: Mapping[Form, Target]
    rows: list[RaceRow]
    step_times: list[StepTime]


def source_of(out: Path) -> Path:
    """Where trials and targets come from: a folder's own, if it was raced from scratch, else the published ones."""
    return out if (out / TARGETS_FILE).exists() else KEPT


def read(out: Path, only: Sequence[str] = ()) -> Race:
    """The race in a folder, on top of the published one unless it has targets of its own. Raises FileError.

    only: these workloads; none: all. An entrant's rows in the folder replace all that were published under its name.
    """
    source = source_of(out)
    mine = records.read(out / ROWS_FILE, RaceRow)
    names = {row.entrant for row in mine}
    others = (
        [] if source == out else [row for row in records.read(source / ROWS_FILE, RaceRow) if row.entrant not in names]
    )
    own = records.read(out / TIMES_FILE, StepTime)
    again = {t.workload for t in own if t.entrant == results.REFERENCE}  # measured here: no others fit beside them
    others_times = [t for t in records.read(source / TIMES_FILE, StepTime) if t.workload not in again]
    times = {(t.workload, t.entrant): t for t in (*others_times, *own)}
    chosen = only or tuple(workloads.WORKLOADS)
    return Race(
        records.read(source / TRIALS_FILE, Trial),
        tuning.read_targets(source),
        [row for row in (*others, *mine) if row.workload in chosen],
        list(times.values()),
    )


@contextlib.contextmanager
def held(out: Path) -> Iterator[None]:
    """The folder of a race, made where there is none, for this process alone.

    Raises FileError where that can't be: before the first run rather than after it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{out} can't be a folder ({error.strerror}); give another --out.") from error
    with disk.locked(out) as free:
        if not free:
            raise FileError(f"another process is at work on {out}; wait for it, stop it, or give another --out.")
        yield


class Steps:
    """Counts steps done and reports them as progress."""

    def __init__(self, total: int, what: str, on_progress: interrupt.OnProgress) -> None:
        self.total, self.what, self.on_progress, self.done = total, what, on_progress, 0

    def __call__(self, count: int) -> None:
        self.done += count
        self.on_progress(self.what, self.done, self.total, "steps")


def search_all(
    out: Path, optimizers: Sequence[tuning.Searched], only: Sequence[str], on_progress: interrupt.OnProgress
) -> list[Trial]:
    """All trials of these optimizers on every workload; those in `out` are not made again.

    Returns: all that `out` then has. Trials of other weights under a name that is searched are not among them.
    """
    chosen = only or tuple(workloads.WORKLOADS)
    parts = {
        (name, of): out / "trials" / f"{name}-{slug(of.name)[-120:]}{of.contents and '-' + of.contents[:8]}.jsonl"
        for name in chosen
        for of in optimizers
    }
    missing = {place: file for place, file in parts.items() if not file.exists()}
    total = sum(tuning.steps_of_search(workloads.WORKLOADS[name]) * search.TRIALS for name, _ in missing)
    steps = Steps(total, "searching settings", on_progress)
    for (name, of), file in missing.items():
        records.write(file, tuning.trials(of, name, steps))
        environment.forget_programs()
    names, files = {of.name for of in optimizers}, sorted((out / "trials").glob("*.jsonl"))
    of_files = {file: records.read_part(file, Trial) for file in files}
    found = [t for file, made in of_files.items() for t in made if file in parts.values() or t.kind not in names]
    records.write(out / TRIALS_FILE, found)
    return found


def set_targets(out: Path, only: Sequence[str], on_progress: interrupt.OnProgress) -> None:
    """Every workload's target and that of its held-out form, from the trials in `out`."""
    found, there = records.read(out / TRIALS_FILE, Trial), tuning.read_targets(out)
    places = [(name, held_out) for name in only or workloads.WORKLOADS for held_out in (False, True)]
    missing = [place for place in places if place not in there]
    runs = len(tuning.TARGET_SEEDS)
    total = sum(tuning.steps_of_search(workloads.WORKLOADS[name]) * runs for name, _ in missing)
    steps = Steps(total, "setting targets", on_progress)
    for place in missing:
        there[place] = tuning.target(found, *place, steps)
        records.write(out / TARGETS_FILE, list(there.values()))
        environment.forget_programs()


def check_known(out: Path, only: Sequence[str], field: Sequence[Entrant]) -> None:
    """Raise FileError for a workload without a target or the runs that all are compared with: before the first run."""
    chosen, known = only or tuple(workloads.WORKLOADS), read(out)
    compared = {row.workload for row in known.rows if row.entrant == results.REFERENCE}
    if results.REFERENCE in [one.name for one in field]:
        compared |= set(chosen)
    for name in chosen:
        if not {(name, False), (name, True)} <= set(known.targets) or name not in compared:
            raise FileError(
                f"{out} was raced from scratch without {name}: run lolo race --from-scratch --only {name} there, or "
                "give another --out."
            )


def check_name(optimizer: str, name: str, searched: bool) -> None:
    """Raise ValueError for an entrant that has the name of another published one.

    searched: whether its settings are searched; a kind of rival may be searched again under its own name.
    """
    called, base = name or optimizer, optimizer.partition(":")[0]
    bases = {r.optimizer.partition(":")[0] for r in records.read(KEPT / ROWS_FILE, RaceRow) if r.entrant == called}
    if called == results.REFERENCE or (bases and base not in bases and not (searched and called == optimizer)):
        raise ValueError(f"{called} is in the published race; give the entrant another --name.")


def race(
    out: Path, field: Sequence[Entrant], seeds: int, only: Sequence[str], on_progress: interrupt.OnProgress
) -> None:
    """Every entrant on every workload; rows go to `out`, and those that are there are not made again."""
    chosen, rows = only or tuple(workloads.WORKLOADS), records.read(out / ROWS_FILE, RaceRow)
    for entrant in field:
        kept = entrants.of_today(rows, entrant, out)
        if len(kept) < len(rows):
            words = "were made with other settings, weights or another file: dropped."
            warnings.warn(f"rows of {entrant.name} {words}", stacklevel=1)
        rows = kept
    runs = sum(len(entrant.optimizers) + 1 for entrant in field) * seeds
    steps = Steps(sum(workloads.WORKLOADS[name].steps for name in chosen) * runs, "racing", on_progress)
    for name in chosen:
        for entrant in field:
            before = steps.done
            made = entrants.run_on(entrant, name, seeds, out, steps)
            rows = records.with_new(rows, made, RUN_OF)
            records.write(out / ROWS_FILE, rows)
            due = workloads.WORKLOADS[name].steps * (len(entrant.optimizers) + 1) * seeds
            if steps.done > before:
                environment.forget_programs()
            steps(due - (steps.done - before))  # of those that were there


def time_steps(out: Path, field: Sequence[Entrant], only: Sequence[str], on_progress: interrupt.OnProgress) -> None:
    """The time of a training step of every entrant on every workload, in place of what `out` has of them.

    AdamW, which all are compared with, is timed beside them. If it is not one of them, times count in those that it is
    known to take: another machine's, or another hour's.
    """
    there = read(out)
    known = {t.workload: t.seconds for t in there.step_times if t.entrant == results.REFERENCE}
    beside = published([row for row in there.rows if row.entrant == results.REFERENCE])
    scaled = results.REFERENCE not in [one.name for one in field] and bool(known and beside)
    field = [*field, *(beside if scaled else ())]
    chosen, times = only or tuple(workloads.WORKLOADS), records.read(out / TIMES_FILE, StepTime)
    device = jax.local_devices()[0]
    machine = f"{device.platform}: {device.device_kind}, one of {parallel.cores()} cores"
    done = Steps(len(chosen) * len(field), "timing steps", on_progress)
    for name in chosen:
        made = step_times.measure(name, field, machine, done)
        environment.forget_programs()
        if scaled:
            *made, reference = made
            factor = known.get(name, reference.seconds) / reference.seconds
            made = [dataclasses.replace(t, seconds=float(f"{t.seconds * factor:.3g}")) for t in made]
        times = records.with_new(times, made, RUN_OF)
        records.write(out / TIMES_FILE, times)


def transfer_rates(out: Path, optimizers: Sequence[str], on_progress: interrupt.OnProgress) -> Path:
    """The best learning rate of each optimizer on transformers of several sizes; rows and picture go to `out`.

    Rows that are there are not made again. Returns the picture's path. Raises ValueError, FileError.
    """
    contents = {name: transfer.contents_of(name) for name in optimizers}
    with held(out):
        file, rows = out / TRANSFER_FILE, records.read(out / TRANSFER_FILE, TransferRow)
        rows = [row for row in rows if contents.get(row.entrant, row.contents) == row.contents]  # not of other weights
        missing = [name for name in optimizers if not any(row.entrant == name for row in rows)]
        models = len(transfer.WIDTHS) * len(transfer.DEPTHS) * transfer.SEEDS
        runs = sum(len(transfer.names_of(name)) for name in missing) * models
        steps = Steps(runs * transfer.STEPS, "trying learning rates on transformers", on_progress)
        for name in missing:
            rows += transfer.run(name, steps)
            records.write(file, rows)
            environment.forget_programs()
        picture = out / "transfer.svg"
        style.save_figure(transfer.picture([row for row in rows if row.entrant in optimizers]), picture)
    return picture


def validate(
    out: Path,
    optimizers: Sequence[str],
    seeds: int,
    only: Sequence[str],
    code: Sequence[Path],
    on_progress: interrupt.OnProgress,
) -> str:
    """The losses of optimizers on the search's data, as a table; rows go to `out`, and those there are not made again.

    Raises ValueError, FileError.
    """
    chosen, drawn = only or tuple(workloads.WORKLOADS), validation.seeds_of(seeds)
    named = candidates.read(optimizers, code=code)
    tuning.check_no_grid(named, "with --validate")
    with held(out):
        files = {
            workload: {name: entrants.part_file(out, workload, name, one, "validation") for name, one in named.items()}
            for workload in chosen
        }
        rows = {
            workload: {name: records.read_part(file, ValidationRow) for name, file in mine.items()}
            for workload, mine in files.items()
        }
        missing = {
            workload: {name: named[name] for name in mine if not validation.is_complete(mine[name], workload, drawn)}
            for workload, mine in rows.items()
        }
        total = sum(tuning.steps_of_search(workloads.WORKLOADS[workload]) * len(of) for workload, of in missing.items())
        steps = Steps(total * seeds, "validating", on_progress)
        for workload, of in missing.items():
            for name, made in validation.run(of, workload, drawn, steps).items():
                rows[workload][name] = made
                records.write(files[workload][name], made)
            environment.forget_programs()
    means = {
        name: {w: float(np.mean([row.loss for row in rows[w][name] if row.seed in drawn])) for w in chosen}
        for name in named
    }
    return validation.table(means)


def rivals(trials: Sequence[Trial]) -> list[Entrant]:
    """The rivals with the settings that the search found. Raises FileError: a trial is missing."""
    for kind in search.SPACES:
        if not any(trial.kind == kind for trial in trials):
            raise FileError(f"no trials of {kind}: run lolo race --from-scratch.")
    return [entrants.rival(kind, trials) for kind in search.SPACES]


def published(rows: Sequence[RaceRow], but: Sequence[Entrant] = ()) -> list[Entrant]:
    """The entrants of rows, without those of some names, and without those whose weights or code are elsewhere.

    Their first setting is that of the self-tuning rules.
    """
    settings: dict[str, dict[str, bool]] = {}
    for row in rows:
        mine = settings.setdefault(row.entrant, {})
        mine[row.optimizer] = mine.get(row.optimizer, False) or row.held_out
    for one in but:
        settings.pop(one.name, None)
    found = []
    for name, mine in settings.items():
        ordered = sorted(mine, key=lambda optimizer: not mine[optimizer])
        with contextlib.suppress(ValueError):  # FileError too: a file that is somewhere else
            tasks = {task for named in candidates.read(ordered).values() for task in entrants.meta_tasks(named)}
            found.append(Entrant(name, tuple(ordered), tuple(sorted(tasks))))
    return found


def outlook(mine: int, searched: int, seeds: int, only: Sequence[str], out: Path, from_scratch: bool) -> str:
    """What a race would run, in words: workloads with their targets, and the number of training steps.

    mine: settings of an entrant, 0 for none. searched: optimizers whose settings are searched.
    """
    targets, lines = tuning.read_targets(source_of(out)), []
    for name in only or workloads.WORKLOADS:
        of = workloads.WORKLOADS[name]
        known = [targets[name, form].loss for form in (False, True) if (name, form) in targets]
        losses = " and ".join(f"{loss:.4f}" for loss in known) or "not set yet"
        lines.append(f"{name}: {of.task}, held out {workloads.variant_of(of)}, {of.steps:,} steps, targets {losses}")
    steps = sum(workloads.WORKLOADS[name].steps for name in only or workloads.WORKLOADS)
    runs = (mine + 1) * bool(mine)
    if from_scratch:
        runs += len(search.SPACES) * (search.FIVE + 1)
    if searched:
        share = sum(tuning.steps_of_search(workloads.WORKLOADS[name]) for name in only or workloads.WORKLOADS)
        trials = f"{search.TRIALS} trials on every workload"
        lines.append(f"search: {searched} optimizers, {trials}, {searched * search.TRIALS * share:,} steps")
    lines.append(f"race: {runs * seeds} runs on every workload, {runs * seeds * steps:,} training steps in all")
    return "\n".join(lines)
