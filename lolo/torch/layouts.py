"""How a tensor is seen as [K, A, B], in blocks, and where its moments lie beside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from lolo.optimizers import factored
from lolo.torch.rounds import Share, largest_rows
from lolo.torch.sharding import Zeros

SMALLEST_ROW = 16  # a matrix with shorter rows is worked on transposed: inner loops of a few entries are slow


class Cut(NamedTuple):
    """How much of a tensor lies here: some of its rows, the entries of its axis 0."""

    share: Share
    axis: int  # -3, -2 or -1: of K, A and B the one that axis 0 is in
    whole: tuple[int, int, int]  # [K, A, B] of the whole tensor
    largest: tuple[int, int, int]  # of the process that has most of it


class BlockLayout(NamedTuple):
    """A tensor seen as [K, A, B]: A and B its factored axes, K all others; [1, 1, N] below two axes."""

    order: tuple[int, ...]  # the tensor's axes, the factored ones last
    shape: tuple[int, int, int]
    factored: bool
    last_is_largest: bool  # row moments are means over B, column moments over A; else the other way round
    cut: Cut | None = None  # where not all of the tensor lies here: then `shape` is of what does

    @property
    def whole(self) -> tuple[int, int, int]:
        """[K, A, B] of the whole tensor."""
        return self.cut.whole if self.cut else self.shape

    @property
    def averaged(self) -> tuple[int, int]:
        """The axes that row and column moments are means over."""
        return (-1, -2) if self.last_is_largest else (-2, -1)

    @property
    def rows_axis(self) -> int:
        """Of K, A and B the axis that the tensor's axis 0 is in, before all others that are in it."""
        return max(self.order.index(0) - len(self.order), -3) if self.factored else -1


@functools.lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...], axes: factored.FactoredAxes | None) -> BlockLayout:
    """Where the factored axes go: last, the largest at the very end. Matrices with long rows stay as they are."""
    if axes is None:
        return BlockLayout((), (1, 1, math.prod(shape)), factored=False, last_is_largest=True)
    last, other = axes.largest, axes.second
    if len(shape) == 2 and shape[1] >= SMALLEST_ROW:
        last, other = 1, 0
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    extents = (math.prod(shape[axis] for axis in kept), shape[other], shape[last])
    return BlockLayout((*kept, other, last), extents, factored=True, last_is_largest=last == axes.largest)


def flat(param: torch.Tensor) -> BlockLayout:
    """The layout of a tensor without factored axes, [1, 1, N]."""
    return layout(tuple(param.shape), None)


def part(layout_of: Callable[[tuple[int, ...]], BlockLayout], param: torch.Tensor, share: Share | None) -> BlockLayout:
    """The layout of what lies here of a tensor. layout_of: of a whole tensor, by its shape."""
    if share is None:
        return layout_of(tuple(param.shape))
    place = layout_of(share.shape)
    axis = place.rows_axis

    def of(count: int) -> tuple[int, int, int]:
        extents = list(place.shape)
        extents[axis] = extents[axis] // share.shape[0] * count
        return extents[0], extents[1], extents[2]

    return place._replace(shape=of(len(param)), cut=Cut(share, axis, place.shape, of(largest_rows(share))))


def rows_along(place: BlockLayout, name: str) -> int | None:
    """Of [..., K, A, B] the axis along which a moment has the tensor's rows; None where it is a mean over them."""
    averaged = dict(zip(("row", "column"), place.averaged, strict=True)) if place.factored else {}
    return None if averaged.get(name) == place.rows_axis else place.rows_axis


def moment_shapes(place: BlockLayout) -> dict[str, tuple[int, ...]]:
    """The moments kept for one tensor, [3, K, A, B] and smaller."""
    kept, other, last = place.shape
    momentum, over_last, over_other = (3, kept, other, last), (3, kept, other, 1), (3, kept, 1, last)
    if not place.factored:
        return {"momentum": momentum, "rms": place.shape, "row": momentum}
    row, column = (over_last, over_other) if place.last_is_largest else (over_other, over_last)
    return {"momentum": momentum, "rms": place.shape, "row": row, "column": column}


def zeros(place: BlockLayout, momentum_dtype: torch.dtype = torch.float32) -> dict[str, Zeros]:
    """The moments of one tensor, as they are when nothing has been seen."""
    found = {}
    for name, shape in moment_shapes(place).items():
        axis = rows_along(place, name)
        dtype = momentum_dtype if name == "momentum" else torch.float32
        found[name] = Zeros(shape, dtype, None if axis is None else len(shape) + axis)
    return found


def arrange(tensor: torch.Tensor, place: BlockLayout) -> torch.Tensor:
    """[*shape] -> [K, A, B], a view where strides allow."""
    return (tensor.permute(place.order) if place.factored else tensor).reshape(place.shape)


def restore(tensor: torch.Tensor, place: BlockLayout, shape: torch.Size) -> torch.Tensor:
    """[K, A, B] -> [*shape], a view."""
    if not place.factored:
        return tensor.view(shape)
    inverse = sorted(range(len(shape)), key=place.order.__getitem__)
    return tensor.view([shape[axis] for axis in place.order]).permute(inverse)


def block_extents(shape: tuple[int, int, int], limit: int) -> tuple[int, int, int]:
    """Extents of blocks of at most `limit` entries, whole rows first, as even as they come."""
    if 0 in shape:
        return shape
    kept, rows, length = shape
    row_limit = max(1, limit // length)
    steps = (max(1, row_limit // rows), min(rows, row_limit), min(length, limit))
    even = [math.ceil(n / math.ceil(n / step)) for n, step in zip(shape, steps, strict=True)]
    return even[0], even[1], even[2]


def split(tensor: torch.Tensor, shape: tuple[int, int, int], block: tuple[int, int, int]) -> list[torch.Tensor]:
    """Views of the blocks of [..., K, A, B] in order; an axis of extent 1 is broadcast: each block sees it whole."""
    pieces = [] if 0 in shape else [tensor]
    for axis, extent, step in zip((-3, -2, -1), shape, block, strict=True):
        if extent > step:
            copies = math.ceil(extent / step)
            pieces = [
                part
                for piece in pieces
                for part in (piece.split(step, axis) if tensor.shape[axis] > 1 else [piece] * copies)
            ]
    return pieces
