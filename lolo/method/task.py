"""What an inner problem is: a model, a loss and one split of a data set, as a `Task`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Int, Key

from lolo.trees import PyTree


class TaskError(ValueError):
    """A task that can't be found or used; says which, and what to do.

    >>> try:
    ...     tasks.resolve("fashion-mpl")
    ... except lolo.TaskError as error:
    ...     print(error)
    unknown task 'fashion-mpl'; did you mean 'fashion-mlp'? Your own: path.py:function.
    """


@runtime_checkable
class Segments(Protocol):
    """The batches of a stream, one segment after the other."""

    @property
    def cursor(self) -> Any: ...  # a NamedTuple: the first example that no segment has had yet

    def next(self) -> PyTree: ...  # leaves [steps, batch, ...]

    def close(self) -> None: ...


@runtime_checkable
class BatchStream(Protocol):
    """Examples that do not lie in memory, such as `lolo.data.stream.Stream`."""

    @property
    def columns(self) -> Sequence[Any]: ...  # arrays, or their shapes and dtypes, [examples, ...]

    @property
    def size(self) -> int: ...  # number of examples

    def segments(self, steps: int, batch: int, seed: Sequence[int], used: int = 0) -> Segments: ...


def _static(default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """One inner problem on one split of its data. The arrays in `data` are leaves; all else is static.

    Another split, or the next segment of a stream, is the same Task with other leaves.

    >>> task = tasks.quadratic().train
    >>> isinstance(task, lolo.Task)
    True
    >>> params, stats = task.init(jax.random.key(0))
    >>> batch = task.examples(task.data, jnp.arange(task.batch))
    >>> loss, stats = task.loss(params, stats, batch, jax.random.key(1))
    """

    data: PyTree  #: arrays; leaves [examples, ...] unless the task says otherwise
    init: Callable[[jax.Array], tuple[PyTree, PyTree]] = _static()  #: key -> params, stats
    examples: Callable[[PyTree, jax.Array], PyTree] = _static()  #: data, indices [B] -> batch
    #: params, stats, batch, key -> loss [], stats; the mean over the batch
    loss: Callable[[PyTree, PyTree, PyTree, jax.Array], tuple[jax.Array, PyTree]] = _static()
    #: params, stats, batch -> means over the batch by name; "loss" is always there
    score: Callable[[PyTree, PyTree, PyTree], dict[str, jax.Array]] = _static()
    size: int = _static()  #: number of examples
    batch: int = _static()  #: examples per inner step
    loss_limit: float | None = _static()  #: losses enter the meta-gradient clipped to this; None does not clip
    micro_batches: int = _static(1)  #: the gradient of a batch is computed in n equal parts, one after the other
    score_batch: int = _static(1000)  #: examples scored together
    score_examples: int = _static(10_000)  #: of the held-out split, scored on the way through a long run
    stream: BatchStream | None = _static(None)  #: where segments come from; None if `data` is the complete split

    def __repr__(self) -> str:
        kind = "stream" if self.stream is not None else "resident data"
        return f"Task({self.size:,} examples, batch {self.batch:,}, {kind})"

    def sample(self, key: Key[Array, ""], step: Int[Array, ""]) -> PyTree:
        """The batch of inner step `step`.

        From resident data it is drawn with replacement by `key`. Of a stream, `data` is a segment, leaves
        [steps, batch, ...], and the batch is the one at `step` modulo its length.
        """
        if self.stream is not None:
            return self.examples(self.data, step % jax.tree.leaves(self.data)[0].shape[0])
        return self.examples(self.data, jax.random.randint(key, (self.batch,), 0, self.size))


class Splits(NamedTuple):
    """The same problem on data that never mix: meta-training, choices, and the one final report.

    >>> isinstance(tasks.fashion_mlp(), lolo.Splits)
    True
    >>> tasks.fashion_mlp().validation.size
    3000
    """

    train: Task
    validation: Task
    test: Task


def check_splits(splits: Any, name: str) -> None:
    """Raise TaskError for what is no task: no `Splits` of `Task`s, or data that are no arrays."""
    if not isinstance(splits, Splits):
        cure = "; give what it returns" if callable(splits) else ", which are three `lolo.Task`s"
        raise TaskError(f"{name} is {type(splits).__name__}; expected lolo.Splits{cure}.")
    for split, task in zip(Splits._fields, splits, strict=True):
        if not isinstance(task, Task) or task.size < 1 or task.batch < 1:
            raise TaskError(f"{name}: its {split} split is no lolo.Task with size and batch of 1 or more.")
        for leaf in jax.tree.leaves(task.data):
            check_array(leaf, f"{name}: the data of its {split} split")


def check_array(leaf: Any, what: str) -> None:
    """Raise TaskError for a leaf that is no array, nor the shape and dtype of one."""
    if not hasattr(leaf, "shape"):
        raise TaskError(f"{what} have a {type(leaf).__name__} where an array belongs; make one with numpy.asarray.")
