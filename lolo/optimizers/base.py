"""What learned optimizers have in common: their interface, the draw of their weights, and what they refuse.

`learned_sgd` is the smallest member of the family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from lolo.files.settings import Alternative
from lolo.optimizers import sharding
from lolo.trees import PyTree

# Which parameters decay, as optax.adamw has it: bools in the parameters' tree or a prefix of it, or a function of the
# parameters that returns one; None: all of them.
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None


MetaParams: TypeAlias = dict[str, jax.Array]
"""φ of an architecture, by name."""


class LearnedOptimizer(NamedTuple):
    """An architecture: how φ is drawn, and the optimizer that a φ is.

    >>> def init(key):
    ...     return {"log_rate": jnp.float32(-3.0)}
    >>> def optimizer(phi):
    ...     return optax.sign_sgd(jnp.exp(phi["log_rate"]))
    >>> learner = lolo.LearnedOptimizer(init, optimizer)
    """

    init: Callable[[jax.Array], PyTree]  #: key -> meta_params
    optimizer: Callable[[PyTree], optax.GradientTransformation]  #: meta_params -> optimizer


@dataclasses.dataclass(frozen=True)
class SgdSettings(Alternative):
    """SGD with momentum, whose two numbers are meta-learned: it has nothing to set."""

    name: str = "sgd"  # the architecture: --learner.name NAME --help lists the fields of another one

    # Recipes and weights were written with small_fc's fields, which meant nothing.
    DROPPED: ClassVar[Mapping[str, Any]] = {
        **{"hidden": 32, "step_mult": 1e-3, "exp_mult": 1e-3, "learn_decays": False},
        **{"weight_decay": 0.0, "clock_limit": None, "step_decay": None},
    }


SGD_SHAPES: dict[str, tuple[int, ...]] = {"log_learning_rate": (), "momentum_logit": ()}


def learned_sgd() -> LearnedOptimizer:
    """SGD with momentum whose log learning rate and logit of momentum are the two meta-parameters.

    >>> learner = lolo.learned_sgd()
    >>> phi = learner.init(jax.random.key(0))
    >>> sorted(phi)
    ['log_learning_rate', 'momentum_logit']
    >>> optimizer = learner.optimizer(phi)
    """

    def init(key: jax.Array) -> MetaParams:
        return {"log_learning_rate": jnp.log(jnp.float32(0.1)), "momentum_logit": jnp.zeros((), jnp.float32)}

    def optimizer(meta_params: MetaParams) -> optax.GradientTransformation:
        decay = jax.nn.sigmoid(meta_params["momentum_logit"])
        return optax.chain(optax.trace(decay=decay), optax.scale(-jnp.exp(meta_params["log_learning_rate"])))

    return LearnedOptimizer(init, optimizer)


def truncated_normal(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    """Normal with σ = 1/√fan_in, truncated at ±2σ, variance not corrected."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32) / jnp.sqrt(jnp.float32(fan_in))


def check_full_tensors(params: PyTree, axis_name: str | None) -> None:
    """Raise ValueError, inside shard_map, for parameters that are sharded over other mesh axes than `axis_name`."""
    if axis_name is not None and not sharding.types_vary(axis_name):
        raise ValueError(
            f"axis_name={axis_name!r} needs jax.shard_map(..., check_vma=True), which is its default: JAX's types then "
            "tell a parameter that is sharded over the mesh axis from one that is equal on all devices."
        )
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        for other in sorted(sharding.varying_axes(param) - {axis_name}):
            raise ValueError(
                f"the parameter params{jax.tree_util.keystr(path)} of shape {param.shape} differs between the devices "
                f"of mesh axis {other!r}, and the optimizer's means need the full tensor. If it is sharded over this "
                f"axis, pass axis_name={other!r}, sharded_axis=... (one mesh axis only). If every device trains a "
                "model of its own, use shard_map(..., check_vma=False)."
            )


def check_reduced(grads: PyTree, params: PyTree) -> None:
    """Raise ValueError, inside shard_map, for gradients that differ where their parameter doesn't."""
    for (path, param), grad in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(grads), strict=True):
        for other in sorted(sharding.varying_axes(grad) - sharding.varying_axes(param)):
            raise ValueError(
                f"the gradient of params{jax.tree_util.keystr(path)} differs between the devices of mesh axis "
                f"{other!r} and the parameter does not: average gradients first, jax.lax.pmean(grads, {other!r})."
            )


