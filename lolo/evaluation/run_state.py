"""The state of a long run in a file, so that the same run goes on from there after a stop."""

from __future__ import annotations

import glob
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from lolo.files import disk, tensors
from lolo.files.disk import FileError
from lolo.trees import PyTree

EVERY_S = 300.0  # seconds between two writes: what a kill may cost


class Done(NamedTuple):
    """What K runs of `long_runs.run` have done: N scans, in S whole segments."""

    states: PyTree  # of the K runs
    lengths: list[int]  # steps of each scan
    means: list[NDArray[np.float32]]  # N of [K], mean losses of each scan
    train: list[NDArray[np.float32]]  # S of [K], points of the train curves
    scores: list[NDArray[np.float32]]  # S of [K], points of the held-out curves


class RunState:
    """A file for the state of one `long_runs.run`. Whoever made it removes it once the run's results are safe."""

    def __init__(self, path: Path, every_s: float = EVERY_S) -> None:
        """path: of the file, SOMETHING.safetensors; every_s: seconds between two writes."""
        self.path, self.every_s = path, every_s
        self._clock = {"written": time.monotonic()}  # one for all parts
        self._is_part = False

    def part(self, name: object) -> RunState:
        """For one run of several: a file of its own beside this one."""
        part = RunState(self.path.with_name(f"{self.path.stem}~{name}{self.path.suffix}"), self.every_s)
        part._clock, part._is_part = self._clock, True
        return part

    def due(self, ended: bool) -> bool:
        """Whether the last write was long enough ago. A part that has ended is kept too: others are to follow."""
        return time.monotonic() - self._clock["written"] >= self.every_s or (ended and self._is_part)

    def write(self, of: str, done: Done) -> None:
        """Keep what is done. `of`: tells the run from others."""
        leaves = {f"state.{i}": _bytes_of(leaf) for i, leaf in enumerate(jax.tree.leaves(done.states))}
        points = {name: np.asarray(getattr(done, name)) for name in Done._fields[1:]}
        disk.write_bytes(self.path, tensors.pack({**leaves, **points}, {"of": of}))
        self._clock["written"] = time.monotonic()

    def read(self, of: str, like: PyTree) -> Done | None:
        """What is kept of this run; None if nothing is, or another run's. Raises FileError for a damaged file.

        like: states of the same shapes and dtypes.
        """
        if not self.path.exists():
            return None
        try:
            arrays, metadata = tensors.unpack(self.path.read_bytes(), str(self.path))
            if metadata.get("of") != of:
                return None
            others, structure = jax.tree.flatten(like)
            leaves = [_from_bytes(arrays[f"state.{i}"], other) for i, other in enumerate(others)]
            lengths, *points = (arrays[name] for name in Done._fields[1:])
        except (FileError, KeyError, ValueError) as error:
            raise FileError(f"{self.path} is damaged ({error}). Remove it, and its run starts again.") from error
        return Done(jax.tree.unflatten(structure, leaves), lengths.tolist(), *map(list, points))

    def remove(self) -> None:
        """Remove the file and those of its parts."""
        for path in (self.path, *self.path.parent.glob(f"{glob.escape(self.path.stem)}~*{self.path.suffix}")):
            path.unlink(missing_ok=True)


def _bytes_of(leaf: Any) -> NDArray[np.uint8]:
    """A leaf of any dtype: safetensors knows neither keys nor some of JAX's floats."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.frombuffer(np.asarray(leaf).tobytes(), np.uint8)


def _from_bytes(content: NDArray[np.uint8], like: Any) -> Any:
    if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, like)
        return jax.random.wrap_key_data(_from_bytes(content, data), impl=jax.random.key_impl(like))
    return np.frombuffer(content.tobytes(), like.dtype).reshape(like.shape)
