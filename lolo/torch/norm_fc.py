"""`norm_fc` in PyTorch: its settings in a param group, its state, and one step.

The same function as `lolo.optimizers.norm_fc`, in blocks that stay in cache: 18 inputs per entry, those of the row and
column moments in their own smaller spaces, normalisers folded into the first weights. Small matrices of equal shape
share a block, and all tensors on AdamW are worked on together.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lolo.kernels.library import CHOICES
from lolo.optimizers import factored
from lolo.optimizers import norm_fc_spec as spec
from lolo.torch import blocks, kernel, layouts
from lolo.torch.blocks import Batch, Piece, Workspace
from lolo.torch.checks import check_number
from lolo.torch.layouts import BlockLayout
from lolo.torch.rounds import Rounds, Share, Sums, WholeMatrices
from lolo.torch.sharding import State, Zeros

WIDER = 2  # a block has this many times the entries of one of small_fc: the network is narrower
STATE_DTYPES = (torch.float32, torch.bfloat16)
# Settings of a group that states saved before there were such lack.
ADDED = {"kernel": "auto", "step_rms": "one", "adam_beta2": spec.RMS_DECAY}
# Rows of a block's inputs: what is multiplied by the same thing lies side by side. Below two axes the last is absent.
ORDER = (
    *("momentum", "gradient", "scaled_momentum", "scaled_gradient", "factored_gradient"),
    *("clipped_gradient", "parameter", "second_moment", "inverse_root", "factored_momentum"),
)
ENTRY_ROWS = np.r_[tuple(spec.SLICES[name] for name in ORDER)]


class NormFcNetwork(NamedTuple):
    """φ as the blocks want it: weights transposed, rows of the first grouped by where inputs vary."""

    entry: torch.Tensor  # [H, 18], of ENTRY_ROWS
    row: torch.Tensor  # [H, 6]
    column: torch.Tensor  # [H, 6]
    first_bias: torch.Tensor  # [H]
    second: torch.Tensor  # [H, H]
    second_bias: torch.Tensor  # [H, 1]
    last: torch.Tensor  # [1, H]
    last_bias: torch.Tensor  # [1, 1]
    momentum_gain: torch.Tensor  # [3, 1, 1, 1, 1], 1 − decay
    rms_gain: float
    factored_gain: torch.Tensor  # [3, 1, 1, 1, 1]
    phi: torch.Tensor  # [H² + 33·H + 1], φ's arrays one after the other, for the kernel


class NormFcScratch(NamedTuple):
    """Views of a workspace for blocks of one shape, [T, k, a, b] with n entries."""

    momentum: torch.Tensor  # [3, T, k, a, b], this and what follows parts of the inputs
    grad: torch.Tensor
    source: torch.Tensor  # [4, ...], momentum and gradient
    scaled: torch.Tensor  # [4, ...], the same times the inverse root
    factored_gradient: torch.Tensor  # [3, ...]
    clipped: torch.Tensor
    param: torch.Tensor
    rms: torch.Tensor
    root: torch.Tensor
    factored_momentum: torch.Tensor  # [3, ...]; [0, ...] below two axes
    flat: torch.Tensor  # [18 or 15, n], the inputs
    per_tensor: torch.Tensor  # [18 or 15, T, n / T], the inputs
    baseline: torch.Tensor  # [T, k, a, b]
    squared: torch.Tensor  # [T, k, a, b]
    first: torch.Tensor  # [H, T, k, a, b]
    first_flat: torch.Tensor  # [H, n]
    second: torch.Tensor  # [H, n]
    out: torch.Tensor  # [1, n]


def default(arrays: Mapping[str, np.ndarray]) -> spec.NormFcSettings:
    """The settings that bare arrays have."""
    return spec.NormFcSettings(hidden=arrays["b0"].size if "b0" in arrays else 0)


def settings_of(learner: spec.NormFcSettings, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a param group; what is not given is as shipped. Raises ValueError."""
    adam_scale = learner.adam_scale if given["adam_scale"] is None else given["adam_scale"]
    check_number("adam_scale", adam_scale)
    adam_beta2 = learner.adam_beta2 if given["adam_beta2"] is None else given["adam_beta2"]
    check_number("adam_beta2", adam_beta2)
    is_matrix, state_dtype = given["is_matrix"], given["state_dtype"] or torch.float32
    if is_matrix not in (None, True, False):
        raise ValueError(f"is_matrix={is_matrix!r}; expected None, True or False: one answer for a whole param group.")
    if state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype={state_dtype!r}; expected torch.float32 or torch.bfloat16.")
    step_rms = learner.step_rms if given["step_rms"] is None else given["step_rms"]
    spec.one_of(spec.STEP_RMS, step_rms, "step_rms")
    kind = {"orthogonal": learner.orthogonal, "baseline": learner.baseline, "step_rms": step_rms}
    kind["kernel"] = "auto" if given["kernel"] is None else spec.one_of(CHOICES, given["kernel"], "kernel")
    numbers = {"adam_scale": adam_scale, "adam_beta2": spec.adam_beta2(adam_beta2, "adam_beta2")}
    return {**numbers, "is_matrix": is_matrix, "state_dtype": state_dtype, **kind}


