"""What `LoLO` can't take, and how it says so."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

# What AdamW and SGD take and LoLO has no use for, and why.
OTHERS = {
    **dict.fromkeys(
        ("betas", "eps", "momentum", "dampening", "nesterov", "amsgrad"), "its averages come with the weights"
    ),
    **dict.fromkeys(
        ("fused", "foreach", "capturable", "differentiable"), "there is one implementation for all devices"
    ),
    "decoupled_weight_decay": "its weight decay is always decoupled",
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARDED = {"DTensor", "FlatParameter", "ShardedTensor"}


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


def refuse_others(given: Iterable[str]) -> None:
    """Raise TypeError for arguments of other optimizers."""
    for name in given:
        if name in OTHERS:
            raise TypeError(f"LoLO has no {name}: {OTHERS[name]}. Leave it out; all that LoLO needs is its parameters.")


def check_number(name: str, value: Any, endless: bool = False) -> None:
    """Raise ValueError for a setting that is no number, is negative, or is infinite and not `endless`."""
    if not float(value) >= 0 or not (math.isfinite(float(value)) or endless):
        raise ValueError(f"{name}={value!r}; expected a number that is not negative.")
