"""The report of a race: who wins, where, and by how much, in a table, pictures and Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lolo.evaluation.statistics import Interval
from lolo.files import disk
from lolo.race import pictures, results, workloads
from lolo.race.entrants import Entrant
from lolo.race.records import Target
from lolo.race.results import Form, Standing
from lolo.race.stages import Race
from lolo.runtime import environment
from lolo.studies import style
from lolo.studies.tables import markdown

Table = list[list[str]]


def in_bold(cells: Sequence[str], chosen: Sequence[bool]) -> list[str]:
    """Some cells of a table in bold."""
    return [f"**{cell}**" if mark else cell for cell, mark in zip(cells, chosen, strict=True)]


def number(interval: Interval) -> str:
    """A mean with its interval; "–" where nothing is known."""
    if math.isnan(interval.mean):
        return "–"
    return f"{interval.mean:.2f}" + (f" ± {interval.half:.2f}" if math.isfinite(interval.half) else "")


def scores_table(standings: Sequence[Standing]) -> Table:
    """Profile score, workloads whose target was reached, and speed-up over tuned AdamW."""
    header = ["optimizer", "profile score", "targets reached", "speed-up in steps", "speed-up in seconds"]
    lines = [
        [
            of.entrant,
            number(of.profile),
            f"{sum(map(math.isfinite, of.steps.values()))} of {len(of.steps)}",
            number(of.speed_up),
            number(of.speed_up_seconds),
        ]
        for of in standings
    ]
    return [header, *lines]


def form_name(form: Form) -> str:
    """A workload in a table's header or first column."""
    return f"{form[0]}, held out" if form[1] else form[0]


def steps_table(standings: Sequence[Standing]) -> Table:
    """Median steps to the target, workload by workload; the fewest is bold, a miss is ∞."""
    forms = list(standings[0].steps)
    table = [["workload", *(of.entrant for of in standings)]]
    for form in forms:
        found = [of.steps[form] for of in standings]
        cells = ["∞" if math.isinf(steps) else f"{steps:,.0f}" for steps in found]
        best = min(found)
        table.append([form_name(form), *in_bold(cells, [steps == best < math.inf for steps in found])])
    return table


def losses_table(
    chosen: Mapping[str, results.RowsByForm], targets: Mapping[Form, Target], order: Sequence[str]
) -> Table:
    """Test loss at the end, means over seeds, beside the target, which is a validation loss."""
    forms = sorted({form for mine in chosen.values() for form in mine})
    table = [["workload", "target", *order]]
    for form in forms:
        means = [float(np.mean([row.test["loss"] for row in chosen[name][form]])) for name in order]
        best = min(filter(math.isfinite, means), default=math.inf)
        cells = [f"{x:.4f}" if math.isfinite(x) else "diverged" for x in means]
        table.append(
            [
                form_name(form),
                f"{targets[form].loss:.4f}",
                *in_bold(cells, [mean == best for mean in means]),
            ]
        )
    return table


def shared_table(field: Sequence[Entrant]) -> Table:
    """Which workloads share data or the family of a model with the tasks of an entrant's meta-training."""
    table = [["workload", *(entrant.name for entrant in field)]]
    for name, workload in workloads.WORKLOADS.items():
        cells = [" and ".join(workloads.shared_with(workload, entrant.meta_tasks)) or "nothing" for entrant in field]
        table.append([name, *cells])
    return table


def write(race: Race, out: Path, field: Sequence[Entrant], own: Sequence[str], command: str) -> str:
    """Report and pictures in `out`. Returns the tables of scores, for the terminal.

    Args:
      field: entrants with meta-training tasks, for what they share with the workloads.
      own: names of entrants that pictures show in any case.
    """
    times = {(t.workload, t.entrant): t.seconds for t in race.step_times}
    rows, text, shown = results.comparable(race.rows), ["# Race"], []
    few_seeds = ", ".join(f"{name} has {count}" for name, count in results.short_of_seeds(race.rows).items())
    for rules in results.RULES:
        standings = results.standings(rows, race.targets, rules, times)
        chosen = results.rows_that_count(rows, rules, race.targets)
        order = [of.entrant for of in standings]
        seeds = standings[0].profile.n
        picture = f"profile-{rules}.svg"
        style.save_figure(pictures.profiles(standings, rules, own), out / picture)
        style.save_figure(pictures.curves(chosen, race.targets, standings, rules, own), out / f"curves-{rules}.svg")
        table, incomplete = markdown(scores_table(standings)), sorted(set(chosen) - set(order))
        notes = [
            f"Left out, since some of their workloads were not run: {', '.join(incomplete)}." if incomplete else "",
            f"All are shown with {seeds} seeds, since {few_seeds}." if few_seeds else "",
        ]
        shown.append("\n\n".join(filter(None, [f"{rules} rules, {seeds} seeds", *notes, table])))
        text += [
            f"## {rules.capitalize()} rules",
            f"{seeds} seeds; ±: 95 % t interval over them. Speed-ups are over tuned AdamW.",
            *notes,
            table,
            f"![profiles]({picture})",
            "Median steps to the target:",
            markdown(steps_table(standings)),
            f"![validation curves](curves-{rules}.svg)",
            "Test loss at the end:",
            markdown(losses_table(chosen, race.targets, order)),
        ]
    learned = [entrant for entrant in field if entrant.meta_tasks]
    if learned:
        text += ["## What workloads share with meta-training", markdown(shared_table(learned))]
    devices = sorted({t.device for t in race.step_times}) or ["not measured"]
    text.append(f"{environment.stated(command, environment.provenance())} Step times: {'; '.join(devices)}.")
    disk.write_bytes(out / "report.md", ("\n\n".join(filter(None, text)) + "\n").encode())
    return "\n\n".join(shown)
