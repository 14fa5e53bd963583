"""`small_fc` in PyTorch: its settings in a param group, its state, and one step.

The same function as `lolo.small_fc`, computed features-first and in blocks that stay in cache: 16 inputs per entry,
those of the row and column moments in their own smaller spaces, normalisation folded into the first weights and time
into the first bias. Small tensors of equal shape share a block, so that many leaves cost little.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from lolo.optimizers import factored
from lolo.optimizers import small_fc_spec as spec
from lolo.torch import blocks, layouts
from lolo.torch.blocks import Batch, Workspace
from lolo.torch.checks import check_number
from lolo.torch.layouts import BlockLayout
from lolo.torch.rounds import Rounds, Share
from lolo.torch.sharding import State, Zeros

ADDED: Mapping[str, Any] = {"step_decay": math.inf, "freeze_unseen": False}  # settings that older states lack


class SmallFcNetwork(NamedTuple):
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


class Rule(NamedTuple):
    """How the parameters of one group with one step count move."""

    network: SmallFcNetwork
    bias: torch.Tensor  # [H], the first bias with the time inputs folded in
    scale: float  # lr · λ1 / √(1 + t/step_decay)
    exp_mult: float  # λ2
    weight_decay: float
    freeze_unseen: bool


class SmallFcScratch(NamedTuple):
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


def default(arrays: Mapping[str, np.ndarray]) -> spec.SmallFcSettings:
    """The settings that bare arrays have."""
    hidden = arrays["b0"].size if "b0" in arrays else 0
    return spec.SmallFcSettings(hidden=hidden, learn_decays="momentum_decays" in arrays)


def settings_of(learner: spec.SmallFcSettings, given: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a param group; what is not given is as shipped. Raises ValueError."""
    limits: dict[str, Any] = {}
    for name in ("clock_limit", "step_decay"):
        shipped = getattr(learner, name)
        limits[name] = (math.inf if shipped is None else shipped) if given[name] is None else given[name]
        check_number(name, limits[name], endless=True)
    if not limits["step_decay"]:
        raise ValueError(f"step_decay={limits['step_decay']!r}; expected a positive number of steps.")
    multiples = {"step_mult": float(learner.step_mult), "exp_mult": float(learner.exp_mult)}
    return {**limits, "freeze_unseen": given["freeze_unseen"], **multiples}


@functools.lru_cache(maxsize=4096)
def layout(shape: tuple[int, ...]) -> BlockLayout:
    return layouts.layout(shape, factored.factored_axes(shape))


def zeros(param: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Zeros]:
    """What is kept for a parameter beside its step count."""
    return layouts.zeros(layout(tuple(param.shape)))


def step(
    params: list[torch.Tensor],
    state: State,
    group: Mapping[str, Any],
    network: SmallFcNetwork,
    space: Workspace,
    shares: Mapping[torch.Tensor, Share],
) -> Iterator[Rounds]:
    """One step of parameters of one group and device, all with a gradient and entries. shares: of those cut."""
    alike = defaultdict(list)
    for param in params:
        place = layouts.part(layout, param, shares.get(param))
        alike[place, int(state[param]["step"])].append(param)
    rules: dict[int, Rule] = {}
    read = blocks.reader(spec.LARGEST_GRADIENT, math.inf, group["maximize"])
    for (place, count), members in alike.items():
        if count not in rules:
            rules[count] = rule_at(count, group, network)
        for some in blocks.batches(members, place, space.block):
            batch = blocks.gather(some, state, place, read)
            yield step_batch(batch, some, state, place, rules[count], space)


def rule_at(count: int, group: Mapping[str, Any], network: SmallFcNetwork) -> Rule:
    """How the parameters move that have made `count` steps."""
    clock = float(min(count, group["clock_limit"]))
    bias = network.first_bias + network.time @ torch.tanh(clock / network.timescales - 1)
    scale = float(group["lr"]) * group["step_mult"] / math.sqrt(1 + count / group["step_decay"])
    return Rule(network, bias, scale, group["exp_mult"], float(group["weight_decay"]), group["freeze_unseen"])


