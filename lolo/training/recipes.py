"""Recipes: everything that decides a meta-training, as plain frozen data; `build` makes a `meta.Setup` of it.

`LOLO` is the method of the paper; `BC_ONLY` and `NAIVE` are differences to it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lolo.files import settings
from lolo.files.settings import RecipeError, fields, parse, pick, unknown_field, with_field
from lolo.optimizers import architecture
from lolo.optimizers.architecture import LearnerSettings
from lolo.optimizers.norm_fc_spec import NormFcSettings
from lolo.optimizers.small_fc_spec import SmallFcSettings

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class ImitationSettings:
    """The expert and the hand-over from it to the task loss."""

    expert: str = "adam"  # adam, adam-of-learner (the same, without a state of its own), sgdm or muon
    lr: float = 1e-3  # the expert's learning rate
    alpha_mix: str = "linear"  # α of Eq. 1: linear, zero (the expert steps) or one (the learned optimizer steps)
    alpha_loss: str = "linear"  # α of Eq. 3-4: linear, zero (imitation loss only) or one (task loss only)
    normalize: str = "slot"  # ψ of Eq. 5: slot, joint or none
    # Of imitation: squared (Eq. 2), direction (1 - cosine of the two updates) or direction-magnitude (their sizes too)
    loss: str = settings.added("squared")
    magnitude: float = settings.added(0.3)  # weight of the sizes in direction-magnitude; the direction has the rest
    start: float = settings.added(0.0)  # share of T at which a linear α leaves 0
    end: float = settings.added(1.0)  # share of T at which a linear α reaches 1
    floor: float = settings.added(0.0)  # least weight of the imitation loss in Eq. 4
    schedule: str = settings.added("constant")  # of the expert's learning rate over the inner step: constant or cosine
    final_lr: float = settings.added(1e-5)  # where the cosine ends
    decay_steps: int = settings.added(10_000)  # inner steps that the cosine takes


@dataclasses.dataclass(frozen=True)
class ReplaySettings:
    """The buffer of inner states that unrolls restart from."""

    capacity: int = 4  # M, states per slot
    threshold: float = 0.1  # P_th: the share of unrolls that start from a random init
    read: str = "oldest"  # oldest, uniform, newest or pop
    push: str = "random"  # when a state enters: random (a random step of the unroll) or struggle (where it got worse)


@dataclasses.dataclass(frozen=True)
class UnrollSettings:
    """How inner training is cut into unrolls and truncations."""

    length: int = 1000  # N, inner steps
    truncation: int = 50  # L, inner steps with one noise
    truncations_per_update: int = 1  # J; N / L is Algorithm 1 as printed
    schedule: str = "constant"  # length of an unroll: constant, uniform, log-uniform or curriculum
    stagger: bool = False  # first unrolls shortened, so that slots are out of phase


@dataclasses.dataclass(frozen=True)
class EstimatorSettings:
    """The estimator of the meta-gradient."""

    kind: str = "pes"  # pes, es or nres
    pairs: int = 8  # P, antithetic pairs per task; a slot is one pair with its inner problem and buffer
    sigma: float = 0.01  # σ of the noise on φ
    slots_per_block: int = 1  # pairs advanced together by vmap; 1 is best on CPUs, more suits GPUs


@dataclasses.dataclass(frozen=True)
class OuterSettings:
    """The optimizer of φ."""

    steps: int = 5000  # T
    lr: float = 3e-3  # AdamW's peak learning rate
    final_lr: float = 1e-3  # at the end of the cosine
    warmup: float = 0.02  # share of T
    weight_decay: float = 0.0
    clip: float = 1.0  # global norm
    clip_position: str = "before"  # before Adam (acts as normalisation), after it, or none
    max_bad_steps: int = 10  # stop after this many outer steps in a row without one finite pair


@dataclasses.dataclass(frozen=True)
class ValidationSettings:
    """The long unroll that picks the best weights."""

    every: int = 250  # outer steps; 0: never
    steps: int = 0  # inner steps; 0: 10 times unroll.length
    seeds: int = 2
    tasks: tuple[str, ...] = settings.added(())  # that choose the best instead of the recipe's tasks; none of those


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One meta-training. Equal recipes and versions give equal φ on the same kind of device, byte for byte.

    >>> recipe = lolo.Recipe(tasks=("books-mlp",), seed=3)
    >>> lolo.LOLO.replay.threshold, lolo.BC_ONLY.replay.threshold, lolo.NAIVE.imitation.alpha_loss
    (0.1, 1.0, 'one')
    """

    tasks: tuple[str, ...] = ("fashion-mlp",)  # names of `lolo tasks`, or path.py:function
    learner: LearnerSettings = settings.alternatives(SmallFcSettings(), architecture.settings_types)
    imitation: ImitationSettings = ImitationSettings()
    replay: ReplaySettings = ReplaySettings()
    unroll: UnrollSettings = UnrollSettings()
    estimator: EstimatorSettings = EstimatorSettings()
    outer: OuterSettings = OuterSettings()
    validation: ValidationSettings = ValidationSettings()
    seed: int = 0


