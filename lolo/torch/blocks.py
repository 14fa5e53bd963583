"""What the architectures' steps share: tensors in blocks that fit the cache, buffers that are used again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from lolo.optimizers import factored

State = MutableMapping[torch.Tensor, dict[str, torch.Tensor]]  # of a `torch.optim.Optimizer`, by parameter
Zeros = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of what is kept for a parameter

# Entries per block: on a CPU the hidden activations of a block stay in cache; an accelerator wants few launches.
CPU_BLOCK = 1 << 14
ACCELERATOR_BLOCK = 1 << 18
SMALLEST_ROW = 16  # a matrix with shorter rows is worked on transposed: inner loops of a few entries are slow
MOMENTS = ("momentum", "rms", "row", "column")


class BlockLayout(NamedTuple):
    """A tensor seen as [K, A, B]: A and B its factored axes, K all others; [1, 1, N] below two axes."""

    order: tuple[int, ...]  # the tensor's axes, the factored ones last
    shape: tuple[int, int, int]
    factored: bool
    last_is_largest: bool  # row moments are means over B, column moments over A; else the other way round


@runtime_checkable
class MomentWeights(Protocol):
    """What moments and their share of the first layer take from φ."""

    @property
    def row(self) -> torch.Tensor: ...  # [H, 6]

    @property
    def column(self) -> torch.Tensor: ...  # [H, 6]

    @property
    def momentum_gain(self) -> torch.Tensor: ...  # [3, 1, 1, 1, 1], 1 − decay

    @property
    def rms_gain(self) -> float: ...

    @property
    def factored_gain(self) -> torch.Tensor: ...  # [3, 1, 1, 1, 1]


class Batch(NamedTuple):
    """T tensors of one layout, in float32. Moments are updated in place."""

    grad: torch.Tensor  # [T, K, A, B]
    param: torch.Tensor  # [T, K, A, B]
    momentum: torch.Tensor  # [3, T, K, A, B]
    rms: torch.Tensor  # [T, K, A, B]
    row: torch.Tensor  # [3, T, K, A, B], 1 instead of the largest axis; [3, T, 1, 1, N] below two axes
    column: torch.Tensor | None  # likewise, 1 instead of the second largest; None below two axes


def moment_shapes(place: BlockLayout) -> dict[str, tuple[int, ...]]:
    """The moments kept for one tensor, [3, K, A, B] and smaller."""
    kept, other, last = place.shape
    momentum, over_last, over_other = (3, kept, other, last), (3, kept, other, 1), (3, kept, 1, last)
    if not place.factored:
        return {"momentum": momentum, "rms": place.shape, "row": momentum}
    row, column = (over_last, over_other) if place.last_is_largest else (over_other, over_last)
    return {"momentum": momentum, "rms": place.shape, "row": row, "column": column}


def as_float32(grad: torch.Tensor) -> torch.Tensor:
    """A gradient in float32, in which finite numbers stay finite."""
    if grad.dtype != torch.float64:
        return grad.float()
    largest = torch.finfo(torch.float32).max
    return torch.where(grad.isinf(), grad, grad.clamp(-largest, largest)).float()


def limited(grad: torch.Tensor, largest: float, infinite: float) -> torch.Tensor:
    """The gradient, finite entries within ±largest; infinite ones become `infinite`, and NaN stays, to be seen."""
    # Nearly always nothing is to do; on an accelerator to ask would cost more than a copy.
    if grad.device.type == "cpu" and float(torch.linalg.vector_norm(grad, math.inf)) <= largest:
        return grad
    return grad.clamp(-largest, largest).masked_fill_(grad.isinf(), infinite)


def reader(largest: float, infinite: float, maximize: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes a float32 gradient fit for use: `limited`, and the other way round where the step shall climb."""
    if maximize:
        return lambda grad: -limited(grad, largest, infinite)
    return lambda grad: limited(grad, largest, infinite)


def as_tensor(array: Any) -> torch.Tensor:
    """A copy of an array in float32, on the CPU; torch.tensor would ask for the default device."""
    return torch.from_numpy(np.array(array, np.float32, order="C"))


