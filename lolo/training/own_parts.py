"""Parts of a recipe that are functions of a user's own file: `--imitation.expert path.py:mine:decay=0.9`.

Each is called as the package's functions of its family are, with the settings in its name besides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolo.files import settings, user_code
from lolo.files.user_code import HERE
from lolo.optimizers import architecture
from lolo.training.recipes import Recipe

FAMILIES: dict[str, str] = {
    "learner.name": "a lolo.LearnedOptimizer",
    "imitation.expert": "an optax optimizer",
    "imitation.loss": "an imitation loss",
    "imitation.schedule": "a learning rate",
    "imitation.alpha_mix": "α",
    "imitation.alpha_loss": "α",
    "imitation.normalize": "what an imitation loss is divided by",
    "estimator.kind": "a lolo.Estimator",
    "unroll.schedule": "a length in truncations",
    "replay.read": "a place in the buffer",
}
"""Fields of a recipe whose value may be a user's function, and what that returns."""


def load(recipe: Recipe, folders: Sequence[Path] = HERE) -> Recipe:
    """Run the files of a recipe's own parts. Returns the recipe with their sha256 in the names.

    folders: where a file is looked for. Raises UserCodeError: no such file or function, or it has changed.
    """
    values = settings.fields(recipe)
    for field, returns in FAMILIES.items():
        if settings.is_own(values[field]):
            name = user_code.load(values[field], field.replace(".", "_"), returns, folders)
            if field == "learner.name":
                architecture.register(name, user_code.loaded(name))
                recipe = dataclasses.replace(recipe, learner=dataclasses.replace(recipe.learner, name=name))
            else:
                recipe = settings.with_field(recipe, field, name)
    return recipe


def pick(table: dict[str, Any], field: str, name: str) -> Any:
    """The function that a field of a recipe names: a row of the family's table, or a user's that `load` has run."""
    if not settings.is_own(name):
        return settings.pick(table, field, name)
    match = settings.NAME.fullmatch(name)
    return settings.with_settings(user_code.loaded(name), match and match["settings"])
