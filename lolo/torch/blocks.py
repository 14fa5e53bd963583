"""One step of `small_fc` in PyTorch: tensors in blocks that fit the cache, buffers that are used again."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lolo.files import settings
from lolo.files.disk import FileError
from lolo.files.tensors import digest
from lolo.optimizers import small_fc_spec as spec
from lolo.optimizers import weights_file

# Entries per block: on a CPU the hidden activations of a block stay in cache; an accelerator wants few launches.
CPU_BLOCK = 1 << 14
ACCELERATOR_BLOCK = 1 << 18
RUNS = {spec.SmallFcSettings.name: spec.SmallFcSettings}  # the architectures that there is a step for
SMALLEST_ROW = 16  # a matrix with shorter rows is worked on transposed: inner loops of a few entries are slow


class Network(NamedTuple):
    """φ as the blocks want it: weights transposed, columns grouped by where they vary, decays as numbers."""

    entry: torch.Tensor  # [H, 16], of spec.ENTRY_COLUMNS
    row: torch.Tensor  # [H, 6]
    column: torch.Tensor  # [H, 6]
    time: torch.Tensor  # [H, 11]
    timescales: torch.Tensor  # [11]
    first_bias: torch.Tensor  # [H]
    second: torch.Tensor  # [H, H]
    second_bias: torch.Tensor  # [H, 1]
    last: torch.Tensor  # [2, H]
    last_bias: torch.Tensor  # [2, 1]
    momentum_gain: torch.Tensor  # [3, 1, 1, 1, 1], 1 − decay
    rms_gain: float
    factored_gain: torch.Tensor  # [3, 1, 1, 1, 1]

    def to(self, device: torch.device) -> Network:
        return Network(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self))


class Rule(NamedTuple):
    """How the parameters of one group with one step count move."""

    network: Network
    bias: torch.Tensor  # [H], the first bias with the time inputs folded in
    scale: float  # lr · λ1 / √(1 + t/step_decay)
    exp_mult: float  # λ2
    weight_decay: float
    freeze_unseen: bool


class BlockLayout(NamedTuple):
    """A tensor seen as [K, A, B]: A and B its factored axes, K all others; [1, 1, N] below two axes."""

    order: tuple[int, ...]  # the tensor's axes, the factored ones last
    shape: tuple[int, int, int]
    factored: bool
    last_is_largest: bool  # row moments are means over B, column moments over A; else the other way round


class Batch(NamedTuple):
    """T tensors of one layout, in float32. Moments are updated in place."""

    grad: torch.Tensor  # [T, K, A, B]
    param: torch.Tensor  # [T, K, A, B]
    momentum: torch.Tensor  # [3, T, K, A, B]
    rms: torch.Tensor  # [T, K, A, B]
    row: torch.Tensor  # [3, T, K, A, B], 1 instead of the largest axis; [3, T, 1, 1, N] below two axes
    column: torch.Tensor | None  # likewise, 1 instead of the second largest; None below two axes


@functools.lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...]) -> BlockLayout:
    """Where the factored axes go: last, the largest at the very end. Matrices with long rows stay as they are."""
    axes = spec.factored_axes(shape)
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


class Scratch(NamedTuple):
    """Views of a workspace for blocks of one shape, [T, k, a, b] with n entries."""

    inputs: torch.Tensor  # [16, T, k, a, b], in the order of spec.ENTRY_COLUMNS; below two axes [22, ...]
    grad: torch.Tensor  # parts of it, as named there
    param: torch.Tensor
    momentum: torch.Tensor
    rms: torch.Tensor
    scaled_momentum: torch.Tensor
    root: torch.Tensor
    factored_gradient: torch.Tensor
    factored_momentum: torch.Tensor
    diagonal: torch.Tensor  # [3, T, k, a, b], below two axes: the diagonal moment and its inverse root
    diagonal_root: torch.Tensor
    per_tensor: torch.Tensor  # [F, T, n / T], the inputs
    flat: torch.Tensor  # [F, n], the inputs
    squared: torch.Tensor  # [T, k, a, b]
    first: torch.Tensor  # [H, T, k, a, b]
    first_flat: torch.Tensor  # [H, n]
    second: torch.Tensor  # [H, n]
    out: torch.Tensor  # [2, n]
    direction: torch.Tensor  # [T, k, a, b], parts of it
    magnitude: torch.Tensor


class Workspace:
    """Buffers of one device, kept between blocks and steps: fresh memory for each block would cost more than work."""

    def __init__(self, device: torch.device):
        self.device = device
        self.block = CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK
        self.networks: dict[str, Network] = {}  # by the weights' sha256
        self.buffers: dict[str, torch.Tensor] = {}
        self.views: dict[tuple[Any, ...], Scratch] = {}

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Uninitialised float32 [*shape] at the start of the buffer of that name."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, device=self.device, dtype=torch.float32)
            self.views.clear()
        return self.buffers[name][:size].view(shape)

    def scratch(self, shape: torch.Size, count: int, hidden: int) -> Scratch:
        """Views for blocks of this shape, `count` inputs and a network of this width."""
        key = (shape, count, hidden)
        if key not in self.views:
            if len(self.views) > 1000:
                self.views.clear()
            entries = shape.numel()
            x = self.take("inputs", count, *shape)
            first = self.take("first", hidden, *shape)
            second, out = self.take("second", hidden, entries), self.take("out", 2, entries)
            self.views[key] = Scratch(
                *(x, x[0], x[1], x[2:5], x[5], x[6:9], x[9], x[10:13], x[13:16], x[16:19], x[19:22]),
                *(x.flatten(2), x.flatten(1), self.take("squared", *shape)),
                *(first, first.flatten(1), second, out, out[0].view(shape), out[1].view(shape)),
            )
        return self.views[key]


def as_weights(weights: str | Path | weights_file.WeightsFile | Mapping[str, Any]) -> weights_file.WeightsFile:
    """Weights by name, path or value, of the one architecture that this module runs. Raises ValueError."""
    if isinstance(weights, weights_file.WeightsFile):
        found = weights
    elif isinstance(weights, Mapping):
        arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in weights.items()}
        hidden = arrays["b0"].size if "b0" in arrays else 0
        default = spec.SmallFcSettings(hidden=hidden, learn_decays="momentum_decays" in arrays)
        found = weights_file.WeightsFile(arrays, dataclasses.asdict(default), {}, {}, digest(arrays))
    else:
        found = weights_file.read_weights(weights)
    if found.learner.get("name") not in list(RUNS):
        raise ValueError(f"lolo.torch runs {', '.join(RUNS)}; these weights are of {found.learner.get('name')!r}.")
    try:
        learner: spec.SmallFcSettings = settings.parse_alternative(RUNS, found.learner, "learner")
        spec.check(learner)
    except settings.RecipeError as error:
        raise FileError(f"weights: {error}") from error
    weights_file.check_meta_params(found.meta_params, learner.name, spec.shapes_of(learner), "weights")
    return found


def network_from(arrays: Mapping[str, np.ndarray]) -> Network:
    """Regroup φ for the blocks."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, np.float32, order="C"))  # torch.tensor asks for the default device

    def gain(decay: float | tuple[float, ...], offsets: str) -> torch.Tensor:
        standard, one = np.asarray(decay, np.float32).reshape(-1, 1, 1, 1, 1), np.float32(1)
        shift = np.exp(np.float32(10) * arrays[offsets].reshape(standard.shape)) if offsets in arrays else one
        return tensor(one - np.clip(one - (one - standard) * shift, np.float32(0), one))

    w0 = arrays["w0"]
    return Network(
        entry=tensor(w0[spec.ENTRY_COLUMNS].T),
        row=tensor(w0[spec.ROW_COLUMNS].T),
        column=tensor(w0[spec.COLUMN_COLUMNS].T),
        time=tensor(w0[spec.TIME_COLUMNS].T),
        timescales=tensor(np.array(spec.TIMESCALES)),
        first_bias=tensor(arrays["b0"]),
        second=tensor(arrays["w1"].T),
        second_bias=tensor(arrays["b1"][:, None]),
        last=tensor(arrays["w2"].T),
        last_bias=tensor(arrays["b2"][:, None]),
        momentum_gain=gain(spec.MOMENTUM_DECAYS, "momentum_decays"),
        rms_gain=gain(spec.RMS_DECAY, "rms_decays").item(),
        factored_gain=gain(spec.FACTORED_DECAYS, "adafactor_decays"),
    )


