"""The search for optimizers' settings and the targets that come from it, on validation data alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lolo.evaluation import long_runs, rivals
from lolo.files.disk import FileError
from lolo.optimizers import architecture
from lolo.race import records, search, workloads
from lolo.race.records import Target, Trial
from lolo.race.workloads import Workload
from lolo.studies import candidates, evaluation_folder

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


class Searched(NamedTuple):
    """An optimizer whose settings are searched."""

    name: str  # what its trials are called: a rival's kind, or an entrant's name
    space: search.Space
    start: str  # of its name, as `lolo eval` has it, up to the number that stands for the learning rate
    contents: str = ""  # sha256 of weights
    code: tuple[Path, ...] = ()  # files that may be run, of weights whose architecture is a user's function

    def name_of(self, setting: search.Setting) -> str:
        """The optimizer with these numbers, as `lolo eval` names it."""
        rate, decay, warmup = setting
        return f"{self.start}{rate:g},weight_decay={decay:g},warmup={warmup:g}"


def rival(kind: str) -> Searched:
    """A rival of `search.SPACES`.

    >>> rival("muon").name_of(search.Setting(0.001, 0.1, 0.02))
    'muon-warmup-cosine:0.001,weight_decay=0.1,warmup=0.02'
    """
    space = search.SPACES[kind]
    return Searched(kind, space, f"{kind}-{space.schedule}:")


def weights(optimizer: str, name: str = "", code: Sequence[Path] = ()) -> Searched:
    """Weights, as `lolo eval` names them. Raises ValueError for what is none, or of an architecture without a space.

    >>> weights("lolo-norm").name_of(search.Setting(0.001, 0.1, 0.02))
    'lolo-norm:schedule=warmup-cosine,learning_rate=0.001,weight_decay=0.1,warmup=0.02'
    """
    (named,) = candidates.read([optimizer], code=code).values()
    if not isinstance(named, candidates.NamedWeights):
        raise ValueError(f"{optimizer}: the search is for weights; give --settings instead.")
    kind = named.weights.learner.name
    if kind not in search.SPACES_OF_WEIGHTS:
        known = ", ".join(search.SPACES_OF_WEIGHTS)
        raise ValueError(f"{optimizer}: the search knows weights of {known}, not of {kind}; give --settings.")
    space = search.SPACES_OF_WEIGHTS[kind]
    words = ",".join(filter(None, [f"schedule={space.schedule}", space.fixed, f"{space.rate}="]))
    start, digest = candidates.with_settings(optimizer, words), evaluation_folder.contents_of(named)
    return Searched(name or optimizer, space, start, digest, tuple(code))


def searched(optimizer: str, name: str = "", code: Sequence[Path] = ()) -> Searched:
    """A rival by its kind, or weights, as `weights` has them. Raises ValueError.

    Trials are kept by name and contents: a rival under another name than its own has its kind's digest.
    """
    kind = optimizer.partition(":")[0]
    if kind in rivals.NAMES and optimizer not in search.SPACES:
        if kind in search.SPACES:
            raise ValueError(f"{optimizer}: the search finds the learning rate; give {kind} alone.")
        raise ValueError(f"{optimizer}: the search knows the rivals {', '.join(search.SPACES)}; give --settings.")
    if optimizer not in search.SPACES:
        return weights(optimizer, name, code)
    of = rival(optimizer)
    if name in ("", optimizer):
        return of
    return of._replace(name=name, contents=hashlib.sha256(optimizer.encode()).hexdigest())


def steps_of_search(workload: Workload) -> int:
    """Steps of a trial, and of a run that sets a target."""
    return round(workload.steps * workloads.SHARE_OF_TARGET)


def candidate(named: candidates.Named, task: str, steps: int) -> long_runs.Candidate:
    """An optimizer as it takes part: with the task's matrices, and with its kernel, as users have it, unless named."""
    if isinstance(named, candidates.NamedWeights):
        learner = named.weights.learner
        if "kernel" in architecture.of(learner).deployment and "kernel" not in named.deployment.learner:
            learner = architecture.deployed(learner, {"kernel": "auto"})
            named = named._replace(weights=named.weights._replace(learner=learner))
    return candidates.candidate(named, workloads.splits_of(task), steps, is_matrix=workloads.matrices_of(task))


