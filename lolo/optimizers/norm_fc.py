"""`norm_fc`: a per-parameter network that chooses the direction of a step; the learning rate is its size."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers

from lolo.kernels.library import CHOICES
from lolo.optimizers import norm_fc_features as nf
from lolo.optimizers import norm_fc_kernel, sharding
from lolo.optimizers import norm_fc_spec as spec
from lolo.optimizers.alike import over_alike
from lolo.optimizers.base import (
    LearnedOptimizer,
    Mask,
    MetaParams,
    answers_of,
    check_full_tensors,
    check_gradients,
    check_params,
    check_reduced,
    check_state,
    decays_of,
    truncated_normal,
)
from lolo.optimizers.features import Entries, Layout, over_parts
from lolo.optimizers.newton_schulz import orthogonalize
from lolo.optimizers.norm_fc_features import NormFcMoments
from lolo.optimizers.norm_fc_kernel import Moved
from lolo.trees import PyTree

Number: TypeAlias = float | jax.Array
Schedule: TypeAlias = Callable[[jax.Array], Number]
STATE_DTYPES = (jnp.float32, jnp.bfloat16)


class NormFcState(NamedTuple):
    """State of `norm_fc`: the step count, and for each moment a tree like the parameters'. Shapes: `NormFcMoments`."""

    step: Int[Array, ""]  # steps done so far
    momentum: PyTree
    rms: PyTree
    row: PyTree
    column: PyTree


class NormFcArguments(NamedTuple):
    """The arguments of `norm_fc` that its optimizer reads."""

    learning_rate: Number | Schedule
    weight_decay: Number | Schedule
    orthogonal: bool
    baseline: str
    step_rms: str
    adam_scale: Number
    adam_gain: Number  # 1 − adam_beta2
    is_matrix: Any
    state_dtype: Any
    axis_name: str | None
    sharded_axis: int
    mask: Mask
    kernel: str


class Part(NamedTuple):
    """How one parameter is treated."""

    layout: Layout
    learned: bool  # by the network; otherwise by AdamW
    axes: tuple[tuple[int, ...], ...] | None  # batch, input and output axes for Newton-Schulz; None: without it


OneTensor: TypeAlias = tuple[jax.Array, jax.Array, NormFcMoments, jax.Array]  # parameter, gradient, moments, decay


