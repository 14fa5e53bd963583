"""How much arithmetic a function does, counted from its jaxpr.

XLA's `cost_analysis` counts the body of a loop once, whatever the number of turns; here a `scan` counts as often as it
turns. On programs without loops the two agree (tested).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

ELEMENTWISE = frozenset(
    "add sub mul div rem max min neg abs sign exp exp2 log log1p expm1 tanh logistic sqrt rsqrt cbrt erf erf_inv "
    "integer_pow pow square sin cos add_any".split()
)
REDUCTIONS = frozenset("reduce_sum reduce_max reduce_min reduce_prod argmax argmin cumsum reduce_window_sum".split())


class Product(NamedTuple):
    """One matrix product or convolution, and how often it runs."""

    flops: float  # of one run; a multiplication and an addition are two
    nbytes: float  # read and written by one run
    kind: str  # "bfloat16", "float32" (the default precision) or "float32, highest precision"
    times: float


class Cost(NamedTuple):
    """The arithmetic of one call."""

    products: tuple[Product, ...]
    elementwise: float  # FLOPs of everything else

    @property
    def flops(self) -> float:
        """All of it."""
        return self.elementwise + sum(p.flops * p.times for p in self.products)


def count(function: Callable, *arguments: Any) -> Cost:
    """The cost of one call; arguments may be `jax.ShapeDtypeStruct`. A `while` of unknown length counts one turn."""
    found = list(_walk(jax.make_jaxpr(function)(*arguments).jaxpr, 1.0))
    products = tuple(x for x in found if isinstance(x, Product))
    return Cost(products, sum(x for x in found if not isinstance(x, Product)))


def _walk(jaxpr: core.Jaxpr, times: float) -> Iterator[Product | float]:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inside = list(_inner_jaxprs(equation.params))
        if name == "cond":
            branches = [list(_walk(branch, times)) for branch in inside]
            yield from max(branches, key=lambda found: sum(map(_total, found)))
        elif inside:
            turns = equation.params["length"] if name == "scan" else 1
            for inner in inside:
                yield from _walk(inner, times * turns)
        elif name in ("dot_general", "conv_general_dilated"):
            yield _product(equation, times)
        elif name in ELEMENTWISE:
            yield times * _shape(equation.outvars[0]).size
        elif name in REDUCTIONS:
            yield times * _shape(equation.invars[0]).size


def _shape(variable: Any) -> Any:
    return variable.aval


def _total(found: Product | float) -> float:
    return found.flops * found.times if isinstance(found, Product) else found


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _product(equation: core.JaxprEqn, times: float) -> Product:
    left, right = map(_shape, equation.invars)
    out, params = _shape(equation.outvars[0]), equation.params
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(left.shape[axis] for axis in contracted)
    else:
        out_features = right.shape[params["dimension_numbers"].rhs_spec[0]]
        # Zeros between dilated inputs, as in the gradient of a strided convolution, are not multiplied.
        terms = right.size / out_features / math.prod(params["lhs_dilation"])
    nbytes = sum(x.size * x.dtype.itemsize for x in (left, right, out))
    return Product(2.0 * out.size * terms, float(nbytes), _kind(left.dtype, params.get("precision")), times)


def _kind(dtype: Any, precision: Any) -> str:
    if dtype == jnp.bfloat16:
        return "bfloat16"
    asked = precision if isinstance(precision, tuple) else (precision,)
    return "float32, highest precision" if jax.lax.Precision.HIGHEST in asked else "float32"