def check_params(params: PyTree, optimizer: str) -> None:
    """Raise TypeError for leaves that are not arrays of floats of 16 bits or more, and ValueError for complex ones."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = f"params{jax.tree_util.keystr(path)}"
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not hasattr(leaf, "shape"):
            raise TypeError(
                f"{name} is a {type(leaf).__name__}, and {optimizer} moves arrays only. Filter first: "
                "equinox.filter(model, equinox.is_inexact_array), or optax.masked; a number becomes one by jnp.asarray."
            )
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"{name} is {dtype}, and {optimizer} is for real numbers: wrap it, "
                "optax.contrib.split_real_and_imaginary(optimizer)."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"{name} is {dtype}, which has no gradient. Filter first: "
                "equinox.filter(model, equinox.is_inexact_array), or optax.masked."
            )
        if not is_real(dtype):
            raise TypeError(
                f"{name} is {dtype}, in which a step of the optimizer is lost. Keep it as bfloat16 or float32, and "
                "cast where the model uses it."
            )


def check_state(state: Any, kind: type, optimizer: str) -> None:
    """Raise ValueError for the state of another optimizer."""
    if not isinstance(state, kind):
        raise ValueError(f"{optimizer}: the state is a {type(state).__name__}; expected what init(params) gives.")


def is_real(dtype: Any) -> bool:
    """Whether the optimizers compute with numbers of a dtype: floating ones of 16 bits or more."""
    return bool(jnp.issubdtype(dtype, jnp.floating)) and jnp.finfo(dtype).bits >= 16


def check_gradients(grads: PyTree, params: PyTree, optimizer: str) -> None:
    """Raise ValueError unless every parameter has a real gradient of its shape, and nothing else has one.

    Raises TypeError for a gradient of a dtype in which there are none.
    """
    params_at, grads_at = (
        {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (params, grads)
    )
    for name in [name for name in params_at if name not in grads_at]:
        raise ValueError(f"{optimizer}: params{name} has no gradient; gradients are there for: {names(grads_at)}.")
    for name in [name for name in grads_at if name not in params_at]:
        raise ValueError(f"{optimizer}: grads{name} belongs to no parameter; parameters: {names(params_at)}.")
    theirs: Any = jax.tree.structure(grads)
    ours: Any = jax.tree.structure(params)
    # Static data of a node may be equal and read otherwise (as addresses), or read the same and not be equal (closures)
    # or not be comparable at all (arrays), hence the order.
    if str(theirs) != str(ours) and theirs != ours:
        raise ValueError(f"{optimizer}: the gradients' tree {theirs} is not the parameters' tree {ours}.")
    for name, param in params_at.items():
        shape = getattr(grads_at[name], "shape", None)
        if shape != param.shape:
            raise ValueError(f"{optimizer}: the gradient of params{name} has shape {shape}; expected {param.shape}.")
        _check_gradient(f"{optimizer}: the gradient of params{name}", grads_at[name].dtype)


def _check_gradient(name: str, dtype: Any) -> None:
    """Raise TypeError, or ValueError for complex numbers, for a dtype that a real parameter's gradient can't have."""
    if dtype == jax.dtypes.float0:
        raise TypeError(
            f"{name} is float0, which says that there is none: differentiate by these parameters themselves."
        )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise ValueError(f"{name} is {dtype}, and the parameter is real: give its real part, grad.real.")
    if jnp.issubdtype(dtype, jnp.floating) and not is_real(dtype):
        raise TypeError(f"{name} is {dtype}: give it as float32, grad.astype(jnp.float32).")


def answers_of(asked: PyTree, params: PyTree, what: str, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """The user's answer for each parameter, from the parameters' tree or a prefix of it. Raises ValueError."""
    answers: list[Any] = []
    try:
        jax.tree.map(
            lambda answer, below: answers.extend([answer] * len(jax.tree.leaves(below))), asked, params, is_leaf=is_leaf
        )
    except ValueError as error:
        raise ValueError(f"{what} is neither the parameters' tree nor a prefix of it: {error}") from error
    return answers


def decays_of(decay: Any, mask: Mask, params: PyTree) -> list[Any]:
    """The weight decay of each parameter: 0 where the mask says False. Raises ValueError for a mask without sense."""
    if mask is None:
        return [decay] * len(jax.tree.leaves(params))
    answers = answers_of(mask(params) if callable(mask) else mask, params, "mask")
    return [decay if _yes(answer) else 0.0 for answer in answers]


def _yes(answer: Any) -> bool:
    """A mask's answer: a bool, or an array that is one. Raises ValueError."""
    if isinstance(answer, jax.core.Tracer):
        raise ValueError(
            "mask says something that is traced, and which parameters decay must be known before. Build the mask of "
            'bools or NumPy\'s arrays, outside of jit; for optax.inject_hyperparams, name it: static_args="mask".'
        )
    if isinstance(answer, np.ndarray | jax.Array) and answer.shape == () and answer.dtype == bool:
        return bool(answer)
    if not isinstance(answer, bool | np.bool_):
        raise ValueError(f"mask says {answer!r}; expected True, for weight decay, or False.")
    return bool(answer)


def limited(grad: Float[Array, "*shape"], most: float) -> Float[Array, "*shape"]:
    """The gradient in float32, finite entries within ±most; one that is not finite stays as it is, to be seen."""
    grad = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
    return jnp.where(jnp.isinf(grad), grad, jnp.clip(grad, -most, most)).astype(jnp.float32)


def names(leaves: dict[str, object], most: int = 8) -> str:
    """The first of them, for an error message."""
    return ", ".join([*list(leaves)[:most], *(["..."] if len(leaves) > most else [])]) or "none"
