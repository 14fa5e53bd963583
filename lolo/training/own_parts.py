"""Parts of a recipe that are functions of a user's own file: `--imitation.expert path.py:mine:decay=0.9`.

Each is called as the package's functions of its family are, with the settings in its name besides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lolo.files import settings, user_code
from lolo.files.settings import RecipeError
from lolo.files.user_code import HERE
from lolo.method import estimators, imitation, replay
from lolo.optimizers import architecture, base
from lolo.training.recipes import Recipe


class Family(NamedTuple):
    """What functions of a family return."""

    returns: str  # in words
    fits: Callable[[Any], bool]  # whether a result can be that; results may be traced


def _a(kind: type) -> Callable[[Any], bool]:
    return lambda made: isinstance(made, kind)


def _is_number(made: Any, kind: Any = jnp.number) -> bool:
    plain = isinstance(made, int | float | jax.Array) or hasattr(made, "dtype")
    return plain and jnp.ndim(made) == 0 and jnp.issubdtype(jnp.result_type(made), kind)


def _is_read(made: Any) -> bool:
    return isinstance(made, tuple) and len(made) == 2 and isinstance(made[1], replay.Replay)


FAMILIES: dict[str, Family] = {
    "learner.name": Family("a lolo.LearnedOptimizer", _a(base.LearnedOptimizer)),
    "imitation.expert": Family("an optax optimizer", _a(optax.GradientTransformation)),
    "imitation.loss": Family("an imitation loss", _a(imitation.ImitationLoss)),
    "imitation.schedule": Family(
        "a number, or a function of the inner step", lambda made: callable(made) or _is_number(made)
    ),
    "imitation.alpha_mix": Family("α, a number", _is_number),
    "imitation.alpha_loss": Family("α, a number", _is_number),
    "imitation.normalize": Family("an array [J, P, L]", lambda made: jnp.ndim(made) == 3),
    "estimator.kind": Family("a lolo.Estimator", _a(estimators.Estimator)),
    "unroll.schedule": Family("a whole number of truncations", functools.partial(_is_number, kind=jnp.integer)),
    "replay.read": Family("a state and the buffer after it", _is_read),
}
"""Fields of a recipe whose value may be a user's function."""


def load(recipe: Recipe, folders: Sequence[Path] = HERE) -> Recipe:
    """Run the files of a recipe's own parts. Returns the recipe with their sha256 in the names.

    folders: where a file is looked for. Raises UserCodeError: no such file or function, or it has changed; RecipeError
    for a learner whose φ could not be kept.
    """
    values = settings.fields(recipe)
    for field, family in FAMILIES.items():
        if settings.is_own(values[field]):
            name = user_code.load(values[field], field, family.returns, folders)
            if field == "learner.name":
                architecture.register(name, user_code.loaded(name))
                recipe = dataclasses.replace(recipe, learner=dataclasses.replace(recipe.learner, name=name))
                architecture.of(recipe.learner).shapes(recipe.learner)
            else:
                recipe = settings.with_field(recipe, field, name)
    return recipe


def pick(table: dict[str, Any], field: str, name: str) -> Any:
    """The function that a field of a recipe names: a row of the family's table, or a user's that `load` has run.

    The user's raises RecipeError where it returns something else than its family does.
    """
    if field not in FAMILIES or not settings.is_own(name):
        return settings.pick(table, field, name)
    match, family = settings.NAME.fullmatch(name), FAMILIES[field]
    function = settings.with_settings(user_code.loaded(name), match and match["settings"])

    def checked(*args: Any) -> Any:
        made = function(*args)
        if not family.fits(made):
            found = f"{made.dtype}{list(made.shape)}" if hasattr(made, "dtype") else type(made).__name__
            raise RecipeError(f"{settings.without_sha256(name)} returned {found}; expected {family.returns}.")
        return made

    return checked


def used(recipe: Recipe) -> list[str]:
    """The parts of a recipe that are a user's functions, as people write them."""
    values = settings.fields(recipe)
    return [settings.without_sha256(values[field]) for field in FAMILIES if settings.is_own(values[field])]
