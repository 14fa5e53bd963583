"""Speed of the optimizers' steps in PyTorch, beside the textbook form, AdamW and Muon. Needs torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import numpy as np
import torch

from lolo.bench.textbook_torch import Textbook
from lolo.bench.timing import Line, interleaved
from lolo.files import tensors
from lolo.optimizers import norm_fc, small_fc
from lolo.optimizers.base import LearnedOptimizer
from lolo.optimizers.norm_fc_spec import NormFcSettings
from lolo.optimizers.weights_file import WeightsFile
from lolo.torch import LoLO, kernel

SIZES = {"1M": (784, 640, 640, 136, 10), "10M": (1024, 2560, 2560, 256, 10), "100M": (2048, *[4096] * 6, 2048, 10)}
"""Widths of the MLPs by number of parameters."""
GPU_GOAL = 5.0  # times fused AdamW's step, at 100M parameters without Newton-Schulz


def measure(seconds: float) -> Iterator[Line]:
    """On one CPU thread against the textbook form, AdamW and Muon; then on a GPU, if there is one, against both."""
    torch.set_num_threads(1)
    yield from steps("cpu", "1M", seconds)
    if torch.cuda.is_available():
        for size in ("1M", "10M"):
            yield from steps("cuda", size, seconds / 2)
        yield from large_steps("100M", seconds / 2)


def parameters(size: str, device: str) -> list[Any]:
    """Parameters of an MLP with gradients, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    widths = SIZES[size]
    layers = [torch.nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
    params = [p.to(device).detach().requires_grad_() for layer in layers for p in layer.parameters()]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 0.01).to(device)
    return params


def kernel_rivals(count: int, orthogonal: bool, threads: int) -> dict[str, Callable[[], Any]]:
    """Steps on matrices of 1,000 × 1,000 for `kernel_speed`: norm_fc's, AdamW's or Muon's."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)

    def matrices() -> list[Any]:
        params = [torch.randn(1000, 1000, generator=generator).mul_(0.03).requires_grad_() for _ in range(count)]
        for param in params:
            param.grad = 0.01 * torch.randn(1000, 1000, generator=generator)
        return params

    calls = {"norm_fc, torch": LoLO(matrices(), weights=norm_fc_weights(orthogonal)).step}
    if not orthogonal:
        calls["torch AdamW fused"] = torch.optim.AdamW(matrices(), fused=True).step
    elif hasattr(torch.optim, "Muon"):  # since torch 2.9
        calls["torch Muon"] = torch.optim.Muon(matrices()).step
    return calls


def arrays(learned: LearnedOptimizer) -> dict[str, np.ndarray]:
    """Meta-parameters before any meta-training: a step's time does not depend on them."""
    return {name: np.array(x) for name, x in learned.init(jax.random.key(0)).items()}


def norm_fc_weights(orthogonal: bool) -> WeightsFile:
    """Weights of `norm_fc`, with or without Newton-Schulz."""
    phi = arrays(norm_fc.norm_fc())
    return WeightsFile(phi, dataclasses.asdict(NormFcSettings(orthogonal=orthogonal)), {}, {}, tensors.digest(phi))


def finished(step: Callable[[], Any], device: str) -> None:
    """Take a step and wait until the device has taken it."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()


def steps(device: str, size: str, seconds: float) -> Iterator[Line]:
    """One step of each optimizer on the parameters of an MLP. Muon moves the matrices alone."""
    phi = arrays(small_fc.small_fc())
    calls = {"lolo": LoLO(parameters(size, device), weights=phi).step}
    path = kernel.path(torch.device(device))
    for name, orthogonal in (("norm_fc", False), ("norm_fc orthogonal", True)):
        calls[name] = LoLO(parameters(size, device), weights=norm_fc_weights(orthogonal)).step
    if device == "cpu":
        calls["textbook"] = Textbook(parameters(size, device), phi).step
    else:
        calls["adamw fused"] = torch.optim.AdamW(parameters(size, device), fused=True).step
    if hasattr(torch.optim, "Muon"):  # since torch 2.9
        calls["muon"] = torch.optim.Muon([p for p in parameters(size, device) if p.ndim == 2]).step
    calls["adamw foreach"] = torch.optim.AdamW(parameters(size, device), foreach=True).step
    times = interleaved({name: partial(finished, step, device) for name, step in calls.items()}, seconds)
    for name, t in times.items():
        note = path if name.startswith("norm_fc") else ""
        yield Line(f"torch {torch.__version__} step on {size} parameters, {device}: {name}", 1000 * t, "ms", note)
    if device == "cpu":
        yield Line("torch: textbook / lolo", times["textbook"] / times["lolo"], "x")
    pairs = [
        ("lolo", "adamw foreach"),
        ("norm_fc", "adamw foreach"),
        ("norm_fc", "adamw fused"),
        ("norm_fc orthogonal", "muon"),
    ]
    for ours, rival in pairs:
        if rival in times:
            yield Line(f"torch {size}, {device}: {ours} / {rival}", times[ours] / times[rival], "x")


def large_steps(size: str, seconds: float) -> Iterator[Line]:
    """On a GPU, a step of norm_fc without Newton-Schulz by its kernels and by torch's operations, and fused AdamW's."""
    file, path = norm_fc_weights(False), kernel.path(torch.device("cuda"))
    calls = {path: LoLO(parameters(size, "cuda"), weights=file).step}
    if path != "plain":
        calls["plain"] = LoLO(parameters(size, "cuda"), weights=file, kernel="plain").step
    calls["adamw fused"] = torch.optim.AdamW(parameters(size, "cuda"), fused=True).step
    times = interleaved({name: partial(finished, step, "cuda") for name, step in calls.items()}, seconds)
    for name, t in times.items():
        what = name if name == "adamw fused" else f"norm_fc, {name}"
        yield Line(f"torch {torch.__version__} step on {size} parameters, cuda: {what}", 1000 * t, "ms")
    ratio = times[path] / times["adamw fused"]
    yield Line(f"torch {size}, cuda: norm_fc, {path} / adamw fused", ratio, "x", f"goal: at most {GPU_GOAL:g}")
