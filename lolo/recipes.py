"""Recipes: everything that decides a meta-training, as plain frozen data, and how it becomes a `meta.Setup`.

`LOLO` is the method of the paper; `BC_ONLY` and `NAIVE` are differences to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lolo.files.settings import RecipeError, fields, parse, pick, unknown, with_field
from lolo.method import estimators, experts, imitation, meta, replay
from lolo.optimizers import architecture

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Imitation:
    """The expert and the hand-over from it to the task loss."""

    expert: str = "adam"  # adam, adam-of-learner (the same, without a state of its own) or sgdm
    lr: float = 1e-3  # the expert's learning rate
    alpha_mix: str = "linear"  # α of Eq. 1: linear, zero (the expert steps) or one (the learned optimizer steps)
    alpha_loss: str = "linear"  # α of Eq. 3-4: linear, zero (imitation loss only) or one (task loss only)
    normalize: str = "slot"  # ψ of Eq. 5: slot, joint or none


@dataclasses.dataclass(frozen=True)
class Replay:
    """The buffer of inner states that unrolls restart from."""

    capacity: int = 4  # M, states per slot
    threshold: float = 0.1  # P_th: the share of unrolls that start from a random init
    read: str = "oldest"  # oldest, uniform, newest or pop
    push: str = "random"  # when a state enters: at a random step of the unroll


@dataclasses.dataclass(frozen=True)
class Unroll:
    """How inner training is cut into unrolls and truncations."""

    length: int = 1000  # N, inner steps
    truncation: int = 50  # L, inner steps with one noise
    truncations_per_update: int = 1  # J; N / L is Algorithm 1 as printed
    schedule: str = "constant"  # length of an unroll: constant, uniform, log-uniform or curriculum
    stagger: bool = False  # first unrolls shortened, so that slots are out of phase


@dataclasses.dataclass(frozen=True)
class Estimator:
    """The estimator of the meta-gradient."""

    kind: str = "pes"  # pes, es or nres
    pairs: int = 8  # P, antithetic pairs per task
    sigma: float = 0.01  # σ of the noise on φ
    slots_per_block: int = 1  # pairs advanced together by vmap; 1 is best on CPUs, more suits GPUs


@dataclasses.dataclass(frozen=True)
class Outer:
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
class Validation:
    """The long unroll that picks the best weights."""

    every: int = 250  # outer steps; 0: never
    steps: int = 0  # inner steps; 0: 10 times unroll.length
    seeds: int = 2


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One meta-training. Equal recipes and versions give equal φ on the same kind of device, byte for byte."""

    tasks: tuple[str, ...] = ("fashion-mlp",)  # names of `lolo tasks`, or path.py:function
    learner: architecture.Learner = architecture.Learner()
    imitation: Imitation = Imitation()
    replay: Replay = Replay()
    unroll: Unroll = Unroll()
    estimator: Estimator = Estimator()
    outer: Outer = Outer()
    validation: Validation = Validation()
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