def is_learned(param: torch.Tensor, is_matrix: bool | None) -> bool:
    """Whether the network moves a tensor; otherwise AdamW does."""
    return param.ndim > 1 if is_matrix is None else is_matrix


@functools.lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...]) -> BlockLayout:
    """Ties between axes are broken by their names: [out, in, *window] is [*window, in, out] in JAX."""
    inputs_first = (*range(2, len(shape)), 1, 0) if len(shape) > 1 else None
    return layouts.layout(shape, factored.factored_axes(shape, inputs_first))


def zeros(param: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Zeros]:
    """What is kept for a parameter beside its step count."""
    shape, dtype = tuple(param.shape), group["state_dtype"]
    if is_learned(param, group["is_matrix"]):
        return layouts.zeros(layout(shape), dtype)
    axis = 0 if shape else None
    return {"momentum": Zeros(shape, dtype, axis), "rms": Zeros(shape, torch.float32, axis)}


def network_from(arrays: Mapping[str, np.ndarray]) -> NormFcNetwork:
    """Regroup φ for the blocks."""

    def gain(decays: tuple[float, ...]) -> torch.Tensor:
        return blocks.as_tensor(1 - np.array(decays).reshape(-1, 1, 1, 1, 1))

    w0 = arrays["w0"]
    flat = (w0, arrays["b0"], arrays["w1"], arrays["b1"], arrays["w2"][:, 0], arrays["b2"][:1])
    return NormFcNetwork(
        entry=blocks.as_tensor(w0[ENTRY_ROWS].T),
        row=blocks.as_tensor(w0[spec.ROW_ROWS].T),
        column=blocks.as_tensor(w0[spec.COLUMN_ROWS].T),
        first_bias=blocks.as_tensor(arrays["b0"]),
        second=blocks.as_tensor(arrays["w1"].T),
        second_bias=blocks.as_tensor(arrays["b1"][:, None]),
        last=blocks.as_tensor(arrays["w2"].T),
        last_bias=blocks.as_tensor(arrays["b2"][:, None]),
        momentum_gain=gain(spec.MOMENTUM_DECAYS),
        rms_gain=1 - spec.RMS_DECAY,
        factored_gain=gain(spec.FACTORED_DECAYS),
        phi=blocks.as_tensor(np.concatenate([np.ravel(x) for x in flat])),
    )


