"""From a recipe to the functions and sizes of Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lolo.files.settings import RecipeError, fields, pick
from lolo.method import estimators, experts, imitation, meta, replay
from lolo.optimizers import architecture
from lolo.training import recipes

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


def check(recipe: recipes.Recipe) -> None:
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


def check_unroll(unroll: recipes.UnrollSettings) -> None:
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


def check_pairs(estimator: recipes.EstimatorSettings) -> None:
    """Raise RecipeError unless blocks are whole."""
    if estimator.pairs % estimator.slots_per_block:
        raise RecipeError(
            f"estimator.pairs={estimator.pairs} must be a multiple of estimator.slots_per_block="
            f"{estimator.slots_per_block}; try estimator.slots_per_block=1."
        )


def check_learner(recipe: recipes.Recipe) -> None:
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


def build_expert(recipe: recipes.Recipe) -> experts.Expert | None:
    """The expert, or None where both α ≡ 1: it would only cost time and memory."""
    if recipe.imitation.alpha_mix == recipe.imitation.alpha_loss == "one":
        return None
    expert = pick(experts.EXPERTS, "imitation.expert", recipe.imitation.expert)(recipe.imitation.lr)
    decay = recipe.learner.step_mult * recipe.learner.weight_decay
    return experts.with_decay(expert, decay) if decay else expert


def build_outer(outer: recipes.OuterSettings) -> optax.GradientTransformation:
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


def unroll_schedules(unroll: recipes.UnrollSettings, total: int) -> dict[str, Draw]:
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


def build(recipe: recipes.Recipe) -> meta.Setup:
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