def check_no_grid(named: Mapping[str, candidates.Named], where: str) -> None:
    """Raise ValueError for a grid, which takes another rate on every workload."""
    for name, one in named.items():
        if isinstance(one, candidates.NamedRival) and isinstance(one.learning_rate, str):
            raise ValueError(f"{name}: give each rate by itself {where}, for instance {one.name}:1e-3.")


def together(named: Mapping[str, candidates.Named], task: str, steps: int) -> list[dict[str, long_runs.Candidate]]:
    """Candidates that share a compiled program, in groups."""
    groups: dict[object, dict[str, long_runs.Candidate]] = {}
    for name, one in named.items():
        entry = candidate(one, task, steps)
        groups.setdefault((entry.make, entry.scored), {})[name] = entry
    return list(groups.values())


def trials(of: Searched, workload: str, on_steps: OnSteps, count: int = search.TRIALS) -> list[Trial]:
    """All trials of an optimizer on a workload."""
    task, steps = workloads.WORKLOADS[workload].task, steps_of_search(workloads.WORKLOADS[workload])
    named = {of.name_of(setting): setting for setting in search.settings_of(of.space, count)}
    losses: dict[str, float] = {}
    for group in together(candidates.read(list(named), code=of.code), task, steps):
        curves = run(task, list(group.values()), [search.TRIAL_SEED], steps, on_steps)
        losses |= dict(zip(group, curves.held_loss[:, -1].tolist(), strict=True))
    return [Trial(workload, of.name, *setting, round(losses[name], 6)) for name, setting in named.items()]


def losses_of(found: Sequence[Trial], name: str) -> dict[str, list[float]]:
    """workload -> loss of each trial of an optimizer, in the order of `search.settings_of`."""
    losses: dict[str, list[float]] = {}
    for trial in found:
        if trial.kind == name:
            losses.setdefault(trial.workload, []).append(trial.loss)
    return losses


def names_of(found: Sequence[Trial], of: Searched) -> list[str]:
    """The five settings of an optimizer, as `lolo eval` names them, that of the self-tuning rules first."""
    settings = search.settings_of(of.space)
    return [of.name_of(settings[i]) for i in search.five_for_all(losses_of(found, of.name))]


def reference_of(found: Sequence[Trial], workload: str) -> str:
    """The best trial of the reference optimizers on a workload, by name. Raises FileError where trials are missing."""
    best: tuple[float, str, int] | None = None
    for kind in search.REFERENCES:
        losses = losses_of(found, kind).get(workload)
        if losses is None:
            raise FileError(f"no trials of {kind} on {workload}: run the search first.")
        place = int(np.nanargmin(np.where(np.isfinite(losses), losses, np.inf)))
        best = min(filter(None, (best, (losses[place], kind, place))))
    assert best is not None
    _, kind, place = best
    return rival(kind).name_of(search.settings_of(search.SPACES[kind])[place])


def target(found: Sequence[Trial], workload: str, held_out: bool, on_steps: OnSteps) -> Target:
    """A workload's target, or that of its held-out form: the reference of the workload, run again on five seeds."""
    of, reference = workloads.WORKLOADS[workload], reference_of(found, workload)
    task, steps = workloads.variant_of(of) if held_out else of.task, steps_of_search(of)
    (group,) = together(candidates.read([reference]), task, steps)
    curves = run(task, list(group.values()), TARGET_SEEDS, steps, on_steps)
    losses = [round(float(loss), 6) for loss in curves.held_loss[:, -1]]
    return Target(task, float(np.median(losses)), reference, losses)


def read_targets(folder: Path) -> dict[tuple[str, bool], Target]:
    """(workload, whether its held-out form) -> its target. Raises FileError."""
    by_task = {target.task: target for target in records.read(folder / "targets.jsonl", Target)}
    places = {
        (name, held_out): workloads.variant_of(of) if held_out else of.task
        for name, of in workloads.WORKLOADS.items()
        for held_out in (False, True)
    }
    return {place: by_task[task] for place, task in places.items() if task in by_task}