def norm_fc(
    hidden: int = 8,
    learning_rate: Number | Schedule = 1e-3,
    weight_decay: Number | Schedule = 0.0,
    orthogonal: bool = True,
    baseline: str = "momentum",
    step_rms: str = "one",
    adam_scale: Number = 1.0,
    adam_beta2: Number = spec.RMS_DECAY,
    is_matrix: Callable[[str, Any], bool | MuonDimensionNumbers] | PyTree = None,
    state_dtype: jax.typing.DTypeLike = jnp.float32,
    axis_name: str | None = None,
    sharded_axis: int = 0,
    mask: Mask = None,
    kernel: str = "auto",
) -> LearnedOptimizer:
    """A learned direction whose size is a learning rate, 30 → hidden → hidden → 1 (Celo2; ELO-Celo2, LoLO's successor).

    θ ← θ − learning_rate·(step + weight_decay·θ). For matrices step is the network's direction, orthogonalised if asked
    for, divided by its root mean square over the tensor, and as large as step_rms says. For all other tensors it is
    AdamW's (.9, adam_beta2, 1e-8) times adam_scale. Entries that never had a gradient get no step.

    Args:
      hidden: width of the two hidden layers; 8 gives 329 meta-parameters.
      learning_rate: root mean square of a matrix's step, if step_rms is "one"; a number, or a schedule: step count ->
        number. It may be traced, and so may the numbers below: `optax.inject_hyperparams` works.
      weight_decay: a number or a schedule; decoupled, times the learning rate (`small_fc` has λ1 in its place).
      orthogonal: orthogonalise the direction by five Newton-Schulz iterations, as Muon does.
      baseline: "momentum": the network's output is added to Nesterov momentum (decay .9) of root mean square 1, and its
        last layer starts at zero, so that an untrained φ is Muon, or momentum of fixed step size if not orthogonal;
        "none": the network alone.
      step_rms: root mean square of a matrix's step before the learning rate: "one"; or "adam": that of the step which
        AdamW (.9, .95, 1e-8) would make, as in grafting (Agarwal et al., arXiv 2002.11803). It falls where gradients
        are noise, and learning rates are of AdamW's order, about eight times those for "one".
      adam_scale: AdamW's learning rate is adam_scale·learning_rate.
      adam_beta2: decay of AdamW's second moment, from 0 to below 1. Embeddings and biases whose gradients are mostly
        zero want more than .95, for instance .999; a matrix's second moment, which the network reads, keeps .95.
      is_matrix: which tensors the network moves. None: all of two axes or more. A function (path, param) -> answer,
        path as in "decoder/embedding", or a tree of answers, which may be a prefix of the parameters' tree. An answer
        is False or None: AdamW, as advised for embeddings and output layers; True: the last axis is the output, all
        others are inputs; or optax.contrib.MuonDimensionNumbers: axes that it does not name count matrices, each of
        which is orthogonalised by itself. A vector that is said to be a matrix goes through the network, 15 inputs.
      state_dtype: of the momenta, float32 or bfloat16. In bfloat16 the average with decay .999 misses changes below
        0.4 % of its value. All other accumulators are float32.
      axis_name: inside shard_map, the mesh axis over whose devices parameters are cut; those that JAX's types show to
        be equal on all of its devices are taken as whole. Newton-Schulz gathers whole matrices, one after the other.
      sharded_axis: the axis along which parameters are cut, in equal parts.
      mask: which parameters decay, as in optax.adamw (see `base.Mask`).
      kernel: "auto": the CPU kernel where the installation has one and it serves: on one CPU device, or inside
        shard_map over whole parameters, for types of at most 32 bits and float32 momenta; $LOLO_KERNEL=0 says no.
        "plain": JAX's operations. Both agree to about 1e-6 of an update, not to the bit.

    Returns: a LearnedOptimizer whose φ is the dict `w0 [30, hidden], b0, w1 [hidden, hidden], b1, w2 [hidden, 1], b2`.
      Its optimizer takes any tree of real arrays of any rank; its state is a NormFcState; updates have the parameters'
      dtype. Gradients beyond ±2²⁴ count as ±2²⁴; one that is not finite shows as NaN in its tensor's update.

    Raises: ValueError for settings that are none of the above, without parameters, for gradients of another tree or
      shape, for complex parameters, for a state that was made with another is_matrix, and inside shard_map as
      `small_fc` does; TypeError for leaves that are not arrays of real numbers.

    >>> learner = lolo.norm_fc(learning_rate=optax.cosine_decay_schedule(1e-3, 1000), weight_decay=0.1)
    >>> optimizer = learner.optimizer(learner.init(jax.random.key(0)))
    >>> params = {"weight": jnp.ones((3, 2)), "bias": jnp.zeros(2)}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    """
    if not isinstance(adam_beta2, jax.core.Tracer):
        spec.adam_beta2(adam_beta2, "adam_beta2")
    settings = NormFcArguments(
        learning_rate,
        weight_decay,
        orthogonal,
        baseline,
        step_rms,
        adam_scale,
        1 - adam_beta2,
        is_matrix,
        jnp.dtype(state_dtype),
        axis_name,
        sharded_axis,
        mask,
        kernel,
    )
    check_settings(hidden, settings)

    def init(key: jax.Array) -> MetaParams:
        zero = {"b0", "b1", "b2"} | ({"w2"} if baseline == "momentum" else set())
        keys = dict(zip(("w0", "w1", "w2"), jax.random.split(key, 3), strict=True))
        return {
            name: jnp.zeros(shape, jnp.float32) if name in zero else truncated_normal(keys[name], shape, shape[0])
            for name, shape in spec.weight_shapes(hidden).items()
        }

    def optimizer(meta_params: MetaParams) -> optax.GradientTransformationExtraArgs:
        weights = nf.arrange(meta_params)

        def update(
            grads: PyTree, state: NormFcState, params: PyTree = None, **extra_args: Any
        ) -> tuple[PyTree, NormFcState]:
            if params is None:
                raise ValueError("norm_fc reads the parameters: call update(grads, state, params).")
            check_state(state, NormFcState, "norm_fc")
            check_params(params, "norm_fc")
            check_gradients(grads, params, "norm_fc")

            def step(grads: PyTree, state: NormFcState, params: PyTree) -> tuple[PyTree, NormFcState]:
                form = norm_fc_kernel.form(kernel, settings.state_dtype, axis_name, (grads, params, meta_params))
                if form is None:
                    return update_all(weights, settings, grads, state, params)
                known = numbers_of(settings, state.step)

                def given(numbers: list[jax.Array]) -> NormFcArguments:
                    rate, decay, scale, gain = numbers
                    return settings._replace(learning_rate=rate, weight_decay=decay, adam_scale=scale, adam_gain=gain)

                run = norm_fc_kernel.with_derivatives_of(
                    lambda phi, numbers, *trees: update_all(nf.arrange(phi), given(numbers), *trees),
                    lambda phi, numbers, *trees: kernel_step(form, phi, given(numbers), *trees),
                )
                return run(meta_params, known, grads, state, params)

            return sharding.in_auto_mode(step)(grads, state, params)

        return optax.GradientTransformationExtraArgs(lambda params: zero_state(settings, params), update)

    return LearnedOptimizer(init, optimizer)


