"""Names for the trees that pass between modules, and the few tree operations that several of them share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def select(condition: jax.Array, if_true: PyTree, if_false: PyTree) -> PyTree:
    """`jnp.where` leaf by leaf. `condition` is [] or [P]; a [P] condition chooses along the leaves' first axis."""

    def choose(yes: jax.Array, no: jax.Array) -> jax.Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (jnp.ndim(yes) - condition.ndim)), yes, no)

    return jax.tree.map(choose, if_true, if_false)


def both_signs(tree: PyTree) -> PyTree:
    """Leaves [*shape] -> [2, *shape]: the common start of an antithetic pair."""
    return jax.tree.map(lambda x: jnp.stack([x, x]), tree)


def count_bytes(tree: PyTree) -> int:
    """Bytes of all leaves (arrays or their shapes)."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
