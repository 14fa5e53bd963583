"""Slots spread over devices, of one process or of several, as one program.

On a CPU a device is a share of the cores: `use_cores` asks for one device per core. In-process devices reach what as
many processes would (measured: two devices 1.93 times one core, two processes 2.01 times), so on one machine there
are no workers to start, to watch or to lose. How several processes meet is in `gang`.
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
    own: list[list[jax.Device]] = [[] for _ in range(jax.process_count())]
    for device in jax.devices():
        own[device.process_index].append(device)
    check_processes(blocks, len(own))
    count = even_share(blocks // len(own), min(map(len, own)), devices)
    return Mesh(np.array([device for some in own for device in some[:count]]), (AXIS,))


def place(tree: PyTree, over: Mesh, specs: Any = None) -> PyTree:
    """Put arrays where a mesh wants them: by `specs`, or a copy on every device.

    With several processes, each gives its own rows of what is spread, and all of what lies everywhere.
    """

    def put(x: Any, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(over, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    if specs is None:
        return jax.tree.map(lambda x: put(x, PartitionSpec()), tree)
    return jax.tree.map(put, tree, specs)


def own_rows(over: Mesh, pairs: int) -> tuple[int, int]:
    """The slots that lie with this process: from the first number to before the second."""
    share = pairs // over.devices.size
    mine = [i for i, device in enumerate(over.devices.flat) if device.process_index == jax.process_index()]
    return mine[0] * share, (mine[-1] + 1) * share


def own_part(x: jax.Array | NDArray[Any]) -> NDArray[Any]:
    """What `place` was given: this process's rows of an array that is spread, or all of one that lies everywhere."""
    if isinstance(x, np.ndarray) or x.is_fully_addressable or x.is_fully_replicated:
        return np.array(x)  # a copy: on the CPU a view would show what the next outer step, given the state, writes
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def local(tree: PyTree) -> PyTree:
    """Arrays that lie everywhere, as arrays of this process alone."""
    return jax.tree.map(lambda x: x if x.is_fully_addressable else x.addressable_data(0), tree)


def any_process(over: Mesh) -> Callable[..., tuple[bool, ...]]:
    """A function that says of each flag whether any process gives it as true. 4 bytes per flag and device travel."""
    count = len(set(device.process_index for device in over.devices.flat))
    if count == 1:
        return lambda *flags: flags
    spread = NamedSharding(over, PartitionSpec(AXIS))
    largest = jax.jit(lambda flags: jnp.max(flags, axis=0), out_shardings=NamedSharding(over, PartitionSpec()))

    def ask(*flags: bool) -> tuple[bool, ...]:
        mine = np.tile(np.array(flags, np.int32), (over.devices.size // count, 1))
        everyone = largest(jax.make_array_from_process_local_data(spread, mine))
        return tuple(bool(flag) for flag in np.asarray(everyone))

    return ask
