"""Learning-rate schedules by name: factors of a rate, 1 at their peak, for rivals and learned optimizers alike.

A schedule is a function (count, steps, warmup) -> factor. count: steps done before this one; steps: of the run;
warmup: steps that the rate rises over, where the schedule has a warm-up. All three may be traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

Number: TypeAlias = int | float | jax.Array
Factor: TypeAlias = Callable[[Number, Number, Number], jax.Array]

WARMUP = 0.02  # share of the steps
DECAY = 0.2  # share of the steps in which warm-up-stable-decay goes to 0
RSQRT_STEPS = 3000.0


def constant(count: Number, steps: Number, warmup: Number) -> jax.Array:
    """1."""
    return jnp.ones(())


def cosine(count: Number, steps: Number, warmup: Number) -> jax.Array:
    """Half a cosine from 1 to 0 at `steps`."""
    return 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count, steps) / steps))


def rsqrt(count: Number, steps: Number, warmup: Number) -> jax.Array:
    """1/√(1 + count/3000): of any horizon, as `step_decay` is for a learned optimizer."""
    return 1 / jnp.sqrt(1 + count / RSQRT_STEPS)


def warm(count: Number, steps: Number, warmup: Number) -> jax.Array:
    """A straight line from 0 to 1 at `warmup`, then 1."""
    return jnp.where(count < warmup, count / jnp.maximum(warmup, 1), 1.0)


def warmup_cosine(count: Number, steps: Number, warmup: Number) -> jax.Array:
    """The same line, then half a cosine to 0 at `steps`."""
    falling = cosine(jnp.maximum(count - warmup, 0), jnp.maximum(steps - warmup, 1), warmup)
    return jnp.where(count < warmup, warm(count, steps, warmup), falling)


def warmup_stable_decay(count: Number, steps: Number, warmup: Number) -> jax.Array:
    """The same line, then 1, then over the last fifth of the steps a line to 0 at `steps`."""
    return jnp.minimum(warm(count, steps, warmup), jnp.clip((steps - count) / (DECAY * steps), 0, 1))


SCHEDULES: dict[str, Factor] = {
    "constant": constant,
    "cosine": cosine,
    "rsqrt": rsqrt,
    "warmup": warm,
    "warmup-cosine": warmup_cosine,
    "wsd": warmup_stable_decay,
}
