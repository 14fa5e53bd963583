"""Newton-Schulz iterations, which bring all singular values of a matrix near 1, for tensors of any rank."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lolo.optimizers import norm_fc_spec as spec
from lolo.optimizers.features import Entries
from lolo.optimizers.norm_fc_features import product, reciprocal


def orthogonalize(x: Entries, axes: tuple[tuple[int, ...], ...]) -> Entries:
    """Newton-Schulz on the matrices [input axes, output axes] of a tensor. axes: batch, input, output."""
    order = [axis for kind in axes for axis in kind]
    extents = [[x.shape[axis] for axis in kind] for kind in axes]
    matrices = jnp.transpose(x, order).reshape([int(np.prod(kind)) for kind in extents])
    alone = len(matrices) == 1
    done = newton_schulz(matrices[0] if alone else matrices)
    done = done.reshape([extent for kind in extents for extent in kind])
    return jnp.transpose(done, [order.index(axis) for axis in range(x.ndim)])


def newton_schulz(x: Float[Array, "*batch m n"]) -> Float[Array, "*batch m n"]:
    """Five iterations that bring all singular values near 1."""
    a, b, c = spec.NEWTON_SCHULZ
    tall = x.shape[-2] > x.shape[-1]
    x = jnp.swapaxes(x, -1, -2) if tall else x
    one = jnp.eye(x.shape[-2], dtype=jnp.float32)

    def polynomial(gram: jax.Array) -> jax.Array:
        return a * one + b * gram + c * product(gram, gram)

    # The trace of x·xᵀ is the squared Frobenius norm. x enters products only, so XLA computes it once.
    gram = product(x, jnp.swapaxes(x, -1, -2))
    norm = jnp.sqrt(jnp.trace(gram, axis1=-2, axis2=-1))[..., None, None] + spec.NEWTON_SCHULZ_EPSILON
    scale = reciprocal(norm, least=spec.NEWTON_SCHULZ_EPSILON)
    x = product(polynomial(gram * scale * scale) * scale, x)
    for _ in range(spec.NEWTON_SCHULZ_STEPS - 1):
        x = product(polynomial(product(x, jnp.swapaxes(x, -1, -2))), x)
    return jnp.swapaxes(x, -1, -2) if tall else x
