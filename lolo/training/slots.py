"""Slots of a meta-training spread over devices, of one process or of several, as one program."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lolo.method import meta
from lolo.runtime import parallel
from lolo.trees import PyTree


def state_specs(state: meta.MetaState) -> meta.MetaState:
    """Where each leaf of a MetaState lies: `Slots.local` with the device that runs the slots, the rest everywhere."""
    specs = jax.tree.map(lambda _: PartitionSpec(), state)

    def spread(slots: meta.Slots) -> meta.Slots:
        return slots._replace(local=jax.tree.map(lambda _: PartitionSpec(parallel.AXIS), slots.local))

    return specs._replace(slots=tuple(map(spread, specs.slots)))


def shards(count: int, pairs: int) -> meta.Shards:
    """Cut and gather along the mesh; inside shard_map only."""
    if count == 1:
        return meta.ALONE
    share = pairs // count

    def own(tree: PyTree) -> PyTree:
        start = jax.lax.axis_index(parallel.AXIS) * share
        # A branch takes arrays from memory. Without it XLA computes φ ± ε, and cuts, in one loop, and rounds some of
        # it otherwise than on one device, where nothing is cut: the learner's weights of one entry, such as b2.
        return jax.lax.cond(
            start > 0,
            lambda tree: jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, share), tree),
            lambda tree: jax.tree.map(lambda x: x[:share], tree),
            tree,
        )

    def gather(tree: PyTree) -> PyTree:
        # As one array of words: one message, whatever the number of leaves, each of 4-byte numbers.
        leaves, structure = jax.tree.flatten(tree)
        words = [jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(x.shape[0], -1) for x in leaves]
        everyone = jax.lax.all_gather(jnp.concatenate(words, axis=1), parallel.AXIS, tiled=True)
        parts = jnp.split(everyone, np.cumsum([x.shape[1] for x in words])[:-1], axis=1)
        return jax.tree.unflatten(
            structure,
            [
                jax.lax.bitcast_convert_type(part, x.dtype).reshape(-1, *x.shape[1:])
                for part, x in zip(parts, leaves, strict=True)
            ],
        )

    return meta.Shards(own, gather)


Step = jax.stages.Wrapped  # tasks, MetaState -> MetaState, Metrics; jitted


def compile_step(setup: meta.Setup, state: meta.MetaState, over: Mesh) -> Step:
    """`meta.meta_step` jitted over a mesh: one program, the state donated. `state` may be shapes only."""
    count = over.devices.size
    step = partial(meta.meta_step, setup, shards=shards(count, setup.estimator.pairs))
    specs = state_specs(state)
    mapped = jax.shard_map(
        step, mesh=over, in_specs=(PartitionSpec(), specs), out_specs=(specs, PartitionSpec()), check_vma=False
    )
    state_places = jax.tree.map(lambda spec: NamedSharding(over, spec), specs)
    everywhere = NamedSharding(over, PartitionSpec())
    # Stated, so that the state comes back exactly as it went in: else the second call would compile again.
    return jax.jit(
        mapped, in_shardings=(everywhere, state_places), out_shardings=(state_places, everywhere), donate_argnums=1
    )


def init_state(init: Callable[[], meta.MetaState], over: Mesh) -> meta.MetaState:
    """The state that `init` makes, each device making its own slots."""
    specs = state_specs(jax.eval_shape(init))
    return jax.jit(init, out_shardings=jax.tree.map(lambda spec: NamedSharding(over, spec), specs))()
