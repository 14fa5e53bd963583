"""LoLO for PyTorch: `small_fc` as a `torch.optim.Optimizer`. The only module that imports torch; it needs no JAX.

    from lolo.torch import LoLO

    optimizer = LoLO(model.parameters(), weights="lolo-small")

The same function as `lolo.learned.small_fc`, computed features-first and in blocks that stay in cache: 16 inputs per
entry, those of the row and column moments in their own smaller spaces, normalisation folded into the first weights and
time into the first bias. Small tensors of equal shape share a block, so that many leaves cost little. Written in plain
torch operations, so that it runs on any device; its speed was measured on CPUs only.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lolo import files
from lolo import small_fc_spec as spec

# Entries per block: on a CPU the hidden activations of a block stay in cache; an accelerator wants few launches.
CPU_BLOCK = 1 << 13
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
    momentum_gain: list[float]  # 1 − decay, of three
    rms_gain: float
    factored_gain: list[float]  # of three

    def to(self, device: torch.device) -> Network:
        return Network(*(x.to(device) if isinstance(x, torch.Tensor) else x for x in self))


class Rule(NamedTuple):
    """How the parameters of one group with one step count move."""

    network: Network
    bias: torch.Tensor  # [H], the first bias with the time inputs folded in
    scale: float  # lr · λ1
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


Block = tuple[slice, slice, slice]


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


def cut_into_blocks(shape: tuple[int, int, int], limit: int) -> list[Block]:
    """Blocks of at most `limit` entries, as even as they come, whole rows first."""
    kept, rows, length = shape
    row_limit = max(1, limit // length)

    def slices(extent: int, step: int) -> list[slice]:
        step = math.ceil(extent / math.ceil(extent / max(1, step)))
        return [slice(start, min(extent, start + step)) for start in range(0, extent, step)]

    return list(itertools.product(slices(kept, row_limit // rows), slices(rows, row_limit), slices(length, limit)))


def cut(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """One block of [..., K, A, B]; axes of extent 1 are broadcast and stay."""
    extents = tensor.shape[-3:]
    return tensor[(..., *(part if extent > 1 else slice(None) for part, extent in zip(block, extents, strict=True)))]


class Workspace:
    """Buffers of one device, kept between blocks and steps: fresh memory for each block would cost more than the work."""

    def __init__(self, device: torch.device):
        self.device = device
        self.block = CPU_BLOCK if device.type == "cpu" else ACCELERATOR_BLOCK
        self.buffers: dict[str, torch.Tensor] = {}
        self.networks: dict[str, Network] = {}  # by the weights' sha256

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """Uninitialised float32 [*shape], valid until the next `take` of this name."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, device=self.device)
        return self.buffers[name][:size].view(shape)


def as_weights(weights: str | Path | files.WeightsFile | Mapping[str, Any]) -> files.WeightsFile:
    """Weights by name, path or value, of the one architecture that this module runs. Raises ValueError."""
    if isinstance(weights, files.WeightsFile):
        found = weights
    elif isinstance(weights, Mapping):
        arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in weights.items()}
        learner = {
            **{"name": "small_fc", "hidden": arrays["b0"].size if "b0" in arrays else 0},
            **{"step_mult": 1e-3, "exp_mult": 1e-3, "learn_decays": "momentum_decays" in arrays},
            **{"weight_decay": 0.0, "clock_limit": None},
        }
        found = files.WeightsFile(arrays, learner, {}, {}, files.digest(arrays))
    else:
        found = files.read_weights(weights)
    if found.learner.get("name") != "small_fc":
        raise ValueError(f"lolo.torch runs small_fc; these weights are of {found.learner.get('name')!r}.")
    files.check_meta_params(found.meta_params, found.learner, "weights")
    return found


