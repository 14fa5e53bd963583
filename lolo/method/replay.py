"""The replay buffer of inner states (lines 2-8 and 14 of Algorithm 1): one small ring per slot, and who enters it.

Everything here is written for one slot and vmapped over slots where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lolo.trees import PyTree


class Replay(NamedTuple):
    """A ring of M inner states."""

    states: PyTree  # leaves [M, *shape]
    head: Int[Array, ""]  # int32: where the oldest state lies
    size: Int[Array, ""]  # int32: how many states are held


def init(example: PyTree, capacity: int) -> Replay:
    """An empty ring for states like `example` (leaves [*shape]; arrays or their shapes)."""
    states = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), example)
    return Replay(states, head=jnp.int32(0), size=jnp.int32(0))


def capacity(buffer: Replay) -> int:
    """M, the number of states that the ring can hold."""
    return jax.tree.leaves(buffer.states)[0].shape[0]


def push(buffer: Replay, state: PyTree, condition: Bool[Array, ""] | bool = True) -> Replay:
    """Add `state` as the newest where `condition` holds; a full ring drops its oldest.

    Without the condition one state is written as well, the one that was there: the cost is the same for every
    slot, and nothing but that one state moves.
    """
    condition = jnp.asarray(condition)
    places = capacity(buffer)
    tail = (buffer.head + buffer.size) % places

    def write(ring: jax.Array, new: jax.Array) -> jax.Array:
        return ring.at[tail].set(jnp.where(condition, new, ring[tail]))

    full = condition & (buffer.size == places)
    return Replay(
        jax.tree.map(write, buffer.states, state),
        head=jnp.where(full, (buffer.head + 1) % places, buffer.head),
        size=jnp.where(condition, jnp.minimum(buffer.size + 1, places), buffer.size),
    )


def at(buffer: Replay, age: Int[Array, ""] | int) -> PyTree:
    """The state with `age` states older than it; 0 is the oldest. Leaves [*shape]."""
    index = (buffer.head + age) % capacity(buffer)
    return jax.tree.map(lambda ring: ring[index], buffer.states)


def oldest(buffer: Replay, key: Key[Array, ""]) -> tuple[PyTree, Replay]:
    """Peek at the oldest state (the paper's rule)."""
    return at(buffer, 0), buffer


def newest(buffer: Replay, key: Key[Array, ""]) -> tuple[PyTree, Replay]:
    """Peek at the state that was pushed last."""
    return at(buffer, jnp.maximum(buffer.size - 1, 0)), buffer


def uniform(buffer: Replay, key: Key[Array, ""]) -> tuple[PyTree, Replay]:
    """Peek at a state drawn uniformly."""
    return at(buffer, jax.random.randint(key, (), 0, jnp.maximum(buffer.size, 1))), buffer


def pop(buffer: Replay, key: Key[Array, ""]) -> tuple[PyTree, Replay]:
    """Take the oldest state out."""
    held = (buffer.size > 0).astype(jnp.int32)
    return at(buffer, 0), buffer._replace(head=(buffer.head + held) % capacity(buffer), size=buffer.size - held)


Read = Callable[[Replay, Key[Array, ""]], tuple[PyTree, Replay]]
READ_RULES: dict[str, Read] = {"oldest": oldest, "uniform": uniform, "newest": newest, "pop": pop}


PushState = Any


class PushRule(NamedTuple):
    """When a state enters the buffer, at most one per truncation of L steps."""

    # key, truncations of the unroll that starts -> its state
    start: Callable[[Key[Array, ""], Int[Array, ""]], PushState]
    # key, L -> the state before this step of a truncation may enter
    offset: Callable[[Key[Array, ""], int], Int[Array, ""]]
    # state, losses [2, L], which of them count [2, L], whether the unroll ended -> state; after each truncation
    observe: Callable[[PushState, Float[Array, "2 L"], Bool[Array, "2 L"], Bool[Array, ""]], PushState]
    # state after the truncation with this index -> whether it enters
    due: Callable[[PushState, Int[Array, ""]], Bool[Array, ""]]


class Drawn(NamedTuple):
    """The state of `RANDOM`."""

    truncation: Int[Array, ""]  # int32: the truncation of this unroll in which a state enters


def draw(key: Key[Array, ""], length: Int[Array, ""]) -> Drawn:
    """One of the unroll's truncations, uniformly."""
    return Drawn(jax.random.randint(key, (), 0, length))


RANDOM = PushRule(
    start=draw,
    offset=lambda key, steps: jax.random.randint(key, (), 0, steps),
    observe=lambda drawn, losses, counted, ended: drawn,
    due=lambda drawn, position: drawn.truncation == position,
)
"""The paper's rule: the state before a random step of the unroll, uniform over its steps, once per unroll."""


class Struggle(NamedTuple):
    """The state of `STRUGGLE`: losses since the unroll began, of +ε and −ε. All zeros before the first."""

    seen: Bool[Array, "2"]  # whether a loss has counted
    lowest: Float[Array, "2"]  # the lowest so far
    score: Float[Array, "2"]  # the worst rise above the lowest so far
    due: Bool[Array, ""]  # in the last truncation the pair's mean score grew, or its unroll ended


def no_losses_yet(key: Key[Array, ""], length: Int[Array, ""]) -> Struggle:
    """The start of every unroll, fresh or from the buffer."""
    return Struggle(jnp.zeros(2, bool), jnp.zeros(2), jnp.zeros(2), jnp.zeros((), bool))


def watch(
    state: Struggle, losses: Float[Array, "2 L"], counted: Bool[Array, "2 L"], ended: Bool[Array, ""]
) -> Struggle:
    """The state after L more losses of both signs, of which those that are `counted` count."""
    before = jnp.where(state.seen, state.lowest, jnp.inf)
    lowest = jnp.minimum(before[:, None], jax.lax.cummin(jnp.where(counted, losses, jnp.inf), axis=1))
    rise = jnp.max(jnp.where(counted, losses - lowest, 0.0), axis=1)
    seen, score = state.seen | jnp.any(counted, axis=1), jnp.maximum(state.score, rise)
    due = ended | (jnp.mean(score) > jnp.mean(state.score))
    return Struggle(seen, jnp.where(seen, lowest[:, -1], 0.0), score, due)


STRUGGLE = PushRule(
    start=no_losses_yet,
    offset=lambda key, steps: jnp.int32(0),
    observe=watch,
    due=lambda state, position: state.due,
)
"""Where it got worse: the first state of a truncation in which the score of the pair grew, or the unroll ended."""

PUSH_RULES: dict[str, PushRule] = {"random": RANDOM, "struggle": STRUGGLE}
