"""Slots spread over the devices of one process, as one program.

On a CPU a device is a share of the cores: `use_cores` asks for one device per core. In-process devices reach what as
many processes would (measured: two devices 1.93 times one core, two processes 2.01 times), so there are no workers
to start, to watch or to lose.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lolo import meta
from lolo.trees import PyTree

AXIS = "slots"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores(count: int | None = None) -> None:
    """Ask JAX for one CPU device per core. Call it before anything runs in JAX.

    Where JAX runs already, its devices and its splitting of products over threads stay as they are: results are then
    those of that process, not byte-equal to those of another number of cores.
    """
    # Without this, Eigen splits every product over the cores, in an order that depends on their number.
    flag = "--xla_cpu_multi_thread_eigen=false"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    try:
        jax.config.update("jax_num_cpu_devices", count or cores())
    except RuntimeError:  # JAX has been used in this process
        pass


def mesh(blocks: int, devices: int | None = None) -> Mesh:
    """As many local devices as divide the number of blocks, at most `devices`.

    Blocks are whole, whatever the number of devices: what vmap advances together never depends on it.
    Raises ValueError for less than one device.
    """
    if devices is not None and devices < 1:
        raise ValueError(f"devices={devices} must be at least 1; leave it out to use all.")
    available = jax.local_devices()
    most = min(len(available), devices or len(available), blocks)
    count = max(n for n in range(1, most + 1) if blocks % n == 0)
    return Mesh(np.array(available[:count]), (AXIS,))


def state_specs(state: meta.MetaState) -> meta.MetaState:
    """Where each leaf of a MetaState lies: a slot's states with the device that runs it, all else everywhere."""
    everywhere, spread = PartitionSpec(), PartitionSpec(AXIS)
    own = {"inner", "replay", "push_truncation"}

    def slots(part: meta.Slots) -> meta.Slots:
        return meta.Slots(
            *(
                jax.tree.map(lambda _, name=name: spread if name in own else everywhere, getattr(part, name))
                for name in meta.Slots._fields
            )
        )

    rest = jax.tree.map(lambda _: everywhere, state._replace(slots=()))
    return rest._replace(slots=tuple(slots(part) for part in state.slots))


def shards(count: int, pairs: int) -> meta.Shards:
    """Cut and gather along the mesh; inside shard_map only."""
    if count == 1:
        return meta.ALONE
    share = pairs // count

    def own(tree: PyTree) -> PyTree:
        start = jax.lax.axis_index(AXIS) * share
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, share), tree)

    def gather(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, tiled=True), tree)

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


def place(tree: PyTree, over: Mesh, specs: Any = None) -> PyTree:
    """Put arrays where a mesh wants them: by `specs`, or a copy on every device."""
    if specs is None:
        return jax.device_put(tree, NamedSharding(over, PartitionSpec()))
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(over, spec)), tree, specs)
