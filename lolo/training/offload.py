"""Replay buffers in the host's memory: on the device each slot keeps one state, the one that it would read next.

A slot reads its buffer when an unroll starts and is pushed to at most once per outer step, after that. So the program
on the device gets rings of one place with the state to read; between outer steps the host takes out what was pushed
and puts in what comes to be read. Results are those of buffers on the device, bit for bit, and so are checkpoints.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from lolo.files.settings import RecipeError
from lolo.method import meta, replay
from lolo.method.task import Task
from lolo.runtime import parallel
from lolo.training.recipes import Recipe
from lolo.training.slots import compile_step, state_specs
from lolo.trees import PyTree

AGES = {"oldest": lambda size: np.zeros_like(size), "newest": lambda size: np.maximum(size - 1, 0)}
"""Read rules that say without a draw which state is next: sizes [P] -> how many states are older."""


class HostRing(NamedTuple):
    """The buffers of one task's slots. Leaves are NumPy arrays that change in place."""

    states: PyTree  # leaves [P, M, *shape]
    head: Any  # [P] int32
    size: Any  # [P] int32


def check(recipe: Recipe) -> None:
    """Raise RecipeError for recipes whose buffers must be on the device."""
    if recipe.replay.read not in AGES:
        raise RecipeError(
            f"--offload needs replay.read to be {' or '.join(AGES)}, not {recipe.replay.read!r}; leave it out, or "
            "change the rule."
        )
    if recipe.unroll.truncations_per_update != 1:
        raise RecipeError(
            f"--offload needs unroll.truncations_per_update=1, not {recipe.unroll.truncations_per_update}: buffers are "
            "read within an outer step there. Leave it out."
        )


def empty(state: meta.MetaState, capacity: int) -> tuple[HostRing, ...]:
    """Empty buffers of `capacity` places for a state whose own have one."""

    def ring(slots: meta.Slots) -> HostRing:
        states = jax.tree.map(lambda x: np.zeros((len(x), capacity, *x.shape[2:]), x.dtype), slots.local.replay.states)
        return HostRing(states, *np.zeros((2, len(slots.position)), np.int32))

    return tuple(ring(slots) for slots in state.slots)


def with_replay(slots: meta.Slots, buffers: replay.Replay) -> meta.Slots:
    """The slots with these buffers."""
    return slots._replace(local=slots.local._replace(replay=buffers))


def with_buffers(state: meta.MetaState, rings: tuple[HostRing, ...]) -> meta.MetaState:
    """The state with complete buffers, as NumPy arrays: what a checkpoint holds."""
    pairs = zip(state.slots, rings, strict=True)
    return state._replace(slots=tuple(with_replay(slots, replay.Replay(*ring)) for slots, ring in pairs))


def _next_states(ring: HostRing, rule: str, which: NDArray[np.intp]) -> PyTree:
    """The state that each slot of `which` reads next: leaves [len(which), 1, *shape]."""
    places = len(jax.tree.leaves(ring.states)[0][0])
    place = (ring.head + AGES[rule](ring.size))[which] % places
    return jax.tree.map(lambda x: x[which, place][:, None], ring.states)


def _push(ring: HostRing, slot: Any, new: PyTree) -> None:
    """`replay.push` for one slot, in place. new: leaves [*shape]."""
    places = len(jax.tree.leaves(ring.states)[0][0])
    tail = (ring.head[slot] + ring.size[slot]) % places

    def write(ring: NDArray[Any], new: NDArray[Any]) -> None:
        ring[slot, tail] = new

    jax.tree.map(write, ring.states, new)
    if ring.size[slot] == places:
        ring.head[slot] = (ring.head[slot] + 1) % places
    else:
        ring.size[slot] += 1


@jax.jit
def _take(states: PyTree, slot: jax.Array) -> PyTree:
    """The one state that a slot's ring on the device holds."""
    return jax.tree.map(lambda x: x[slot, 0], states)


@partial(jax.jit, donate_argnums=0)
def _put(states: PyTree, slot: jax.Array, new: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: x.at[slot, 0].set(y), states, new)


class Offloaded:
    """An outer step with buffers on the host: `step(tasks, state)` as `slots.compile_step` gives it.

    `state` holds rings of one place; `buffers` are the complete ones.
    """

    def __init__(self, recipe: Recipe, setup: meta.Setup, state: meta.MetaState, over: Mesh) -> None:
        """`setup` and `state` (a start, or its shapes) have a capacity of 1. Raises RecipeError."""
        check(recipe)
        self.rule, self.push, self.over = recipe.replay.read, setup.push, over
        self.buffers = empty(state, recipe.replay.capacity)
        self.specs = state_specs(state)
        self.step = compile_step(setup, state, over)

    def place(self, complete: meta.MetaState) -> meta.MetaState:
        """From a state with complete buffers, such as a checkpoint's, to one that `self` takes."""
        self.buffers = tuple(HostRing(*jax.tree.map(np.array, tuple(slots.local.replay))) for slots in complete.slots)
        slots = []
        for own, ring in zip(complete.slots, self.buffers, strict=True):
            states = _next_states(ring, self.rule, np.arange(len(ring.size)))
            held: Any = np.minimum(ring.size, 1)
            slots.append(with_replay(own, replay.Replay(states, 0 * held, held)))
        return parallel.place(complete._replace(slots=tuple(slots)), self.over, self.specs)

    def complete(self, state: meta.MetaState) -> meta.MetaState:
        """The opposite of `place`; buffers are NumPy arrays."""
        return with_buffers(state, self.buffers)

    def __call__(self, tasks: tuple[Task, ...], state: meta.MetaState) -> tuple[meta.MetaState, meta.Metrics]:
        """One outer step."""
        state, metrics = self.step(tasks, state)
        slots = []
        for group, (own, ring) in enumerate(zip(state.slots, self.buffers, strict=True)):
            push, position, dropped = jax.device_get((own.local.push, own.position, metrics.tasks.dropped[group]))
            due = np.asarray(jax.vmap(self.push.due)(push, position - 1))
            states = own.local.replay.states
            for slot in np.flatnonzero(due & (dropped == 0)):
                _push(ring, slot, jax.device_get(_take(states, slot)))
                following = _next_states(ring, self.rule, np.array([slot]))
                states = _put(states, slot, jax.tree.map(lambda x: x[0, 0], following))
            slots.append(with_replay(own, own.local.replay._replace(states=states)))
        return parallel.place(state._replace(slots=tuple(slots)), self.over, self.specs), metrics
