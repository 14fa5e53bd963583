"""Learned optimizers: functions from meta-parameters φ to an `optax.GradientTransformation`.

`learned_sgd` is the smallest member of the family; `small_fc` is the per-parameter network of the paper (Eq. 7).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lolo import features
from lolo import small_fc_spec as spec
from lolo.trees import PyTree

# On GPUs the default precision of a float32 matrix product is lower than float32.
HIGHEST = jax.lax.Precision.HIGHEST


class LearnedOptimizer(NamedTuple):
    """An architecture: how φ is drawn, and the optimizer that a φ is."""

    init: Callable[[jax.Array], PyTree]  # key -> meta_params
    optimizer: Callable[[PyTree], optax.GradientTransformation]  # meta_params -> optimizer


class SmallFcState(NamedTuple):
    """State of `small_fc`: one `features.Moments` per parameter tensor, and the step count."""

    moments: PyTree  # the parameters' tree with a Moments at each leaf
    step: jax.Array  # [] int32, steps done so far


def learned_sgd() -> LearnedOptimizer:
    """SGD with momentum whose log learning rate and logit of momentum are the two meta-parameters."""

    def init(key: jax.Array) -> dict[str, jax.Array]:
        return {"log_learning_rate": jnp.log(jnp.float32(0.1)), "momentum_logit": jnp.zeros(())}

    def optimizer(meta_params: dict[str, jax.Array]) -> optax.GradientTransformation:
        decay = jax.nn.sigmoid(meta_params["momentum_logit"])
        return optax.chain(optax.trace(decay=decay), optax.scale(-jnp.exp(meta_params["log_learning_rate"])))

    return LearnedOptimizer(init, optimizer)


def truncated_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal with σ = 1/√fan_in, truncated at ±2σ, variance not corrected."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / jnp.sqrt(jnp.float32(fan_in))


def small_fc(
    hidden: int = 32,
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
    learn_decays: bool = False,
    weight_decay: float = 0.0,
    clock_limit: float | None = None,
) -> LearnedOptimizer:
    """The per-parameter MLP of Metz et al. (2022), 39 → hidden → hidden → 2 (Eq. 7).

    u = −λ1·d·exp(λ2·m), with (d, m) the network's two outputs for each parameter entry.

    Args:
      hidden: width of the two hidden layers; 32 gives 2,402 meta-parameters.
      step_mult: λ1, the scale of the step.
      exp_mult: λ2, the scale of the exponent.
      learn_decays: add seven meta-parameters that shift the accumulators' decays (2,409 with hidden=32).
      weight_decay: decoupled; adds −λ1·weight_decay·θ to the update.
      clock_limit: the time features see min(t, clock_limit); None: no limit.

    Returns: a LearnedOptimizer whose φ is the dict `w0, b0, w1, b1, w2, b2`, and with learned decays
      `momentum_decays, rms_decays, adafactor_decays`. Its optimizer takes any tree of float arrays of any rank;
      accumulators are float32, updates have the parameters' dtype.
    """
    shapes = spec.weight_shapes(hidden, learn_decays=learn_decays)

    def init(key: jax.Array) -> dict[str, jax.Array]:
        names = [name for name in shapes if name.startswith("w")]
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        return {
            name: truncated_normal(keys[name], shape, shape[0]) if name in keys else jnp.zeros(shape)
            for name, shape in shapes.items()
        }

    def optimizer(meta_params: dict[str, jax.Array]) -> optax.GradientTransformation:
        def init_state(params: PyTree) -> SmallFcState:
            return SmallFcState(jax.tree.map(features.init_moments, params), jnp.zeros((), jnp.int32))

        def update(grads: PyTree, state: SmallFcState, params: PyTree = None) -> tuple[PyTree, SmallFcState]:
            if params is None:
                raise ValueError("small_fc reads the parameters: call update(grads, state, params).")
            decay = features.decays(meta_params)
            clock = state.step if clock_limit is None else jnp.minimum(state.step, clock_limit)
            bias = meta_params["b0"] + features.time_inputs(clock) @ meta_params["w0"][spec.TIME_COLUMNS]

            def one(grad: jax.Array, param: jax.Array, moments: features.Moments) -> tuple:
                dtype, (grad, param) = param.dtype, (grad.astype(jnp.float32), param.astype(jnp.float32))
                moments = features.accumulate(moments, grad, decay)
                direction, magnitude = network(meta_params, bias, features.inputs(grad, param, moments))
                change = direction * jnp.exp(exp_mult * magnitude)
                if weight_decay:
                    change = change + weight_decay * param
                return (-step_mult * change).astype(dtype), moments

            leaves, structure = jax.tree.flatten(params)
            done = [
                one(*leaf)
                for leaf in zip(
                    structure.flatten_up_to(grads), leaves, structure.flatten_up_to(state.moments), strict=True
                )
            ]
            updates, moments = (jax.tree.unflatten(structure, part) for part in zip(*done, strict=True))
            return updates, SmallFcState(moments, state.step + 1)

        return optax.GradientTransformation(init_state, update)

    return LearnedOptimizer(init, optimizer)


def network(meta_params: dict[str, jax.Array], bias: jax.Array, inputs: features.Inputs) -> tuple:
    """The MLP on the inputs of one tensor. bias: [H], the first bias with the time inputs folded in.

    Returns: direction d and magnitude m, each [*shape].
    """
    shape = inputs.entry.shape[1:]

    def first_layer(x: jax.Array, weight: jax.Array) -> jax.Array:
        """Normalise and project. x: [F, *space], weight: [F, H] -> [H, *space]."""
        scale = jax.lax.rsqrt(spec.NORMALIZE_EPSILON + mean_square(x))
        return project(weight * scale[:, None], x)

    w0 = meta_params["w0"]
    row_weight, column_weight = w0[spec.ROW_COLUMNS], w0[spec.COLUMN_COLUMNS]
    hidden = first_layer(inputs.entry, w0[spec.ENTRY_COLUMNS]) + expand(bias, len(shape))
    if inputs.column is None:
        hidden = hidden + first_layer(inputs.row, row_weight + column_weight)
    else:
        hidden = hidden + first_layer(inputs.row, row_weight) + first_layer(inputs.column, column_weight)
    hidden = jax.nn.relu(hidden)
    hidden = jax.nn.relu(project(meta_params["w1"], hidden) + expand(meta_params["b1"], len(shape)))
    out = project(meta_params["w2"], hidden) + expand(meta_params["b2"], len(shape))
    return out[0], out[1]


def expand(vector: jax.Array, ndim: int) -> jax.Array:
    """[H] -> [H, 1, ..., 1]."""
    return vector.reshape(-1, *(1,) * ndim)


def project(weight: jax.Array, x: jax.Array) -> jax.Array:
    """weight: [F, H], x: [F, *space] -> [H, *space]. Features come first: the products then run along memory."""
    flat = jnp.matmul(weight.T, x.reshape(x.shape[0], -1), precision=HIGHEST)
    return flat.reshape(-1, *x.shape[1:])


def mean_square(x: jax.Array) -> jax.Array:
    """Mean of x² over all axes but the first. [F, *space] -> [F]."""
    squared = x**2
    while squared.ndim > 1:  # the outer axis first: XLA adds up whole rows at once
        squared = jnp.mean(squared, axis=1)
    return squared


LEARNERS: dict[str, Callable[..., LearnedOptimizer]] = {"small_fc": small_fc, "sgd": learned_sgd}
