"""What a process says of the precision of float32 products, kept out of an optimizer's step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch

FULL = ("ieee", "none")  # of `fp32_precision`; none: nobody asked for less


@contextlib.contextmanager
def full_precision(kinds: Iterable[str]) -> Iterator[None]:
    """Products of float32 are computed in float32 on devices of these kinds, whatever autocast and torch's flags say.

    Flags are the process's: while they differ, other threads see them too.
    """
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if _has_flags() else ()
        for backend in backends:
            stack.enter_context(_flag(backend))
        if not backends:
            stack.enter_context(_legacy_flag())
        yield


def _has_flags() -> bool:
    """Whether torch has a flag for each backend; since 2.9."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    return hasattr(matmul, "fp32_precision")


@contextlib.contextmanager
def _flag(backend: Any) -> Iterator[None]:
    before = backend.fp32_precision
    if before in FULL:
        yield
        return
    backend.fp32_precision = "none"
    inherited = backend.fp32_precision == before  # from torch.backends.fp32_precision, which may change later
    backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        backend.fp32_precision = "none" if inherited else before


@contextlib.contextmanager
def _legacy_flag() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
