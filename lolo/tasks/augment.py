"""Task augmentation: the same problem in other coordinates, so that a learned optimizer meets other scales.

Reference: Metz et al., "VeLO: Training Versatile Learned Optimizers by Scaling Up", 2022, which reparametrises the
weights of its meta-training tasks.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lolo.method.task import Splits, Task, TaskError
from lolo.trees import PyTree


class ScaledStats(NamedTuple):
    """Statistics of a reparametrised problem."""

    scale: jax.Array  # [] c, drawn with the init
    inner: PyTree  # statistics of the problem itself


def reparametrized(splits: Splits, bound: float = 1e3) -> Splits:
    """θ = c·θ' with one c for all weights of a run: the optimizer sees θ', gradients c·∇, and the same losses.

    c is log-uniform in [1/bound, bound], drawn at each random init. It is kept with the statistics, so a state in the
    replay buffer keeps its own. Raises TaskError: bound below 1.
    """
    if not (math.isfinite(bound) and bound >= 1):
        raise TaskError(f"reparametrize={bound} must be a number of at least 1, such as 1e3.")
    changed = _scaled_functions(splits.train, bound)
    return Splits(*(dataclasses.replace(task, **changed) for task in splits))


def _scaled_functions(task: Task, bound: float) -> dict[str, Any]:
    def scaled(params: PyTree, scale: jax.Array) -> PyTree:
        return jax.tree.map(lambda x: (scale * x).astype(x.dtype), params)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        key_scale, key_init = jax.random.split(key)
        params, stats = task.init(key_init)
        limit = math.log(bound)
        scale = jnp.exp(jax.random.uniform(key_scale, (), minval=-limit, maxval=limit))
        return scaled(params, 1 / scale), ScaledStats(scale, stats)

    def loss(params: PyTree, stats: ScaledStats, batch: PyTree, key: jax.Array) -> tuple[jax.Array, PyTree]:
        value, inner = task.loss(scaled(params, stats.scale), stats.inner, batch, key)
        return value, ScaledStats(stats.scale, inner)

    def score(params: PyTree, stats: ScaledStats, batch: PyTree) -> dict[str, jax.Array]:
        return task.score(scaled(params, stats.scale), stats.inner, batch)

    return {"init": init, "loss": loss, "score": score}
