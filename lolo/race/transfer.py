"""Does a learning rate transfer? The best one at three widths and three depths of a small transformer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lolo.evaluation import rivals
from lolo.optimizers import architecture
from lolo.race import search, tuning
from lolo.race.records import TransferRow
from lolo.studies import candidates, evaluation_folder, style
from lolo.studies.names import in_words
from lolo.studies.style import styled

WIDTHS, DEPTHS, STEPS, SEEDS = (32, 64, 128), (1, 2, 4), 800, 2
RATES = (3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
SCALES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of weights whose step has no rate, and of Prodigy


def task_of(width: int, depth: int) -> str:
    """A character transformer."""
    return f"books-transformer:width={width},heads=4,context=32,layers={depth}"


def names_of(optimizer: str) -> list[str]:
    """An optimizer at every rate, as `lolo eval` names it: of a rival its kind is given, of weights their name.

    >>> names_of("muon")[1]
    'muon-warmup-cosine:0.001'
    >>> names_of("lolo-small")[3]
    'lolo-small:schedule=warmup-cosine,step_scale=1'
    >>> names_of("prodigy")[3], names_of("schedule-free")[3]
    ('prodigy-warmup-cosine:1', 'schedule-free-warmup:0.004')
    """
    if optimizer in rivals.RIVALS:
        space = search.SPACES.get(optimizer, search.Space((RATES[0], RATES[-1])))
        multiplies = space.learning_rate[0] > RATES[-1]  # a rate that it finds by itself
        return [f"{optimizer}-{space.schedule}:{rate:g}" for rate in (SCALES if multiplies else RATES)]
    (named,) = candidates.read([optimizer]).values()
    if not isinstance(named, candidates.NamedWeights):
        raise ValueError(f"{optimizer}: expected weights, or one of {', '.join(rivals.RIVALS)}.")
    has_rate = "learning_rate" in architecture.of(named.weights.learner).deployment
    field, values = ("learning_rate", RATES) if has_rate else ("step_scale", SCALES)
    return [candidates.with_settings(optimizer, f"schedule=warmup-cosine,{field}={value:g}") for value in values]


def contents_of(optimizer: str) -> str:
    """sha256 of weights; "" for a rival. Raises ValueError, FileError."""
    if optimizer in rivals.RIVALS:
        return ""
    (named,) = candidates.read([optimizer]).values()
    return evaluation_folder.contents_of(named)


def run(optimizer: str, on_steps: tuning.OnSteps) -> list[TransferRow]:
    """Every rate on every model, on two seeds."""
    names, rows, contents = names_of(optimizer), [], contents_of(optimizer)
    for width, depth in itertools.product(WIDTHS, DEPTHS):
        task = task_of(width, depth)
        for group in tuning.together(candidates.read(names), task, STEPS):
            curves = tuning.run(task, list(group.values()), range(SEEDS), STEPS, on_steps)
            losses = curves.held_loss[:, -1].reshape(len(group), SEEDS)
            for name, mine in zip(group, losses, strict=True):
                rows += [
                    TransferRow(optimizer, contents, name, width, depth, seed, STEPS, round(float(loss), 6))
                    for seed, loss in enumerate(mine)
                ]
    return rows


def grid(rows: Sequence[TransferRow], optimizer: str) -> tuple[list[str], np.ndarray]:
    """An optimizer's names, by rate, and the mean validation loss over seeds, [models, rates], widths before depths."""
    mine = [row for row in rows if row.entrant == optimizer]
    names = list(dict.fromkeys(row.optimizer for row in mine))
    table = np.full((len(WIDTHS), len(DEPTHS), len(names)), np.nan)
    for (i, width), (j, depth), (k, name) in itertools.product(enumerate(WIDTHS), enumerate(DEPTHS), enumerate(names)):
        found = [r.loss for r in mine if (r.width, r.depth, r.optimizer) == (width, depth, name)]
        table[i, j, k] = np.mean(found) if found else np.nan
    return names, table.reshape(-1, len(names))


@styled
def picture(rows: Sequence[TransferRow]) -> Any:
    """One panel per optimizer: how far each rate is above the best one of its model; the best is marked."""
    optimizers = list(dict.fromkeys(row.entrant for row in rows))
    found = {optimizer: grid(rows, optimizer) for optimizer in optimizers}
    losses = [np.where(np.isfinite(table), table, np.inf) for _, table in found.values()]
    best = [table.argmin(axis=1) for table in losses]
    words = [f"{np.ptp(of)} for {in_words(name)}" for name, of in zip(optimizers, best, strict=True)]
    title = f"Over {len(best[0])} models the best rate moves by so many steps of the grid: {', '.join(words)}"
    figure, axes = style.panels(len(optimizers), title, height=3.2)
    models = [f"{width} × {depth}" for width, depth in itertools.product(WIDTHS, DEPTHS)]
    for axis, optimizer, table, lowest in zip(axes, optimizers, losses, best, strict=True):
        names = found[optimizer][0]
        with np.errstate(invalid="ignore"):
            above = table - table.min(axis=1, keepdims=True)
        drawn = axis.imshow(np.where(np.isfinite(above), above, 1.0), cmap="cividis_r", vmin=0, vmax=0.3, aspect="auto")
        axis.plot(lowest, np.arange(len(lowest)), "o", color="#c52929", markersize=7)
        axis.set_xticks(range(len(names)), [name.rpartition("=")[2].rpartition(":")[2] for name in names], rotation=45)
        axis.set_yticks(range(len(models)), models)
        axis.grid(False)
        axis.set_xlabel("learning rate" if "step_scale" not in names[0] else "step_scale")
        axis.set_ylabel("width × depth")
        style.explain(axis, in_words(optimizer))
    figure.colorbar(drawn, ax=axes, location="bottom", label="validation loss above the model's best (nats)")
    return figure
