"""Timing: calls in turns, their medians, and the lines that `lolo bench` prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Line:
    """One measurement."""

    what: str
    value: float
    unit: str
    note: str = ""


def has_torch() -> bool:
    """Whether PyTorch is installed."""
    spec = importlib.util.find_spec("torch")
    return spec is not None and spec.origin is not None


def interleaved(calls: dict[str, Callable[[], Any]], seconds: float = 6.0, least: int = 5) -> dict[str, float]:
    """Median seconds of each call: one of each in turn, for about `seconds` in total, after one to warm up."""
    for call in calls.values():
        jax.block_until_ready(call())
    times: dict[str, list[float]] = {name: [] for name in calls}
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(next(iter(times.values()))) < least:
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}
