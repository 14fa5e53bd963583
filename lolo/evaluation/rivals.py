"""Optimizers that people use today, by name, with their schedules, and the best of a grid of their settings.

Each is optax's. A name is KIND:RATE or KIND-SCHEDULE:RATE: `adamw:1e-3`, `muon-warmup-cosine:3e-3`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from lolo.evaluation import long_runs, run_state, schedules
from lolo.method import experts
from lolo.method.task import Splits

PICK_SEEDS = (1_000_001, 1_000_002)  # learning rates of rivals are picked on these, never reported
WEIGHT_DECAY = 1e-4  # where a name does not say otherwise

Number: TypeAlias = float | jax.Array
Optimizer: TypeAlias = Callable[..., optax.GradientTransformation]  # (learning rate, weight decay) -> it


def adamw(rate: experts.Rate, weight_decay: Number) -> optax.GradientTransformation:
    """AdamW."""
    return optax.adamw(rate, weight_decay=weight_decay)


def adam(rate: experts.Rate, weight_decay: Number) -> optax.GradientTransformation:
    """Adam, without weight decay."""
    return optax.adam(rate)


def sgdm(rate: experts.Rate, weight_decay: Number) -> optax.GradientTransformation:
    """SGD with momentum 0.9, without weight decay."""
    return optax.sgd(rate, momentum=0.9)


def nadamw(rate: experts.Rate, weight_decay: Number) -> optax.GradientTransformation:
    """AdamW with Nesterov momentum."""
    return optax.nadamw(rate, weight_decay=weight_decay)


def nesterov(rate: experts.Rate, weight_decay: Number) -> optax.GradientTransformation:
    """SGD with Nesterov momentum 0.9; the weight decay is part of the gradient (L2)."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum=0.9, nesterov=True))


def lion(rate: experts.Rate, weight_decay: Number) -> optax.GradientTransformation:
    """Lion."""
    return optax.lion(rate, weight_decay=weight_decay)


