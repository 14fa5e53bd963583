"""Optimizers made by hand, by name, and the best of a grid of their settings."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lolo.evaluation import long_runs
from lolo.method.task import Splits

PICK_SEEDS = (1_000_001, 1_000_002)  # learning rates of baselines are picked on these, never reported


def adamw(setting: dict[str, jax.Array]) -> optax.GradientTransformation:
    """AdamW with constant learning rate."""
    return optax.adamw(setting["lr"], weight_decay=setting["weight_decay"])


def adam(setting: dict[str, jax.Array]) -> optax.GradientTransformation:
    """Adam with constant learning rate."""
    return optax.adam(setting["lr"])


def sgdm(setting: dict[str, jax.Array]) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and constant learning rate."""
    return optax.sgd(setting["lr"], momentum=0.9)


def adamw_cosine(setting: dict[str, jax.Array]) -> optax.GradientTransformation:
    """AdamW with the learning rate following half a cosine to 0 at `steps`."""

    def schedule(count: jax.Array) -> jax.Array:
        return setting["lr"] * 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count / setting["steps"], 1.0)))

    return optax.adamw(schedule, weight_decay=setting["weight_decay"])


def adamw_rsqrt(setting: dict[str, jax.Array]) -> optax.GradientTransformation:
    """AdamW with the learning rate over √(1 + t/3000): of any horizon, as `step_decay` is for a learned optimizer."""
    return optax.adamw(lambda count: setting["lr"] / jnp.sqrt(1 + count / 3000), weight_decay=setting["weight_decay"])


BASELINES: dict[str, long_runs.Make] = {
    "adamw": adamw,
    "adam": adam,
    "sgdm": sgdm,
    "adamw-cosine": adamw_cosine,
    "adamw-rsqrt": adamw_rsqrt,
}
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SGD_GRID = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
GRIDS = {"grid": (1e-4,), "wide-grid": (1e-4, 0.1)}
"""Weight decays of the grids by name; learning rates are those of GRID, for SGD of SGD_GRID."""


def grid(kind: str, name: str, steps: int) -> list[long_runs.Candidate]:
    """The candidates of a baseline's grid. Adam and SGD have no weight decay."""
    decays = GRIDS[name] if kind.startswith("adamw") else (1e-4,)
    return [baseline(kind, lr, steps, decay) for decay in decays for lr in (SGD_GRID if kind == "sgdm" else GRID)]


def grid_size(kind: str, learning_rate: float | str) -> int:
    """Runs that picking the learning rate of a baseline takes: those of a grid, by its name; 0 for a number."""
    return len(grid(kind, learning_rate, 1)) * len(PICK_SEEDS) if isinstance(learning_rate, str) else 0


def baseline(name: str, lr: float, steps: int, weight_decay: float = 1e-4) -> long_runs.Candidate:
    """A hand-made optimizer: "adamw", 1e-3 -> AdamW with learning rate 1e-3 and weight decay 1e-4."""
    setting = {"lr": lr, "weight_decay": weight_decay, "steps": float(steps)}
    label = f"{name} {lr:g}" if weight_decay == 1e-4 else f"{name} {lr:g} wd {weight_decay:g}"
    return long_runs.Candidate(label, None, BASELINES[name], setting)


def best_of_grid(
    splits: Splits,
    name: str,
    steps: int,
    of: str = "grid",
    on_steps: Callable[[int], None] = lambda steps: None,
) -> long_runs.Candidate:
    """The baseline with the lowest final train loss on separate seeds; its label says that it was picked.

    `of`: a name in GRIDS.
    """
    candidates = grid(name, of, steps)
    settings = [c.setting for c in candidates for _ in PICK_SEEDS]
    curves = long_runs.run(
        splits.train, splits.validation, BASELINES[name], settings, PICK_SEEDS * len(candidates), steps, on_steps
    )
    finals = curves.train_loss[:, -1].reshape(len(candidates), len(PICK_SEEDS)).mean(axis=1)
    best = candidates[int(np.nanargmin(np.where(np.isfinite(finals), finals, np.inf)))]
    return best._replace(label=f"best {best.label}")