def network_from(arrays: Mapping[str, np.ndarray]) -> Network:
    """Regroup φ for the blocks."""

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.ascontiguousarray(array, np.float32))

    def gain(decay: float | tuple[float, ...], offsets: str) -> Any:
        standard, one = np.asarray(decay, np.float32), np.float32(1)
        if offsets not in arrays:
            return (one - standard).tolist()
        shift = np.exp(np.float32(10) * arrays[offsets].reshape(standard.shape))
        return (one - np.clip(one - (one - standard) * shift, np.float32(0), one)).tolist()

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
        rms_gain=gain(spec.RMS_DECAY, "rms_decays"),
        factored_gain=gain(spec.FACTORED_DECAYS, "adafactor_decays"),
    )


def average(moment: torch.Tensor, new: torch.Tensor, gains: list[float]) -> None:
    """moment ← d·moment + (1 − d)·new for several decays. moment: [3, *shape], new: [*shape]."""
    for one, gain in zip(moment.unbind(), gains, strict=True):
        one.lerp_(new, gain)


def accumulate_factored(batch: Batch, place: Layout, network: Network, blocks: list[Block], space: Workspace) -> None:
    """Row and column moments of T tensors; below two axes the diagonal one."""
    if batch.column is None:
        for block in blocks:
            grad = cut(batch.grad, block)
            squared = torch.mul(grad, grad, out=space.take("squared", *grad.shape)).add_(spec.FACTORED_EPSILON)
            average(cut(batch.row, block), squared, network.factored_gain)
        return
    row_axis, column_axis = (-1, -2) if place.last_is_largest else (-2, -1)
    means = [(torch.zeros_like(batch.row[0]), row_axis), (torch.zeros_like(batch.column[0]), column_axis)]
    for block in blocks:
        grad = cut(batch.grad, block)
        squared = torch.mul(grad, grad, out=space.take("squared", *grad.shape))
        for mean, axis in means:
            cut(mean, block).add_(squared.sum(dim=axis, keepdim=True))
    for (mean, axis), moment in zip(means, (batch.row, batch.column), strict=True):
        mean.div_(place.shape[axis]).add_(spec.FACTORED_EPSILON)
        average(moment, mean, network.factored_gain)


def accumulate(batch: Batch, network: Network, space: Workspace) -> None:
    """Momenta and second moment of one block."""
    squared = torch.mul(batch.grad, batch.grad, out=space.take("squared", *batch.grad.shape))
    average(batch.momentum, batch.grad, network.momentum_gain)
    batch.rms.lerp_(squared, network.rms_gain)


def with_root(moment: torch.Tensor) -> torch.Tensor:
    """Moment and its inverse root. [3, ...] -> [6, ...]"""
    return torch.cat([moment, (moment + spec.MOMENT_EPSILON).rsqrt_()])


