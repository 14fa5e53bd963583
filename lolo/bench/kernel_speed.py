"""Speed of `norm_fc`'s CPU kernel at inference, in a process of one device, on one core and on all."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import optax

from lolo.bench.timing import Line, interleaved, on_all_cores, on_one_core, step_calls
from lolo.kernels import library
from lolo.optimizers import norm_fc
from lolo.runtime import environment, parallel

SIDE = 1000  # of the matrices
CHILD = """
import sys
from lolo.bench import kernel_speed
calls = []
if sys.argv[1] == "torch":
    from lolo.bench import torch_speed
    calls = [torch_speed.kernel_rivals]
kernel_speed.child(calls, *map(int, sys.argv[2:]))
"""


def measure(with_torch: bool, matrices: Sequence[int] = (1, 10), rounds: int = 15) -> Iterator[Line]:
    """Steps on several matrices without Newton-Schulz, and on one with it, beside their rivals.

    with_torch: PyTorch's too.
    """
    torch = "torch" if with_torch else ""
    for count, orthogonal in [(count, False) for count in matrices] + [(1, True)]:
        n = rounds if count * (1 + 9 * orthogonal) < 10 else rounds // 2
        one = on_one_core(CHILD, torch, count, int(orthogonal), n, 1)
        yield from lines(one, f"{count}M{', Newton-Schulz' if orthogonal else ''}", n)
        if count > 1 and not orthogonal:
            cores = parallel.cores()
            many = on_all_cores(CHILD, torch, count, 0, n, cores)
            yield from lines(many, f"{count}M, {cores} cores", n)
            for name in one:
                yield Line(f"step on {count}M: {name}, {cores} cores / one", one[name] / many[name], "x")


def lines(times: dict[str, float], what: str, rounds: int) -> Iterator[Line]:
    """Times, and ours in units of the others'."""
    for name, seconds in times.items():
        yield Line(f"step on {what}: {name}", 1000 * seconds, "ms", f"n={rounds}")
    for ours in [name for name in times if name.startswith("norm_fc")]:
        for rival in [name for name in times if not name.startswith("norm_fc")]:
            yield Line(f"step on {what}: {ours} / {rival}", times[ours] / times[rival], "x")


def child(torch_calls: Sequence[Callable[..., Any]], count: int, orthogonal: int, rounds: int, threads: int) -> None:
    """Measure in this process and print medians as JSON.

    Args:
      torch_calls: functions that make PyTorch's calls.
      threads: of PyTorch; JAX takes the cores that the process has.
    """
    environment.set_up(1)
    calls = jax_calls(count, bool(orthogonal))
    for make in torch_calls:
        calls |= make(count, bool(orthogonal), threads)
    print(json.dumps(interleaved(calls, 0.0, rounds)))


def jax_calls(count: int, orthogonal: bool) -> dict[str, Callable[[], Any]]:
    """A step of each of JAX's optimizers."""
    learned = norm_fc.norm_fc(orthogonal=orthogonal)
    phi = learned.init(jax.random.key(0))
    rival = ("optax.contrib.muon", optax.contrib.muon(1e-3)) if orthogonal else ("optax.adamw", optax.adamw(1e-3))
    plain = norm_fc.norm_fc(orthogonal=orthogonal, kernel="plain").optimizer(phi)
    sized = norm_fc.norm_fc(orthogonal=orthogonal, step_rms="adam").optimizer(phi)
    ours = [(f"norm_fc, {library.path()}", learned.optimizer(phi)), ("norm_fc, step_rms adam", sized)]
    optimizers = [*ours, ("norm_fc, plain", plain), rival]
    keys = jax.random.split(jax.random.key(1), count)
    params = {f"w{i}": 0.03 * jax.random.normal(key, (SIDE, SIDE)) for i, key in enumerate(keys)}
    grads = jax.tree.map(lambda x: 0.01 * x[::-1], params)
    return step_calls(dict(optimizers), grads, params)
