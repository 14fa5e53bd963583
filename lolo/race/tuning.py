"""The search for rivals' settings and the targets that come from it, on validation data alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lolo.evaluation import long_runs, rivals
from lolo.files.disk import FileError
from lolo.race import records, search, workloads
from lolo.race.records import Target, Trial
from lolo.race.workloads import Workload

TARGET_SEEDS = tuple(range(1_000_010, 1_000_015))  # evaluation seeds of the runs that set a target

OnSteps = Callable[[int], None]


def run(
    task: str, entries: Sequence[long_runs.Candidate], seeds: Sequence[int], steps: int, on_steps: OnSteps
) -> long_runs.Curves:
    """Each candidate on each seed, candidates of one kind; curves on validation, final scores on test."""
    splits = workloads.splits_of(task)
    return long_runs.run(
        splits.train,
        splits.validation,
        entries[0].make,
        [entry.setting for entry in entries for _ in seeds],
        [*seeds] * len(entries),
        steps,
        on_steps,
        window=steps // workloads.POINTS,
        scored=entries[0].scored,
        final=splits.test,
    )


def rival_of(kind: str, setting: search.Setting, task: str, steps: int) -> long_runs.Candidate:
    """A rival with the numbers of a trial."""
    return rivals.rival(search.name_of(kind), setting.learning_rate, steps, *setting[1:], workloads.matrices_of(task))


def steps_of_search(workload: Workload) -> int:
    """Steps of a trial, and of a run that sets a target."""
    return round(workload.steps * workloads.SHARE_OF_TARGET)


def trials(name: str, kind: str, on_steps: OnSteps, count: int = search.TRIALS) -> list[Trial]:
    """All trials of a rival on a workload."""
    workload = workloads.WORKLOADS[name]
    settings, steps = search.settings_of(kind, count), steps_of_search(workload)
    entries = [rival_of(kind, setting, workload.task, steps) for setting in settings]
    curves = run(workload.task, entries, [search.TRIAL_SEED], steps, on_steps)
    return [
        Trial(name, kind, *setting, round(float(loss), 6))
        for setting, loss in zip(settings, curves.held_loss[:, -1], strict=True)
    ]


def losses_of(found: Sequence[Trial], kind: str) -> dict[str, list[float]]:
    """workload -> loss of each trial of a rival, in the order of `search.settings_of`."""
    losses: dict[str, list[float]] = {}
    for trial in found:
        if trial.kind == kind:
            losses.setdefault(trial.workload, []).append(trial.loss)
    return losses


def names_of(found: Sequence[Trial], kind: str) -> list[str]:
    """The five settings of a rival, as `lolo eval` names them, that of the self-tuning rules first."""
    settings = search.settings_of(kind)
    return [name_of(kind, settings[i]) for i in search.five_for_all(losses_of(found, kind))]


def name_of(kind: str, setting: search.Setting) -> str:
    """A rival with its settings, as `lolo eval` names it."""
    rate, decay, warmup = setting
    return f"{search.name_of(kind)}:{rate:g},weight_decay={decay:g},warmup={warmup:g}"


def reference_of(found: Sequence[Trial], workload: str) -> tuple[str, search.Setting]:
    """The best trial of the reference optimizers on a workload. Raises FileError where trials are missing."""
    best: tuple[float, str, int] | None = None
    for kind in search.REFERENCES:
        losses = losses_of(found, kind).get(workload)
        if losses is None:
            raise FileError(f"no trials of {kind} on {workload}: run the search first.")
        place = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.inf)))
        best = min(filter(None, (best, (losses[place], kind, place))))
    assert best is not None
    _, kind, place = best
    return kind, search.settings_of(kind)[place]


def target(found: Sequence[Trial], workload: str, held_out: bool, on_steps: OnSteps) -> Target:
    """A workload's target, or that of its held-out form: the reference of the workload, run again on five seeds."""
    of, (kind, setting) = workloads.WORKLOADS[workload], reference_of(found, workload)
    task, steps = workloads.variant_of(of) if held_out else of.task, steps_of_search(of)
    curves = run(task, [rival_of(kind, setting, task, steps)], TARGET_SEEDS, steps, on_steps)
    losses = [round(float(loss), 6) for loss in curves.held_loss[:, -1]]
    return Target(task, float(np.median(losses)), name_of(kind, setting), losses)


def read_targets(folder: Path) -> dict[tuple[str, bool], Target]:
    """(workload, whether its held-out form) -> its target. Raises FileError."""
    by_task = {target.task: target for target in records.read(folder / "targets.jsonl", Target)}
    places = {
        (name, held_out): workloads.variant_of(of) if held_out else of.task
        for name, of in workloads.WORKLOADS.items()
        for held_out in (False, True)
    }
    return {place: by_task[task] for place, task in places.items() if task in by_task}