LOLO = Recipe()
"""LoLO with the paper's sizes: imitation of Adam on-policy, replay, linear hand-over."""

BC_ONLY = dataclasses.replace(LOLO, replay=dataclasses.replace(LOLO.replay, threshold=1.0))
"""LoLO without its buffer: every unroll starts from a random init."""

NAIVE = dataclasses.replace(
    BC_ONLY, imitation=dataclasses.replace(BC_ONLY.imitation, alpha_mix="one", alpha_loss="one", normalize="none")
)
"""Naive-LO: persistent evolution strategies on the task loss alone."""

REPLAY_ONLY = dataclasses.replace(NAIVE, replay=LOLO.replay)
"""Naive-LO that restarts from the buffer, without imitation: the paper's ablation."""

LOLO_PAPER = dataclasses.replace(LOLO, tasks=("imagenet32-mlp-w128-d3",))
"""The paper's meta-training: ImageNet-32 MLP at batch 4,096, T = 5,000, N = 1,000, L = 50, σ = 0.01, M = 4.

    lolo train lolo-paper --dry-run                                   # what it needs
    lolo train lolo-paper --estimator.slots-per-block 8 --out runs/paper   # on a GPU

The paper's three evaluations of its weights, and the hardware, are in docs/paper_tasks.md. Not run yet.
"""

NORM_FC = dataclasses.replace(
    LOLO,
    tasks=("fashion-mlp", "books-mlp"),
    learner=NormFcSettings(),
    imitation=dataclasses.replace(LOLO.imitation, expert="muon", loss="direction"),
    outer=dataclasses.replace(LOLO.outer, steps=1000),
    validation=dataclasses.replace(LOLO.validation, tasks=("books-transformer",)),
)
"""LoLO of `norm_fc`: Muon's direction as expert, two small MLPs, best weights by a transformer that is not among them.

    lolo train norm-fc --out runs/norm-fc

With `--validation.every 0 --learner.kernel auto` that takes 8 to 9 minutes on one core of a 2-core cloud machine, and
the task loss that the last line prints is 1.18 for seed 0 (1.24 after 100 of the 1,000 outer steps).

Its use on larger models, and what its parts are worth, is the study `lolo reproduce study --only norm-fc`.
"""

NORM_FC_BC_ONLY = dataclasses.replace(NORM_FC, replay=BC_ONLY.replay)
"""`NORM_FC` without its buffer."""

NORM_FC_NAIVE = dataclasses.replace(NORM_FC, imitation=NAIVE.imitation, replay=NAIVE.replay)
"""Naive-LO of `norm_fc`."""

RECIPES: dict[str, Recipe] = {
    "lolo": LOLO,
    "bc-only": BC_ONLY,
    "naive": NAIVE,
    "replay-only": REPLAY_ONLY,
    "lolo-paper": LOLO_PAPER,
    "norm-fc": NORM_FC,
    "norm-fc-bc-only": NORM_FC_BC_ONLY,
    "norm-fc-naive": NORM_FC_NAIVE,
}


def method_of(recipe: Recipe) -> str | None:
    """The name of the method that a recipe's imitation and replay are; None if they are no known method's."""
    for name, method in RECIPES.items():
        if recipe.imitation == method.imitation and recipe.replay == method.replay:
            return name
    return None


def variant(text: str) -> Recipe:
    """A named recipe with changes: "lolo replay.threshold=0.2 replay.read=newest". Raises RecipeError."""
    name, *changes = text.split() or [""]
    recipe: Recipe = pick(RECIPES, "recipe", name)
    for change in changes:
        field, _, value = change.partition("=")
        if field not in fields(recipe):
            raise unknown_field(recipe, field)
        kind = type(fields(recipe)[field])
        if kind not in (bool, int, float, str, type(None)):
            raise RecipeError(f"{field} can't be set in {text!r}.")
        parsed: Any = value
        try:
            if kind is bool:
                parsed = {"True": True, "False": False}[value]
            elif kind is not str:
                parsed = int(value) if kind is int else float(value)
        except (KeyError, ValueError):
            expected = "float" if kind is type(None) else kind.__name__
            raise RecipeError(f"{field} can't be {value!r}: expected {expected}.") from None
        recipe = with_field(recipe, field, parsed)
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON-ready data with its `format_version`."""
    return {"format_version": FORMAT_VERSION, **dataclasses.asdict(recipe)}


def from_dict(data: Any) -> Recipe:
    """The recipe of `to_dict`. Raises RecipeError for unknown or missing fields, wrong types, other versions."""
    if not isinstance(data, dict):
        raise RecipeError(f"a recipe must be a JSON object, not {type(data).__name__}.")
    version = data.get("format_version")
    if version != FORMAT_VERSION:
        raise RecipeError(f"recipe format_version {version!r} is not {FORMAT_VERSION}; use the lolo that wrote it.")
    return parse(Recipe, {name: value for name, value in data.items() if name != "format_version"}, "")
