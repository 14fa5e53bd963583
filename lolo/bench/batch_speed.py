"""From which batch size on an optimizer's step is a small part of a training step, in a process of one core."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lolo.bench import timing
from lolo.bench.timing import Line, step_calls
from lolo.kernels import library
from lolo.optimizers import norm_fc, small_fc
from lolo.optimizers.base import LearnedOptimizer
from lolo.runtime import environment
from lolo.tasks import models
from lolo.tasks.models import Params

WIDTHS = (784, 640, 640, 128, 10)  # of the MLP: 995,978 parameters
BATCHES = (128, 1024, 4096)  # examples in a batch
SHARE = 0.1  # of a training step that is a small part of it
CHILD = """
import sys
from lolo.bench import batch_speed
batch_speed.child(*map(int, sys.argv[1:]))
"""


def measure(rounds: int = 9) -> Iterator[Line]:
    """Forward and backward pass of an MLP of 1M parameters, and the steps of optimizers beside them."""
    times = timing.on_one_core(CHILD, rounds)
    note = f"n={rounds}"
    for name, seconds in times.items():
        yield Line(f"MLP of 1M parameters, {name}", 1000 * seconds, "ms", note)
    passes = {size: times[passes_at(size)] for size in BATCHES}
    for name, seconds in times.items():
        if not name.startswith("passes"):
            yield from lines(name, seconds, passes)


def lines(name: str, seconds: float, passes: dict[int, float]) -> Iterator[Line]:
    """An optimizer's share of a training step at each batch size, and the batch from which it is below SHARE.

    passes: seconds by batch size; beyond the largest they grow in proportion.
    """
    for size, one in passes.items():
        yield Line(f"share of a training step at batch {size:,}: {name}", 100 * seconds / (seconds + one), "%")
    largest = max(passes)
    enough = seconds * (1 - SHARE) / SHARE * largest / passes[largest]
    yield Line(f"batch from which the step is below {SHARE:.0%}: {name}", enough, "examples")


def passes_at(size: int) -> str:
    return f"passes at batch {size:,}"


def child(rounds: int, *widths: int) -> None:
    """Measure in this process and print medians as JSON. widths: of the MLP, if not WIDTHS."""
    environment.set_up(1)
    model, keys = models.mlp(widths or WIDTHS), jax.random.split(jax.random.key(0), 2)
    params, stats = model.init(keys[0])
    inputs, classes = (widths or WIDTHS)[0], (widths or WIDTHS)[-1]

    @jax.jit
    def gradient(params: Params, images: jax.Array, labels: jax.Array) -> Params:
        def loss(params: Params) -> jax.Array:
            logits, _ = model.apply(params, stats, images, training=True)
            return models.cross_entropy(logits, labels)

        return jax.grad(loss)(params)

    calls: dict[str, Callable[[], Any]] = {}
    for size in BATCHES:
        images, labels = jax.random.normal(keys[1], (size, inputs)), jnp.arange(size) % classes
        calls[passes_at(size)] = partial(gradient, params, images, labels)
    calls |= step_calls(optimizers(), gradient(params, images, labels), params)
    print(json.dumps(timing.interleaved(calls, 0.0, rounds)))


def optimizers() -> dict[str, optax.GradientTransformation]:
    learned: dict[str, LearnedOptimizer] = {
        f"norm_fc, {library.path()}, no Newton-Schulz": norm_fc.norm_fc(orthogonal=False),
        f"norm_fc, {library.path()}": norm_fc.norm_fc(),
        "small_fc": small_fc.small_fc(),
    }
    made = {name: one.optimizer(one.init(jax.random.key(0))) for name, one in learned.items()}
    return made | {"adamw": optax.adamw(1e-3), "muon": optax.contrib.muon(1e-3)}