def step(
    params: list[torch.Tensor],
    state: State,
    group: Mapping[str, Any],
    network: NormFcNetwork,
    space: Workspace,
    shares: Mapping[torch.Tensor, Share],
) -> Iterator[Rounds]:
    """One step of parameters of one group and device, all with a gradient and entries. shares: of those cut."""
    spec.one_of(spec.STEP_RMS, group["step_rms"], "step_rms")
    for param in params:
        if is_learned(param, group["is_matrix"]) != ("row" in state[param]):
            raise ValueError(
                f"is_matrix={group['is_matrix']!r} is another one than when the state of a parameter of shape "
                f"{tuple(param.shape)} was made: set it when the group is made, and leave it."
            )
    form = kernel.form(group, space)
    # The kernel finishes a tensor in one call, and of one that is cut the sums are not here.
    whole = [] if form is None else [param for param in params if param not in shares]
    served = [param for param in whole if kernel.serves(param, state, zeros(param, group))]
    if form is not None and served:
        places = [layout(tuple(x.shape)) if is_learned(x, group["is_matrix"]) else None for x in served]
        arguments = list(zip(served, places, strict=True))
        kernel.step(form, arguments, state, group, network.phi, space, orthogonalized)
        done = set(map(id, served))
        params = [param for param in params if id(param) not in done]
    alike = defaultdict[tuple[tuple[int, ...], Share | None], list[torch.Tensor]](list)
    others: list[torch.Tensor] = []
    for param in params:
        learned = is_learned(param, group["is_matrix"])
        members = alike[tuple(param.shape), shares.get(param)] if learned else others
        members.append(param)
    read = reader_of(group)
    for (_, share), members in alike.items():
        place = layouts.part(layout, members[0], share)
        for some in blocks.batches(members, place, WIDER * space.block):
            batch = blocks.gather(some, state, place, read)
            yield step_batch(batch, some, state, place, group, network, space)
    if others:
        adam_step(others, state, group)