RECIPES: dict[str, Recipe] = {
    "lolo": LOLO,
    "bc-only": BC_ONLY,
    "naive": NAIVE,
    "replay-only": REPLAY_ONLY,
    "lolo-paper": LOLO_PAPER,
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
            raise unknown("recipe field", field, fields(recipe))
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


AT_LEAST_ONE = (
    "learner.hidden",
    "replay.capacity",
    "unroll.truncation",
    "unroll.truncations_per_update",
    "estimator.pairs",
    "estimator.slots_per_block",
    "outer.steps",
    "outer.max_bad_steps",
    "validation.seeds",
)
POSITIVE = ("learner.step_mult", "imitation.lr", "estimator.sigma", "outer.lr", "outer.clip")
NOT_NEGATIVE = (
    "learner.exp_mult",
    "learner.weight_decay",
    "outer.final_lr",
    "outer.weight_decay",
    "validation.every",
    "validation.steps",
)
SHARES = ("replay.threshold", "outer.warmup")


def check(recipe: Recipe) -> None:
    """Raise RecipeError for values that can't be, or that don't go together."""
    values = fields(recipe)
    for name in AT_LEAST_ONE:
        if values[name] < 1:
            raise RecipeError(f"{name}={values[name]} must be at least 1.")
    for name in POSITIVE:
        if not (math.isfinite(values[name]) and values[name] > 0):
            raise RecipeError(f"{name}={values[name]} must be a positive number.")
    for name in NOT_NEGATIVE:
        if not (math.isfinite(values[name]) and values[name] >= 0):
            raise RecipeError(f"{name}={values[name]} must be 0 or a positive number.")
    for name in SHARES:
        if not 0 <= values[name] <= 1:
            raise RecipeError(f"{name}={values[name]} is a share: give a number from 0 to 1.")
    if not 0 <= recipe.seed < 2**31:
        raise RecipeError(f"seed={recipe.seed} must be a whole number from 0 to {2**31 - 1}.")
    if recipe.learner.clock_limit is not None and not recipe.learner.clock_limit >= 0:
        raise RecipeError(f"learner.clock_limit={recipe.learner.clock_limit} must be 0 or more, or None.")
    if recipe.learner.step_decay is not None:
        raise RecipeError(
            f"learner.step_decay={recipe.learner.step_decay} is for use: an expert has no such schedule, and imitation "
            "would work against it. Leave it out, and say optimizer(step_decay=...) of the meta-trained weights."
        )
    if not recipe.tasks or len(set(recipe.tasks)) < len(recipe.tasks):
        raise RecipeError(f"tasks={recipe.tasks} must name at least one task, none of them twice; see `lolo tasks`.")
    pick({"random": None}, "replay.push", recipe.replay.push)
    check_unroll(recipe.unroll)
    check_pairs(recipe.estimator)
    check_learner(recipe)


def check_unroll(unroll: Unroll) -> None:
    """Raise RecipeError unless unrolls are whole truncations."""
    length, truncation = unroll.length, unroll.truncation
    if length < truncation or length % truncation:
        near = max(length // truncation, 1) * truncation
        raise RecipeError(f"unroll.length={length} must be a multiple of unroll.truncation={truncation}; try {near}.")
    if unroll.stagger and unroll.truncations_per_update * truncation >= length:
        raise RecipeError(
            f"unroll.stagger has no meaning with truncations_per_update={unroll.truncations_per_update}: every "
            "update holds a whole unroll; set unroll.stagger to False."
        )


def check_pairs(estimator: Estimator) -> None:
    """Raise RecipeError unless blocks are whole."""
    if estimator.pairs % estimator.slots_per_block:
        raise RecipeError(
            f"estimator.pairs={estimator.pairs} must be a multiple of estimator.slots_per_block="
            f"{estimator.slots_per_block}; try estimator.slots_per_block=1."
        )


def check_learner(recipe: Recipe) -> None:
    """Raise RecipeError for a learner that lacks what other fields ask of it."""
    learner = recipe.learner
    if learner.name == "sgd" and (learner.weight_decay or learner.clock_limit is not None or learner.learn_decays):
        raise RecipeError(
            "learner.name='sgd' has no weight_decay, clock_limit or learn_decays; leave them as they are, or use "
            "learner.name='small_fc'."
        )
    if recipe.imitation.expert == "adam-of-learner" and (learner.name != "small_fc" or learner.learn_decays):
        raise RecipeError(
            "imitation.expert='adam-of-learner' reads small_fc's accumulators at the standard decays; "
            "use imitation.expert='adam'."
        )


def build_expert(recipe: Recipe) -> experts.Expert | None:
    """The expert, or None where both α ≡ 1: it would only cost time and memory."""
    if recipe.imitation.alpha_mix == recipe.imitation.alpha_loss == "one":
        return None
    expert = pick(experts.EXPERTS, "imitation.expert", recipe.imitation.expert)(recipe.imitation.lr)
    decay = recipe.learner.step_mult * recipe.learner.weight_decay
    return experts.with_decay(expert, decay) if decay else expert


def build_outer(outer: Outer) -> optax.GradientTransformation:
    """Clip, then AdamW with warm-up and cosine (or AdamW, then clip)."""
    warmup = round(outer.warmup * outer.steps)
    schedule = optax.warmup_cosine_decay_schedule(
        outer.lr / max(warmup, 1), outer.lr, warmup, max(outer.steps, warmup + 1), outer.final_lr
    )
    adamw = optax.adamw(schedule, weight_decay=outer.weight_decay)
    clip = optax.clip_by_global_norm(outer.clip)
    orders = {"before": (clip, adamw), "after": (adamw, clip), "none": (adamw,)}
    return optax.chain(*pick(orders, "outer.clip_position", outer.clip_position))


Draw = Callable[[jax.Array, jax.Array], jax.Array]


def unroll_schedules(unroll: Unroll, total: int) -> dict[str, Draw]:
    """Lengths of new unrolls in truncations, from a key and the outer step. Random ones reach from N/10 to N."""
    longest = unroll.length // unroll.truncation
    shortest = max(longest // 10, 1)

    def constant(key: jax.Array, step: jax.Array) -> jax.Array:
        return jnp.int32(longest)

    def uniform(key: jax.Array, step: jax.Array) -> jax.Array:
        return jax.random.randint(key, (), shortest, longest + 1)

    def log_uniform(key: jax.Array, step: jax.Array) -> jax.Array:
        logarithm = jax.random.uniform(key, (), minval=math.log(shortest), maxval=math.log(longest + 1))
        return jnp.minimum(jnp.exp(logarithm).astype(jnp.int32), longest)

    def curriculum(key: jax.Array, step: jax.Array) -> jax.Array:
        done = jnp.minimum(2 * step / total, 1.0)  # the full length from half of meta-training on
        return jnp.round(shortest + done * (longest - shortest)).astype(jnp.int32)

    return {"constant": constant, "uniform": uniform, "log-uniform": log_uniform, "curriculum": curriculum}


def build(recipe: Recipe) -> meta.Setup:
    """The functions and sizes of a recipe. Raises RecipeError."""
    check(recipe)
    unroll, total, pairs = recipe.unroll, recipe.outer.steps, recipe.estimator.pairs
    longest = unroll.length // unroll.truncation
    first = tuple(-(-(p + 1) * longest // pairs) if unroll.stagger else longest for p in range(pairs))

    def alpha(field: str, name: str) -> Callable[[jax.Array], jax.Array]:
        schedule = pick(imitation.ALPHA_SCHEDULES, field, name)
        return lambda step: schedule(step, total)

    return meta.Setup(
        learned=architecture.build_learner(recipe.learner),
        expert=build_expert(recipe),
        estimator=pick(estimators.ESTIMATORS, "estimator.kind", recipe.estimator.kind)(recipe.estimator.sigma, pairs),
        outer=build_outer(recipe.outer),
        alpha_mix=alpha("imitation.alpha_mix", recipe.imitation.alpha_mix),
        alpha_loss=alpha("imitation.alpha_loss", recipe.imitation.alpha_loss),
        normalize=pick(imitation.NORMALIZERS, "imitation.normalize", recipe.imitation.normalize),
        read=pick(replay.READ_RULES, "replay.read", recipe.replay.read),
        capacity=recipe.replay.capacity,
        threshold=recipe.replay.threshold,
        truncation=unroll.truncation,
        truncations_per_update=unroll.truncations_per_update,
        draw_length=pick(unroll_schedules(unroll, total), "unroll.schedule", unroll.schedule),
        first_lengths=first,
        slots_per_block=recipe.estimator.slots_per_block,
    )
