"""What `LoLO` can't take, and how it says so."""

from __future__ import annotations

import math
import warnings
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
COMPLEX = " Keep a real parameter of shape [..., 2], and use torch.view_as_complex of it in the model."
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
    if any(kind.__name__ in SHARDED for kind in type(grad).__mro__):
        raise RuntimeError("LoLO got a sharded gradient: its normalisation needs means over the whole tensor.")


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


def warn_of_rates(rates: Iterable[float], smallest: float, stacklevel: int) -> None:
    """Warn of each lr of small_fc, of several param groups, that is some other optimizer's learning rate."""
    for rate in rates:
        if 0 < rate < smallest:
            warnings.warn(
                f"lr={rate:g} is a multiple of the step that the weights were meta-trained with, and 1 is as shipped. "
                f"Training will be {1 / rate:,.0f} times slower; leave lr out.",
                stacklevel=stacklevel + 1,
            )
