"""Eq. 1-5 and α of the paper as its figures' meta-trainings computed them, operation by operation; no code of lolo.

What is guarded is: a weight of 0 adds no term, ψ divides by max |x| first, and steps that are not valid are 0.
"""

import jax
import jax.numpy as jnp


def alpha(t, total):
    """t / (T − 1)."""
    return t.astype(jnp.float32) / (total - 1)


def mix(alpha, learned, expert):
    """Eq. 1."""

    def one(u_o, u_h):
        return jnp.where(alpha < 1, (1 - alpha) * u_h, 0.0) + jnp.where(alpha > 0, alpha * u_o, 0.0)

    return jax.tree.map(one, learned, expert)


def distance(learned, expert):
    """Eq. 2."""
    differences = jax.tree.map(lambda u_o, u_h: (u_o - u_h).ravel(), learned, expert)
    return sum(jnp.vdot(d, d) for d in jax.tree.leaves(differences))


def psi(x, valid):
    """Eq. 5, for each slot: x [J, P, L]."""
    x = jnp.where(valid, x, 0.0)
    largest = jnp.max(jnp.abs(x), axis=(0, 2), keepdims=True)
    x = x / jnp.where(largest > 0, largest, 1.0)
    mean = jnp.sum(x**2, axis=(0, 2), keepdims=True) / jnp.maximum(jnp.sum(valid, axis=(0, 2), keepdims=True), 1)
    return x * jax.lax.rsqrt(jnp.where(mean > 0, mean, 1.0))


def fuse(alpha, task, bc):
    """Eq. 4, of differences after ψ."""
    return (1 - alpha) * bc + alpha * task


def fuse_otherwise(alpha, task, bc):
    """Equal to `fuse` in real numbers, and not in float32."""
    return bc + alpha * (task - bc)