def schedule_free(rate: experts.Rate, weight_decay: Number) -> optax.GradientTransformation:
    """Schedule-Free AdamW; scores are those of its average."""
    # As optax.contrib.schedule_free_adamw, whose warm-up can't be traced.
    optimizer = optax.chain(
        optax.scale_by_rms(decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.contrib.schedule_free(optimizer, rate, b1=0.9)


def prodigy(rate: experts.Rate, weight_decay: Number) -> optax.GradientTransformation:
    """Prodigy, which finds its learning rate; `rate` multiplies it, 1 as meant."""
    # Its authors advise the safeguard for a warm-up: a first rate of 0 makes everything NaN without it.
    return optax.contrib.prodigy(rate, weight_decay=weight_decay, safeguard_warmup=callable(rate))


def muon_matched(
    rate: experts.Rate, weight_decay: Number, is_matrix: experts.IsMatrix = experts.has_two_axes
) -> optax.GradientTransformation:
    """Muon with steps of .2, about as large as AdamW's: one rate suits both (Moonlight, arXiv 2502.16982)."""
    return experts.muon(rate, weight_decay, is_matrix, rms=0.2)


GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SGD_GRID = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


class Rival(NamedTuple):
    """One kind of optimizer."""

    optimizer: Optimizer
    rates: tuple[float, ...] = GRID  # of its grids
    decays: bool = True  # whether it has a weight decay
    scored: long_runs.Scored = long_runs.params_of  # where its scores are taken
    tells_matrices_apart: bool = False  # whether it has an argument is_matrix


RIVALS: dict[str, Rival] = {
    "adamw": Rival(adamw),
    "adam": Rival(adam, decays=False),
    "sgdm": Rival(sgdm, rates=SGD_GRID, decays=False),
    "nadamw": Rival(nadamw),
    "nesterov": Rival(nesterov, rates=SGD_GRID),
    "lion": Rival(lion, rates=(1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
    "muon": Rival(experts.muon, tells_matrices_apart=True),
    "muon-matched": Rival(muon_matched, tells_matrices_apart=True),
    "schedule-free": Rival(
        schedule_free, scored=lambda state: optax.contrib.schedule_free_eval_params(state.learner, state.params)
    ),
    "prodigy": Rival(prodigy, rates=(0.1, 0.3, 1.0, 3.0, 10.0)),
}
NAMES = {
    kind if schedule == "constant" else f"{kind}-{schedule}": (kind, schedule)
    for kind in RIVALS
    for schedule in schedules.SCHEDULES
}
"""Kind and schedule of each name: "adamw", "adamw-cosine"."""

GRIDS = {"grid": (WEIGHT_DECAY,), "wide-grid": (WEIGHT_DECAY, 0.1)}
"""Weight decays of the grids by name; learning rates are those of the kind."""


@functools.cache
def maker(name: str, is_matrix: experts.IsMatrix | None = None) -> long_runs.Make:
    """setting -> the optimizer of that name, one object for all settings, so that they share a compiled program.

    A setting holds numbers by name: lr, weight_decay, and for a schedule steps and warmup, in steps. is_matrix: the
    parameters that a rival which tells matrices apart moves as such; None: all of two axes or more.
    """
    kind, schedule = NAMES[name]
    optimizer, factor, apart = RIVALS[kind].optimizer, schedules.SCHEDULES[schedule], RIVALS[kind].tells_matrices_apart
    if is_matrix is not None and apart:
        optimizer = functools.partial(optimizer, is_matrix=is_matrix)

    def make(setting: dict[str, Any]) -> optax.GradientTransformation:
        rate: experts.Rate = setting["lr"]
        if schedule != "constant":
            rate = lambda count: setting["lr"] * factor(count, setting["steps"], setting["warmup"])  # noqa: E731
        return optimizer(rate, setting["weight_decay"])

    return make


def rival(
    name: str,
    lr: float,
    steps: int,
    weight_decay: float = WEIGHT_DECAY,
    warmup: float = schedules.WARMUP,
    is_matrix: experts.IsMatrix | None = None,
) -> long_runs.Candidate:
    """A rival as a candidate: "adamw", 1e-3 -> AdamW with learning rate 1e-3 and weight decay 1e-4.

    steps: of the run; warmup: the share of it in which a schedule's warm-up rises; is_matrix: see `maker`.
    """
    label = f"{name} {lr:g}"
    if weight_decay != WEIGHT_DECAY:
        label += f" wd {weight_decay:g}"
    if warmup != schedules.WARMUP:
        label += f" warmup {warmup:g}"
    setting = {"lr": lr, "weight_decay": weight_decay, "steps": float(steps), "warmup": warmup * steps}
    return long_runs.Candidate(label, None, maker(name, is_matrix), setting, RIVALS[NAMES[name][0]].scored)


def grid(name: str, of: str, steps: int) -> list[long_runs.Candidate]:
    """The candidates of a rival's grid. `of`: a name in GRIDS."""
    kind = RIVALS[NAMES[name][0]]
    return [
        rival(name, lr, steps, decay) for decay in (GRIDS[of] if kind.decays else GRIDS["grid"]) for lr in kind.rates
    ]


def grid_size(name: str, rate: float | str) -> int:
    """Runs that picking the learning rate of a rival takes: those of a grid, by its name; 0 for a number."""
    return len(grid(name, rate, 1)) * len(PICK_SEEDS) if isinstance(rate, str) else 0


def best_of_grid(
    splits: Splits,
    name: str,
    steps: int,
    of: str = "grid",
    on_steps: Callable[[int], None] = lambda steps: None,
    keep: run_state.RunState | None = None,
) -> long_runs.Candidate:
    """The rival with the lowest final train loss on separate seeds; its label says that it was picked.

    of: a name in GRIDS; keep: where the state of the grid's runs is kept.
    """
    candidates = grid(name, of, steps)
    settings = [c.setting for c in candidates for _ in PICK_SEEDS]
    curves = long_runs.run(
        splits.train, splits.validation, maker(name), settings, PICK_SEEDS * len(candidates), steps, on_steps, keep=keep
    )
    finals = curves.train_loss[:, -1].reshape(len(candidates), len(PICK_SEEDS)).mean(axis=1)
    best = candidates[int(np.nanargmin(np.where(np.isfinite(finals), finals, np.inf)))]
    return best._replace(label=f"best {best.label}")
