"""LoLO for PyTorch: `small_fc` as a `torch.optim.Optimizer`. The only module that imports torch; it needs no JAX.

    from lolo.torch import LoLO

    optimizer = LoLO(model.parameters())

The same function as `lolo.learned.small_fc`, computed features-first and in blocks that stay in cache: 16 inputs per
entry, those of the row and column moments in their own smaller spaces, normalisation folded into the first weights and
time into the first bias. Small tensors of equal shape share a block, so that many leaves cost little. Written in plain
torch operations, which any device has, and tuned for CPUs (docs/performance.md has a GPU's times).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lolo.files.tensors import digest
from lolo.optimizers import small_fc_spec as spec
from lolo.optimizers import weights_file

# Entries per block: on a CPU the hidden activations of a block stay in cache; an accelerator wants few launches.
CPU_BLOCK = 1 << 14
ACCELERATOR_BLOCK = 1 << 18
SMALLEST_ROW = 16  # a matrix with shorter rows is worked on transposed: inner loops of a few entries are slow
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARDED = {"DTensor", "FlatParameter", "ShardedTensor"}


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


class Layout(NamedTuple):
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
def layout(shape: tuple[int, ...]) -> Layout:
    """Where the factored axes go: last, the largest at the very end. Matrices with long rows stay as they are."""
    axes = spec.factored_axes(shape)
    if axes is None:
        return Layout((), (1, 1, math.prod(shape)), factored=False, last_is_largest=True)
    last, other = axes.largest, axes.second
    if len(shape) == 2 and shape[1] >= SMALLEST_ROW:
        last, other = 1, 0
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    extents = (math.prod(shape[axis] for axis in kept), shape[other], shape[last])
    return Layout((*kept, other, last), extents, factored=True, last_is_largest=last == axes.largest)


def arrange(tensor: torch.Tensor, place: Layout) -> torch.Tensor:
    """[*shape] -> [K, A, B], a view where strides allow."""
    return (tensor.permute(place.order) if place.factored else tensor).reshape(place.shape)


def restore(tensor: torch.Tensor, place: Layout, shape: torch.Size) -> torch.Tensor:
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
            self.buffers[name] = torch.empty(size, device=self.device)
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
        learner = {
            **{"name": "small_fc", "hidden": arrays["b0"].size if "b0" in arrays else 0},
            **{"step_mult": 1e-3, "exp_mult": 1e-3, "learn_decays": "momentum_decays" in arrays},
            **{"weight_decay": 0.0, "clock_limit": None, "step_decay": None},
        }
        found = weights_file.WeightsFile(arrays, learner, {}, {}, digest(arrays))
    else:
        found = weights_file.read_weights(weights)
    if found.learner.get("name") != "small_fc":
        raise ValueError(f"lolo.torch runs small_fc; these weights are of {found.learner.get('name')!r}.")
    weights_file.check_meta_params(found.meta_params, found.learner, "weights")
    return found


def network_from(arrays: Mapping[str, np.ndarray]) -> Network:
    """Regroup φ for the blocks."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(array, np.float32))

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


def accumulate_factored(batch: Batch, place: Layout, network: Network, blocks: list[torch.Tensor]) -> None:
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


def factors(batch: Batch, place: Layout) -> tuple[torch.Tensor, torch.Tensor]:
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


def step_batch(batch: Batch, place: Layout, rule: Rule, space: Workspace, in_place: bool) -> None:
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
        if in_place:
            piece.param.add_(change, alpha=-rule.scale)
        else:
            torch.mul(change, -rule.scale, out=piece.param)