def factors(batch: Batch, last_is_largest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gradient is multiplied by along rows and along columns."""
    assert batch.column is not None
    mean = batch.row.mean(dim=-2 if last_is_largest else -1, keepdim=True).add_(spec.FACTOR_MEAN_EPSILON)
    return (
        (batch.row / mean).clamp_(min=spec.FACTOR_FLOOR).rsqrt_(),
        batch.column.clamp(min=spec.FACTOR_FLOOR).rsqrt_(),
    )


def fill_inputs(batch: Batch, factor: tuple[torch.Tensor, torch.Tensor] | None, space: Workspace) -> torch.Tensor:
    """The inputs that vary from entry to entry, not normalised, in the order of spec.ENTRY_COLUMNS.

    Returns: [16, T, K, A, B]; below two axes [22, 1, ...], the diagonal moment and its inverse root come last.
    """
    x = space.take("inputs", 16 if factor else 22, *batch.grad.shape)
    x[0].copy_(batch.grad)
    x[1].copy_(batch.param)
    x[2:5].copy_(batch.momentum)
    x[5].copy_(batch.rms)
    root = torch.add(batch.rms, spec.MOMENTUM_EPSILON, out=x[9]).rsqrt_()
    torch.mul(batch.momentum, root, out=x[6:9])
    if factor:
        product = torch.mul(*factor, out=x[10:13])
        torch.mul(batch.momentum, product, out=x[13:16])
        product.mul_(batch.grad)
    else:
        torch.add(batch.row, spec.MOMENTUM_EPSILON, out=x[13:16]).rsqrt_().mul_(batch.momentum)
        product = torch.add(batch.row, spec.FACTOR_MEAN_EPSILON, out=x[10:13]).clamp_(min=spec.FACTOR_FLOOR)
        product.rsqrt_().mul_(batch.grad)
        x[16:19].copy_(batch.row)
        torch.add(batch.row, spec.MOMENT_EPSILON, out=x[19:22]).rsqrt_()
    return x


def sum_of_squares(x: torch.Tensor) -> torch.Tensor:
    """[F, T, ...] -> [F, T]"""
    return torch.linalg.vector_norm(x.flatten(2), dim=2).square_()


def normalizer(squares: torch.Tensor, count: int) -> torch.Tensor:
    """One over the root mean square."""
    return (squares / count).add_(spec.NORMALIZE_EPSILON).rsqrt_()


def project_moment(weight: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A row or column moment and its inverse root, normalised and multiplied by their weights. -> [H, T, K, A, B]"""
    x = with_root(moment)
    flat = x.flatten(2)
    flat.mul_(normalizer(sum_of_squares(x), flat.shape[2]).unsqueeze(2))
    return (weight @ flat.flatten(1)).view(-1, *x.shape[1:])


def update(
    x: torch.Tensor, weight: torch.Tensor, base: list[torch.Tensor], rule: Rule, space: Workspace
) -> torch.Tensor:
    """d · exp(λ2·m) of one block. x: [F, T, K, A, B]; base: one or two summands of [H, T, K, A, B], broadcast."""
    network, hidden = rule.network, len(rule.bias)
    count, flat = x[0].numel(), x.flatten(1)
    first = space.take("first", hidden, *x.shape[1:])
    if len(base) == 2:
        torch.add(*base, out=first)
    else:
        first.copy_(base[0])
    first = first.view(hidden, count).addmm_(weight, flat).relu_()
    second = torch.addmm(network.second_bias, network.second, first, out=space.take("second", hidden, count)).relu_()
    direction, magnitude = torch.addmm(network.last_bias, network.last, second, out=space.take("out", 2, count))
    return magnitude.mul_(rule.exp_mult).exp_().mul_(direction).view(x.shape[1:])


def step_batch(batch: Batch, place: Layout, rule: Rule, space: Workspace, in_place: bool) -> None:
    """Update the moments of T tensors, and `batch.param`: by adding the step, or, not in place, by becoming it."""
    network, tensors = rule.network, batch.grad.shape[0]
    blocks = cut_into_blocks(place.shape, max(1, space.block // tensors))
    accumulate_factored(batch, place, network, blocks, space)
    whole_bias = rule.bias.view(-1, 1, 1, 1, 1)
    if batch.column is None:
        factor, weight, base = None, torch.cat([network.entry, network.row + network.column], dim=1), [whole_bias]
    else:
        factor, weight = factors(batch, place.last_is_largest), network.entry
        base = [project_moment(network.row, batch.row), project_moment(network.column, batch.column).add_(whole_bias)]

    def part(block: Block) -> Batch:
        return Batch(*(None if x is None else cut(x, block) for x in batch))

    def inputs(block: Block, piece: Batch) -> torch.Tensor:
        return fill_inputs(piece, factor and (cut(factor[0], block), cut(factor[1], block)), space)

    squares = batch.grad.new_zeros(weight.shape[1], tensors)
    for block in blocks:
        piece = part(block)
        accumulate(piece, network, space)
        x = inputs(block, piece)
        squares.add_(sum_of_squares(x))
    scale = normalizer(squares, math.prod(place.shape))
    if tensors == 1:
        weight = weight * scale.T
    for block in blocks:
        piece = part(block)
        if len(blocks) > 1:
            x = inputs(block, piece)
        if tensors > 1:
            x.flatten(2).mul_(scale.unsqueeze(2))
        here = [term if term is whole_bias else cut(term, block) for term in base]
        change = update(x, weight, here, rule, space)
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
            f"LoLO got a gradient of layout {grad.layout} for a parameter of shape {tuple(param.shape)}; it needs dense "
            "ones: build the embedding with sparse=False, or call grad.to_dense()."
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

    θ ← θ − lr·λ1·(d·exp(λ2·m) + weight_decay·θ), (d, m) the network's outputs for each entry (Eq. 7).

    Args:
      params: parameters, named parameters or param groups; a group may have its own `lr`, `weights`, `weight_decay`,
        `clock_limit` and `maximize`. float32, bfloat16, float16 or float64, of any rank; all of it computed in float32.
      weights: name of shipped weights, path of a weights file, a `files.WeightsFile`, or a dict of φ's arrays
        (then λ1 = λ2 = 1e-3, no decay, no limit).
      lr: the step's scale; 1 is what the weights were meta-trained with. Schedulers may change it.
      weight_decay: decoupled; None: as shipped with the weights, 0: none.
      clock_limit: the time inputs see min(t, clock_limit); None: as shipped, math.inf: no limit.
      maximize: climb instead of descend.

    State per parameter: `step`, `momentum`, `rms`, `row`, `column`, all float32 (`step` int64, on the CPU): 4 numbers
    per entry and the factored moments, 7 per entry below two axes. A tensor's moments lie as [K, A, B], A and B its two
    largest axes; `load_state_dict` brings them back bit for bit, whatever the parameters' dtype, and refuses the state
    of other weights. Parameters without a gradient are skipped, and their clock with them.

    A weight matrix [out, in] here is [in, out] in JAX. Sides of unequal length give the same update, transposed;
    for square ones the row and column moments swap roles, since the later axis counts as the larger.

    Data parallel (DDP): gradients are averaged before the step, so every process makes the same update; nothing to set.
    Sharded parameters (FSDP, DTensor) are refused: normalisation needs means over the whole tensor.
    `torch.compile` around a training step works; the optimizer's part runs as it is, uncompiled.
    Raises ValueError for weights or numbers that make no sense, TypeError for parameters it can't move, RuntimeError
    for gradients it can't use.
    """

    def __init__(
        self,
        params: Iterable[Any],
        weights: str | Path | files.WeightsFile | Mapping[str, Any] = "lolo-small",
        lr: float | torch.Tensor = 1.0,
        weight_decay: float | None = None,
        clock_limit: float | None = None,
        *,
        maximize: bool = False,
    ):
        self._networks: dict[str, Network] = {}  # by the weights' sha256
        self._spaces: dict[torch.device, Workspace] = {}
        defaults = {"lr": lr, "weights": weights, "weight_decay": weight_decay, "clock_limit": clock_limit}
        super().__init__(params, {**defaults, "maximize": maximize})

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
        if given["clock_limit"] is None:
            given["clock_limit"] = math.inf if learner.get("clock_limit") is None else learner["clock_limit"]
        for name in ("lr", "weight_decay", "clock_limit"):
            if not float(given[name]) >= 0 or (name != "clock_limit" and not math.isfinite(float(given[name]))):
                raise ValueError(f"{name}={given[name]!r}; expected a number that is not negative.")
        named = isinstance(given["weights"], str | Path)
        group |= {
            **{name: given[name] for name in ("lr", "weight_decay", "clock_limit", "maximize")},
            "weights": str(given["weights"]) if named else "given as arrays",
            "weights_sha256": weights.sha256,
            "step_mult": float(learner["step_mult"]),
            "exp_mult": float(learner["exp_mult"]),
        }
        super().add_param_group(group)
        self._networks.setdefault(weights.sha256, network_from(weights.meta_params))

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

    @torch._disable_dynamo
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
        return Rule(
            network, bias, float(group["lr"]) * group["step_mult"], group["exp_mult"], float(group["weight_decay"])
        )

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
                    f"the saved state of parameter {name!r}, shape {tuple(param.shape)}, has {found}; expected {expected}."
                )
