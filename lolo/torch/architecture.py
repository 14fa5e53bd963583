"""Architectures that there is a step for in PyTorch: the one table of what `LoLO` asks of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lolo.files import settings
from lolo.files.tensors import digest
from lolo.optimizers import norm_fc_spec, small_fc_spec, weights_file
from lolo.torch import norm_fc, small_fc
from lolo.torch.blocks import Workspace
from lolo.torch.rounds import Rounds, Share
from lolo.torch.sharding import State, Zeros


class TorchArchitecture(NamedTuple):
    """What `LoLO` asks of an architecture. `learner` is an instance of its settings type, `group` a param group."""

    settings: type[Any]  # all that weights say of the learner
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]  # learner -> names and shapes of φ
    check: Callable[[Any], None]  # raises RecipeError for a learner that can't be
    inputs: int  # rows of φ's first matrix, by which bare arrays are recognised
    default: Callable[[Mapping[str, np.ndarray]], Any]  # the learner that bare arrays are of
    lr: Callable[[Any], float]  # of a learner, when none is said
    arguments: tuple[str, ...]  # of `LoLO`, beside those that all have
    settings_of: Callable[[Any, Mapping[str, Any]], dict[str, Any]]  # (learner, arguments) -> settings of a group
    network: Callable[[Mapping[str, np.ndarray]], Any]  # φ as `step` takes it: a NamedTuple
    zeros: Callable[[torch.Tensor, Mapping[str, Any]], dict[str, Zeros]]  # (param, group) -> what is kept for it
    step: Callable[  # moves and counts
        [list[torch.Tensor], State, Mapping[str, Any], Any, Workspace, Mapping[torch.Tensor, Share]], Iterator[Rounds]
    ]
    counts_on_gpu: bool = False  # whether a CUDA parameter's step count lies beside it: no step waits for the GPU then
    added: Mapping[str, Any] = settings.NONE  # settings of a group that older states lack, and what they meant


ARCHITECTURES: dict[str, TorchArchitecture] = {
    "small_fc": TorchArchitecture(
        settings=small_fc_spec.SmallFcSettings,
        shapes=small_fc_spec.shapes_of,
        check=small_fc_spec.check,
        inputs=small_fc_spec.INPUTS,
        default=small_fc.default,
        lr=lambda learner: 1.0,
        arguments=("clock_limit", "step_decay", "freeze_unseen"),
        settings_of=small_fc.settings_of,
        network=small_fc.network_from,
        zeros=small_fc.zeros,
        step=small_fc.step,
        added=small_fc.ADDED,
    ),
    "norm_fc": TorchArchitecture(
        settings=norm_fc_spec.NormFcSettings,
        shapes=norm_fc_spec.shapes_of,
        check=norm_fc_spec.check,
        inputs=norm_fc_spec.INPUTS,
        default=norm_fc.default,
        lr=lambda learner: float(learner.learning_rate),
        arguments=("step_rms", "adam_scale", "adam_beta2", "is_matrix", "state_dtype", "kernel"),
        settings_of=norm_fc.settings_of,
        network=norm_fc.network_from,
        zeros=norm_fc.zeros,
        step=norm_fc.step,
        counts_on_gpu=True,
        added=norm_fc.ADDED,
    ),
}
ABSENT: dict[str, Any] = {name: None for row in ARCHITECTURES.values() for name in row.arguments}
ABSENT["freeze_unseen"] = False
"""The arguments that not all architectures have, and what they are when they are not given."""


class Learned(NamedTuple):
    """Weights, checked."""

    architecture: str
    learner: Any
    file: weights_file.WeightsFile


def as_weights(weights: str | Path | weights_file.WeightsFile | Mapping[str, Any]) -> Learned:
    """Weights by name, path or value, of an architecture that there is a step for. Raises ValueError."""
    if isinstance(weights, weights_file.WeightsFile):
        file = weights
    elif isinstance(weights, Mapping):
        arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in weights.items()}
        learner = dataclasses.asdict(of_arrays(arrays).default(arrays))
        file = weights_file.WeightsFile(arrays, learner, {}, {}, digest(arrays))
    else:
        file = weights_file.read_weights(weights)
    name = file.learner.get("name")
    if name not in list(ARCHITECTURES):
        raise ValueError(f"lolo.torch runs {', '.join(ARCHITECTURES)}; these weights are of {name!r}.")
    return Learned(name, weights_file.check_learner(file.meta_params, file.learner, ARCHITECTURES, "weights"), file)


def of_arrays(arrays: Mapping[str, np.ndarray]) -> TorchArchitecture:
    """The row that bare arrays are of, by the number of inputs; the first where none fits."""
    rows = list(ARCHITECTURES.values())
    return next((row for row in rows if "w0" in arrays and arrays["w0"].shape[:1] == (row.inputs,)), rows[0])


def settings_of(learned: Learned, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a param group that belong to its architecture. Raises ValueError for those of another one."""
    row = ARCHITECTURES[learned.architecture]
    for name, absent in ABSENT.items():
        if name not in row.arguments and given[name] is not absent:
            raise ValueError(
                f"{name}={given[name]!r}: these weights are of {learned.architecture}, which has no {name}; "
                f"leave it out. What it has: {', '.join(row.arguments)}."
            )
    return row.settings_of(learned.learner, given)