def check_settings(hidden: int, settings: NormFcArguments) -> None:
    """Raise ValueError for values that no norm_fc has."""
    if not isinstance(hidden, int) or not 1 <= hidden <= spec.MAX_HIDDEN:
        raise ValueError(f"hidden={hidden!r} must be a whole number from 1 to {spec.MAX_HIDDEN}.")
    spec.one_of(spec.BASELINES, settings.baseline, "baseline")
    spec.one_of(spec.STEP_RMS, settings.step_rms, "step_rms")
    if settings.state_dtype not in STATE_DTYPES:
        raise ValueError(f"state_dtype={settings.state_dtype} must be float32 or bfloat16.")
    spec.one_of(CHOICES, settings.kernel, "kernel")


def zero_state(settings: NormFcArguments, params: PyTree) -> NormFcState:
    leaves, structure = jax.tree.flatten(params)
    parts = zip(leaves, parts_of(settings, params), strict=True)
    moments = [nf.zero_moments(param, of.layout, of.learned, settings.state_dtype) for param, of in parts]
    return as_state(jnp.zeros((), jnp.int32), moments, structure)


def numbers_of(settings: NormFcArguments, step: Int[Array, ""]) -> list[jax.Array]:
    """Learning rate, weight decay, adam_scale and adam_gain of a step."""
    numbers = settings.learning_rate, settings.weight_decay, settings.adam_scale, settings.adam_gain
    return [jnp.asarray(x(step) if callable(x) else x, jnp.float32) for x in numbers]


def update_all(
    weights: nf.NormFcMatrices, settings: NormFcArguments, grads: PyTree, state: NormFcState, params: PyTree
) -> tuple[PyTree, NormFcState]:
    """One step of all tensors, in JAX's operations."""
    parts, (leaves, structure) = parts_of(settings, params), jax.tree.flatten(params)
    old_moments = moments_of(state, params, parts)
    check_reduced(grads, params)
    rate, decay, adam_scale, adam_gain = numbers_of(settings, state.step)
    decays = [jnp.asarray(x, jnp.float32) for x in decays_of(decay, settings.mask, params)]

    def one(of: Part, tensor: OneTensor) -> Moved:
        param, grad, old, decay = tensor
        g, p = limited(grad), param.astype(jnp.float32)
        gain = spec.RMS_GAIN if of.learned else adam_gain
        new = nf.accumulate(old, g, of.layout, gain)
        if of.learned:
            step = learned_step(weights, g, p, new, of, settings.baseline)
            if settings.step_rms == "adam":
                step = step * rms_of(adam_step(new, state.step + 1, gain), of.layout)
        else:
            step = adam_scale * adam_step(new, state.step + 1, gain)
        update = (-rate * (step + decay * p)).astype(param.dtype)
        return update, new._replace(momentum=new.momentum.astype(settings.state_dtype))

    tensors = list(zip(leaves, jax.tree.leaves(grads), old_moments, decays, strict=True))
    done = over_alike(one, parts, tensors)
    updates = [update for update, _ in done]
    return jax.tree.unflatten(structure, updates), as_state(state.step + 1, [new for _, new in done], structure)


