"""From a recipe to the functions and sizes of Algorithm 1."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from lolo.files.settings import RecipeError, check_numbers, fields
from lolo.method import estimators, experts, imitation, meta, replay
from lolo.optimizers import architecture
from lolo.training import own_parts, recipes
from lolo.training.own_parts import pick

AT_LEAST_ONE = (
    "replay.capacity",
    "unroll.truncation",
    "unroll.truncations_per_update",
    "estimator.pairs",
    "estimator.slots_per_block",
    "outer.steps",
    "outer.max_bad_steps",
    "validation.seeds",
    "imitation.decay_steps",
)
POSITIVE = ("imitation.lr", "imitation.final_lr", "estimator.sigma", "outer.lr", "outer.clip")
NOT_NEGATIVE = (
    "outer.final_lr",
    "outer.weight_decay",
    "validation.every",
    "validation.steps",
)
SHARES = (
    "replay.threshold",
    "outer.warmup",
    "imitation.start",
    "imitation.end",
    "imitation.floor",
    "imitation.magnitude",
)


def check(recipe: recipes.Recipe) -> None:
    """Raise RecipeError for values that can't be, or that don't go together."""
    values = fields(recipe)
    check_numbers(values, at_least_one=AT_LEAST_ONE, positive=POSITIVE, not_negative=NOT_NEGATIVE)
    for name in SHARES:
        if not 0 <= values[name] <= 1:
            raise RecipeError(f"{name}={values[name]} is a share: give a number from 0 to 1.")
    if not 0 <= recipe.seed < 2**31:
        raise RecipeError(f"seed={recipe.seed} must be a whole number from 0 to {2**31 - 1}.")
    if not recipe.tasks or len(set(recipe.tasks)) < len(recipe.tasks):
        raise RecipeError(f"tasks={recipe.tasks} must name at least one task, none of them twice; see `lolo tasks`.")
    check_validation(recipe)
    check_hand_over(recipe.imitation)
    check_unroll(recipe.unroll)
    check_pairs(recipe.estimator)
    check_learner(recipe)


def check_validation(recipe: recipes.Recipe) -> None:
    """Raise RecipeError unless the validation tasks differ from each other and from the meta-training tasks."""
    names = recipe.validation.tasks
    if len(set(names)) < len(names):
        raise RecipeError(f"validation.tasks={names} names a task twice; leave it out the second time.")
    both = [name for name in names if name in recipe.tasks]
    if both:
        raise RecipeError(
            f"validation.tasks={names} has {both[0]!r}, which is one of tasks={recipe.tasks}: a task that chooses the "
            "best weights must not be meta-trained on; take another. Without any, `tasks` choose."
        )


def check_hand_over(given: recipes.ImitationSettings) -> None:
    """Raise RecipeError unless the hand-over starts before it ends."""
    if given.start >= given.end:
        raise RecipeError(
            f"imitation.start={given.start} must be less than imitation.end={given.end}: α grows from 0 to 1 between "
            "these shares of outer.steps; try imitation.start=0.0."
        )


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
    """Raise RecipeError for a learner that can't be meta-trained, or that lacks what the expert asks of it."""
    learner, row = recipe.learner, architecture.of(recipe.learner)
    row.check(learner)
    row.check_meta_training(learner)
    if recipe.imitation.expert == "adam-of-learner" and not row.keeps_adam_moments(learner):
        raise RecipeError(
            "imitation.expert='adam-of-learner' reads small_fc's accumulators at the standard decays; "
            "use imitation.expert='adam'."
        )
    if recipe.imitation.loss == "direction-magnitude" and row.fixed_size:
        raise RecipeError(
            f"imitation.loss='direction-magnitude' has nothing to teach learner.name={learner.name!r} about magnitude: "
            "the size of its step is not learned; use imitation.loss='direction'."
        )


def build_expert(recipe: recipes.Recipe) -> experts.Expert | None:
    """The expert, or None where both α ≡ 1 and nothing is left to imitate: it would only cost time and memory."""
    if recipe.imitation.alpha_mix == recipe.imitation.alpha_loss == "one" and recipe.imitation.floor == 0:
        return None
    return expert_of(recipe.imitation, architecture.of(recipe.learner).expert_decay(recipe.learner))


def expert_of(given: recipes.ImitationSettings, decay: float) -> experts.Expert:
    """The expert of a recipe, whether or not anything imitates it. `decay`: weight decay per step, as the learner's."""
    make_rate = pick(experts.RATES, "imitation.schedule", given.schedule)
    rate = make_rate(given.lr, given.final_lr, given.decay_steps)
    expert = optax.with_extra_args_support(pick(experts.EXPERTS, "imitation.expert", given.expert)(rate))
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
    """The functions and sizes of a recipe. Runs the files of its own parts. Raises RecipeError, UserCodeError.

    >>> setup = lolo.build(lolo.LOLO)
    >>> setup.estimator.pairs
    8
    """
    recipe = own_parts.load(recipe)
    check(recipe)
    unroll, given, total, pairs = recipe.unroll, recipe.imitation, recipe.outer.steps, recipe.estimator.pairs
    longest = unroll.length // unroll.truncation
    first = tuple(-(-(p + 1) * longest // pairs) if unroll.stagger else longest for p in range(pairs))

    def alpha(field: str, name: str) -> Callable[[jax.Array], jax.Array]:
        schedule = pick(imitation.ALPHA_SCHEDULES, field, name)
        return lambda step: schedule(step, total, given.start, given.end)

    return meta.Setup(
        learned=architecture.build_learner(recipe.learner),
        expert=build_expert(recipe),
        estimator=pick(estimators.ESTIMATORS, "estimator.kind", recipe.estimator.kind)(recipe.estimator.sigma, pairs),
        outer=build_outer(recipe.outer),
        alpha_mix=alpha("imitation.alpha_mix", given.alpha_mix),
        alpha_loss=alpha("imitation.alpha_loss", given.alpha_loss),
        imitation_loss=pick(imitation.IMITATION_LOSSES, "imitation.loss", given.loss)(given.magnitude),
        floor=given.floor,
        normalize=pick(imitation.NORMALIZERS, "imitation.normalize", given.normalize),
        read=pick(replay.READ_RULES, "replay.read", recipe.replay.read),
        push=pick(replay.PUSH_RULES, "replay.push", recipe.replay.push),
        capacity=recipe.replay.capacity,
        threshold=recipe.replay.threshold,
        truncation=unroll.truncation,
        truncations_per_update=unroll.truncations_per_update,
        draw_length=pick(unroll_schedules(unroll, total), "unroll.schedule", unroll.schedule),
        first_lengths=first,
        slots_per_block=recipe.estimator.slots_per_block,
    )
