"""On-policy imitation and its hand-over to the task loss (Eq. 1-5 of the LoLO paper).

Eq. 1 mixes the learned update with the expert's, Eq. 2 is their squared distance, Eq. 3-4 fuse the two
antithetic differences into one, Eq. 5 brings both to unit second moment first. Beside Eq. 2 there are the distances of
the directions and of the sizes, and the hand-over may start late, end early, and keep a floor of imitation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lolo.trees import PyTree

Schedule = Callable[..., jax.Array]  # outer step, T, a, b -> α


class ImitationLoss(NamedTuple):
    """How far the learned update is from the expert's: one part or several, which ψ scales one by one."""

    parts: Callable[[PyTree, PyTree], PyTree]  # u_O, u_H -> [] for each part
    weights: PyTree  # of the parts, in their structure: numbers


class Losses(NamedTuple):
    """One number per inner step for each of the two losses, or their antithetic differences Δ."""

    task: Float[Array, "..."]
    bc: PyTree  # [...] for each part of the imitation loss


def linear(step: Int[Array, ""], total: int, start: float = 0.0, end: float = 1.0) -> Float[Array, ""]:
    """α_t = clip((t/(T − 1) − a)/(b − a), 0, 1), from the expert to the task loss: a = `start`, b = `end`.

    With a = 0 and b = 1 it is the paper's t/(T − 1). A run of one step is at t/(T − 1) = 0, not 0/0.
    """
    done = jnp.asarray(step, jnp.float32) / max(total - 1, 1)
    if (start, end) == (0.0, 1.0):  # the clip would change nothing but how XLA rounds 1 − α, and with it φ's bytes
        return done
    return jnp.clip((done - start) / (end - start), 0.0, 1.0)


def zero(step: Int[Array, ""], total: int, start: float = 0.0, end: float = 1.0) -> Float[Array, ""]:
    """α ≡ 0: follow the expert, learn from imitation only."""
    return jnp.zeros((), jnp.float32)


def one(step: Int[Array, ""], total: int, start: float = 0.0, end: float = 1.0) -> Float[Array, ""]:
    """α ≡ 1: follow the learned optimizer, learn from the task loss only."""
    return jnp.ones((), jnp.float32)


ALPHA_SCHEDULES: dict[str, Schedule] = {"linear": linear, "zero": zero, "one": one}


def mix_updates(alpha: Float[Array, ""], learned: PyTree, expert: PyTree) -> PyTree:
    """(1 − α) u_H + α u_O, leaf by leaf (Eq. 1).

    Both updates start from the same parameters, so mixing updates is mixing parameters. A term whose weight is
    exactly 0 is not added: 0 · ∞ would void the other.
    """

    def mix(u_o: jax.Array, u_h: jax.Array) -> jax.Array:
        mixed = jnp.where(alpha < 1, (1 - alpha) * u_h, 0.0) + jnp.where(alpha > 0, alpha * u_o, 0.0)
        return mixed.astype(u_o.dtype)

    return jax.tree.map(mix, learned, expert)


def squared_distance(learned: PyTree, expert: PyTree) -> Float[Array, ""]:
    """‖u_O − u_H‖² summed over all parameters (Eq. 2)."""
    differences = [(a - b).ravel() for a, b in zip(jax.tree.leaves(learned), jax.tree.leaves(expert), strict=True)]
    return sum((jnp.vdot(d, d) for d in differences), jnp.zeros((), jnp.float32))


def direction_distance(learned: PyTree, expert: PyTree) -> Float[Array, ""]:
    """1 − ⟨u_O, u_H⟩ / (‖u_O‖ ‖u_H‖ + 1e-30), over all tensors together: 0 for one direction, 2 for opposite ones.

    The sizes of the two updates do not enter; 1 where one of them is 0. ELO's, instead of Eq. 2.
    """
    norms = jnp.sqrt(dot(learned, learned)) * jnp.sqrt(dot(expert, expert))
    return 1 - dot(learned, expert) / (norms + 1e-30)


def magnitude_distance(learned: PyTree, expert: PyTree) -> Float[Array, ""]:
    """| ‖u_O‖ − ‖u_H‖ |, over all tensors together (ELO's, beside the direction)."""
    return jnp.abs(jnp.sqrt(dot(learned, learned)) - jnp.sqrt(dot(expert, expert)))