def kernel_step(
    form: str, meta_params: MetaParams, settings: NormFcArguments, grads: PyTree, state: NormFcState, params: PyTree
) -> tuple[PyTree, NormFcState]:
    """One step of all tensors, by the CPU kernel."""
    parts, (leaves, structure) = parts_of(settings, params), jax.tree.flatten(params)
    check_reduced(grads, params)
    old = moments_of(state, params, parts)
    tensors = [
        norm_fc_kernel.KernelTensor(
            *(grad, param, moments, of.layout.axes, of.learned),
            adam_sized=of.learned and settings.step_rms == "adam",
            orthogonalize=None if of.axes is None else partial(orthogonalize, axes=of.axes),
        )
        for grad, param, moments, of in zip(jax.tree.leaves(grads), leaves, old, parts, strict=True)
    ]
    rate, decay, *others = numbers_of(settings, state.step)
    numbers, decays = jnp.stack([rate, *others]), decays_of(decay, settings.mask, params)
    baseline = settings.baseline == "momentum"
    done = norm_fc_kernel.step(form, meta_params, baseline, state.step, numbers, decays, tensors)
    updates = [update.astype(param.dtype) for (update, _), param in zip(done, leaves, strict=True)]
    return jax.tree.unflatten(structure, updates), as_state(state.step + 1, [new for _, new in done], structure)


def learned_step(
    weights: nf.NormFcMatrices,
    grad: Entries,
    param: Entries,
    moments: NormFcMoments,
    of: Part,
    baseline: str,
) -> Entries:
    """The step of one matrix, of root mean square 1. moments: after this gradient."""
    if grad.size == 0:
        return jnp.zeros_like(grad)
    step = nf.direction(weights, grad, param, moments, of.layout)
    if baseline == "momentum":
        decay = spec.MOMENTUM_DECAYS[0]
        # The average already holds this gradient, as Nesterov's look-ahead wants it.
        step = step + unit((1 - decay) * grad + decay * moments.momentum[0], of.layout, spec.BASELINE_EPSILON)
    if of.axes is not None:
        step = on_full_tensor(step, of.layout, partial(orthogonalize, axes=of.axes))
    # Not "where rms > 0": an rms of NaN is no entry that never had a gradient, and must show.
    return unit(jnp.where(moments.rms == 0, 0.0, step), of.layout, spec.NORMALIZE_EPSILON)


def adam_step(moments: NormFcMoments, count: Int[Array, ""], gain: float | jax.Array) -> Entries:
    """AdamW's step before learning rate and decay, from moments after `count` gradients. gain: of the second one."""
    decay, t = spec.MOMENTUM_DECAYS[0], count.astype(jnp.float32)
    mean = moments.momentum[0] * nf.reciprocal(1 - decay**t, least=1 - decay)
    square = moments.rms * nf.reciprocal(-jnp.expm1(t * jnp.log1p(-gain)), least=gain)
    return mean / (root(square) + spec.ADAM_EPSILON)


def root(x: jax.Array) -> jax.Array:
    """√x, with derivative 0 at 0."""
    return jnp.where(x == 0, 0.0, jnp.sqrt(jnp.where(x == 0, 1.0, x)))


def limited(grad: Entries) -> Entries:
    """The gradient in float32, finite entries within ±LARGEST_GRADIENT; infinite ones become NaN, to be seen."""
    grad = grad.astype(jnp.promote_types(grad.dtype, jnp.float32))
    inside = jnp.clip(grad, -spec.LARGEST_GRADIENT, spec.LARGEST_GRADIENT)
    return jnp.where(jnp.isinf(grad), jnp.nan, inside).astype(jnp.float32)


def unit(x: Entries, of: Layout, epsilon: float) -> Entries:
    """x divided by its root mean square over the whole tensor."""
    return x * jax.lax.rsqrt(epsilon + over_parts(jnp.mean(x * x), of))


def rms_of(x: Entries, of: Layout) -> jax.Array:
    """The root mean square of x over the whole tensor."""
    return root(over_parts(jnp.mean(x * x), of))