def network_from(arrays: Mapping[str, np.ndarray]) -> SmallFcNetwork:
    """Regroup φ for the blocks."""

    def gain(decay: float | tuple[float, ...], offsets: str) -> torch.Tensor:
        standard, one = np.asarray(decay, np.float32).reshape(-1, 1, 1, 1, 1), np.float32(1)
        shift = np.exp(np.float32(10) * arrays[offsets].reshape(standard.shape)) if offsets in arrays else one
        return blocks.as_tensor(one - np.clip(one - (one - standard) * shift, np.float32(0), one))

    w0 = arrays["w0"]
    return SmallFcNetwork(
        entry=blocks.as_tensor(w0[spec.ENTRY_COLUMNS].T),
        row=blocks.as_tensor(w0[spec.ROW_COLUMNS].T),
        column=blocks.as_tensor(w0[spec.COLUMN_COLUMNS].T),
        time=blocks.as_tensor(w0[spec.TIME_COLUMNS].T),
        timescales=blocks.as_tensor(np.array(spec.TIMESCALES)),
        first_bias=blocks.as_tensor(arrays["b0"]),
        second=blocks.as_tensor(arrays["w1"].T),
        second_bias=blocks.as_tensor(arrays["b1"][:, None]),
        last=blocks.as_tensor(arrays["w2"].T),
        last_bias=blocks.as_tensor(arrays["b2"][:, None]),
        momentum_gain=gain(spec.MOMENTUM_DECAYS, "momentum_decays"),
        rms_gain=gain(spec.RMS_DECAY, "rms_decays").item(),
        factored_gain=gain(spec.FACTORED_DECAYS, "adafactor_decays"),
    )


def views(space: Workspace, shape: torch.Size, count: int, hidden: int) -> SmallFcScratch:
    """Views for blocks of this shape, `count` inputs and a network of this width."""
    entries = shape.numel()
    x = space.take("inputs", count, *shape)
    first = space.take("first", hidden, *shape)
    second, out = space.take("second", hidden, entries), space.take("out", 2, entries)
    return SmallFcScratch(
        *(x, x[0], x[1], x[2:5], x[5], x[6:9], x[9], x[10:13], x[13:16], x[16:19], x[19:22]),
        *(x.flatten(2), x.flatten(1), space.take("squared", *shape)),
        *(first, first.flatten(1), second, out, out[0].view(shape), out[1].view(shape)),
    )


def fill_inputs(piece: blocks.Piece, scratch: SmallFcScratch) -> None:
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
        torch.add(piece.row, factored.FACTOR_MEAN_EPSILON, out=scratch.factored_gradient)
        scratch.factored_gradient.clamp_(min=factored.FACTOR_FLOOR).rsqrt_()
        scratch.diagonal.copy_(piece.row)
        torch.add(piece.row, factored.MOMENT_EPSILON, out=scratch.diagonal_root).rsqrt_()
    scratch.factored_gradient.mul_(piece.grad)


def run_network(
    weight: torch.Tensor, base: tuple[torch.Tensor, ...], rule: Rule, scratch: SmallFcScratch
) -> torch.Tensor:
    """d · exp(λ2·m) of the block whose inputs lie in the scratch, [T, k, a, b]. base: one or two summands."""
    network, second = rule.network, blocks.second_layer(weight, base, rule.network, scratch)
    torch.addmm(network.last_bias, network.last, second, out=scratch.out)
    return scratch.magnitude.mul_(rule.exp_mult).exp_().mul_(scratch.direction)


def step_batch(
    batch: Batch, params: list[torch.Tensor], state: State, place: BlockLayout, rule: Rule, space: Workspace
) -> Rounds:
    """Move T tensors, and update their moments."""
    network, tensors = rule.network, batch.grad.shape[0]
    in_place = blocks.in_place(batch, params)
    pieces = yield from blocks.pieces_of(batch, place, network, space.block)
    weight = network.entry if place.factored else torch.cat([network.entry, network.row + network.column], dim=1)
    scratches = [space.scratch(views, piece.grad.shape, weight.shape[1], len(rule.bias)) for piece in pieces]

    squares = batch.grad.new_zeros(weight.shape[1], tensors)
    for piece, scratch in zip(pieces, scratches, strict=True):
        blocks.accumulate(piece, network, scratch.squared)
        fill_inputs(piece, scratch)
        squares.add_(blocks.sum_of_squares(scratch.per_tensor))
    squares, base = yield from blocks.first_layer(squares, batch, place, network, rule.bias, spec.NORMALIZE_EPSILON)
    scale = blocks.normalizer(squares, math.prod(place.whole), spec.NORMALIZE_EPSILON)
    if tensors == 1:
        weight = weight * scale.T
    for piece, scratch, summands in zip(pieces, scratches, blocks.bases_of(base, place, pieces), strict=True):
        if len(pieces) > 1 or place.cut:  # the scratch holds another block
            fill_inputs(piece, scratch)
        if tensors > 1:
            scratch.per_tensor.mul_(scale.unsqueeze(2))
        change = run_network(weight, summands, rule, scratch)
        if rule.weight_decay:
            change.add_(piece.param, alpha=rule.weight_decay)
        if rule.freeze_unseen:
            change.masked_fill_(piece.rms == 0, 0.0)
        if in_place:
            piece.param.add_(change, alpha=-rule.scale)
        else:
            torch.mul(change, -rule.scale, out=piece.param)
    blocks.scatter(batch, params, state, place)