def accumulate_factored(batch: Batch, place: BlockLayout, network: Network, blocks: list[torch.Tensor]) -> None:
    """Row and column moments of T tensors. blocks: those of batch.grad."""
    assert batch.column is not None
    row_axis, column_axis = (-1, -2) if place.last_is_largest else (-2, -1)
    block = tuple(blocks[0].shape[-3:])
    row_mean, column_mean = torch.zeros_like(batch.row[0]), torch.zeros_like(batch.column[0])
    here = (split(row_mean, place.shape, block), split(column_mean, place.shape, block))
    for grad, row_part, column_part in zip(blocks, *here, strict=True):
        squared = grad * grad
        row_part.add_(squared.sum(dim=row_axis, keepdim=True))
        column_part.add_(squared.sum(dim=column_axis, keepdim=True))
    batch.row.lerp_(row_mean.div_(place.shape[row_axis]).add_(spec.FACTORED_EPSILON), network.factored_gain)
    batch.column.lerp_(column_mean.div_(place.shape[column_axis]).add_(spec.FACTORED_EPSILON), network.factored_gain)


def factors(batch: Batch, place: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gradient is multiplied by along rows and along columns."""
    assert batch.column is not None
    mean = batch.row.mean(dim=-2 if place.last_is_largest else -1, keepdim=True).add_(spec.FACTOR_MEAN_EPSILON)
    return (
        (batch.row / mean).clamp_(min=spec.FACTOR_FLOOR).rsqrt_(),
        batch.column.clamp(min=spec.FACTOR_FLOOR).rsqrt_(),
    )


class Piece(NamedTuple):
    """One block of a batch, [T, k, a, b]."""

    grad: torch.Tensor
    param: torch.Tensor
    momentum: torch.Tensor
    rms: torch.Tensor
    row: torch.Tensor  # [3, ...]; below two axes the diagonal moment, else the row factor
    column: torch.Tensor | None  # the column factor
    base: tuple[torch.Tensor, ...]  # what the entries' inputs are added to in the first layer, [H, ...] broadcast


def accumulate(piece: Piece, network: Network, scratch: Scratch) -> None:
    """All moments of one block but the row and column moments."""
    squared = torch.mul(piece.grad, piece.grad, out=scratch.squared)
    piece.momentum.lerp_(piece.grad, network.momentum_gain)
    piece.rms.lerp_(squared, network.rms_gain)
    if piece.column is None:
        piece.row.lerp_(squared.add_(spec.FACTORED_EPSILON), network.factored_gain)


def fill_inputs(piece: Piece, scratch: Scratch) -> None:
    """The inputs that vary from entry to entry, not normalised."""
    scratch.grad.copy_(piece.grad)
    scratch.param.copy_(piece.param)
    scratch.momentum.copy_(piece.momentum)
    scratch.rms.copy_(piece.rms)
    torch.add(piece.rms, spec.MOMENTUM_EPSILON, out=scratch.root).rsqrt_()
    torch.mul(piece.momentum, scratch.root, out=scratch.scaled_momentum)
    if piece.column is not None:
        torch.mul(piece.row, piece.column, out=scratch.factored_gradient)
        torch.mul(piece.momentum, scratch.factored_gradient, out=scratch.factored_momentum)
    else:
        torch.add(piece.row, spec.MOMENTUM_EPSILON, out=scratch.factored_momentum).rsqrt_().mul_(piece.momentum)
        torch.add(piece.row, spec.FACTOR_MEAN_EPSILON, out=scratch.factored_gradient)
        scratch.factored_gradient.clamp_(min=spec.FACTOR_FLOOR).rsqrt_()
        scratch.diagonal.copy_(piece.row)
        torch.add(piece.row, spec.MOMENT_EPSILON, out=scratch.diagonal_root).rsqrt_()
    scratch.factored_gradient.mul_(piece.grad)


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """[F, T, n] -> [F, T]"""
    return torch.linalg.vector_norm(x, dim=2).square_()


def normalizer(squares: torch.Tensor, count: int) -> torch.Tensor:
    """One over the root mean square."""
    return (squares / count).add_(spec.NORMALIZE_EPSILON).rsqrt_()


def project_moment(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A row or column moment and its inverse root, normalised and multiplied by their weights. -> [H, T, K, A, B]"""
    x = torch.cat([moment, (moment + spec.MOMENT_EPSILON).rsqrt_()])
    flat = x.flatten(2)
    flat.mul_(normalizer(sum_of_squares(flat), flat.shape[2]).unsqueeze(2))
    return (weight @ flat.flatten(1)).view(-1, *x.shape[1:])


def run_network(weight: torch.Tensor, base: tuple[torch.Tensor, ...], rule: Rule, scratch: Scratch) -> torch.Tensor:
    """d · exp(λ2·m) of the block whose inputs lie in the scratch, [T, k, a, b]. base: one or two summands."""
    if len(base) == 2:
        torch.add(*base, out=scratch.first)
    else:
        scratch.first.copy_(base[0])
    network, first = rule.network, scratch.first_flat.addmm_(weight, scratch.flat).relu_()
    second = torch.addmm(network.second_bias, network.second, first, out=scratch.second).relu_()
    torch.addmm(network.last_bias, network.last, second, out=scratch.out)
    return scratch.magnitude.mul_(rule.exp_mult).exp_().mul_(scratch.direction)


def step_batch(batch: Batch, place: BlockLayout, rule: Rule, space: Workspace, in_place: bool) -> None:
    """Update the moments of T tensors, and `batch.param`: by adding the step, or, not in place, by becoming it."""
    network, tensors, bias = rule.network, batch.grad.shape[0], rule.bias.view(-1, 1, 1, 1, 1)
    block = block_extents(place.shape, max(1, space.block // tensors))

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        return split(tensor, place.shape, block)

    grads = parts(batch.grad)
    if batch.column is None:
        weight, along = torch.cat([network.entry, network.row + network.column], dim=1), [parts(batch.row)]
        columns: list[Any] = [None] * len(grads)
        base: list[tuple[torch.Tensor, ...]] = [(bias,)] * len(grads)
    else:
        weight = network.entry
        accumulate_factored(batch, place, network, grads)
        row_factor, column_factor = factors(batch, place)
        columns, along = parts(column_factor), [parts(row_factor)]
        row_term = parts(project_moment(network.row, batch.row))
        column_term = parts(project_moment(network.column, batch.column).add_(bias))
        base = list(zip(row_term, column_term, strict=True))
    own = (grads, parts(batch.param), parts(batch.momentum), parts(batch.rms))
    pieces = [Piece(*piece) for piece in zip(*own, *along, columns, base, strict=True)]
    scratches = [space.scratch(grad.shape, weight.shape[1], len(rule.bias)) for grad in grads]

    squares = batch.grad.new_zeros(weight.shape[1], tensors)
    for piece, scratch in zip(pieces, scratches, strict=True):
        accumulate(piece, network, scratch)
        fill_inputs(piece, scratch)
        squares.add_(sum_of_squares(scratch.per_tensor))
    scale = normalizer(squares, math.prod(place.shape))
    if tensors == 1:
        weight = weight * scale.T
    for piece, scratch in zip(pieces, scratches, strict=True):
        if len(pieces) > 1:
            fill_inputs(piece, scratch)
        if tensors > 1:
            scratch.per_tensor.mul_(scale.unsqueeze(2))
        change = run_network(weight, piece.base, rule, scratch)
        if rule.weight_decay:
            change.add_(piece.param, alpha=rule.weight_decay)
        if rule.freeze_unseen:
            change.masked_fill_(piece.rms == 0, 0.0)
        if in_place:
            piece.param.add_(change, alpha=-rule.scale)
        else:
            torch.mul(change, -rule.scale, out=piece.param)
