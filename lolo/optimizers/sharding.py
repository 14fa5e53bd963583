"""Tensors that lie on several devices: whole ones under `jit`, and their parts inside `shard_map`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Update = Callable[..., tuple[Any, Any]]  # of an optimizer: grads, state, params -> updates, state


def varying_axes(x: Any) -> frozenset[str]:
    """The mesh axes of the enclosing shard_map over which the value differs; empty under check_vma=False."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying  # .vma before JAX 0.10.2


def types_vary(axis_name: str) -> bool:
    """Whether JAX's types tell what differs over this axis: not under check_vma=False. True outside of it."""
    try:
        return axis_name in varying_axes(jax.lax.axis_index(axis_name))
    except NameError:  # the axis is not bound: arrays are whole
        return True


def zeros_beside(
    x: Any, axes: tuple[int, ...], lead: tuple[int, ...] = (), dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Zeros with the extents of `axes` of x, distributed as x is along them. Returns: [*lead, *axes]."""
    shape = (*lead, *(x.shape[axis] for axis in axes))
    traced = isinstance(x, jax.core.Tracer)
    sharding = jax.typeof(x).sharding if traced else getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or (traced and not any(sharding.spec)):
        return jnp.zeros(shape, dtype)
    spec = (*sharding.spec, *(None,) * x.ndim)
    places = PartitionSpec(*(None,) * len(lead), *(spec[axis] for axis in axes))
    return jnp.zeros(shape, dtype, device=NamedSharding(sharding.mesh, places))


def in_auto_mode(update: Update) -> Update:
    """An optimizer's update that leaves it to XLA how values are distributed on the way.

    On a mesh of explicit axes JAX would ask for the sharding of every reshape. Updates get their parameters' sharding,
    the state keeps its own.
    """

    @functools.wraps(update)
    def wrapped(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        shardings = [jax.typeof(x).sharding for x in jax.tree.leaves((grads, state, params))]
        explicit = [s.mesh for s in shardings if any(s.spec) and AxisType.Explicit in s.mesh.axis_types]
        if not explicit:
            return update(grads, state, params)
        everywhere = NamedSharding(explicit[0], PartitionSpec())

        def place(x: Any) -> NamedSharding:
            sharding = jax.typeof(x).sharding
            return everywhere if sharding.mesh.empty else sharding

        run = jax.sharding.auto_axes(update, out_sharding=jax.tree.map(place, (params, state)))
        return run(grads, state, params)

    return wrapped
