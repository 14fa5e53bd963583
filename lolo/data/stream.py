"""Streams: examples that stay on disk are read in a shuffled order, in segments, one segment ahead.

The order of an epoch is a permutation drawn from (seed, epoch), so a position in the stream is two numbers, and a
stopped run resumes at exactly the next example. Rows are read with `pread` and not through a memory map: pages
of a map count as the process's memory as long as it holds them.

    stream = Stream((Rows.of(images), labels))  # images: numpy.memmap [N, 32, 32, 3]; labels: [N]
    reader = stream.segments(steps=50, batch=4096, seed=(0,))
    images, labels = reader.next()  # uint8 [50, 4096, 32, 32, 3], uint16 [50, 4096]
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lolo.data.errors import DataError

Segment = tuple[NDArray[Any], ...]
"""The batches of consecutive steps: of each column [steps, batch, ...]."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Equal pieces of a file, read by index: `rows[indices]`. Neighbours may overlap, as windows of tokens do."""

    path: Path
    offset: int  # byte at which piece 0 begins
    stride: int  # bytes from one piece to the next
    shape: tuple[int, ...]  # of all pieces: [N, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, mapped: np.memmap) -> Rows:
        """The rows of a C-ordered `numpy.memmap` [N, ...]."""
        if not mapped.flags.c_contiguous:
            raise ValueError(f"Rows.of takes C-ordered arrays; {mapped.filename} has strides {mapped.strides}.")
        return cls(Path(str(mapped.filename)), mapped.offset, mapped.strides[0], mapped.shape, mapped.dtype)

    @classmethod
    def windows(cls, mapped: np.memmap, context: int) -> Rows:
        """Windows of `context` + 1 elements of a row [n]; each begins with the last element of the one before it.

        The last elements, fewer than `context`, are in no window.
        """
        shape = ((len(mapped) - 1) // context, context + 1)
        stride = context * mapped.dtype.itemsize
        return cls(Path(str(mapped.filename)), mapped.offset, stride, shape, mapped.dtype)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces side by side."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, indices: NDArray[np.integer]) -> NDArray[Any]:
        """Pieces [n, *shape], in the order of `indices` [n].

        Raises:
            DataError: the file is gone, or shorter than it was.
        """
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        pieces: Any = rows.view(np.uint8).reshape(len(indices), self.nbytes // len(self))
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError.at(self.path, f"can't be read ({error.strerror})", "prepare the data again") from error
        try:
            for piece, index in zip(pieces, indices.tolist(), strict=True):
                if os.preadv(file, [piece], self.offset + index * self.stride) != piece.nbytes:
                    raise DataError.at(self.path, f"ends within row {index}", "prepare the data again")
        finally:
            os.close(file)
        return rows


@dataclasses.dataclass(frozen=True)
class Outline:
    """Shape and type of an array without its data, for plans."""

    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the array would have."""
        return math.prod(self.shape) * self.dtype.itemsize


Column = Rows | Outline | NDArray[Any]
"""One array of a set of examples, [N, ...]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """Examples in columns of equal length. A stream with outlines for columns serves plans and can't be read."""

    columns: tuple[Column, ...]

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.columns[0])

    def segments(self, steps: int, batch: int, seed: Sequence[int], used: int = 0) -> SegmentReader:
        """A reader of segments of `steps` batches in the order that `seed` decides; `used` of them were read before."""
        return SegmentReader(self, steps, batch, seed, used)


class Cursor(NamedTuple):
    """The next example of a stream: `position` in the order of `epoch`."""

    epoch: int
    position: int


def cursor_after(examples: int, size: int) -> Cursor:
    """The position in a stream of `size` examples after reading `examples` of them."""
    return Cursor(*divmod(examples, size))


@functools.lru_cache(maxsize=4)
def order(seed: tuple[int, ...], epoch: int, size: int) -> NDArray[np.int64]:
    """The order of one epoch: a permutation of 0 .. size - 1, the same wherever NumPy is the same version."""
    # The epoch as a spawn key: as one more word of entropy, 0 would count as absent.
    mixed = np.random.SeedSequence(seed, spawn_key=(epoch,))
    shuffled = np.random.Generator(np.random.PCG64(mixed)).permutation(size)
    shuffled.setflags(write=False)
    return shuffled


def indices(seed: tuple[int, ...], start: Cursor, count: int, size: int) -> NDArray[np.int64]:
    """The `count` examples from `start` on. Each epoch is read to its end before the next begins. [count]"""
    parts, (epoch, position) = [], start
    while count:
        part = order(seed, epoch, size)[position : position + count]
        parts.append(part)
        count -= len(part)
        epoch, position = epoch + 1, 0
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def segment(stream: Stream, seed: tuple[int, ...], start: Cursor, steps: int, batch: int) -> Segment:
    """The batches of the next `steps` steps: of each column [steps, batch, ...]."""
    chosen = indices(seed, start, steps * batch, stream.size)
    parts = (column[chosen] for column in stream.columns if not isinstance(column, Outline))
    return tuple(part.reshape(steps, batch, *part.shape[1:]) for part in parts)


class SegmentReader:
    """Segments of a stream in order. A thread reads the next one while the present one is used."""

    def __init__(self, stream: Stream, steps: int, batch: int, seed: Sequence[int], used: int = 0) -> None:
        """`used`: segments that were read before, by the run that resumes here."""
        self.stream, self.steps, self.batch, self.seed = stream, steps, batch, tuple(seed)
        self.used = used
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="lolo-feed")
        self._ahead: Future[Segment] | None = None

    @property
    def cursor(self) -> Cursor:
        """The first example of the next segment."""
        return cursor_after(self.used * self.steps * self.batch, self.stream.size)

    def _read(self) -> Future[Segment]:
        return self._reader.submit(segment, self.stream, self.seed, self.cursor, self.steps, self.batch)

    def next(self) -> Segment:
        """The next segment, of each column [steps, batch, ...].

        Raises:
            DataError: the files have changed.
        """
        present = (self._ahead or self._read()).result()
        self.used += 1
        self._ahead = self._read()
        return present

    def close(self) -> None:
        """Stop reading ahead."""
        self._reader.shutdown(wait=True, cancel_futures=True)
