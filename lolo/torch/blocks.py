"""What the architectures' steps share: tensors in blocks that fit the cache, buffers that are used again."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from lolo.optimizers import factored
from lolo.torch.layouts import BlockLayout, arrange, block_extents, moment_shapes, restore, rows_along, split
from lolo.torch.rounds import Sums
from lolo.torch.sharding import State

# Entries per block: on a CPU the hidden activations of a block stay in cache; an accelerator wants few launches.
CPU_BLOCK = 1 << 14
ACCELERATOR_BLOCK = 1 << 18
MOMENTS = ("momentum", "rms", "row", "column")


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


def as_float32(grad: torch.Tensor) -> torch.Tensor:
    """A gradient in float32, in which finite numbers stay finite."""
    if grad.dtype != torch.float64:
        return grad.float()
    largest = torch.finfo(torch.float32).max
    return torch.where(grad.isinf(), grad, grad.clamp(-largest, largest)).float()


def limited(grad: torch.Tensor, largest: float, infinite: float) -> torch.Tensor:
    """The gradient, finite entries within ±largest; infinite ones become `infinite`, and NaN stays, to be seen."""
    # Nearly always nothing is to do; on an accelerator to ask would cost more than a copy.
    if not grad.numel() or (grad.device.type == "cpu" and float(torch.linalg.vector_norm(grad, math.inf)) <= largest):
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


def total(sums: list[torch.Tensor], place: BlockLayout) -> Generator[Sums, list[torch.Tensor], list[torch.Tensor]]:
    """Sums over whole tensors, of those over what lies here."""
    return sums if place.cut is None else (yield Sums(sums, place.cut.share))


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
    size = math.prod(place.cut.largest if place.cut else place.shape)  # the same for all processes
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


def accumulate_factored(
    batch: Batch, place: BlockLayout, gain: torch.Tensor, blocks: list[torch.Tensor]
) -> Generator[Sums, list[torch.Tensor], torch.Tensor]:
    """Row and column moments of T tensors. gain: [3, 1, 1, 1, 1], 1 − decay; blocks: those of batch.grad.

    Returns: the mean of the row moments over the second largest axis, [3, T, K, 1, 1].
    """
    assert batch.column is not None
    (row_axis, column_axis), whole = place.averaged, place.whole
    cut = place.cut.axis if place.cut else None
    row_sum, column_sum = torch.zeros_like(batch.row[0]), torch.zeros_like(batch.column[0])
    block = tuple(blocks[0].shape[-3:]) if blocks else place.shape
    here = (split(row_sum, place.shape, block), split(column_sum, place.shape, block))
    for grad, row_part, column_part in zip(blocks, *here, strict=True):
        squared = grad * grad
        row_part.add_(squared.sum(dim=row_axis, keepdim=True))
        column_part.add_(squared.sum(dim=column_axis, keepdim=True))
    # One round whatever is cut, so that all tensors are always in the same one.
    if cut == row_axis:
        (row_sum,) = yield from total([row_sum], place)
    batch.row.lerp_(row_sum.div_(whole[row_axis]).add_(factored.FACTORED_EPSILON), gain)
    over_second = batch.row.sum(dim=column_axis, keepdim=True)
    if cut == column_axis:
        column_sum, over_second = yield from total([column_sum, over_second], place)
    elif cut not in (None, row_axis):
        yield from total([], place)
    batch.column.lerp_(column_sum.div_(whole[column_axis]).add_(factored.FACTORED_EPSILON), gain)
    return over_second.div_(whole[column_axis])


def factors(batch: Batch, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gradient is multiplied by along rows and along columns. mean: of the row moments, [3, T, K, 1, 1]"""
    assert batch.column is not None
    return (
        (batch.row / mean.add_(factored.FACTOR_MEAN_EPSILON)).clamp_(min=factored.FACTOR_FLOOR).rsqrt_(),
        batch.column.clamp(min=factored.FACTOR_FLOOR).rsqrt_(),
    )


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """[F, T, n] -> [F, T]"""
    return torch.linalg.vector_norm(x, dim=2).square_()


def normalizer(squares: torch.Tensor, count: int, epsilon: float) -> torch.Tensor:
    """One over the root mean square."""
    return (squares / count).add_(epsilon).rsqrt_()