def reader_of(group: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    return blocks.reader(spec.LARGEST_GRADIENT, math.nan, group["maximize"])


def step_batch(
    batch: Batch,
    params: list[torch.Tensor],
    state: State,
    place: BlockLayout,
    group: Mapping[str, Any],
    network: NormFcNetwork,
    space: Workspace,
) -> Rounds:
    """Move T tensors, and update their moments."""
    in_place = blocks.in_place(batch, params)
    change = yield from directions(batch, place, network, group["baseline"] == "momentum", space)
    if group["orthogonal"] and place.factored:
        if place.cut is None:
            change = orthogonalized(change, place, tuple(params[0].shape))
        else:
            rows = matrices(change, place, tuple(params[0].shape))
            (rows,) = yield WholeMatrices(rows, place.cut.share, newton_schulz)
            change = arranged(rows, place, tuple(params[0].shape))
    change = change.mul_(batch.rms > 0)  # NaN stays NaN
    sums = [blocks.sum_of_squares(change.flatten(1).unsqueeze(0))]
    if group["step_rms"] == "adam":
        sums.append(blocks.sum_of_squares(adam_steps(batch, params, state).flatten(1).unsqueeze(0)))
    squares, *of_adam = yield from blocks.total(sums, place)
    scale = blocks.normalizer(squares, math.prod(place.whole), spec.NORMALIZE_EPSILON)
    for adam_squares in of_adam:
        scale.mul_((adam_squares / math.prod(place.whole)).sqrt_())
    change.mul_(scale.view(-1, 1, 1, 1))
    rate, decay = float(group["lr"]), float(group["weight_decay"])
    if decay:
        change.add_(batch.param, alpha=decay)
    if in_place:
        batch.param.add_(change, alpha=-rate)
    else:
        torch.mul(change, -rate, out=batch.param)
    blocks.scatter(batch, params, state, place)


def directions(
    batch: Batch, place: BlockLayout, network: NormFcNetwork, baseline: bool, space: Workspace
) -> Generator[Sums, list[torch.Tensor], torch.Tensor]:
    """What the network says of T tensors, and the momentum that it corrects. Updates their moments. -> [T, K, A, B]"""
    tensors, entries = batch.grad.shape[0], math.prod(place.whole)
    pieces = yield from blocks.pieces_of(batch, place, network, WIDER * space.block)
    weight = network.entry if place.factored else network.entry[:, : spec.DIAGONAL_INPUTS]
    scratches = [space.scratch(views, piece.grad.shape, weight.shape[1], len(weight)) for piece in pieces]
    squares = batch.grad.new_zeros(weight.shape[1] + 1, tensors)  # the last: of the baseline
    for piece, scratch in zip(pieces, scratches, strict=True):
        blocks.accumulate(piece, network, scratch.squared)
        fill_inputs(piece, scratch)
        squares[:-1].add_(blocks.sum_of_squares(scratch.per_tensor))
        if baseline:
            fill_baseline(scratch)
            squares[-1:].add_(blocks.sum_of_squares(scratch.baseline.flatten(1).unsqueeze(0)))
    squares, base = yield from blocks.first_layer(
        squares, batch, place, network, network.first_bias, spec.NORMALIZE_EPSILON
    )
    scale = blocks.normalizer(squares[:-1], entries, spec.NORMALIZE_EPSILON)
    size = blocks.normalizer(squares[-1:], entries, spec.BASELINE_EPSILON).view(-1, 1, 1, 1)
    if tensors == 1:
        weight = weight * scale.T
    found = torch.empty_like(batch.grad, memory_format=torch.contiguous_format)
    again = len(pieces) > 1 or place.cut is not None  # the scratch holds another block
    parts = layouts.split(found, place.shape, tuple(pieces[0].grad.shape[1:]) if pieces else place.shape)
    bases = blocks.bases_of(base, place, pieces)
    for piece, scratch, part, summands in zip(pieces, scratches, parts, bases, strict=True):
        if again:
            fill_inputs(piece, scratch)
        if baseline:
            if again:
                fill_baseline(scratch)
            torch.mul(scratch.baseline, size, out=part)
        else:
            part.zero_()
        if tensors > 1:
            scratch.per_tensor.mul_(scale.unsqueeze(2))
        part.add_(run_network(weight, summands, network, scratch))
    return found


def views(space: Workspace, shape: torch.Size, count: int, hidden: int) -> NormFcScratch:
    """Views for blocks of this shape, `count` inputs and a network of this width."""
    x, first = space.take("inputs", count, *shape), space.take("first", hidden, *shape)
    baseline, squared = space.take("baseline", *shape), space.take("squared", *shape)
    return NormFcScratch(
        *(x[0:3], x[3], x[0:4], x[4:8], x[8:11], x[11], x[12], x[13], x[14], x[15:18], x.flatten(1), x.flatten(2)),
        *(baseline, squared, first, first.flatten(1)),
        *(space.take("second", hidden, shape.numel()), space.take("out", 1, shape.numel())),
    )


def fill_inputs(piece: Piece, scratch: NormFcScratch) -> None:
    """The inputs that vary from entry to entry, not normalised."""
    scratch.momentum.copy_(piece.momentum)
    scratch.grad.copy_(piece.grad)
    scratch.param.copy_(piece.param)
    scratch.rms.copy_(piece.rms)
    torch.clamp(piece.grad, -spec.GRADIENT_CLIP, spec.GRADIENT_CLIP, out=scratch.clipped)
    torch.add(piece.rms, factored.MOMENT_EPSILON, out=scratch.root).rsqrt_()
    torch.mul(scratch.source, scratch.root, out=scratch.scaled)
    if piece.column is not None:
        torch.mul(piece.row, piece.column, out=scratch.factored_gradient)
        torch.mul(scratch.momentum, scratch.factored_gradient, out=scratch.factored_momentum)
    else:
        torch.add(piece.row, factored.FACTOR_MEAN_EPSILON, out=scratch.factored_gradient)
        scratch.factored_gradient.clamp_(min=factored.FACTOR_FLOOR).rsqrt_()
    scratch.factored_gradient.mul_(scratch.grad)


def fill_baseline(scratch: NormFcScratch) -> None:
    """Nesterov momentum, from the inputs."""
    torch.lerp(scratch.momentum[0], scratch.grad, 1 - spec.MOMENTUM_DECAYS[0], out=scratch.baseline)


def run_network(
    weight: torch.Tensor, base: tuple[torch.Tensor, ...], network: NormFcNetwork, scratch: NormFcScratch
) -> torch.Tensor:
    """The network's output for the block whose inputs lie in the scratch, [T, k, a, b]. base: one or two summands."""
    second = blocks.second_layer(weight, base, network, scratch)
    return torch.addmm(network.last_bias, network.last, second, out=scratch.out).view(scratch.grad.shape)


def orthogonalized(x: torch.Tensor, place: BlockLayout, shape: tuple[int, ...]) -> torch.Tensor:
    """Newton-Schulz on the matrices [output axis, all others] of T tensors. x, and the result: [T, K, A, B]."""
    return arranged(newton_schulz(matrices(x, place, shape)), place, shape)


def matrices(x: torch.Tensor, place: BlockLayout, shape: tuple[int, ...]) -> torch.Tensor:
    """[T, K, A, B] of tensors of this shape -> [T, output axis, all others]"""
    inverse = sorted(range(len(shape)), key=place.order.__getitem__)
    whole = x.view(len(x), *(shape[axis] for axis in place.order)).permute(0, *(axis + 1 for axis in inverse))
    return whole.reshape(len(x), shape[0], math.prod(shape[1:]))


def arranged(x: torch.Tensor, place: BlockLayout, shape: tuple[int, ...]) -> torch.Tensor:
    """[T, output axis, all others] -> [T, K, A, B]"""
    return x.reshape(len(x), *shape).permute(0, *(axis + 1 for axis in place.order)).reshape(len(x), *place.shape)


def newton_schulz(x: torch.Tensor) -> torch.Tensor:
    """Five iterations that bring all singular values near 1. [T, m, n] -> [T, m, n]"""
    a, b, c = spec.NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + spec.NEWTON_SCHULZ_EPSILON)
    for _ in range(spec.NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def adam_steps(batch: Batch, params: list[torch.Tensor], state: State) -> torch.Tensor:
    """AdamW's step of T tensors, from their moments after the gradient, whose count is not yet in. -> [T, K, A, B]"""
    counts = [state[param]["step"] + 1 for param in params]
    first, second = adam_corrections(counts, (spec.MOMENTUM_DECAYS[0], spec.RMS_DECAY), 1.0)
    roots = batch.rms.sqrt().div_(along_tensors(second, batch)).add_(spec.ADAM_EPSILON)
    return torch.div(batch.momentum[0], roots, out=roots).mul_(along_tensors(first, batch))


def along_tensors(numbers: list[Any], batch: Batch) -> torch.Tensor:
    """One number of each tensor -> [T, 1, 1, 1]"""
    if not isinstance(numbers[0], torch.Tensor):
        return batch.rms.new_tensor(numbers).view(-1, 1, 1, 1)
    return torch.stack(numbers).to(batch.rms.device).view(-1, 1, 1, 1)


def adam_step(params: list[torch.Tensor], state: State, group: Mapping[str, Any]) -> None:
    """AdamW's step (.9, adam_beta2, 1e-8) of tensors of any shape, each with its own step count."""
    decays, read = (spec.MOMENTUM_DECAYS[0], float(group["adam_beta2"])), reader_of(group)
    grads = [read(blocks.as_float32(param.grad)) for param in params]
    states = [state[param] for param in params]
    kept, squares = ([own[name] for own in states] for name in ("momentum", "rms"))
    means = [mean.float() for mean in kept]
    torch._foreach_lerp_(means, grads, 1 - decays[0])
    torch._foreach_mul_(squares, decays[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - decays[1])
    if group["state_dtype"] != torch.float32:
        torch._foreach_copy_(kept, means)
    for own in states:
        own["step"] += 1
    first, second = adam_corrections([own["step"] for own in states], decays, float(group["adam_scale"]))
    roots = torch._foreach_sqrt(squares)
    torch._foreach_div_(roots, second)
    torch._foreach_add_(roots, spec.ADAM_EPSILON)
    changes = torch._foreach_div(means, roots)
    torch._foreach_mul_(changes, first)
    decay = float(group["weight_decay"])
    for param, change in zip(params, changes, strict=True):
        param.add_(change.add_(param.float(), alpha=decay) if decay else change, alpha=-float(group["lr"]))


def adam_corrections(
    steps: list[torch.Tensor], decays: tuple[float, float], scale: float
) -> tuple[list[Any], list[Any]]:
    """What means are multiplied by and roots divided by; of counts on a GPU they are computed there."""
    if all(step.is_cpu for step in steps):
        counts = [int(step) for step in steps]
        return [scale / (1 - decays[0] ** n) for n in counts], [math.sqrt(1 - decays[1] ** n) for n in counts]
    on_device = torch.stack(steps).double()
    first, second = scale / (1 - decays[0] ** on_device), (1 - decays[1] ** on_device).sqrt()
    return list(first.float().unbind()), list(second.float().unbind())
