"""Where a step of `small_fc` in JAX spends its time, in a process of one device on one core.

Beside the parts stand the products of its three layers alone, over as many entries from the core's cache: no form that
leaves them to XLA is faster than that.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lolo.bench import timing
from lolo.bench.timing import Line, step_calls
from lolo.optimizers import features, small_fc
from lolo.runtime import environment

SIDE = 1000  # of the matrix
BLOCK = small_fc.CPU_BLOCK  # entries
LAYERS = ((32, 16), (32, 32), (2, 32))  # outputs and inputs; the other inputs of the first layer cost next to nothing
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
CHILD = """
import sys
from lolo.bench import parts_speed
parts_speed.child(*map(int, sys.argv[1:]))
"""


def measure(rounds: int = 25) -> Iterator[Line]:
    """A step on 1M parameters, its parts, and products; all of it again with memory in huge pages."""
    for where, variables in {"": {}, ", huge pages": HUGE_PAGES}.items():
        yield from lines(timing.on_one_core(CHILD, rounds, SIDE, variables=variables), where, rounds)


def lines(times: Mapping[str, float], where: str, rounds: int) -> Iterator[Line]:
    """Times, shares of the step, and rates of arithmetic."""
    for name, seconds in times.items():
        yield Line(f"1M{where}: {name}", 1000 * seconds, "ms", f"n={rounds}")
    step = times["step of small_fc"]
    flops = {f"products, {m} x {k}": 2.0 * m * k * SIDE**2 for m, k in LAYERS}
    products = sum(times[name] for name in flops)
    yield Line(f"1M{where}: the layers' products / step", products / step, "x")
    yield Line(f"1M{where}: step / AdamW", step / times["adamw"], "x")
    rates = {"step of small_fc": sum(flops.values()), **flops, "product, 1024 x 1024": 2.0 * 1024**3}
    for name, count in rates.items():
        yield Line(f"1M{where}: arithmetic, {name}", count / times[name] / 1e9, "GFLOP/s")


def child(rounds: int, side: int) -> None:
    """Measure on a matrix in this process and print medians as JSON."""
    environment.set_up(1)
    print(json.dumps(timing.interleaved(calls(side), 0.0, rounds)))


def calls(side: int) -> dict[str, Callable[[], Any]]:
    """A step, its parts and the products, compiled each for itself."""
    keys = jax.random.split(jax.random.key(0), 4)
    params, grads = (
        scale * jax.random.normal(key, (side, side)) for scale, key in zip((0.03, 0.01), keys, strict=False)
    )
    learned = small_fc.small_fc()
    phi = learned.init(keys[2])
    of, decays = features.layout(params), features.decays(phi)
    accumulate = jax.jit(lambda grads, moments: features.accumulate(moments, grads, decays, of))
    moments = accumulate(grads, features.init_moments(params, of))
    weights = jax.jit(small_fc.arrange)(phi)
    bias = jax.jit(small_fc.first_bias)(weights, jnp.zeros(()))

    def inputs(grads: jax.Array, params: jax.Array, moments: features.Moments) -> tuple[jax.Array, jax.Array]:
        x = features.inputs(grads, params, moments, of)
        return x.entry, features.normalizer(x.entry, of)

    def network(grads: jax.Array, params: jax.Array, moments: features.Moments) -> jax.Array:
        return small_fc.matrix_network(weights, bias, grads, params, moments, of)

    outputs = jax.jit(network)(grads, params, moments)
    square = jax.random.normal(keys[3], (1024, 1024))
    return {
        **step_calls({"step of small_fc": learned.optimizer(phi), "adamw": optax.adamw(1e-3)}, grads, params),
        "moments": partial(accumulate, grads, moments),
        "inputs and their normalisers": partial(jax.jit(inputs), grads, params, moments),
        "inputs and network": partial(jax.jit(network), grads, params, moments),
        "exponential and update": partial(jax.jit(lambda x: -1e-3 * x[0] * jnp.exp(1e-3 * x[1])), outputs),
        **{f"products, {m} x {k}": products(m, k, side**2 // BLOCK) for m, k in LAYERS},
        "product, 1024 x 1024": partial(jax.jit(lambda x: x @ x), square),
    }


def products(outputs: int, inputs: int, count: int) -> Callable[[], Any]:
    """[outputs, inputs] @ [inputs, BLOCK], `count` times."""
    weight, x = jnp.ones((outputs, inputs)), jnp.ones((inputs, BLOCK))

    @jax.jit
    def run(weight: jax.Array, x: jax.Array) -> jax.Array:
        def body(i: jax.Array, last: jax.Array) -> jax.Array:
            # Another input each time, and a result that is used: XLA would lift the product out of the loop.
            return small_fc.product(weight, x.at[0, 0].set(last[0, 0] + i))

        return jax.lax.fori_loop(0, count, body, jnp.zeros((outputs, BLOCK)))

    return partial(run, weight, x)
