"""Timing: calls in turns, their medians, and the lines that `lolo bench` prints."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import optax

from lolo.trees import PyTree


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


def on_one_core(code: str, *words: Any, variables: Mapping[str, str] | None = None) -> dict[str, float]:
    """What a new Python process, pinned to a core, prints last, as JSON: seconds by name.

    variables: of the environment, beside the present ones.
    """
    pinned = f"import os; os.sched_setaffinity(0, {{min(os.sched_getaffinity(0))}})\n{code}"
    return on_all_cores(pinned, *words, variables=variables)


def on_all_cores(code: str, *words: Any, variables: Mapping[str, str] | None = None) -> dict[str, float]:
    """The same of a process that is not pinned."""
    command, environment = [sys.executable, "-c", code, *map(str, words)], os.environ | dict(variables or {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    times: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return times


def step_calls(
    optimizers: Mapping[str, optax.GradientTransformation], grads: PyTree, params: PyTree
) -> dict[str, Callable[[], Any]]:
    """A step of each optimizer on its own state, which it is given to keep, as a training loop does."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, optimizer in optimizers.items():
        step, held = jax.jit(optimizer.update, donate_argnums=1), [optimizer.init(params)]

        def call(step: Callable[..., Any], held: list[Any]) -> Any:
            updates, held[0] = step(grads, held[0], params)
            return updates, held[0]

        calls[name] = partial(call, step, held)
    return calls


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
