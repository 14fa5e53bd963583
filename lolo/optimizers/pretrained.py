"""Weights as an optimizer: `lolo.load` and `lolo.save`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lolo.optimizers import architecture, weights_file
from lolo.optimizers.architecture import LearnerSettings
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
        *,
        learning_rate: float | Callable[[jax.Array], jax.Array] | None = None,
        adam_scale: float | None = None,
    ) -> optax.GradientTransformation:
        """The optimizer for optax.

        Args:
          step_scale: multiplies every update; a float, or a schedule step -> float.
          weight_decay: decoupled, times λ1 (small_fc) or the learning rate (norm_fc); None: as shipped; 0 switches it
            off.
          clock_limit: the time features see min(t, clock_limit); None: as shipped; inf switches it off.
          axis_name: inside shard_map, the mesh axis over whose devices parameters are cut. Those that are equal on all
            of its devices may stand beside them.
          sharded_axis: the axis along which they are cut, in equal parts.
          step_decay: updates are divided by √(1 + t/step_decay); None: as shipped; inf switches it off.
          learning_rate: of norm_fc, a float or a schedule step -> float; None: as shipped.
          adam_scale: of norm_fc, the learning rate of vectors in units of learning_rate; None: as shipped.

        Raises ValueError for a setting that the architecture does not have, and for a value that makes no sense. Its
        init and update raise ValueError, inside shard_map, for parameters that are cut over another axis, and for
        gradients that were not averaged. Under jit, whole arrays may lie on several devices without a word here.
        """
        requested: dict[str, Any] = {"weight_decay": weight_decay, "clock_limit": clock_limit, "step_decay": step_decay}
        requested |= {"learning_rate": learning_rate, "adam_scale": adam_scale}
        learner = architecture.deployed(self.learner, requested)
        return maker(learner, step_scale, axis_name, sharded_axis, presented=True)(self.meta_params)


def maker(
    learner: LearnerSettings,
    step_scale: float | Callable[[jax.Array], jax.Array] = 1.0,
    axis_name: str | None = None,
    sharded_axis: int = 0,
    *,
    presented: bool = False,
) -> Callable[[PyTree], optax.GradientTransformation]:
    """φ -> the optimizer of these settings, updates multiplied by `step_scale`, a number or a schedule.

    `presented`: with its state in the form that users see. Otherwise, and with a scale of 1, one object for equal
    settings.
    """
    built = architecture.build_learner(learner, axis_name, sharded_axis).optimizer
    present = architecture.of(learner).present
    make = (lambda meta_params: present(built(meta_params))) if presented else built
    if isinstance(step_scale, int | float) and step_scale == 1.0:
        return make
    scale = optax.scale_by_schedule(step_scale) if callable(step_scale) else optax.scale(step_scale)
    return lambda meta_params: optax.chain(make(meta_params), scale)


def load(name_or_path: str | Path = weights_file.DEFAULT_WEIGHTS) -> Weights:
    """Weights by name, from a file, or from the Hugging Face Hub. Executes no code.

    Args:
      name_or_path: the name of shipped ones (`lolo weights` lists them), a path, or, with the extra `hub`,
        "user/repo", "user/repo/file.safetensors" or "user/repo@revision/file.safetensors".

    Raises files.FileError, a ValueError, for anything that is not a whole weights file of a known version.
    """
    file = weights_file.read_weights(name_or_path)
    learner = architecture.check_weights(file.meta_params, file.learner, str(name_or_path))
    return Weights({name: jnp.asarray(x) for name, x in file.meta_params.items()}, learner, file.recipe, file.card)


def save(path: Path | str, weights: Weights) -> None:
    """Write weights as one safetensors file with architecture, recipe and card in its metadata.

    A limit of inf is written as None, which means the same.
    """
    learner = {name: None if x == math.inf else x for name, x in dataclasses.asdict(weights.learner).items()}
    weights_file.write_weights(
        path,
        {name: np.asarray(x) for name, x in weights.meta_params.items()},
        learner=learner,
        recipe=weights.recipe,
        card=weights.card,
    )
