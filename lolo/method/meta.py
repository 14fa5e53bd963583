"""One outer step of meta-training: Algorithm 1 of the LoLO paper. J truncations, P slots, L steps per truncation.

A slot is one antithetic pair with its inner problem, its replay buffer and its place in the unroll. Naive-LO, BC-only
and LoLO are this one program with other settings.

Slots may be spread over devices. Each device runs the unrolls of its own slots; only scalars travel. Noise and
directions are drawn for all slots on every device, and contracted there in one order, so that the result has the
same bytes on any number of devices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from lolo.method import imitation, replay
from lolo.method.estimators import Estimator, antithetic_gradient
from lolo.method.experts import Expert
from lolo.method.imitation import Losses
from lolo.method.inner import InnerState, StepRecord, begin, inner_step
from lolo.method.task import Task
from lolo.optimizers.base import LearnedOptimizer
from lolo.trees import PyTree, both_signs, select


class Setup(NamedTuple):
    """What a recipe builds: functions and sizes, all static."""

    learned: LearnedOptimizer
    expert: Expert | None  # None: nothing imitates and nothing is mixed in
    estimator: Estimator
    outer: optax.GradientTransformation
    alpha_mix: Callable[[jax.Array], jax.Array]  # outer step -> α of Eq. 1
    alpha_loss: Callable[[jax.Array], jax.Array]  # outer step -> α of Eq. 3-4
    imitation_loss: imitation.ImitationLoss  # Eq. 2 or another, see imitation.IMITATION_LOSSES
    floor: float  # least weight of imitation in Eq. 4
    normalize: Callable[[jax.Array, jax.Array], jax.Array]  # Eq. 5, see imitation.NORMALIZERS
    read: replay.Read
    push: replay.PushRule
    capacity: int  # M
    threshold: float  # P_th: a fresh start where U <= P_th
    truncation: int  # L
    truncations_per_update: int  # J
    draw_length: Callable[[jax.Array, jax.Array], jax.Array]  # key, outer step -> truncations of a new unroll
    first_lengths: tuple[int, ...]  # [P], truncations of each slot's first unroll
    slots_per_block: int  # slots that vmap advances together, both signs; 1: one sign at a time


class LocalSlots(NamedTuple):
    """The part of `Slots` that lies with the device that runs the slots: P of them, or its share of P."""

    inner: InnerState  # leaves [P, 2, *shape]: +ε and −ε
    replay: replay.Replay  # leaves [P, M, *shape], [P], [P]
    push: replay.PushState  # leaves [P, *shape]: what the push rule remembers of this unroll


class Slots(NamedTuple):
    """P slots of one task. What is not `local` is on every device."""

    local: LocalSlots
    estimator: PyTree  # leaves [P, *shape]
    position: Int[Array, "P"]  # truncations done in this unroll
    length: Int[Array, "P"]  # truncations this unroll has; negative before a slot's first
    fresh: Bool[Array, "P"]  # numbers went bad; start from a random init at the next boundary


class MetaState(NamedTuple):
    """All that a checkpoint must hold."""

    meta_params: PyTree  # φ
    outer: optax.OptState
    slots: tuple[Slots, ...]  # one per task
    outer_step: Int[Array, ""]  # t
    bad_steps: Int[Array, ""]  # outer steps in a row without one good pair
    key: UInt32[Array, "2"]  # key data; noise and batches derive from it, the slot's index and the step


class TaskMetrics(NamedTuple):
    """What one outer step measured on one task. Means are over pairs with finite numbers."""

    task_loss: Float[Array, ""]
    bc_loss: Float[Array, ""]
    delta_task_rms: Float[Array, ""]  # before ψ
    delta_bc_rms: Float[Array, ""]
    mean_square_pair: Float[Array, ""]  # mean over pairs of ‖g_pair‖², g_pair the meta-gradient of one pair
    start_step: Int[Array, "P"]  # K of the unroll that the slot is in
    starts: Int[Array, "J P"]  # start step K where a truncation began an unroll, else -1
    reached: Int[Array, "P"]  # inner steps since the random init at the end of the outer step
    dropped: Int[Array, "P"]  # 1 for a pair that had a non-finite number
    first_bad: Int[Array, "P"]  # 0 none, 1 loss, 2 gradient, 3 bc


class Metrics(NamedTuple):
    """What one outer step measured. G tasks."""

    tasks: TaskMetrics  # leaves [G, ...]
    alpha_mix: Float[Array, ""]
    alpha_loss: Float[Array, ""]
    gradient_ratio: Float[Array, ""]  # norm of the gradient of Δ^bc alone over that of Δ^task alone, before ψ
    gradient_norm: Float[Array, ""]  # of the fused meta-gradient
    signal_to_noise: Float[Array, ""]  # ‖mean‖² / mean ‖deviation‖² over pairs


class Shards(NamedTuple):
    """How slots are spread over devices: `own` cuts out this device's, `gather` brings all devices' together."""

    own: Callable[[PyTree], PyTree]  # leaves [P, ...] -> [P_own, ...]
    gather: Callable[[PyTree], PyTree]  # leaves [P_own, ...] -> [P, ...]


ALONE = Shards(own=lambda tree: tree, gather=lambda tree: tree)


def first_params(learned: LearnedOptimizer, seed_key: Key[Array, ""]) -> PyTree:
    """φ before the first outer step."""
    return learned.init(jax.random.split(seed_key)[0])


def meta_init(setup: Setup, tasks: tuple[Task, ...], seed_key: Key[Array, ""], meta_params: PyTree = None) -> MetaState:
    """The state before the first outer step. `meta_params` continues from other weights; None draws new ones.

    >>> setup = lolo.build(lolo.with_field(lolo.LOLO, "learner.name", "sgd"))
    >>> state = lolo.meta_init(setup, (tasks.quadratic().train,), jax.random.key(0))
    >>> sorted(state.meta_params)
    ['log_learning_rate', 'momentum_logit']
    """
    key_run = jax.random.split(seed_key)[1]
    if meta_params is None:
        meta_params = first_params(setup.learned, seed_key)
    pairs = setup.estimator.pairs
    learner = setup.learned.optimizer(meta_params)

    def slots(task: Task) -> Slots:
        one = jax.eval_shape(lambda key: begin(task, learner, setup.expert, key), key_run)
        empty = jax.tree.map(lambda x: jnp.zeros((pairs, 2, *x.shape), x.dtype), one)
        rule = jax.eval_shape(setup.push.start, key_run, jnp.int32(1))
        push = jax.tree.map(lambda x: jnp.zeros((pairs, *x.shape), x.dtype), rule)
        rings = jax.tree.map(
            lambda x: jnp.zeros((pairs, *x.shape), x.dtype), jax.eval_shape(lambda: replay.init(one, setup.capacity))
        )
        noise = jax.vmap(setup.estimator.init, in_axes=(0, None))(jax.random.split(key_run, pairs), meta_params)
        zeros = jnp.zeros(pairs, jnp.int32)
        # Negative: not started yet. The first unroll has this many truncations, later ones what `draw_length` says.
        first = -jnp.asarray(setup.first_lengths, jnp.int32)
        return Slots(LocalSlots(empty, rings, push), noise, position=zeros, length=first, fresh=jnp.ones(pairs, bool))

    return MetaState(
        meta_params,
        setup.outer.init(meta_params),
        tuple(slots(task) for task in tasks),
        outer_step=jnp.int32(0),
        bad_steps=jnp.int32(0),
        key=jax.random.key_data(key_run),
    )


def start_unrolls(
    setup: Setup,
    task: Task,
    meta_params: PyTree,
    local: LocalSlots,
    starting: Bool[Array, "P"],
    fresh: Bool[Array, "P"],
    keys: Key[Array, "P"],
    length: Int[Array, "P"],
) -> LocalSlots:
    """Lines 2-8 of Algorithm 1 for the slots that `starting` names; the others stay as they are.

    starting, fresh: [P] bool; keys: [P]; length: [P] int32, truncations of the unroll that starts.
    """
    learner = setup.learned.optimizer(meta_params)

    def start(args: tuple) -> tuple[InnerState, jax.Array, jax.Array, replay.PushState]:
        (inner, buffer, push), starting, fresh, key, length = args
        key_use, key_read, key_init, key_push = jax.random.split(key, 4)
        use = (jax.random.uniform(key_use) > setup.threshold) & (buffer.size > 0) & ~fresh
        read, after = setup.read(buffer, key_read)
        start = both_signs(select(use, read, begin(task, learner, setup.expert, key_init)))
        taken = starting & use
        return (
            select(starting, start, inner),
            jnp.where(taken, after.head, buffer.head),
            jnp.where(taken, after.size, buffer.size),
            select(starting, setup.push.start(key_push, length), push),
        )

    inner, head, size, push = jax.lax.map(start, (local, starting, fresh, keys, length))
    return LocalSlots(inner, local.replay._replace(head=head, size=size), push)


def truncated_unroll(
    setup: Setup,
    task: Task,
    meta_params: PyTree,
    alpha: Float[Array, ""],
    inner: InnerState,
    key: Key[Array, ""],
    offset: Int[Array, ""],
) -> tuple[InnerState, InnerState, StepRecord]:
    """L inner steps of one sign of a slot (lines 9-18).

    Args:
      meta_params: φ + ε or φ − ε.
      offset: in [0, L): the state before this step is the snapshot.

    Returns: state after L steps, state after `offset` steps, records [L].
    """
    learner = setup.learned.optimizer(meta_params)

    def step(n: jax.Array, carry: tuple[InnerState, StepRecord]) -> tuple[InnerState, StepRecord]:
        inner, records = carry
        key_step = jax.random.fold_in(key, n)
        inner, record = inner_step(task, learner, setup.expert, alpha, inner, key_step, setup.imitation_loss)
        return inner, jax.tree.map(lambda all_, new: all_.at[n].set(new), records, record)

    # Two loops around the snapshot, [0, offset) and [offset, L), as one program that runs twice. Nothing is
    # pushed inside: a buffer in the carry of an inner loop would be copied at every step.
    def stretch(carry: tuple, bounds: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
        inner, records, _ = carry
        start, end = bounds
        snapshot = inner
        inner, records = jax.lax.fori_loop(start, end, step, (inner, records))
        return (inner, records, snapshot), None

    zeros = jnp.zeros(setup.truncation)
    records = StepRecord(task=zeros, bc=jax.tree.map(lambda _: zeros, setup.imitation_loss.weights), gradient=zeros)
    bounds = (jnp.stack([jnp.int32(0), offset]), jnp.stack([offset, jnp.int32(setup.truncation)]))
    (inner, records, snapshot), _ = jax.lax.scan(stretch, (inner, records, inner), bounds)
    return inner, snapshot, records


class Truncation(NamedTuple):
    """What one truncation of all slots of a task measured."""

    records: StepRecord  # [P, 2, L], on every device
    directions: PyTree  # leaves [P, *shape]
    start_step: Int[Array, "P"]
    started: Int[Array, "P"]
    reached: Int[Array, "P"]


def run_truncation(
    setup: Setup,
    shards: Shards,
    task: Task,
    meta_params: PyTree,
    alpha: Float[Array, ""],
    outer_step: Int[Array, ""],
    slots: Slots,
    key: Key[Array, ""],
) -> tuple[Slots, Truncation]:
    """Start what is due, advance every slot by L steps, push what is drawn (lines 2-19)."""
    pairs = setup.estimator.pairs
    key_offset, key = jax.random.split(key)
    slot_keys = jax.vmap(lambda slot: jax.random.split(jax.random.fold_in(key, slot), 6))(jnp.arange(pairs))
    keys_length, keys_estimator, keys_noise, keys_start, keys_steps, keys_coin = slot_keys.T

    starting = slots.fresh | (slots.position >= slots.length)
    drawn = jax.vmap(setup.draw_length, in_axes=(0, None))(keys_length, outer_step)
    length = jnp.where(starting, jnp.where(slots.length < 0, -slots.length, drawn), slots.length)
    position = jnp.where(starting, 0, slots.position)
    new = jax.vmap(setup.estimator.init, in_axes=(0, None))(keys_estimator, meta_params)
    noise, directions, estimator = jax.vmap(setup.estimator.sample)(keys_noise, select(starting, new, slots.estimator))
    candidates = jax.tree.map(lambda phi, e: jnp.stack([phi + e, phi - e], axis=1), meta_params, noise)

    candidates, keys_start, keys_steps, keys_coin, own_starting, own_length, own_position, own_fresh = shards.own(
        (candidates, keys_start, keys_steps, keys_coin, starting, length, position, slots.fresh)
    )
    # Most truncations start nothing; the states of those that do are drawn outside the inner loops.
    local = jax.lax.cond(
        jnp.any(own_starting),
        lambda local: start_unrolls(setup, task, meta_params, local, own_starting, own_fresh, keys_start, own_length),
        lambda local: local,
        slots.local,
    )
    offset = setup.push.offset(key_offset, setup.truncation)
    start_step = local.inner.step[:, 0] - own_position * setup.truncation

    def one_sign(args: tuple[PyTree, InnerState, jax.Array]) -> tuple[InnerState, InnerState, StepRecord]:
        candidate, inner, key_steps = args
        return truncated_unroll(setup, task, candidate, alpha, inner, key_steps, offset)

    signs = (candidates, local.inner, jnp.stack([keys_steps, keys_steps], axis=1))
    inner, snapshots, records = over_blocks(one_sign, signs, setup.slots_per_block)
    sign = jax.vmap(jax.random.bernoulli)(keys_coin).astype(jnp.int32)
    snapshots = jax.vmap(lambda both, one: jax.tree.map(lambda x: x[one], both))(snapshots, sign)
    push = jax.vmap(setup.push.observe)(
        local.push, records.task, finite_parts(records)[..., 0], own_position == own_length - 1
    )
    pushing = jax.vmap(setup.push.due)(push, own_position) & jnp.all(finite(records), axis=(1, 2))
    buffers = jax.vmap(replay.push)(local.replay, snapshots, pushing)

    records, start_step = shards.gather((records, start_step))
    slots = Slots(
        LocalSlots(inner, buffers, push),
        estimator,
        position + 1,
        length,
        fresh=~jnp.all(finite(records), axis=(1, 2)),
    )
    reached = start_step + (position + 1) * setup.truncation
    return slots, Truncation(records, directions, start_step, starting.astype(jnp.int32), reached)


def over_blocks(one: Callable[[PyTree], PyTree], signs: PyTree, size: int) -> PyTree:
    """`one` for both signs of every slot, in blocks one after the other. Leaves [P, 2, ...] -> [P, 2, ...].

    A block is one sign where `size` is 1, else both signs of `size` slots, with vmap. `jax.lax.map` has this as its
    batch_size, but not for arrays without entries, which some accumulators are.
    """
    pairs = jax.tree.leaves(signs)[0].shape[0]
    block = (2 * pairs,) if size == 1 else (pairs // size, 2 * size)
    blocks = jax.tree.map(lambda x: x.reshape(*block, *x.shape[2:]), signs)
    done = jax.lax.map(one if size == 1 else jax.vmap(one), blocks)
    return jax.tree.map(lambda x: x.reshape(pairs, 2, *x.shape[len(block) :]), done)


LARGEST = 1e12
"""A loss beyond this counts as not finite: what is computed from it would leave float32."""


def finite_parts(records: StepRecord) -> Bool[Array, "*steps 3"]:
    """Whether loss, gradient and bc of a step, in this order, are finite."""
    bc = functools.reduce(jnp.logical_and, [part < LARGEST for part in jax.tree.leaves(records.bc)])
    return jnp.stack([jnp.abs(records.task) < LARGEST, jnp.isfinite(records.gradient), bc], axis=-1)


def finite(records: StepRecord) -> Bool[Array, "*steps"]:
    """Whether all of a step is finite."""
    return jnp.all(finite_parts(records), axis=-1)


def meta_step(
    setup: Setup, tasks: tuple[Task, ...], state: MetaState, shards: Shards = ALONE
) -> tuple[MetaState, Metrics]:
    """One outer step: collect, fuse, update (Algorithm 1, from its first line to its last).

    >>> setup = lolo.build(lolo.with_field(lolo.LOLO, "learner.name", "sgd"))
    >>> problems = (tasks.quadratic().train,)
    >>> state = lolo.meta_init(setup, problems, jax.random.key(0))
    >>> state, metrics = jax.jit(lambda state: lolo.meta_step(setup, problems, state))(state)
    >>> metrics.tasks.task_loss.shape  # one loss for each task
    (1,)
    """
    t = state.outer_step
    alpha_mix, alpha_loss = setup.alpha_mix(t), setup.alpha_loss(t)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), t)

    all_slots, all_seen = [], []
    for group, (task, slots) in enumerate(zip(tasks, state.slots, strict=True)):

        def one_truncation(slots: Slots, key: jax.Array, task: Task = task) -> tuple[Slots, Truncation]:
            return run_truncation(setup, shards, task, state.meta_params, alpha_mix, t, slots, key)

        keys = jax.random.split(jax.random.fold_in(key, group), setup.truncations_per_update)
        slots, seen = jax.lax.scan(one_truncation, slots, keys)
        all_slots.append(slots)
        all_seen.append(seen)

    gradients, measured = zip(
        *(collect(setup, task, alpha_loss, seen) for task, seen in zip(tasks, all_seen, strict=True)), strict=True
    )
    gradient = jax.tree.map(lambda *g: sum(g) / len(tasks), *(g.fused for g in gradients))
    updates, outer = setup.outer.update(gradient, state.outer, state.meta_params)
    measured = jax.tree.map(lambda *of_tasks: jnp.stack(of_tasks), *measured)
    good = jnp.any(measured.dropped == 0) & jnp.isfinite(optax.tree.norm(gradient))
    state = MetaState(
        meta_params=select(good, optax.apply_updates(state.meta_params, updates), state.meta_params),
        outer=select(good, outer, state.outer),
        slots=tuple(all_slots),
        outer_step=t + 1,
        bad_steps=jnp.where(good, 0, state.bad_steps + 1),
        key=state.key,
    )
    return state, summarize(alpha_mix, alpha_loss, gradient, gradients, measured)


class Gradients(NamedTuple):
    """Meta-gradients of one task: fused by Eq. 4, and of each raw loss by itself."""

    fused: PyTree
    task: PyTree
    bc: PyTree


def collect(setup: Setup, task: Task, alpha: Float[Array, ""], seen: Truncation) -> tuple[Gradients, TaskMetrics]:
    """From the records of J truncations to the meta-gradient (lines 19-21). `seen` has leaves [J, P, ...]."""
    records = seen.records
    whole = jnp.all(finite(records), axis=(0, 2, 3))  # [P]
    good = jnp.broadcast_to(whole, (len(records.task), len(whole)))  # [J, P]: a bad truncation voids the pair's others
    valid = jnp.broadcast_to(good[:, :, None], (*good.shape, setup.truncation))
    task_loss = records.task if task.loss_limit is None else jnp.minimum(records.task, task.loss_limit)
    losses = Losses(task=task_loss, bc=records.bc)
    deltas = jax.tree.map(lambda x: jnp.where(valid, x[:, :, 0] - x[:, :, 1], 0.0), losses)
    fused = imitation.fuse(alpha, deltas, valid, setup.normalize, setup.floor, setup.imitation_loss)
    delta_bc = imitation.total(setup.imitation_loss, deltas.bc)
    gradients = Gradients(
        *(antithetic_gradient(x, seen.directions, setup.estimator.sigma, valid) for x in (fused, deltas.task, delta_bc))
    )
    steps = jnp.maximum(jnp.sum(valid), 1)
    both = valid[:, :, None]
    # g_pair = (mean over its steps of δ) · direction / (2σ²)
    weight = jnp.mean(fused, axis=2) / (2 * setup.estimator.sigma**2)
    norms = sum(jnp.sum(d**2, axis=tuple(range(2, d.ndim))) for d in jax.tree.leaves(seen.directions))
    count = jnp.maximum(jnp.sum(good), 1)
    measured = TaskMetrics(
        task_loss=jnp.sum(jnp.where(both, records.task, 0.0)) / (2 * steps),
        bc_loss=jnp.sum(jnp.where(both, imitation.total(setup.imitation_loss, records.bc), 0.0)) / (2 * steps),
        delta_task_rms=jnp.sqrt(jnp.sum(deltas.task**2) / steps),
        delta_bc_rms=jnp.sqrt(jnp.sum(delta_bc**2) / steps),
        mean_square_pair=jnp.sum(jnp.where(good, weight**2 * norms, 0.0)) / count,
        start_step=seen.start_step[-1],
        starts=jnp.where(seen.started > 0, seen.start_step, -1),
        reached=seen.reached[-1],
        dropped=(~whole).astype(jnp.int32),
        first_bad=first_bad(records),
    )
    return gradients, measured


def first_bad(records: StepRecord) -> Int[Array, "P"]:
    """What went bad first in each pair: 0 nothing, 1 loss, 2 gradient, 3 bc. [J, P, 2, L] -> [P]."""
    bad = ~finite_parts(records)
    in_order = jnp.moveaxis(jnp.any(bad, axis=2), 1, 0).reshape(bad.shape[1], -1)  # [P, J · L · 3], step by step
    return jnp.where(jnp.any(in_order, axis=-1), jnp.argmax(in_order, axis=-1) % 3 + 1, 0).astype(jnp.int32)


def summarize(
    alpha_mix: Float[Array, ""],
    alpha_loss: Float[Array, ""],
    gradient: PyTree,
    gradients: tuple[Gradients, ...],
    tasks: TaskMetrics,
) -> Metrics:
    """Metrics of the outer step. `tasks` has leaves [G, ...]."""

    def norm_of_mean(name: str) -> jax.Array:
        return optax.tree.norm(jax.tree.map(lambda *g: sum(g) / len(g), *(getattr(g, name) for g in gradients)))

    norm_task, norm = norm_of_mean("task"), optax.tree.norm(gradient)
    deviation = jnp.maximum(jnp.mean(tasks.mean_square_pair) - norm**2, 0.0)
    return Metrics(
        tasks,
        alpha_mix,
        alpha_loss,
        gradient_ratio=norm_of_mean("bc") / jnp.where(norm_task > 0, norm_task, 1.0),
        gradient_norm=norm,
        signal_to_noise=norm**2 / jnp.where(deviation > 0, deviation, 1.0),
    )
