"""Device meshes: slots are spread over the devices of one or several processes, as one program.

On a CPU a device is a share of the cores: `use_cores` requests one device per core. Devices of one process are as fast
as that many processes (measured: two devices 1.93 times one core, two processes 2.01 times), so one machine needs no
workers. How several processes join is in `process_group`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from lolo.trees import PyTree

AXIS = "slots"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cores(count: int | None = None) -> None:
    """Request one CPU device per core. Call it before anything runs in JAX.

    If JAX runs already, its devices and its splitting of products over threads stay as they are: results are then
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

    A block is never split, whatever the number of devices: the slots that vmap runs together do not depend on it.
    Raises ValueError for less than one device.
    """
    available = jax.local_devices()
    return Mesh(np.array(available[: even_share(blocks, len(available), devices)]), (AXIS,))


def even_share(blocks: int, available: int, devices: int | None) -> int:
    """The largest number of devices, at most `devices`, that divides the blocks. Raises ValueError below one."""
    if devices is not None and devices < 1:
        raise ValueError(f"devices={devices} must be at least 1; leave it out to use all.")
    most = min(available, blocks, devices or blocks)
    return max(n for n in range(1, most + 1) if blocks % n == 0)


def check_processes(blocks: int, processes: int) -> None:
    """Raise ValueError unless the processes can share the blocks evenly."""
    if blocks % processes:
        fit = [n for n in range(1, blocks + 1) if blocks % n == 0]
        raise ValueError(
            f"{processes} processes can't share {blocks} blocks of slots (estimator.pairs / estimator.slots_per_block) "
            f"evenly; use {', '.join(map(str, fit))} processes, or another number of pairs."
        )


def global_mesh(blocks: int, devices: int | None = None) -> Mesh:
    """As many devices of each process, the same number of all, as divide the number of blocks, at most `devices`.

    Raises ValueError for less than one device.
    """
    by_process: list[list[jax.Device]] = [[] for _ in range(jax.process_count())]
    for device in jax.devices():
        by_process[device.process_index].append(device)
    check_processes(blocks, len(by_process))
    count = even_share(blocks // len(by_process), min(map(len, by_process)), devices)
    return Mesh(np.array([device for some in by_process for device in some[:count]]), (AXIS,))


def place(tree: PyTree, over: Mesh, specs: Any = None) -> PyTree:
    """Put arrays on a mesh: by `specs`, or a copy on every device.

    With several processes, each passes its local rows of sharded arrays, and all of replicated ones.
    """

    def put(x: Any, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(over, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    if specs is None:
        return jax.tree.map(lambda x: put(x, PartitionSpec()), tree)
    return jax.tree.map(put, tree, specs)


def local_rows(over: Mesh, pairs: int) -> tuple[int, int]:
    """The slots on devices of this process: start and stop."""
    share = pairs // over.devices.size
    positions = [i for i, device in enumerate(over.devices.flat) if device.process_index == jax.process_index()]
    return positions[0] * share, (positions[-1] + 1) * share


def local_part(x: jax.Array | NDArray[Any]) -> NDArray[Any]:
    """What `place` was given: this process's rows of a sharded array, or all of a replicated one."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.array(x)  # a copy: on the CPU a view would show what the next outer step, given the state, writes
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def local(tree: PyTree) -> PyTree:
    """Replicated arrays, as arrays of this process alone."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), tree)


def any_process(over: Mesh) -> Callable[..., tuple[bool, ...]]:
    """A function that returns, for each flag, whether any process passes true. 4 bytes per flag and device travel."""
    count = len(set(device.process_index for device in over.devices.flat))
    if count == 1:
        return lambda *flags: flags
    spread = NamedSharding(over, PartitionSpec(AXIS))
    largest = jax.jit(lambda flags: jnp.max(flags, axis=0), out_shardings=NamedSharding(over, PartitionSpec()))

    def any_of(*flags: bool) -> tuple[bool, ...]:
        here = np.tile(np.array(flags, np.int32), (over.devices.size // count, 1))
        everyone = largest(jax.make_array_from_process_local_data(spread, here))
        return tuple(bool(flag) for flag in np.asarray(everyone))

    return any_of