def pieces_of(
    batch: Batch, place: BlockLayout, network: MomentWeights, limit: int
) -> Generator[Sums, list[torch.Tensor], list[Piece]]:
    """A batch in blocks of `limit` entries, its row and column moments updated: the first round."""
    extents = block_extents(place.shape, max(1, limit // batch.grad.shape[0]))

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        return split(tensor, place.shape, extents)

    grads = parts(batch.grad)
    if batch.column is None:
        yield from total([], place)
        along, columns = parts(batch.row), [None] * len(grads)
    else:
        mean = yield from accumulate_factored(batch, place, network.factored_gain, grads)
        along, columns = map(parts, factors(batch, mean))
    own = (grads, parts(batch.param), parts(batch.momentum), parts(batch.rms))
    return [Piece(*piece) for piece in zip(*own, along, columns, strict=True)]


def first_layer(
    squares: torch.Tensor, batch: Batch, place: BlockLayout, network: MomentWeights, bias: torch.Tensor, epsilon: float
) -> Generator[Sums, list[torch.Tensor], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """What is left of the first layer where its inputs vary in rows or columns only: the second round.

    Args:
      squares: [F, T], sums of squares of the inputs that vary from entry to entry.
      bias: [H], of the first layer.
      epsilon: of normalisers.

    Returns: `squares` of whole tensors, and what their products are added to: one or two summands, [H, T, K, A, B],
    extents 1 where they do not vary.
    """
    bias = bias.view(-1, 1, 1, 1, 1)
    if batch.column is None:
        (squares,) = yield from total([squares], place)
        return squares, (bias,)
    moments = {"row": batch.row, "column": batch.column}
    inputs = {name: torch.cat([x, (x + factored.MOMENT_EPSILON).rsqrt_()]) for name, x in moments.items()}
    found = {name: sum_of_squares(x.flatten(2)) for name, x in inputs.items()}
    cut = [name for name in inputs if place.cut and rows_along(place, name) is not None]
    squares, *complete = yield from total([squares, *(found[name] for name in cut)], place)
    found |= dict(zip(cut, complete, strict=True))
    for (name, x), axis in zip(inputs.items(), place.averaged, strict=True):
        count = math.prod(place.whole) // place.whole[axis]
        x.mul_(normalizer(found[name], count, epsilon).view(*x.shape[:2], 1, 1, 1))

    def project(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (weight @ x.flatten(1)).view(len(weight), *x.shape[1:])

    return squares, (project(network.row, inputs["row"]), project(network.column, inputs["column"]).add_(bias))


def bases_of(base: tuple[torch.Tensor, ...], place: BlockLayout, pieces: list[Piece]) -> list[tuple[torch.Tensor, ...]]:
    """What belongs to each block, of the summands of the first layer."""
    if not place.factored:
        return [base] * len(pieces)
    extents = tuple(pieces[0].grad.shape[1:]) if pieces else place.shape
    return list(zip(*(split(summand, place.shape, extents) for summand in base), strict=True))


def second_layer(weight: torch.Tensor, base: tuple[torch.Tensor, ...], network: Any, scratch: Any) -> torch.Tensor:
    """The second hidden layer of the block whose inputs lie in the scratch, [H, entries].

    weight: [H, F], of the first layer; base: one or two summands of it; network, scratch: an architecture's own.
    """
    if len(base) == 2:
        torch.add(*base, out=scratch.first)
    else:
        scratch.first.copy_(base[0])
    first = scratch.first_flat.addmm_(weight, scratch.flat).relu_()
    return torch.addmm(network.second_bias, network.second, first, out=scratch.second).relu_()


def accumulate(piece: Piece, network: MomentWeights, squared: torch.Tensor) -> None:
    """All moments of one block but the row and column moments. squared: [T, k, a, b], to be overwritten."""
    torch.mul(piece.grad, piece.grad, out=squared)
    piece.momentum.lerp_(piece.grad, network.momentum_gain)
    piece.rms.lerp_(squared, network.rms_gain)
    if piece.column is None:
        piece.row.lerp_(squared.add_(factored.FACTORED_EPSILON), network.factored_gain)
