"""How a meta-training runs: what does not change its result."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from lolo.runtime.interrupt import Stop
from lolo.runtime.process_group import ALONE, ProcessGroup


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a meta-training is after an outer step."""

    step: int  # outer steps done
    total: int
    task_loss: float  # NaN where every pair of a task had non-finite numbers
    alpha: float
    start_step: float  # mean K over slots
    seconds: float  # that the outer step took


def ignore(_: Any) -> None:
    """Nothing is shown."""


def to_stderr(text: str) -> None:
    """Messages are printed on standard error."""
    print(text, file=sys.stderr)


@dataclasses.dataclass(frozen=True)
class How:
    """How `train` and `resume` run. The result does not depend on any of it, but for the last bits on `other_path`.

    >>> small = {"outer.steps": 2, "unroll.length": 20, "unroll.truncation": 10, "validation.every": 0}
    >>> steps = []
    >>> how = lolo.How(devices=1, on_progress=lambda progress: steps.append(progress.step))
    >>> result = lolo.train("lolo", how=how, task="quadratic", **small, **{"learner.name": "sgd"})
    >>> steps
    [1, 2]
    """

    devices: int | None = None  #: of JAX's local devices, at most; None takes all that divide the work evenly
    group: ProcessGroup = ALONE  #: the processes that run it together; all must see the run's folder
    offload: bool = False  #: keep the replay buffers in the host's memory; one process only
    checkpoint_seconds: float = 20.0  #: between two checkpoints, at least
    loggers: tuple[str, ...] | None = None  #: "tensorboard", "wandb"; None is what the run had before, or none
    other_path: bool = False  #: resume also where the learner's update runs on another path than before
    stop: Stop = dataclasses.field(default_factory=Stop)  #: set its `requested` to end after the current outer step
    on_start: Callable[[Any], None] = ignore  #: called with the `Run`, once it is ready for its first outer step
    on_progress: Callable[[Progress], None] = ignore  #: called after every outer step
    log: Callable[[str], None] = to_stderr  #: called with messages for people