def check_parameter(param: Any) -> None:
    """Raise TypeError for what LoLO can't move. What is no tensor at all is torch's to refuse."""
    if not isinstance(param, torch.Tensor):
        return
    if any(kind.__name__ in SHARDED for kind in type(param).__mro__) or getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"LoLO got a sharded parameter ({type(param).__name__}, FSDP or tensor parallel): its normalisation needs "
            "means over the whole tensor. Use DistributedDataParallel, or keep these parameters unsharded."
        )
    if param.dtype not in DTYPES:
        cure = " Optimize torch.view_as_real of it." if param.is_complex() else ""
        raise TypeError(f"LoLO got a parameter of {param.dtype}; it moves {', '.join(map(str, DTYPES))}.{cure}")
    if param.layout != torch.strided:
        raise TypeError(f"LoLO got a parameter of layout {param.layout}; it needs dense ones.")


def check_gradient(param: torch.Tensor) -> None:
    """Raise RuntimeError for gradients that are not plain dense tensors."""
    grad = param.grad
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"LoLO got a gradient of layout {grad.layout} for a parameter of shape {tuple(param.shape)}; it needs "
            "dense ones: build the embedding with sparse=False, or call grad.to_dense()."
        )
    if any(kind.__name__ in SHARDED for kind in type(grad).__mro__):
        raise RuntimeError("LoLO got a sharded gradient: its normalisation needs means over the whole tensor.")


def state_shapes(place: Layout) -> dict[str, tuple[int, ...]]:
    """The moments kept for one tensor, [3, K, A, B] and smaller."""
    kept, other, last = place.shape
    momentum, over_last, over_other = (3, kept, other, last), (3, kept, other, 1), (3, kept, 1, last)
    if not place.factored:
        return {"momentum": momentum, "rms": place.shape, "row": momentum}
    row, column = (over_last, over_other) if place.last_is_largest else (over_other, over_last)
    return {"momentum": momentum, "rms": place.shape, "row": row, "column": column}


