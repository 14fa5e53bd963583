"""Optimizers by name, as `lolo eval` and studies take them: weights and how they are used, or a baseline.

`lolo-small`, `FILE:clock_limit=10000,weight_decay=0.1,schedule=cosine`, `FILE:step_scale=2`, `adamw:1e-3`,
`adamw-cosine:grid`, `sgdm:…`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax

from lolo.evaluation import baselines, long_runs
from lolo.evaluation.long_runs import Candidate
from lolo.files import settings
from lolo.files.settings import RecipeError
from lolo.method.task import Splits
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.optimizers.architecture import LearnerSettings
from lolo.training import recipes

SCHEDULES = ("constant", "cosine")


@dataclasses.dataclass(frozen=True)
class DeploymentSettings:
    """How weights are used: what stands after their name, `WEIGHTS:clock_limit=10000,schedule=cosine`."""

    weight_decay: float | None = None  # None: as they came
    clock_limit: float | None = None
    step_decay: float | None = None
    step_scale: float = 1.0  # what updates are multiplied by
    schedule: str = "constant"  # and this besides: 1, or half a cosine from 1 to 0

    @property
    def changes(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if value != getattr(DeploymentSettings(), name)
        }


def parse_deployment(words: str, name: str) -> DeploymentSettings:
    """Raises ValueError, which names the weights, the word and what could stand there."""
    known, found = [field.name for field in dataclasses.fields(DeploymentSettings)], dict[str, Any]()
    for word in words.split(",") if words else ():
        field, _, value = word.partition("=")
        if field not in known:
            raise settings.unknown(f"setting of {name}", field, known)
        if field == "schedule":
            settings.pick(dict.fromkeys(SCHEDULES), f"{name}: schedule", value)
            found[field] = value
            continue
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        positive = field in ("step_scale", "step_decay")
        # A clock_limit or step_decay of inf switches off the one that weights came with.
        finite = math.isfinite(number) or field in ("clock_limit", "step_decay")
        if not number >= 0 or not finite or (positive and not number):
            raise ValueError(f"{name}: {field}={value!r} must be {'0 or ' * (not positive)}a positive number.")
        found[field] = number
    return DeploymentSettings(**found)


class NamedWeights(NamedTuple):
    """Weights in use, and what their rows are called."""

    label: str
    meta_seed: int | None
    weights: pretrained.Weights
    use: DeploymentSettings


def is_baseline(name: str) -> bool:
    """Whether this names an optimizer made by hand, such as adamw:1e-3. Raises RecipeError for an unknown one."""
    kind, separator, setting = name.partition(":")
    if separator and kind in baselines.BASELINES:
        return True
    weights = kind in weights_file.shipped_weights() or Path(name.rpartition(":")[0]).is_file()
    if separator and "=" not in setting and not weights and not Path(name).exists():
        raise settings.unknown("optimizer", kind, baselines.BASELINES)
    return False


def named_weights(
    names: Sequence[str | Path], methods: Mapping[str, str] = types.MappingProxyType({})
) -> dict[str, NamedWeights]:
    """Weights by the names that are no baselines'. Raises ValueError, FileError.

    `methods`: what rows of these weights files are called, where their recipe's imitation and replay do not tell.
    """
    found: dict[str, NamedWeights] = {}
    kinds: dict[str, Any] = {}
    for name in map(str, names):
        if is_baseline(name):
            continue
        path, separator, words = name.rpartition(":")
        if not separator or Path(name).exists():
            path, words = name, ""
        use, loaded = parse_deployment(words, path), pretrained.load(path)
        try:
            requested = {"weight_decay": use.weight_decay, "clock_limit": use.clock_limit, "step_decay": use.step_decay}
            learner = architecture.deployed(loaded.learner, requested)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        taken = {(other.label, other.meta_seed) for other in found.values()}
        label, seed = _label(loaded, use, path, methods.get(path), kinds, taken)
        found[name] = NamedWeights(label, seed, loaded._replace(learner=learner), use)
    return found


def _label(
    weights: pretrained.Weights,
    use: DeploymentSettings,
    name: str,
    method: str | None,
    kinds: dict[str, Any],
    taken: set[tuple[str, int | None]],
) -> tuple[str, int | None]:
    """Method and meta-seed of weights, from their recipe, else the file's name; and how they are used.

    `kinds` holds what each label stands for. Rows of one label are meta-seeds of one recipe: weights that differ from
    those before them in more than the seed, or came with other settings than in meta-training, get a row of their own.
    """
    kind: Any = (None, weights.learner)
    label, seed = Path(name).stem, None
    if weights.recipe:
        try:
            recipe = recipes.from_dict(weights.recipe)
        except RecipeError as error:
            raise RecipeError(f"{name}: the recipe in its metadata can't be read: {error}") from error
        # slots_per_block is chosen for a machine: `lolo train --measure-blocks` may store another for each meta-seed.
        plain = settings.with_field(dataclasses.replace(recipe, seed=0), "estimator.slots_per_block", 1)
        seed, kind = recipe.seed, (plain, weights.learner)
        if weights.learner == recipe.learner:
            label = method or recipes.method_of(recipe) or label
    words = "".join(f" {field}={value}" for field, value in use.changes.items())
    another = kinds.setdefault(label + words, kind) != kind or (label + words, seed) in taken
    return ((name if another else label) + words, seed)


@functools.lru_cache(maxsize=64)
def _make_of(learner: LearnerSettings, step_scale: float, cosine_steps: int | None) -> long_runs.Make:
    """φ -> optimizer, one object for equal arguments: what is compiled for it is found again."""
    optimizer = pretrained.maker(learner)
    if cosine_steps is not None:
        scale = optax.scale_by_schedule(optax.cosine_decay_schedule(step_scale, cosine_steps))
    elif step_scale != 1.0:
        scale = optax.scale(step_scale)
    else:
        return optimizer
    return lambda meta_params: optax.chain(optimizer(meta_params), scale)


def candidate(
    name: str,
    named: dict[str, NamedWeights],
    splits: Splits,
    steps: int,
    advanced: Callable[[int], None] = lambda count: None,
) -> Candidate:
    """What `compare` takes, by name: one of `named_weights`, `adamw:1e-3`, `adam:…`, `sgdm:…`, `adamw:grid`."""
    if name in named:
        label, seed, weights, use = named[name]
        make = _make_of(weights.learner, use.step_scale, steps if use.schedule == "cosine" else None)
        return Candidate(label, seed, make, weights.meta_params)
    kind, lr = name.partition(":")[0], learning_rate(name)
    if isinstance(lr, str):
        return baselines.best_of_grid(splits, kind, steps, lr, on_steps=advanced)
    return baselines.baseline(kind, lr, steps)


def distinct(names: Sequence[str | Path]) -> list[str]:
    """Names without those that say the same again: adamw:0.001 after adamw:1e-3. Raises ValueError."""
    found: dict[tuple[str, float | str], str] = {}
    for name in map(str, names):
        key = (name.partition(":")[0], learning_rate(name)) if is_baseline(name) else (name, "")
        found.setdefault(key, name)
    return list(found.values())


def learning_rate(name: str) -> float | str:
    """Of a baseline's name: "adamw:1e-3" -> 1e-3, "adamw:grid" -> "grid". Raises ValueError."""
    kind, _, setting = name.partition(":")
    if setting in baselines.GRIDS:
        return setting
    try:
        lr = float(setting)
    except ValueError:
        grids = " or ".join(f"{kind}:{grid}" for grid in baselines.GRIDS)
        raise ValueError(f"{name}: give a learning rate ({kind}:1e-3), or {grids}.") from None
    if not 0 < lr < float("inf"):
        raise ValueError(f"{name}: the learning rate must be a positive number.")
    return lr
