"""Pictures of a race: performance profiles, and validation curves of every workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lolo.race import results, scores, search
from lolo.race.records import Target
from lolo.race.results import Form, Standing
from lolo.studies import headline, names, style
from lolo.studies.style import Curve, styled


def few(standings: Sequence[Standing], own: Sequence[str] = ()) -> list[Standing]:
    """Those that pictures show, the best first: `own`, ours, the first two, AdamW, and the best of the rivals."""
    there = [of.entrant for of in standings]
    always = {*own, names.reference(there), *there[:2], results.REFERENCE}
    room = headline.FEW - len(always & set(there))
    rivals_first = sorted((name for name in there if name not in always), key=lambda name: name not in search.SPACES)
    shown = always | set(rivals_first[: max(room, 0)])
    return [of for of in standings if of.entrant in shown]


def finding(standings: Sequence[Standing], rules: str, own: Sequence[str] = ()) -> str:
    """Who is first under these rules, by how much, and where the first of `own` is, or ours."""
    there = [of.entrant for of in standings]
    ours = next((name for name in own if name in there), names.reference(there))
    first, *rest = standings

    def scored(of: Standing) -> str:
        return f"{names.in_words(of.entrant)} ({of.profile.mean:.2f})"

    found = f"{rules.capitalize()} rules: {scored(first)} has the highest profile score"
    if rest and not rest[0].profile.mean + rest[0].profile.half < first.profile.mean - first.profile.half:
        found = f"{rules.capitalize()} rules: {scored(first)} and {scored(rest[0])} lead, too close to tell apart"
    place = next(i for i, of in enumerate(standings) if of.entrant == ours)
    if place > 1:
        found += f"; {scored(standings[place])} is {place + 1} of {len(standings)}"
    return found


@styled
def profiles(standings: Sequence[Standing], rules: str, own: Sequence[str] = ()) -> Any:
    """The share of the workloads that each optimizer finishes within τ times the best steps, and seconds if known."""
    drawn = [of.entrant for of in few(standings, own)]
    look, factors = style.looks(drawn), np.linspace(1, scores.FARTHEST, 301)
    found: dict[str, list[Curve]] = {}
    for unit in ("steps", "seconds"):
        forms = [form for form in standings[0].steps if unit == "steps" or not form[1]]
        times = np.array([[getattr(of, unit)[form] for form in forms] for of in standings])
        known = np.flatnonzero(~np.isnan(times).any(axis=1))
        if known.size:
            shares = dict(zip(known, scores.profile(times[known], factors), strict=True))
            found[unit] = [
                Curve(standings[i].entrant, factors, y) for i, y in shares.items() if standings[i].entrant in drawn
            ]
    figure, axes = style.panels(len(found), finding(standings, rules, own))
    for axis, (unit, lines) in zip(axes, found.items(), strict=True):
        style.draw_lines(axis, lines, look)
        axis.set(xlim=(1, scores.FARTHEST), ylim=(-0.02, 1.02), ylabel="share of workloads finished")
        axis.set_xlabel(f"τ: times the best {unit} to the target")
    for axis in axes:
        style.name_lines(axis)
    return figure


@styled
def curves(
    chosen: Mapping[str, results.RowsByForm],
    targets: Mapping[Form, Target],
    standings: Sequence[Standing],
    rules: str,
    own: Sequence[str] = (),
) -> Any:
    """Validation loss of every workload against the step, means over seeds; the target is the dotted line."""
    drawn = [of.entrant for of in few(standings, own)]
    look = style.looks(drawn)
    forms = sorted({form for mine in chosen.values() for form in mine if not form[1]})
    figure, axes = style.panels(len(forms), finding(standings, rules, own), height=2.6)
    for axis, form in zip(axes, forms, strict=True):
        lines, ends, target = [], [np.array([targets[form].loss])], targets[form].loss
        for entrant in drawn:
            mean = np.mean([row.curve for row in chosen[entrant][form]], axis=0)
            steps = chosen[entrant][form][0].steps * np.arange(1, len(mean) + 1) / len(mean)
            lines.append(Curve(entrant, steps, mean))
            ends.append(mean[len(mean) // 5 :])
        style.draw_lines(axis, lines, look)
        axis.axhline(target, color=style.INK, linestyle=":", linewidth=1)
        axis.set_ylim(*style.limits(np.concatenate(ends)))
        axis.set_ylabel("validation loss")
        style.explain(axis, f"{form[0]}; dotted: the target")
    axes[-1].set_xlabel("training step")
    for axis in axes:
        style.name_lines(axis)
    return figure
