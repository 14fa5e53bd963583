"""Where Triton's kernels of `norm_fc` find things: one row of addresses, extents and offsets for each tensor.

A launch serves many tensors. Its programs look up in a list which tensor is theirs, and read the tensor's row. All
but the addresses depends on shapes and strides only and is computed once: a `LaunchPlan`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

POINTERS = ("grad", "param", "momentum", "rms", "row", "column", "count")
FIELDS = (
    *POINTERS,
    *("a", "b", "size"),  # extents; K·A·B entries
    *("grad_k", "grad_a", "grad_b", "param_k", "param_a", "param_b"),  # strides, in entries
    "last_is_largest",
    *("first", "regions"),  # the tensor's programs where each has a region
    *("first_row", "first_column"),  # and where each has a stretch of the row or column moments
    # Offsets into the scratch, in floats:
    *("row_part", "column_part"),  # [tiles along B, K·A], [regions along A, K·B]: sums of g² over a region
    *("row_sums", "column_sums"),  # [6, stretches]: sums of squares of the moments and of their inverse roots
    *("row_along", "column_along"),  # [3 + H, K·A], [3 + H, K·B]: factors and shares of the first layer
    *("sums", "weights", "step_sums"),  # [19, regions]; [18·H + 2], weights and two normalisers; [regions]
    "step",  # [K, A, B]
)
AT = {name: index for index, name in enumerate(FIELDS)}

LOOPS = 16  # tiles of a region, one below the other
TILES = {"wide": (4, 128), "narrow": (16, 32), "flat": (1, 512)}  # rows, columns: four entries for each of 128 threads
NARROW = 32  # the last extent up to which tiles are narrow
STRETCH = 128  # entries of a row or column moment
ENTRY_INPUTS, QUANTITIES = 18, 19  # QUANTITIES: with Nesterov momentum
ADAM_BLOCK = 1024
LIMIT = 1 << 25  # entries of the tensors of a launch, if they are several: the scratch holds a step of each


class Extents(NamedTuple):
    """A tensor without its numbers."""

    shape: tuple[int, int, int]  # K, A, B
    grad_strides: tuple[int, int, int]
    param_strides: tuple[int, int, int]
    last_is_largest: bool


class LaunchPlan(NamedTuple):
    """A launch over T tensors."""

    rows: np.ndarray  # int64 [T, FIELDS], addresses 0
    owners: np.ndarray  # int32 [regions], which tensor's region it is
    stretches: np.ndarray  # int32 [stretches], 2·tensor, + 1 for column moments
    floats: int  # of the scratch
    steps: list[int]  # offsets of the tensors' steps in it


def plan(tensors: Sequence[Extents], kind: str, hidden: int) -> LaunchPlan:
    """Rows of a launch. kind: of `TILES`; "flat" below two axes, where there are no row and column moments."""
    height, width = TILES[kind]
    rows = np.zeros((len(tensors), len(FIELDS)), np.int64)
    owners: list[int] = []
    stretches: list[int] = []
    floats = 0
    for index, of in enumerate(tensors):
        kept, a, b = of.shape
        down, across = math.ceil(a / (height * LOOPS)), math.ceil(b / width)
        regions = kept * down * across
        along = [kept * math.ceil(extent / STRETCH) if kind != "flat" else 0 for extent in (a, b)]
        numbers = {"a": a, "b": b, "size": kept * a * b, "last_is_largest": of.last_is_largest}
        numbers |= {f"grad_{axis}": stride for axis, stride in zip("kab", of.grad_strides, strict=True)}
        numbers |= {f"param_{axis}": stride for axis, stride in zip("kab", of.param_strides, strict=True)}
        numbers |= {"first": len(owners), "regions": regions}
        numbers |= {"first_row": len(stretches), "first_column": len(stretches) + along[0]}
        owners += [index] * regions
        stretches += [2 * index] * along[0] + [2 * index + 1] * along[1]
        sizes = {"sums": QUANTITIES * regions, "weights": ENTRY_INPUTS * hidden + 2, "step_sums": regions}
        if kind != "flat":
            sizes |= {"row_part": across * kept * a, "column_part": down * kept * b}
            sizes |= {"row_sums": 6 * along[0], "column_sums": 6 * along[1]}
            sizes |= {"row_along": (3 + hidden) * kept * a, "column_along": (3 + hidden) * kept * b}
        for name, size in sizes.items():
            numbers[name] = floats
            floats += math.ceil(size / 4) * 4
        for name, number in numbers.items():
            rows[index, AT[name]] = number
    steps = []
    for index, of in enumerate(tensors):  # equal shapes beside each other: a batch for Newton-Schulz
        rows[index, AT["step"]] = floats
        steps.append(floats)
        floats += math.prod(of.shape)
    return LaunchPlan(rows, np.array(owners, np.int32), np.array(stretches, np.int32), floats, steps)


def adam_plan(sizes: Sequence[int]) -> LaunchPlan:
    """Rows of a launch over tensors on AdamW, each one piece of memory."""
    rows = np.zeros((len(sizes), len(FIELDS)), np.int64)
    owners: list[int] = []
    for index, size in enumerate(sizes):
        rows[index, AT["size"]], rows[index, AT["first"]] = size, len(owners)
        owners += [index] * math.ceil(size / ADAM_BLOCK)
    return LaunchPlan(rows, np.array(owners, np.int32), np.zeros(0, np.int32), 0, [])
