"""From rows and targets to times and scores, under either rule set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lolo.evaluation import statistics
from lolo.files.disk import FileError
from lolo.files.settings import RecipeError
from lolo.race import scores
from lolo.race.records import RaceRow, Target

RULES = ("self-tuning", "tuned")
REFERENCE = "adamw"  # under the tuned rules: what speed-ups are over

Form = tuple[str, bool]  # a workload, and whether in its held-out form
RowsByForm = dict[Form, list[RaceRow]]  # rows of one entrant, one for each seed
StepTimes = Mapping[tuple[str, str], float]  # (workload, entrant) -> seconds of one step


class Standing(NamedTuple):
    """One entrant under one rule set. Intervals are over seeds."""

    entrant: str
    steps: dict[Form, float]  # median steps to the target; infinite where most seeds miss it
    seconds: dict[Form, float]  # the same in seconds of one core; NaN where no step time is known
    profile: statistics.Interval  # profile score, by steps
    speed_up: statistics.Interval  # over tuned AdamW, by steps
    speed_up_seconds: statistics.Interval


def comparable(rows: Sequence[RaceRow]) -> list[RaceRow]:
    """The rows of the seeds that every entrant has that was run on all workloads: nothing is chosen by others."""
    common = set.intersection(*_seeds(rows).values())
    return [row for row in rows if row.seed in common or not common]


def short_of_seeds(rows: Sequence[RaceRow]) -> dict[str, int]:
    """Entrants with fewer seeds than another, and how many, among those that were run on all workloads."""
    seeds = _seeds(rows)
    most = max(map(len, seeds.values()))
    return {name: len(mine) for name, mine in seeds.items() if len(mine) < most}


def _seeds(rows: Sequence[RaceRow]) -> dict[str, set[int]]:
    """The seeds that an entrant has on every workload, of those entrants that were run on all."""
    found: dict[str, dict[Form, set[int]]] = {}
    for row in rows:
        found.setdefault(row.entrant, {}).setdefault((row.workload, row.held_out), set()).add(row.seed)
    forms = {form for mine in found.values() for form in mine}
    return {name: set.intersection(*mine.values()) for name, mine in found.items() if set(mine) == forms} or {"": set()}


def rows_that_count(rows: Sequence[RaceRow], rules: str, targets: Mapping[Form, Target]) -> dict[str, RowsByForm]:
    """entrant -> workload -> its rows that count under the rules.

    Self-tuning: those of the one setting that ran on held-out forms too. Tuned: on each workload those of the setting
    that reaches the target first, in the median over seeds; of several, the one with the lowest loss at the end.
    """
    if rules not in RULES:
        raise RecipeError(f"unknown rules {rules!r}; there are {' and '.join(RULES)}.")
    found: dict[str, dict[Form, dict[str, list[RaceRow]]]] = {}
    for row in rows:
        form = row.workload, row.held_out
        found.setdefault(row.entrant, {}).setdefault(form, {}).setdefault(row.optimizer, []).append(row)
    chosen: dict[str, RowsByForm] = {}
    for entrant, by_line in found.items():
        first = {optimizer for (_, held_out), settings in by_line.items() if held_out for optimizer in settings}
        for form, settings in by_line.items():
            if rules == "self-tuning":
                of_first = first & set(settings)
                if not of_first:
                    continue
                (optimizer,) = of_first
            elif form[1]:
                continue
            else:
                optimizer = min(settings, key=lambda name: _order(settings[name], targets[form]))
            chosen.setdefault(entrant, {})[form] = sorted(settings[optimizer], key=lambda row: row.seed)
    return chosen


def _order(rows: Sequence[RaceRow], target: Target) -> tuple[float, float]:
    last = float(np.median([row.curve[-1] for row in rows]))
    return float(np.median(times_of(rows, target))), last if math.isfinite(last) else math.inf


def times_of(rows: Sequence[RaceRow], target: Target) -> list[float]:
    """Steps to the target of each run."""
    return [scores.steps_to(target.loss, row.curve, row.steps) for row in rows]


def standings(
    rows: Sequence[RaceRow], targets: Mapping[Form, Target], rules: str, step_times: StepTimes
) -> list[Standing]:
    """Every entrant under the rules, the highest profile score first. Raises FileError: AdamW is not among them."""
    rows = comparable(rows)
    chosen = rows_that_count(rows, rules, targets)
    reference = rows_that_count(rows, "tuned", targets).get(REFERENCE, {})
    missing = {
        form for form, _ in (form for mine in chosen.values() for form in mine) if (form, False) not in reference
    }
    if missing or not reference:
        where = ", ".join(sorted(missing)) or "any workload"
        raise FileError(
            f"no rows of {REFERENCE}, which all are compared with, on {where}: run lolo race --from-scratch."
        )
    forms = sorted({form for mine in chosen.values() for form in mine})
    entrants = [name for name, mine in chosen.items() if set(mine) == set(forms)]
    seeds = min(len(mine[form]) for name, mine in chosen.items() if name in entrants for form in forms)
    # [entrants, forms, seeds]
    steps = np.array([[times_of(chosen[name][form], targets[form])[:seeds] for form in forms] for name in entrants])
    costs = np.array([[step_times.get((form[0], name), math.nan) for form in forms] for name in entrants])
    at_reference = np.array([_reference_time(reference[name, False], targets[name, False]) for name, _ in forms])
    costs_of_reference = np.array([step_times.get((name, REFERENCE), math.nan) for name, _ in forms])
    base = np.array([not held_out for _, held_out in forms])  # seconds, and AdamW's tuned runs, are of these
    found = []
    profiles = np.stack([scores.profile_score(steps[:, :, k]) for k in range(seeds)], axis=1)
    for i, name in enumerate(entrants):
        medians = np.median(steps[i], axis=1)
        by_steps = [scores.speed_up(steps[i, base, k], at_reference[base]) for k in range(seeds)]
        seconds = steps[i] * costs[i][:, None]
        at_cost = at_reference * costs_of_reference
        known = np.isfinite(costs[i]) & np.isfinite(at_cost) & base
        by_seconds = [scores.speed_up(seconds[known, k], at_cost[known]) for k in range(seeds)] if known.any() else []
        found.append(
            Standing(
                name,
                dict(zip(forms, medians.tolist(), strict=True)),
                dict(zip(forms, (medians * costs[i]).tolist(), strict=True)),
                statistics.interval(profiles[i].tolist(), "seeds"),
                statistics.interval(by_steps, "seeds"),
                statistics.interval(by_seconds or [math.nan], "seeds"),
            )
        )
    return sorted(found, key=lambda standing: -standing.profile.mean)


def _reference_time(rows: Sequence[RaceRow], target: Target) -> float:
    """Median steps that tuned AdamW takes; all of its steps where it misses the target."""
    median = float(np.median(times_of(rows, target)))
    return median if math.isfinite(median) else float(rows[0].steps)
