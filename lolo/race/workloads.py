"""The workloads of the race, and the form of each that is held out.

Steps, parameters and variants are fixed before any learned optimizer runs on them: docs/race.md has the rules.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from lolo.method import experts
from lolo.method.task import Splits
from lolo.tasks import by_name

POINTS = 50  # of a run's curve: its validation loss is taken after each 1/50 of the steps
SCORED = 1000  # examples of the validation split that a point is the loss on; of text fewer, which are long
SCORED_TOGETHER = 125  # examples: the vision transformer takes four times as long for 1,000 at once, on a CPU
TESTED = 10  # times as many examples of the test split are scored at the end
VARIANT_SEED = 20_261_129  # what the held-out variants are drawn by
SHARE_OF_TARGET = 0.75  # runs that set a target, and the search, have this share of a race's steps

OUTSIDE = ("embedding.", "wte.", "wpe.", "positions.", "output.")  # how names of embeddings and output layers begin


class Workload(NamedTuple):
    """One workload."""

    task: str  # as `lolo eval` takes it
    steps: int  # of a run in the race
    variants: dict[str, tuple[int | str, ...]]  # settings of the task, and the values that the held-out form may have
    data: str
    family: str  # of its model
    scored: int = SCORED  # examples of the validation split that a point is the loss on


WORKLOADS: dict[str, Workload] = {
    "mlp": Workload(
        "fashion-mlp:widths=256-256",
        2000,
        {"widths": ("128-128", "512-256", "256-256-256"), "batch": (32, 64, 256)},
        "Fashion-MNIST",
        "MLP",
    ),
    "convolution": Workload(
        "fashion-conv:widths=16-32",
        3000,
        {"widths": ("8-32", "24-48", "16-32-64"), "batch": (16, 64)},
        "Fashion-MNIST",
        "convolution net",
    ),
    "resnet": Workload(
        "fashion-resnet", 600, {"width": (6, 12), "batch": (16, 64)}, "Fashion-MNIST", "convolution net"
    ),
    "vit": Workload(
        "fashion-vit",
        1600,
        {"width": (24, 48), "layers": (1, 3), "batch": (16, 64)},
        "Fashion-MNIST",
        "transformer",
    ),
    "transformer": Workload(
        "books-transformer:width=64,heads=4,context=32,layers=2",
        1600,
        {"width": (48, 96), "layers": (1, 3), "batch": (4, 16)},
        "books",
        "transformer",
        scored=250,
    ),
    "gru": Workload(
        "books-gru", 2000, {"width": (48, 96), "context": (16, 48), "batch": (8, 32)}, "books", "GRU", scored=250
    ),
    "autoencoder": Workload(
        "fashion-autoencoder:widths=128-32-128",
        3000,
        {"widths": ("64-16-64", "128-64-128", "128-64-32-64-128"), "batch": (32, 128)},
        "Fashion-MNIST",
        "autoencoder",
    ),
    "words": Workload(
        "books-words",
        1600,
        {"embedding": (8, 32), "widths": ("32", "128", "64-64"), "batch": (32, 128)},
        "books",
        "MLP",
    ),
    "finetuning": Workload(
        "digits-finetune", 1000, {"widths": ("16-24", "24-48"), "batch": (16, 64)}, "digits", "convolution net"
    ),
    "small-batch": Workload(
        "digits-mlp", 3000, {"widths": ("32-32", "96-96", "64-64-64"), "batch": (2, 8)}, "digits", "MLP"
    ),
}

SEEN: dict[str, tuple[str, str]] = {
    "fashion-mlp": ("Fashion-MNIST", "MLP"),
    "books-mlp": ("books", "MLP"),
    "fashion-conv": ("Fashion-MNIST", "convolution net"),
    "fashion-autoencoder": ("Fashion-MNIST", "autoencoder"),
    "books-transformer": ("books", "transformer"),
}
"""Data and family of the tasks that φs are meta-trained on."""


@dataclasses.dataclass(frozen=True)
class MatrixRule:
    """Which parameters Muon and `norm_fc` move as matrices: those of two axes or more, but for some names."""

    outside: frozenset[str]  # embeddings and output layers, which AdamW moves
    names: frozenset[str]  # of all parameters

    def __call__(self, path: str, param: Any) -> bool:
        """Raises ValueError for a path that no parameter has."""
        if path not in self.names:
            raise ValueError(
                f"is_matrix got the path {path!r}; expected a parameter's name, such as {min(self.names)!r}."
            )
        return experts.has_two_axes(path, param) and path not in self.outside


@functools.cache
def splits_of(task: str) -> Splits:
    """The splits of a workload's task, with no more examples to score than its workload has (`Workload.scored`)."""
    splits, kind = by_name.resolve(task), task.partition(":")[0]
    scored = next((of.scored for of in WORKLOADS.values() if of.task.partition(":")[0] == kind), SCORED)
    together = min(splits.validation.score_batch, SCORED_TOGETHER)
    validation = dataclasses.replace(splits.validation, score_examples=scored, score_batch=together)
    test = dataclasses.replace(splits.test, size=min(splits.test.size, TESTED * scored), score_batch=together)
    return splits._replace(validation=validation, test=test)


@functools.cache
def matrices_of(task: str) -> MatrixRule:
    """The parameters of a task that are matrices: not embeddings, and not output layers, whatever they are called."""
    params, _ = jax.eval_shape(by_name.resolve(task).train.init, jax.random.key(0))
    layers = sorted((int(name.split(".")[1]), name) for name in params if name.startswith("layers."))
    last = {name for number, name in layers if number == layers[-1][0]}
    return MatrixRule(frozenset(name for name in params if name.startswith(OUTSIDE)) | last, frozenset(params))


def variant_of(workload: Workload, seed: int = VARIANT_SEED) -> str:
    """The task of a workload's held-out form: one of its settings has another value, both drawn by the seed.

    >>> variant_of(WORKLOADS["resnet"], seed=1) != WORKLOADS["resnet"].task
    True
    """
    draw = np.random.default_rng([seed, *workload.task.encode()])
    choices = [(name, value) for name, values in workload.variants.items() for value in values]
    name, value = choices[draw.integers(len(choices))]
    known, _, words = workload.task.partition(":")
    settings = dict(word.split("=") for word in words.split(",") if word) | {name: str(value)}
    return f"{known}:{','.join(f'{key}={value}' for key, value in settings.items())}"


def shared_with(workload: Workload, tasks: tuple[str, ...]) -> list[str]:
    """What a workload has in common with tasks of a meta-training: its data, the family of its model, or both."""
    known = {of.task.partition(":")[0]: (of.data, of.family) for of in WORKLOADS.values()} | SEEN
    seen = [known.get(task.partition(":")[0]) for task in tasks]
    parts = [(workload.data, 0), (workload.family, 1)]
    return [part for part, place in parts if any(kind and kind[place] == part for kind in seen)]
