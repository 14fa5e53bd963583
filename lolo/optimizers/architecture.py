"""Architectures by name, their settings, and how settings become a learned optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from lolo.files.settings import RecipeError, parse, pick
from lolo.optimizers import base
from lolo.optimizers.small_fc import small_fc

LEARNERS: dict[str, Callable[..., base.LearnedOptimizer]] = {"small_fc": small_fc, "sgd": base.learned_sgd}


@dataclasses.dataclass(frozen=True)
class LearnerSettings:
    """The learned optimizer's architecture."""

    name: str = "small_fc"  # small_fc or sgd
    hidden: int = 32  # width of the two hidden layers
    step_mult: float = 1e-3  # λ1 of Eq. 7
    exp_mult: float = 1e-3  # λ2 of Eq. 7
    learn_decays: bool = False  # meta-learn the accumulators' decays too
    weight_decay: float = 0.0  # decoupled, times λ1; the expert gets the same
    clock_limit: float | None = None  # the time features see min(t, this)
    step_decay: float | None = None  # updates shrink as 1/√(1 + t/this); for use, not for meta-training


def learner_from_dict(data: Any, source: str) -> LearnerSettings:
    """The architecture stored with weights. Raises RecipeError, which names `source`."""
    try:
        return parse(LearnerSettings, data, "learner.")
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error


def build_learner(
    learner: LearnerSettings, axis_name: str | None = None, sharded_axis: int = 0
) -> base.LearnedOptimizer:
    """The architecture that a recipe names; inside shard_map, for parameters cut over `axis_name` (see small_fc)."""
    make = pick(LEARNERS, "learner.name", learner.name)
    if make is base.learned_sgd:
        return make()
    settings = {name: value for name, value in dataclasses.asdict(learner).items() if name != "name"}
    return make(**settings, axis_name=axis_name, sharded_axis=sharded_axis)
