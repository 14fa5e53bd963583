"""Optimizers by name, as `lolo eval` and studies take them: weights with deployment settings, or a baseline.

`lolo-small`, `FILE:clock_limit=10000,weight_decay=0.1,schedule=cosine`, `FILE:step_scale=2,freeze_unseen=true`,
`adamw:1e-3`, `adamw-cosine:grid`, `sgdm:…`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

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
FLAGS = {"true": True, "false": False}


@dataclasses.dataclass(frozen=True)
class DeploymentSettings:
    """How weights are deployed: what stands after their name, `WEIGHTS:clock_limit=10000,schedule=cosine`."""

    learner: dict[str, Any]  # settings of the architecture that are others than the weights came with
    step_scale: float = 1.0  # what updates are multiplied by
    schedule: str = "constant"  # and this besides: 1, or half a cosine from 1 to 0
    freeze_unseen: bool = False  # whether entries that never had a gradient stand still

    @property
    def words(self) -> str:
        """The settings that were given, for a row's label: " weight_decay=0.1 schedule=cosine"."""
        given = dict(self.learner)
        if self.step_scale != 1.0:
            given["step_scale"] = self.step_scale
        if self.schedule != "constant":
            given["schedule"] = self.schedule
        if self.freeze_unseen:
            given["freeze_unseen"] = "true"
        return "".join(f" {name}={value}" for name, value in given.items())


def parse_deployment(words: str, name: str, learner: LearnerSettings) -> DeploymentSettings:
    """Raises ValueError, which names the weights, the word and what could stand there."""
    row = architecture.of(learner)
    own = row.deployment
    rules: dict[str, Callable[[Any], Any]] = {
        **own,
        "step_scale": functools.partial(settings.number, positive=True),
        "schedule": functools.partial(settings.pick, {word: word for word in SCHEDULES}, f"{name}: schedule"),
    }
    if row.freeze_unseen is not None:
        rules["freeze_unseen"] = functools.partial(settings.pick, FLAGS, f"{name}: freeze_unseen")
    others = {field for other in architecture.ARCHITECTURES.values() for field in other.deployment} | {"freeze_unseen"}
    found = dict[str, Any]()
    for word in words.split(",") if words else ():
        field, _, value = word.partition("=")
        if field in others - set(rules):
            raise ValueError(f"{name}:{words}: learner {learner.name!r} has no {field}; leave it out.")
        if field not in rules:
            raise settings.unknown(f"setting of {name}", field, rules)
        try:
            found[field] = rules[field](value)
        except RecipeError:  # a sentence by itself
            raise
        except ValueError as error:
            raise ValueError(f"{name}: {field}={value!r} {error}") from error
    inside = {field: found.pop(field) for field in own if field in found}
    return DeploymentSettings(inside, **found)


class NamedWeights(NamedTuple):
    """Weights as they are deployed, and what their rows are called."""

    label: str
    meta_seed: int | None
    weights: pretrained.Weights  # their learner has the deployment settings
    deployment: DeploymentSettings


class NamedBaseline(NamedTuple):
    """An optimizer made by hand."""

    kind: str  # of `baselines.BASELINES`
    learning_rate: float | str  # a number, or a grid of `baselines.GRIDS`


Named: TypeAlias = NamedWeights | NamedBaseline


def read(names: Sequence[str | Path], methods: Mapping[str, str] = settings.NONE) -> dict[str, Named]:
    """What optimizers' names mean, by name, in their order; weights are read here and nowhere else.

    A name that says the same as one before it, as adamw:0.001 after adamw:1e-3, is left out.

    Args:
      methods: what rows of these weights files are called, where their recipe's imitation and replay do not tell.

    Raises ValueError, FileError.
    """
    found: dict[str, Named] = {}
    baseline_of = {name: baseline(name) for name in map(str, names)}  # first: reading weights takes longer
    loaded: dict[str, pretrained.Weights] = {}  # by path: weights may be deployed in several ways
    kinds: dict[str, Any] = {}
    for name, by_hand in baseline_of.items():
        if by_hand is None:
            found[name] = _named_weights(name, methods, loaded, kinds, found)
        elif by_hand not in found.values():
            found[name] = by_hand
    return found


