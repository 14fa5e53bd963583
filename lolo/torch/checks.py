"""What `LoLO` can't take, and how it says so."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lolo.torch.sharding import is_cut_along_rows, is_dtensor

# What AdamW and SGD take and LoLO has no use for, and why.
OTHERS = {
    **dict.fromkeys(
        ("betas", "eps", "momentum", "dampening", "nesterov", "amsgrad"), "its averages come with the weights"
    ),
    **dict.fromkeys(
        ("fused", "foreach", "capturable", "differentiable"), "which implementation runs follows from the device"
    ),
    "decoupled_weight_decay": "its weight decay is always decoupled",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = " Keep a real parameter of shape [..., 2], and use torch.view_as_complex of it in the model."
SMALLEST_RATE = 0.02  # of an lr of small_fc that is no mistake
LARGEST_RATE = 0.1  # of an lr of norm_fc that is none
PLAIN = (torch.Tensor, torch.nn.Parameter)
SHARDED = {"DTensor", "FlatParameter", "ShardedTensor"}


def check_parameter(param: Any, name: str | int) -> None:
    """Raise TypeError for what LoLO can't move. What is no tensor at all is torch's to refuse.

    name: the parameter's, or its number in its group.
    """
    if not isinstance(param, torch.Tensor):
        return
    if is_dtensor(param):
        if not is_cut_along_rows(param):
            raise TypeError(
                f"LoLO got parameter {name!r} of shape {tuple(param.shape)} as a DTensor placed {param.placements}; it "
                "takes replicated ones and ones cut along axis 0, Shard(0), by one axis of the mesh. Call fully_shard "
                "without shard_placement_fn, or leave this parameter out of tensor parallelism."
            )
    elif any(kind.__name__ in SHARDED for kind in type(param).__mro__) or getattr(param, "_fsdp_flattened", False):
        raise TypeError(
            f"LoLO got a sharded parameter ({name!r}, a {type(param).__name__}): its normalisation needs means over "
            "the whole tensor. Use fully_shard (FSDP2, from torch 2.6 on) instead of FullyShardedDataParallel, or "
            "DistributedDataParallel."
        )
    if param.dtype not in DTYPES:
        cure = COMPLEX if param.is_complex() else ""
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
    if type(param) in PLAIN and type(grad) is torch.Tensor:
        return
    if is_dtensor(param):
        if not is_dtensor(grad) or grad.placements != param.placements:
            placed = grad.placements if is_dtensor(grad) else "as a plain tensor"
            raise RuntimeError(
                f"LoLO got a gradient placed {placed} for a parameter of shape {tuple(param.shape)} placed "
                f"{param.placements}; bring it there with param.grad.redistribute(placements=param.placements)."
            )
    elif any(kind.__name__ in SHARDED for kind in type(grad).__mro__):
        raise RuntimeError("LoLO got a sharded gradient for a parameter that is not sharded: shard both, or neither.")


def refuse_others(given: Iterable[str]) -> None:
    """Raise TypeError for arguments of other optimizers."""
    for name in given:
        if name in OTHERS:
            raise TypeError(f"LoLO has no {name}: {OTHERS[name]}. Leave it out; all that LoLO needs is its parameters.")


def check_number(name: str, value: Any, endless: bool = False) -> None:
    """Raise ValueError for a setting that is no number, is negative, or is infinite and not `endless`."""
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not number >= 0 or not (math.isfinite(number) or endless):
        raise ValueError(f"{name}={value!r}; expected a number that is not negative.")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError for what is neither True nor False, such as the word "false"."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}; expected True or False.")


def warn_of_rates(groups: Iterable[Mapping[str, Any]], stacklevel: int) -> None:
    """Warn of the lr of each param group that is meant for another optimizer, or for weights of the other kind."""
    for group in groups:
        rate, words = float(group["lr"]), None
        if "step_mult" in group and 0 < rate < SMALLEST_RATE:  # small_fc
            words = (
                f"lr={rate:g} is a multiple of the step that the weights were meta-trained with, and 1 is as shipped. "
                f"Training will be {1 / rate:,.0f} times slower; leave lr out."
            )
        elif "step_mult" not in group and rate > LARGEST_RATE:
            words = (
                f"lr={rate:g} is no multiple of the shipped rate, but a rate itself, as AdamW's and Muon's: "
                "1e-4 to 3e-2 are usual. Leave lr out for the weights' own."
            )
        if words:
            warnings.warn(words, stacklevel=stacklevel + 1)
