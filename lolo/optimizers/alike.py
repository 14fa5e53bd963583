"""One program for many tensors of one shape, so that a model of many layers compiles in the time of a few."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from lolo.optimizers import sharding
from lolo.trees import PyTree

Treatment = TypeVar("Treatment", bound=Hashable)

LEAST = 4
"""Tensors of one shape before they share a program. A small model keeps one program for each, and its last bits."""

LARGEST = 2**20
"""Entries of a tensor, at most, that shares a program: all of a shape are copied side by side for it."""


def over_alike(
    function: Callable[[Treatment, PyTree], PyTree], kinds: Sequence[Treatment], trees: Sequence[PyTree]
) -> list[PyTree]:
    """function(kind, tree) for each pair.

    Pairs of equal kinds whose trees have equal shapes and dtypes share one program where there are LEAST or more of
    them: on a CPU it runs for one after the other, elsewhere for all at once.

    Args:
      kinds: what the function does besides its arrays.
      trees: the arrays of each, the first leaf with as many entries as any.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, (kind, tree) in enumerate(zip(kinds, trees, strict=True)):
        leaves, structure = jax.tree.flatten(tree)
        shared = 0 < leaves[0].size <= LARGEST
        key = (kind, structure, *((x.shape, x.dtype, sharding.varying_axes(x)) for x in leaves)) if shared else i
        groups.setdefault(key, []).append(i)
    done: dict[int, PyTree] = {}
    for members in groups.values():
        chosen = [trees[i] for i in members]
        if len(members) < LEAST:
            done |= {i: function(kinds[i], tree) for i, tree in zip(members, chosen, strict=True)}
        else:
            done |= dict(zip(members, together(function, kinds[members[0]], chosen), strict=True))
    return [done[i] for i in range(len(trees))]


def together(function: Callable[[Treatment, PyTree], PyTree], kind: Treatment, trees: Sequence[PyTree]) -> list[PyTree]:
    """function(kind, tree) of equal trees, by one program."""
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *trees)

    def one(tree: PyTree) -> PyTree:
        return function(kind, tree)

    results = jax.lax.map(one, stacked) if jax.default_backend() == "cpu" else jax.vmap(one)(stacked)
    return [jax.tree.map(lambda x, i=i: x[i], results) for i in range(len(trees))]