def baseline(name: str) -> NamedBaseline | None:
    """What "adamw:1e-3" or "adamw:grid" names; None for weights. Raises ValueError, RecipeError."""
    kind, separator, setting = name.partition(":")
    if separator and kind in baselines.BASELINES:
        return NamedBaseline(kind, _learning_rate(name, kind, setting))
    weights = kind in weights_file.shipped_weights() or Path(name.rpartition(":")[0]).is_file()
    if separator and "=" not in setting and not weights and not Path(name).exists():
        raise settings.unknown("optimizer", kind, baselines.BASELINES)
    return None


def _learning_rate(name: str, kind: str, setting: str) -> float | str:
    if setting in baselines.GRIDS:
        return setting
    try:
        rate = float(setting)
    except ValueError:
        grids = " or ".join(f"{kind}:{grid}" for grid in baselines.GRIDS)
        raise ValueError(f"{name}: give a learning rate ({kind}:1e-3), or {grids}.") from None
    if not 0 < rate < float("inf"):
        raise ValueError(f"{name}: the learning rate must be a positive number.")
    return rate


def _named_weights(
    name: str,
    methods: Mapping[str, str],
    loaded: dict[str, pretrained.Weights],
    kinds: dict[str, Any],
    before: Mapping[str, Named],
) -> NamedWeights:
    """Weights by name, deployed as it says. `kinds`: as `_label` has it."""
    path, separator, words = name.rpartition(":")
    if not separator or Path(name).exists():
        path, words = name, ""
    if path not in loaded:
        loaded[path] = pretrained.load(path)
    weights = loaded[path]
    deployment = parse_deployment(words, path, weights.learner)
    taken = {(other.label, other.meta_seed) for other in before.values() if isinstance(other, NamedWeights)}
    label, seed = _label(weights, deployment, path, methods.get(path), kinds, taken)
    learner = architecture.deployed(weights.learner, deployment.learner)
    return NamedWeights(label, seed, weights._replace(learner=learner), deployment)


def _label(
    weights: pretrained.Weights,
    deployment: DeploymentSettings,
    name: str,
    method: str | None,
    kinds: dict[str, Any],
    taken: set[tuple[str, int | None]],
) -> tuple[str, int | None]:
    """Method and meta-seed of weights as they came, from their recipe, else the file's name; and how they are deployed.

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
    words = deployment.words
    another = kinds.setdefault(label + words, kind) != kind or (label + words, seed) in taken
    return ((name if another else label) + words, seed)


@functools.lru_cache(maxsize=64)
def _make(learner: LearnerSettings, step_scale: float, cosine_steps: int | None, freeze_unseen: bool) -> long_runs.Make:
    """φ -> optimizer, one object for equal arguments: what is compiled for it is found again."""
    cosine = None if cosine_steps is None else optax.cosine_decay_schedule(step_scale, cosine_steps)
    return pretrained.maker(learner, step_scale if cosine is None else cosine, freeze_unseen=freeze_unseen)


def candidate(
    named: Named, splits: Splits, steps: int, on_steps: Callable[[int], None] = lambda count: None
) -> Candidate:
    """What `long_runs.compare` takes. The best of a grid is found here; on_steps gets the number of steps done."""
    if isinstance(named, NamedWeights):
        label, seed, weights, deployment = named
        cosine_steps = steps if deployment.schedule == "cosine" else None
        make = _make(weights.learner, deployment.step_scale, cosine_steps, deployment.freeze_unseen)
        return Candidate(label, seed, make, weights.meta_params)
    kind, rate = named
    if isinstance(rate, str):
        return baselines.best_of_grid(splits, kind, steps, rate, on_steps=on_steps)
    return baselines.baseline(kind, rate, steps)