def dot(x: PyTree, y: PyTree) -> Float[Array, ""]:
    """⟨x, y⟩ over all leaves, in float32."""
    pairs = zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True)
    products = (jnp.vdot(a.astype(jnp.float32).ravel(), b.astype(jnp.float32).ravel()) for a, b in pairs)
    return sum(products, jnp.zeros((), jnp.float32))


class DirectionMagnitude(NamedTuple):
    """The parts of an imitation loss, or their weights."""

    direction: Any
    magnitude: Any


def direction_and_magnitude(learned: PyTree, expert: PyTree) -> DirectionMagnitude:
    """Both distances, which may differ by orders of magnitude."""
    return DirectionMagnitude(direction_distance(learned, expert), magnitude_distance(learned, expert))


SQUARED = ImitationLoss(squared_distance, weights=1.0)
"""Eq. 2."""

# Each from the weight of the magnitude; the direction has the rest.
IMITATION_LOSSES: dict[str, Callable[[float], ImitationLoss]] = {
    "squared": lambda magnitude: SQUARED,
    "direction": lambda magnitude: ImitationLoss(direction_distance, weights=1.0),
    "direction-magnitude": lambda magnitude: ImitationLoss(
        direction_and_magnitude, DirectionMagnitude(1 - magnitude, magnitude)
    ),
}


def total(loss: ImitationLoss, parts: PyTree) -> Float[Array, "..."]:
    """The weighted sum of the parts, each [...]. A weight of 1 is no factor: a single part keeps its bytes."""
    weighted = jax.tree.map(lambda weight, part: part if weight == 1 else weight * part, loss.weights, parts)
    return functools.reduce(jnp.add, jax.tree.leaves(weighted))


def normalize_second_moment(
    x: Float[Array, "J P L"], valid: Bool[Array, "J P L"], *, joint: bool = False
) -> Float[Array, "J P L"]:
    """ψ(x) = x / sqrt(mean x²) over the valid steps of the update (Eq. 5).

    J truncations, P slots, L inner steps.
    The mean is taken per slot, or over all slots if `joint`. An x that is 0 everywhere stays 0.

    The paper adds an ε0 below the root. Δ can be 1e-5 and smaller, so we scale by max |x| first, and ε0 guards
    the division by zero only.
    """
    axes = (0, 1, 2) if joint else (0, 2)
    x = jnp.where(valid, x, 0.0)
    largest = jnp.max(jnp.abs(x), axis=axes, keepdims=True)
    scaled = x / jnp.where(largest > 0, largest, 1.0)
    count = jnp.maximum(jnp.sum(valid, axis=axes, keepdims=True), 1)
    second_moment = jnp.sum(scaled**2, axis=axes, keepdims=True) / count
    return scaled * jax.lax.rsqrt(jnp.where(second_moment > 0, second_moment, 1.0))


def per_slot(x: Float[Array, "J P L"], valid: Bool[Array, "J P L"]) -> Float[Array, "J P L"]:
    """ψ with the second moment of each slot by itself."""
    return normalize_second_moment(x, valid)


def joint(x: Float[Array, "J P L"], valid: Bool[Array, "J P L"]) -> Float[Array, "J P L"]:
    """ψ with one second moment over all slots."""
    return normalize_second_moment(x, valid, joint=True)


def raw(x: Float[Array, "J P L"], valid: Bool[Array, "J P L"]) -> Float[Array, "J P L"]:
    """No ψ: Eq. 3."""
    return jnp.where(valid, x, 0.0)


NORMALIZERS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {"slot": per_slot, "joint": joint, "none": raw}


def fuse(
    alpha: Float[Array, ""],
    deltas: Losses,
    valid: Bool[Array, "J P L"],
    normalize: Callable[[jax.Array, jax.Array], jax.Array],
    floor: float = 0.0,
    loss: ImitationLoss = SQUARED,
) -> Float[Array, "J P L"]:
    """δ = max(1 − α, floor) ψ(Δ^bc) + α ψ(Δ^task) (Eq. 4, floor 0; Eq. 3 with `raw`). Invalid steps give 0.

    With a floor (ELO: 0.21) imitation keeps teaching after the hand-over. Of an imitation loss in several parts, ψ
    scales each before they are weighed, so that the weights are shares whatever the parts' units.
    """
    bc = total(loss, jax.tree.map(lambda part: normalize(part, valid), deltas.bc))
    return jnp.maximum(1 - alpha, floor) * bc + alpha * normalize(deltas.task, valid)
