"""A task with the data of its next steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax

from lolo.method.task import Segments, Task
from lolo.trees import PyTree


class Feed:
    """A task with the data of its next steps: always the same, or of a stream the next segment."""

    def __init__(self, task: Task, steps: int, seed: Sequence[int], used: int = 0) -> None:
        """A segment holds `steps` batches, in the order that `seed` decides; `used` of them were taken before."""
        self.task = task
        self.segments: Segments | None = None
        if task.stream is not None:
            self.segments = task.stream.segments(steps, task.batch, seed, used)

    def next(self, place: Callable[[PyTree], PyTree] = jax.device_put) -> Task:
        """The task for the next `steps` steps; `place` puts a segment where it is used."""
        if self.segments is None:
            return self.task
        return dataclasses.replace(self.task, data=place(self.segments.next()))

    def place_in_stream(self) -> dict[str, int] | None:
        """Epoch, position and size of the stream, for checkpoints; None: resident."""
        if self.segments is None or self.task.stream is None:
            return None
        return {**self.segments.cursor._asdict(), "size": self.task.stream.size}

    def close(self) -> None:
        """Stop reading ahead."""
        if self.segments is not None:
            self.segments.close()