def on_full_tensor(
    x: Entries, of: Layout, function: Callable[[Float[Array, "*full"]], Float[Array, "*full"]]
) -> Entries:
    """function(x) for a function of the full tensor: gathers its parts, applies the function, returns the own part."""
    if of.sharded is None:
        return function(x)
    size = x.shape[of.sharded]
    full = function(jax.lax.all_gather(x, of.axis_name, axis=of.sharded, tiled=True))
    start = jax.lax.axis_index(of.axis_name) * size
    return jax.lax.dynamic_slice_in_dim(full, start, size, axis=of.sharded)


def parts_of(settings: NormFcArguments, params: PyTree) -> list[Part]:
    """How each parameter is treated. Raises what `norm_fc` says of parameters and of is_matrix."""
    check_params(params, "norm_fc")
    check_full_tensors(params, settings.axis_name)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    leaves, answers = jax.tree.leaves(params), matrix_answers(settings.is_matrix, names, params)
    return [part(*each, settings) for each in zip(names, leaves, answers, strict=True)]


def matrix_answers(is_matrix: Any, names: list[str], params: PyTree) -> list[Any]:
    """The user's answer for each parameter, or what holds without one."""
    leaves = jax.tree.leaves(params)
    if is_matrix is None:
        return [leaf.ndim > 1 for leaf in leaves]
    if callable(is_matrix):
        return [is_matrix(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
    return answers_of(is_matrix, params, "is_matrix", is_answer)


def is_answer(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


def part(name: str, param: jax.Array, answer: Any, settings: NormFcArguments) -> Part:
    """How one parameter is treated, given the answer of is_matrix. Raises ValueError for an answer without sense."""
    where = settings.axis_name, settings.sharded_axis
    if not (is_answer(answer) or isinstance(answer, bool | np.bool_)):
        raise ValueError(f"is_matrix says {answer!r} of {name!r}; expected True, False or MuonDimensionNumbers.")
    named = (
        answer
        if isinstance(answer, MuonDimensionNumbers)
        else MuonDimensionNumbers(tuple(range(param.ndim - 1)), param.ndim - 1)
    )
    if not answer or param.ndim < 2:
        if isinstance(answer, MuonDimensionNumbers):
            raise ValueError(f"is_matrix gives {answer} to {name!r}, which has shape {param.shape} and no two axes.")
        return Part(nf.layout(param, range(param.ndim), *where), bool(answer), None)
    inputs, outputs = (tuple(np.atleast_1d(axes).astype(int).tolist()) for axes in named)
    known = {axis % param.ndim for axis in (*inputs, *outputs) if -param.ndim <= axis < param.ndim}
    if len(known) != len(inputs) + len(outputs) or not inputs or not outputs:
        raise ValueError(f"is_matrix gives {answer} to {name!r} of shape {param.shape}; name different axes of it.")
    inputs, outputs = (tuple(axis % param.ndim for axis in axes) for axes in (inputs, outputs))
    axes = tuple(axis for axis in range(param.ndim) if axis not in known), inputs, outputs
    layout = nf.layout(param, [axis for kind in axes for axis in kind], *where)
    return Part(layout, True, axes if settings.orthogonal else None)


def as_state(step: jax.Array, moments: list[NormFcMoments], structure: Any) -> NormFcState:
    """One tree for each moment, as optax's own optimizers have it."""
    fields = [[each[i] for each in moments] for i in range(len(NormFcMoments._fields))]
    return NormFcState(step, *(jax.tree.unflatten(structure, field) for field in fields))


def moments_of(state: NormFcState, params: PyTree, parts: list[Part]) -> list[NormFcMoments]:
    """The moments of each parameter. Raises ValueError for a state of other parameters or of another is_matrix."""
    if str(jax.tree.structure(state.momentum)) != str(jax.tree.structure(params)):
        raise ValueError("norm_fc: the state belongs to parameters of another tree; make it with init(params).")
    moments = [NormFcMoments(*each) for each in zip(*map(jax.tree.leaves, state[1:]), strict=True)]
    paths = jax.tree_util.tree_leaves_with_path(params)
    for (path, param), of, old in zip(paths, parts, moments, strict=True):
        expected = (len(spec.MOMENTUM_DECAYS) if of.learned else 1, *param.shape)
        if old.momentum.shape != expected:
            raise ValueError(
                f"norm_fc: the state of params{jax.tree_util.keystr(path)} has momenta of shape {old.momentum.shape}; "
                f"expected {expected}. It was made for other parameters, or with another is_matrix."
            )
    return moments
