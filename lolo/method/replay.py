"""The replay buffer of inner states (lines 2-8 and 14 of Algorithm 1): one small ring per slot.

Everything here is written for one slot and vmapped over slots where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

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


Read = Callable[[Replay, jax.Array], tuple[PyTree, Replay]]
READ_RULES: dict[str, Read] = {"oldest": oldest, "uniform": uniform, "newest": newest, "pop": pop}
