"""Feeds: a task together with the data of its next steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from lolo.method.task import Segments, Task
from lolo.trees import PyTree


class Feed:
    """A task with the data of its next steps: the same data every time, or the next segment of a stream."""

    def __init__(self, task: Task, steps: int, seed: Sequence[int], used: int = 0) -> None:
        """A segment holds `steps` batches, in the order that `seed` decides; `used` segments were read before."""
        self.task = task
        self.segments: Segments | None = None
        if task.stream is not None:
            self.segments = task.stream.segments(steps, task.batch, seed, used)

    def next(self, place: Callable[[PyTree], PyTree] = jax.device_put) -> Task:
        """The task for the next `steps` steps; `place` moves a segment to the devices."""
        if self.segments is None:
            return self.task
        return dataclasses.replace(self.task, data=place(self.segments.next()))

    def place_in_stream(self) -> dict[str, int] | None:
        """Epoch, position and size of the stream, for checkpoints; None if the data are resident."""
        if self.segments is None or self.task.stream is None:
            return None
        return {**self.segments.cursor._asdict(), "size": self.task.stream.size}

    def close(self) -> None:
        """Stop reading ahead."""
        if self.segments is not None:
            self.segments.close()
