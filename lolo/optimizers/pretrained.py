"""Weights as an optimizer: `lolo.load` and `lolo.save`."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lolo.optimizers import weights_file
from lolo.optimizers.architecture import LearnerSettings, build_learner, learner_from_dict
from lolo.optimizers.base import LearnedOptimizer
from lolo.optimizers.features import Moments
from lolo.optimizers.small_fc import SmallFcState
from lolo.trees import PyTree


class Weights(NamedTuple):
    """A meta-trained optimizer."""

    meta_params: dict[str, jax.Array]  # φ
    learner: LearnerSettings  # its architecture
    recipe: dict[str, Any]  # of its meta-training; {} if unknown
    card: dict[str, Any]  # data, results, realised steps, limits

    def optimizer(
        self,
        step_scale: float | Callable[[jax.Array], jax.Array] = 1.0,
        weight_decay: float | None = None,
        clock_limit: float | None = None,
        axis_name: str | None = None,
        sharded_axis: int = 0,
        step_decay: float | None = None,
    ) -> optax.GradientTransformation:
        """The optimizer for optax.

        Args:
          step_scale: multiplies every update; a float, or a schedule step -> float.
          weight_decay: decoupled, times λ1; None: as shipped; 0 switches it off.
          clock_limit: the time features see min(t, clock_limit); None: as shipped; inf switches it off.
          axis_name: inside shard_map, the mesh axis over whose devices parameters are cut. Those that are equal on all
            of its devices may stand beside them.
          sharded_axis: the axis along which they are cut, in equal parts.
          step_decay: updates are divided by √(1 + t/step_decay); None: as shipped; inf switches it off.

        Raises ValueError for a setting that the architecture does not have. Its init and update raise ValueError,
        inside shard_map, for parameters that are cut over another axis, and for gradients that were not averaged.
        Under jit, whole arrays may lie on several devices without a word here.
        """
        learner = used(self.learner, weight_decay, clock_limit, step_decay)
        base = one_tree_per_moment(architecture(learner, axis_name, sharded_axis).optimizer(self.meta_params))
        if isinstance(step_scale, int | float) and step_scale == 1.0:
            return base
        scale = optax.scale_by_schedule(step_scale) if callable(step_scale) else optax.scale(step_scale)
        return optax.chain(base, scale)


def used(
    learner: LearnerSettings,
    weight_decay: float | None = None,
    clock_limit: float | None = None,
    step_decay: float | None = None,
) -> LearnerSettings:
    """A learner with other settings of use; None: as it is. Raises ValueError for one that does not have them."""
    if step_decay is not None and not step_decay > 0:
        raise ValueError(f"step_decay={step_decay!r} must be a positive number of steps.")
    asked = {"weight_decay": weight_decay, "clock_limit": clock_limit, "step_decay": step_decay}
    changes: dict[str, Any] = {name: float(value) for name, value in asked.items() if value is not None}
    if changes and learner.name != "small_fc":
        raise ValueError(f"learner {learner.name!r} has no {next(iter(changes))}; leave it out.")
    return dataclasses.replace(learner, **changes)


def one_tree_per_moment(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """small_fc with its state as optax's own optimizers have it: a tree of arrays for each moment.

    Inside, all moments of a parameter stand together in its place, where flax's `nnx.Optimizer` takes arrays only.
    """

    def outside(state: Any) -> Any:
        if not isinstance(state, SmallFcState):
            return state
        leaves, structure = jax.tree.flatten(state.moments, is_leaf=lambda node: isinstance(node, Moments))
        fields = [[leaf[i] for leaf in leaves] for i in range(len(Moments._fields))]
        return state._replace(moments=Moments(*(jax.tree.unflatten(structure, field) for field in fields)))

    def inside(state: Any) -> Any:
        if not isinstance(state, SmallFcState):
            return state
        return state._replace(moments=jax.tree.map(Moments, *state.moments))

    def update(grads: PyTree, state: Any, params: PyTree = None) -> tuple[PyTree, Any]:
        updates, state = optimizer.update(grads, inside(state), params)
        return updates, outside(state)

    return optax.GradientTransformation(lambda params: outside(optimizer.init(params)), update)


@functools.lru_cache(maxsize=64)
def architecture(learner: LearnerSettings, axis_name: str | None = None, sharded_axis: int = 0) -> LearnedOptimizer:
    """`recipes.build_learner`, one object for equal arguments: what is compiled for it is found again."""
    return build_learner(learner, axis_name, sharded_axis)


def load(name_or_path: str | Path = weights_file.DEFAULT_WEIGHTS) -> Weights:
    """Weights by name, from a file, or from the Hugging Face Hub. Executes no code.

    Args:
      name_or_path: the name of shipped ones (`lolo weights` lists them), a path, or, with the extra `hub`,
        "user/repo", "user/repo/file.safetensors" or "user/repo@revision/file.safetensors".

    Raises files.FileError, a ValueError, for anything that is not a whole weights file of a known version.
    """
    file = weights_file.read_weights(name_or_path)
    return Weights(
        {name: jnp.asarray(x) for name, x in file.meta_params.items()},
        learner_from_dict(file.learner, str(name_or_path)),
        file.recipe,
        file.card,
    )


def save(path: Path | str, weights: Weights) -> None:
    """Write weights as one safetensors file with architecture, recipe and card in its metadata.

    A clock_limit or step_decay of inf is written as None, which means the same.
    """
    learner = dataclasses.asdict(weights.learner)
    learner |= {name: None for name in ("clock_limit", "step_decay") if learner[name] == math.inf}
    weights_file.write_weights(
        path,
        {name: np.asarray(x) for name, x in weights.meta_params.items()},
        learner=learner,
        recipe=weights.recipe,
        card=weights.card,
    )