class LoLO(torch.optim.Optimizer):
    """The learned optimizer in place of `torch.optim.AdamW`, with no hyper-parameter to tune.

        optimizer = LoLO(model.parameters())

    θ ← θ − lr·λ1/√(1 + t/step_decay)·(d·exp(λ2·m) + weight_decay·θ), (d, m) the network's outputs for an entry (Eq. 7).

    Args:
      params: parameters, named parameters or param groups; a group may have its own `lr`, `weights`, `weight_decay`,
        `clock_limit`, `step_decay` and `maximize`. float32, bfloat16, float16 or float64, of any rank; all of it
        computed in float32.
      weights: name of shipped weights, path of a weights file, a `files.WeightsFile`, or a dict of φ's arrays
        (then λ1 = λ2 = 1e-3, no weight decay, no limit, no step decay).
      lr: the step's scale; 1 is as shipped with the weights. Schedulers may change it.
      weight_decay: decoupled; None: as shipped with the weights, 0: none.
      clock_limit: the time inputs see min(t, clock_limit); None: as shipped, math.inf: no limit.
      step_decay: steps after which updates have shrunk by √2; None: as shipped, math.inf: they don't shrink.
      maximize: climb instead of descend.

    State per parameter: `step`, `momentum`, `rms`, `row`, `column`, all float32 (`step` int64, on the CPU): 4 numbers
    per entry and the factored moments, 7 per entry below two axes. A tensor's moments lie as [K, A, B], A and B its two
    largest axes; `load_state_dict` brings them back bit for bit, whatever the parameters' dtype, and refuses the state
    of other weights. Parameters without a gradient are skipped, and their clock with them.

    A weight matrix [out, in] here is [in, out] in JAX. Sides of unequal length give the same update, transposed;
    for square ones the row and column moments swap roles, since the later axis counts as the larger.

    Data parallel (DDP): gradients are averaged before the step, so every process makes the same update; nothing to set.
    Sharded parameters (FSDP, DTensor) are refused: normalisation needs means over the whole tensor.
    `torch.compile` around a training step works; the optimizer's part runs as it is, uncompiled (a graph break, so
    not under fullgraph=True).
    Raises ValueError for weights or numbers that make no sense, TypeError for parameters it can't move, RuntimeError
    for gradients it can't use.
    """

    def __init__(
        self,
        params: Iterable[Any],
        weights: str | Path | weights_file.WeightsFile | Mapping[str, Any] = weights_file.DEFAULT_WEIGHTS,
        lr: float | torch.Tensor = 1.0,
        weight_decay: float | None = None,
        clock_limit: float | None = None,
        step_decay: float | None = None,
        *,
        maximize: bool = False,
    ):
        self._networks: dict[str, Network] = {}  # by the weights' sha256
        self._spaces: dict[torch.device, Workspace] = {}
        of_use = {"weight_decay": weight_decay, "clock_limit": clock_limit, "step_decay": step_decay}
        super().__init__(params, {"lr": lr, "weights": weights, **of_use, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where given. See `torch.optim.Optimizer.add_param_group`."""
        group = dict(param_group)
        if not isinstance(group["params"], torch.Tensor | set):
            group["params"] = list(group["params"])
        for param in [group["params"]] if isinstance(group["params"], torch.Tensor) else group["params"]:
            check_parameter(param[1] if isinstance(param, tuple) else param)
        given = {**self.defaults, **group}
        weights = as_weights(given["weights"])
        learner = weights.learner
        if given["weight_decay"] is None:
            given["weight_decay"] = learner["weight_decay"]
        for name in ("clock_limit", "step_decay"):
            if given[name] is None:
                given[name] = math.inf if learner.get(name) is None else learner[name]
        for name in ("lr", "weight_decay", "clock_limit", "step_decay"):
            finite = math.isfinite(float(given[name])) or name in ("clock_limit", "step_decay")
            if not float(given[name]) >= 0 or not finite:
                raise ValueError(f"{name}={given[name]!r}; expected a number that is not negative.")
        if not given["step_decay"]:
            raise ValueError(f"step_decay={given['step_decay']!r}; expected a positive number of steps.")
        named = isinstance(given["weights"], str | Path)
        group |= {
            **{name: given[name] for name in ("lr", "weight_decay", "clock_limit", "step_decay", "maximize")},
            "weights": str(given["weights"]) if named else "given as arrays",
            "weights_sha256": weights.sha256,
            "step_mult": float(learner["step_mult"]),
            "exp_mult": float(learner["exp_mult"]),
        }
        super().add_param_group(group)
        self._networks.setdefault(weights.sha256, network_from(weights.meta_params))

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient. Returns: the closure's loss, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        alike = defaultdict(list)
        for param in group["params"]:
            if param.grad is not None and param.numel():
                check_gradient(param)
                state = self.state[param] or self._begin(param)
                alike[param.device, layout(tuple(param.shape)), int(state["step"])].append(param)
        rules: dict[tuple[torch.device, int], Rule] = {}
        for (device, place, step), params in alike.items():
            if (device, step) not in rules:
                rules[device, step] = self._rule(group, device, step)
            space = self._spaces[device]
            size = math.prod(place.shape)
            together = max(1, space.block // size) if size <= space.block // 4 else 1
            for start in range(0, len(params), together):
                self._step_alike(params[start : start + together], place, rules[device, step], space, group["maximize"])

    def _begin(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        """Zero moments, and a clock that counts this parameter's steps."""
        shapes = state_shapes(layout(tuple(param.shape)))
        self.state[param] = {
            "step": torch.zeros((), dtype=torch.int64),
            **{name: torch.zeros(shape, device=param.device) for name, shape in shapes.items()},
        }
        return self.state[param]

    def _rule(self, group: dict[str, Any], device: torch.device, step: int) -> Rule:
        space = self._spaces.setdefault(device, Workspace(device))
        sha256 = group["weights_sha256"]
        if sha256 not in space.networks:
            space.networks[sha256] = self._networks[sha256].to(device)
        network = space.networks[sha256]
        clock = float(min(step, group["clock_limit"]))
        bias = network.first_bias + network.time @ torch.tanh(clock / network.timescales - 1)
        scale = float(group["lr"]) * group["step_mult"] / math.sqrt(1 + step / group["step_decay"])
        return Rule(network, bias, scale, group["exp_mult"], float(group["weight_decay"]))

    def _step_alike(
        self, params: list[torch.Tensor], place: Layout, rule: Rule, space: Workspace, maximize: bool
    ) -> None:
        """One step of T tensors of one layout, dtype apart; alone in its batch a tensor is worked on where it lies."""
        states = [self.state[param] for param in params]
        grads = [arrange(param.grad, place).float() for param in params]
        values = [arrange(param, place).float() for param in params]
        moments = {name: [state[name] for state in states] for name in state_shapes(place)}
        if len(params) == 1:
            grad, value = grads[0].unsqueeze(0), values[0].unsqueeze(0)
            together = {name: moment[0].unsqueeze(-4) for name, moment in moments.items()}
        else:
            grad, value = torch.stack(grads), torch.stack(values)
            together = {name: torch.stack(moment, dim=-4) for name, moment in moments.items()}
        batch = Batch(
            -grad if maximize else grad,
            value,
            *(together.get(name) for name in ("momentum", "rms", "row", "column")),
        )
        in_place = value.data_ptr() == params[0].data_ptr()
        step_batch(batch, place, rule, space, in_place)
        if not in_place:
            for param, change in zip(params, value, strict=True):
                param.add_(restore(change, place, param.shape))
        if len(params) > 1:
            for name, moment in together.items():
                torch._foreach_copy_(moments[name], moment.unbind(-4))
        for state in states:
            state["step"] += 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also of states saved before there was a step_decay."""
        super().__setstate__(state)
        self.defaults.setdefault("step_decay", None)
        for group in self.param_groups:
            group.setdefault("step_decay", math.inf)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_networks": self._networks, "_spaces": {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state exactly. Raises ValueError for the state of other weights, parameters or optimizers.

        torch casts a state to its parameter's dtype, which for bfloat16 loses most of it: here it stays float32.
        """
        loaded: dict[str, Any] = {}

        def before(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:  # comes after the user's own hooks
            self._check_state_dict(given)
            loaded.update(given)

        def after(_: torch.optim.Optimizer) -> None:  # comes before the user's own hooks
            for name, param in self._named_by(loaded):
                state = loaded["state"].get(name)
                if state:
                    self.state[param] = {
                        key: value.detach().clone().to(torch.int64)
                        if key == "step"
                        else value.detach().clone().to(param.device, torch.float32)
                        for key, value in state.items()
                    }

        handles = [
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _named_by(self, state_dict: dict[str, Any]) -> Iterator[tuple[Any, torch.Tensor]]:
        """The parameters beside the names that a state dict has for them."""
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            yield from zip(saved["params"], group["params"], strict=False)

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        for index, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups, strict=False)):
            if "weights_sha256" not in saved:
                raise ValueError("this state is of another optimizer: its param groups name no weights of LoLO.")
            if saved["weights_sha256"] != group["weights_sha256"]:
                raise ValueError(
                    f"param group {index} was saved with the weights {saved['weights']!r} (sha256 "
                    f"{saved['weights_sha256'][:12]}…), this optimizer has {group['weights']!r} "
                    f"({group['weights_sha256'][:12]}…). Build it with LoLO(params, weights=...) of the saved ones."
                )
        for name, param in self._named_by(state_dict):
            state = state_dict["state"].get(name)
            if not state:
                continue
            expected = {"step": (), **state_shapes(layout(tuple(param.shape)))}
            found = {key: tuple(getattr(value, "shape", ("no tensor",))) for key, value in state.items()}
            if found != expected:
                raise ValueError(
                    f"the saved state of parameter {name!r} of shape {tuple(param.shape)} has {found}; "
                    f"expected {expected}."
                )