def moved(network: Any, device: torch.device) -> Any:
    """A NamedTuple of tensors and numbers with its tensors on a device."""
    return type(network)(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in network))


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
    kept, rows, length = shape
    row_limit = max(1, limit // length)
    steps = (max(1, row_limit // rows), min(rows, row_limit), min(length, limit))
    even = [math.ceil(n / math.ceil(n / step)) for n, step in zip(shape, steps, strict=True)]
    return even[0], even[1], even[2]


def split(tensor: torch.Tensor, shape: tuple[int, int, int], block: tuple[int, int, int]) -> list[torch.Tensor]:
    """Views of the blocks of [..., K, A, B] in order; an axis of extent 1 is broadcast: each block sees it whole."""
    pieces = [tensor]
    for axis, extent, step in zip((-3, -2, -1), shape, block, strict=True):
        if extent > step:
            copies = math.ceil(extent / step)
            pieces = [
                part
                for piece in pieces
                for part in (piece.split(step, axis) if tensor.shape[axis] > 1 else [piece] * copies)
            ]
    return pieces


def gather(
    params: list[torch.Tensor], state: State, place: BlockLayout, read: Callable[[torch.Tensor], torch.Tensor]
) -> Batch:
    """T tensors of one layout, dtype apart; alone in its batch a float32 tensor is worked on where it lies.

    read: what makes a gradient fit for use (`reader`).
    """
    grads = [as_float32(arrange(param.grad, place)) for param in params]
    values = [arrange(param, place).float() for param in params]
    states = [state[param] for param in params]
    moments = {name: [own[name].float() for own in states] for name in moment_shapes(place)}
    if len(params) == 1:
        grad, value = grads[0].unsqueeze(0), values[0].unsqueeze(0)
        together = {name: moment[0].unsqueeze(-4) for name, moment in moments.items()}
    else:
        grad, value = torch.stack(grads), torch.stack(values)
        together = {name: torch.stack(moment, dim=-4) for name, moment in moments.items()}
    return Batch(read(grad), value, *(together.get(name) for name in MOMENTS))


def scatter(batch: Batch, params: list[torch.Tensor], state: State, place: BlockLayout) -> None:
    """Give T tensors what their batch has become, and count the step."""
    if not in_place(batch, params):
        changes = zip(params, batch.param, strict=True)
        torch._foreach_add_(params, [restore(change, place, param.shape) for param, change in changes])
    states = [state[param] for param in params]
    for name in moment_shapes(place):
        kept = [own[name] for own in states]
        if len(params) > 1 or kept[0].dtype != torch.float32:
            torch._foreach_copy_(kept, getattr(batch, name).unbind(-4))
    for own in states:
        own["step"] += 1


def in_place(batch: Batch, params: list[torch.Tensor]) -> bool:
    """Whether `batch.param` is the parameter itself; otherwise it becomes what is added to the parameters."""
    return batch.param.data_ptr() == params[0].data_ptr()


def batches(params: list[torch.Tensor], place: BlockLayout, limit: int) -> list[list[torch.Tensor]]:
    """Parameters of one layout in batches that fit in a block of `limit` entries; large ones are alone."""
    size = math.prod(place.shape)
    together = max(1, limit // size) if size <= limit // 4 else 1
    return [params[start : start + together] for start in range(0, len(params), together)]


class Piece(NamedTuple):
    """One block of a batch, [T, k, a, b]."""

    grad: torch.Tensor
    param: torch.Tensor
    momentum: torch.Tensor
    rms: torch.Tensor
    row: torch.Tensor  # [3, ...]; below two axes the diagonal moment, else the row factor
    column: torch.Tensor | None  # the column factor
    base: tuple[torch.Tensor, ...]  # what the entries' inputs are added to in the first layer, [H, ...] broadcast


class Workspace:
    """Buffers of one device, kept between blocks and steps: fresh memory for each block would cost more than work."""

    def __init__(self, device: torch.device):
        self.device = device
        self.block = CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK
        self.networks: dict[str, Any] = {}  # by the weights' sha256
        self.buffers: dict[str, torch.Tensor] = {}
        self.views: dict[tuple[Any, ...], Any] = {}
        self.plans: dict[Any, Any] = {}  # of `triton_kernel`

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Uninitialised float32 [*shape] at the start of the buffer of that name."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, device=self.device, dtype=torch.float32)
            self.views.clear()
        return self.buffers[name][:size].view(shape)

    def scratch(self, make: Callable[..., Any], *sizes: Any) -> Any:
        """`make(self, *sizes)`: views of the buffers, kept until a buffer grows."""
        key = (make, *sizes)
        if key not in self.views:
            if len(self.views) > 1000:
                self.views.clear()
            views = make(self, *sizes)  # which may clear what is kept
            self.views[key] = views
        return self.views[key]


def accumulate_factored(batch: Batch, place: BlockLayout, gain: torch.Tensor, blocks: list[torch.Tensor]) -> None:
    """Row and column moments of T tensors. gain: [3, 1, 1, 1, 1], 1 − decay; blocks: those of batch.grad."""
    assert batch.column is not None
    row_axis, column_axis = (-1, -2) if place.last_is_largest else (-2, -1)
    block = tuple(blocks[0].shape[-3:])
    row_mean, column_mean = torch.zeros_like(batch.row[0]), torch.zeros_like(batch.column[0])
    here = (split(row_mean, place.shape, block), split(column_mean, place.shape, block))
    for grad, row_part, column_part in zip(blocks, *here, strict=True):
        squared = grad * grad
        row_part.add_(squared.sum(dim=row_axis, keepdim=True))
        column_part.add_(squared.sum(dim=column_axis, keepdim=True))
    batch.row.lerp_(row_mean.div_(place.shape[row_axis]).add_(factored.FACTORED_EPSILON), gain)
    batch.column.lerp_(column_mean.div_(place.shape[column_axis]).add_(factored.FACTORED_EPSILON), gain)


def factors(batch: Batch, place: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gradient is multiplied by along rows and along columns."""
    assert batch.column is not None
    mean = batch.row.mean(dim=-2 if place.last_is_largest else -1, keepdim=True).add_(factored.FACTOR_MEAN_EPSILON)
    return (
        (batch.row / mean).clamp_(min=factored.FACTOR_FLOOR).rsqrt_(),
        batch.column.clamp(min=factored.FACTOR_FLOOR).rsqrt_(),
    )


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """[F, T, n] -> [F, T]"""
    return torch.linalg.vector_norm(x, dim=2).square_()


def normalizer(squares: torch.Tensor, count: int, epsilon: float) -> torch.Tensor:
    """One over the root mean square."""
    return (squares / count).add_(epsilon).rsqrt_()


def project_moment(weight: torch.Tensor, moment: torch.Tensor, epsilon: float) -> torch.Tensor:
    """A row or column moment and its inverse root, normalised and multiplied by their weights. -> [H, T, K, A, B]"""
    x = torch.cat([moment, (moment + factored.MOMENT_EPSILON).rsqrt_()])
    flat = x.flatten(2)
    flat.mul_(normalizer(sum_of_squares(flat), flat.shape[2], epsilon).unsqueeze(2))
    return (weight @ flat.flatten(1)).view(-1, *x.shape[1:])


def pieces_of(
    batch: Batch, place: BlockLayout, network: MomentWeights, bias: torch.Tensor, epsilon: float, limit: int
) -> list[Piece]:
    """A batch in blocks of `limit` entries, its row and column moments updated.

    bias: [H], of the first layer; epsilon: of normalisers.
    """
    extents, bias = block_extents(place.shape, max(1, limit // batch.grad.shape[0])), bias.view(-1, 1, 1, 1, 1)

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        return split(tensor, place.shape, extents)

    grads = parts(batch.grad)
    if batch.column is None:
        along, columns = parts(batch.row), [None] * len(grads)
        base: list[tuple[torch.Tensor, ...]] = [(bias,)] * len(grads)
    else:
        accumulate_factored(batch, place, network.factored_gain, grads)
        along, columns = map(parts, factors(batch, place))
        row_term = parts(project_moment(network.row, batch.row, epsilon))
        column_term = parts(project_moment(network.column, batch.column, epsilon).add_(bias))
        base = list(zip(row_term, column_term, strict=True))
    own = (grads, parts(batch.param), parts(batch.momentum), parts(batch.rms))
    return [Piece(*piece) for piece in zip(*own, along, columns, base, strict=True)]


def accumulate(piece: Piece, network: MomentWeights, squared: torch.Tensor) -> None:
    """All moments of one block but the row and column moments. squared: [T, k, a, b], to be overwritten."""
    torch.mul(piece.grad, piece.grad, out=squared)
    piece.momentum.lerp_(piece.grad, network.momentum_gain)
    piece.rms.lerp_(squared, network.rms_gain)
    if piece.column is None:
        piece.row.lerp_(squared.add_(factored.FACTORED_EPSILON), network.factored_gain)
