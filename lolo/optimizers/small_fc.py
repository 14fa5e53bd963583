"""Learned optimizers: functions from meta-parameters φ to an `optax.GradientTransformation`.

`learned_sgd` is the smallest member of the family; `small_fc` is the per-parameter network of the paper (Eq. 7).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lolo.optimizers import base, features, sharding
from lolo.optimizers import small_fc_spec as spec
from lolo.optimizers.alike import over_alike
from lolo.trees import PyTree

# Entries per block. On a CPU a block's activations stay in the core's cache; elsewhere it only bounds the memory.
CPU_BLOCK, OTHER_BLOCK = 1024, 2**20
# On GPUs the default precision of a float32 matrix product is lower than float32.
HIGHEST = jax.lax.Precision.HIGHEST


class SmallFcState(NamedTuple):
    """State of `small_fc`: one `features.Moments` per parameter tensor, and the step count."""

    moments: PyTree  # the parameters' tree with a Moments at each leaf
    step: Int[Array, ""]  # steps done so far


def small_fc(
    hidden: int = 32,
    step_mult: float = 1e-3,
    exp_mult: float = 1e-3,
    learn_decays: bool = False,
    weight_decay: float | jax.Array | Callable[[jax.Array], jax.Array] = 0.0,
    clock_limit: float | jax.Array | None = None,
    step_decay: float | jax.Array | None = None,
    axis_name: str | None = None,
    sharded_axis: int = 0,
    mask: base.Mask = None,
) -> base.LearnedOptimizer:
    """The per-parameter MLP of Metz et al. (2022), 39 → hidden → hidden → 2 (Eq. 7).

    u = −λ1·d·exp(λ2·m), with (d, m) the network's two outputs for each parameter entry.

    Args:
      hidden: width of the two hidden layers; 32 gives 2,402 meta-parameters.
      step_mult: λ1, the scale of the step.
      exp_mult: λ2, the scale of the exponent.
      learn_decays: add seven meta-parameters that shift the accumulators' decays (2,409 with hidden=32).
      weight_decay: a number, or a schedule: step count -> number; decoupled; adds −λ1·weight_decay·θ to the update.
      clock_limit: the time features see min(t, clock_limit); None: no limit.
      step_decay: updates are divided by √(1 + t/step_decay), weight decay included; None: they are not.
        These three may be traced: `optax.inject_hyperparams` works.
      axis_name: inside shard_map, the mesh axis over whose devices parameters are cut; those that JAX's types show to
        be equal on all of its devices are taken as whole.
      sharded_axis: the axis along which parameters are cut, in equal parts.
      mask: which parameters decay, as in optax.adamw (see `base.Mask`).

    Returns: a LearnedOptimizer whose φ is the dict `w0, b0, w1, b1, w2, b2`, and with learned decays
      `momentum_decays, rms_decays, adafactor_decays`. Its optimizer takes any tree of float arrays of any rank;
      accumulators are float32, updates have the parameters' dtype. A gradient whose square is no float32, or that is
      not finite, shows as NaN in its tensor's update (see `one_tree_per_moment`).

    Raises: ValueError without parameters, for gradients of another tree or shape, for complex parameters, for a state
      of other parameters, and inside shard_map for parameters or gradients of which it would see a part only without
      knowing, and for a mask of another tree; TypeError for leaves that are not arrays of real numbers.

    Entries that never had a gradient move too: padding rows, rows never looked up, pruned weights. See `freeze_unseen`.

    >>> learner = lolo.small_fc()
    >>> phi = learner.init(jax.random.key(0))
    >>> sum(x.size for x in phi.values())
    2402
    >>> optimizer = learner.optimizer(phi)
    """
    shapes = spec.weight_shapes(hidden, learn_decays=learn_decays)

    def init(key: jax.Array) -> base.MetaParams:
        names = [name for name in shapes if name.startswith("w")]
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        return {
            name: base.truncated_normal(keys[name], shape, shape[0]) if name in keys else jnp.zeros(shape, jnp.float32)
            for name, shape in shapes.items()
        }

    def optimizer(meta_params: base.MetaParams) -> optax.GradientTransformationExtraArgs:
        weights = arrange(meta_params)

        def layout(param: jax.Array) -> features.Layout:
            return features.layout(param, axis_name, sharded_axis)

        def init_state(params: PyTree) -> SmallFcState:
            base.check_params(params, "small_fc")
            base.check_full_tensors(params, axis_name)
            moments = jax.tree.map(lambda param: features.init_moments(param, layout(param)), params)
            return SmallFcState(moments, jnp.zeros((), jnp.int32))

        def update(
            grads: PyTree, state: SmallFcState, params: PyTree = None, **extra_args: Any
        ) -> tuple[PyTree, SmallFcState]:
            if params is None:
                raise ValueError("small_fc reads the parameters: call update(grads, state, params).")
            base.check_params(params, "small_fc")
            base.check_gradients(grads, params, "small_fc")
            check_state(state, params)
            return sharding.in_auto_mode(step)(grads, state, params)

        def step(grads: PyTree, state: SmallFcState, params: PyTree) -> tuple[PyTree, SmallFcState]:
            base.check_full_tensors(params, axis_name)
            base.check_reduced(grads, params)
            leaves, structure = jax.tree.flatten(params)
            layouts = [layout(leaf) for leaf in leaves]
            params32, grads32 = ([x.astype(jnp.float32) for x in xs] for xs in (leaves, jax.tree.leaves(grads)))
            old = jax.tree.leaves(state.moments, is_leaf=is_moments)
            accumulator_decays = features.decays(meta_params)
            moments = [
                features.accumulate(m, g, accumulator_decays, of)
                for m, g, of in zip(old, grads32, layouts, strict=True)
            ]
            # In float32, which a number of Python's would make float64 where jax_enable_x64 is on.
            t = state.step.astype(jnp.float32)
            clock = t if clock_limit is None else jnp.minimum(t, clock_limit)
            scale = step_mult if step_decay is None else step_mult * jax.lax.rsqrt(1 + t / step_decay)
            tensors = list(zip(grads32, params32, moments, layouts, strict=True))
            outputs = apply_network(weights, first_bias(weights, clock), tensors)

            def change(output: jax.Array, param: jax.Array, of: features.Layout, dtype: Any, decay: Any) -> jax.Array:
                direction, magnitude = (features.from_matrices(x, of) for x in output)
                step = direction * jnp.exp(exp_mult * magnitude)
                if not isinstance(decay, int | float) or decay:  # one that is traced may be 0
                    step = step + decay * param
                return (-scale * step).astype(dtype)

            decay_now = weight_decay(state.step) if callable(weight_decay) else weight_decay
            dtypes, decays = [leaf.dtype for leaf in leaves], base.decays_of(decay_now, mask, params)
            updates = [change(*each) for each in zip(outputs, params32, layouts, dtypes, decays, strict=True)]
            updates, moments = (jax.tree.unflatten(structure, part) for part in (updates, moments))
            return updates, SmallFcState(moments, state.step + 1)

        return optax.GradientTransformationExtraArgs(init_state, update)

    return base.LearnedOptimizer(init, optimizer)


def is_moments(node: Any) -> bool:
    return isinstance(node, features.Moments)


def check_state(state: Any, params: PyTree) -> None:
    """Raise ValueError for the state of another optimizer, or of other parameters."""
    base.check_state(state, SmallFcState, "small_fc")
    old = {
        jax.tree_util.keystr(path): moments
        for path, moments in jax.tree_util.tree_leaves_with_path(state.moments, is_leaf=is_moments)
    }
    for path, param in jax.tree_util.tree_leaves_with_path(params):
        moments = old.pop(name := jax.tree_util.keystr(path), None)
        found = getattr(getattr(moments, "rms", None), "shape", None)
        if found != param.shape:
            raise ValueError(
                f"small_fc: the state of params{name} has shape {found}; expected {param.shape}. It was made for other "
                "parameters: make it with init(params)."
            )
    for name in old:
        raise ValueError(f"small_fc: the state has params{name}, which is no parameter; make it with init(params).")


def freeze_unseen(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """small_fc under which entries that never had a gradient do not move, by weight decay neither.

    The network has a small output for them too: without this, padding rows, rows that were never looked up and masked
    weights drift. Entries whose last gradient lies so far back that their second moment is 0 again do not move either.
    It reads the state, and fits `small_fc`'s own and that of `one_tree_per_moment`.
    """
    inner = optax.with_extra_args_support(optimizer)

    def update(
        grads: PyTree, state: SmallFcState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SmallFcState]:
        updates, after = inner.update(grads, state, params, **extra_args)
        leaves, structure = jax.tree.flatten(updates)
        moments = jax.tree.leaves(
            after.moments, is_leaf=is_moments
        )  # one tree for each, or one Moments for each tensor
        seen = jax.tree.leaves([each.rms for each in moments])
        # NaN is not 0: what went wrong stays visible.
        frozen = [jnp.where(rms == 0, 0, leaf).astype(leaf.dtype) for leaf, rms in zip(leaves, seen, strict=True)]
        return jax.tree.unflatten(structure, frozen), after

    return optax.GradientTransformationExtraArgs(inner.init, update)


def one_tree_per_moment(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """small_fc with its state as optax's own optimizers have it: a tree of arrays for each moment, none of them empty.

    Inside, all moments of a parameter stand together in its place, where flax's `nnx.Optimizer` takes arrays only, and
    below two axes `column` is empty, which Orbax can't save: outside it is one zero, as in `optax.adafactor`. Finite
    gradients beyond ±2⁴⁸ count as ±2⁴⁸.
    """
    inner = optax.with_extra_args_support(optimizer)

    def with_column(moments: features.Moments, *shape: int) -> features.Moments:
        if moments.rms.ndim > 1:
            return moments
        return moments._replace(column=sharding.zeros_beside(moments.rms, (), lead=shape))

    def outside(state: SmallFcState) -> SmallFcState:
        leaves, structure = jax.tree.flatten(state.moments, is_leaf=is_moments)
        leaves = [with_column(leaf, 1) for leaf in leaves]
        fields = [[leaf[i] for leaf in leaves] for i in range(len(features.Moments._fields))]
        return state._replace(moments=features.Moments(*(jax.tree.unflatten(structure, field) for field in fields)))

    def inside(state: SmallFcState) -> SmallFcState:
        base.check_state(state, SmallFcState, "small_fc")
        each = jax.tree.map(lambda *fields: with_column(features.Moments(*fields), 3, 0), *state.moments)
        return state._replace(moments=each)

    def limit(grad: Any) -> Any:
        # What has no real numbers is refused inside, by name.
        real = hasattr(grad, "dtype") and base.is_real(grad.dtype)
        return base.limited(grad, spec.LARGEST_GRADIENT) if real else grad

    def update(
        grads: PyTree, state: SmallFcState, params: PyTree = None, **extra_args: Any
    ) -> tuple[PyTree, SmallFcState]:
        # Limited here and not inside, where it would change the last bits of what XLA computes, and so of φ.
        updates, state = inner.update(jax.tree.map(limit, grads), inside(state), params, **extra_args)
        return updates, outside(state)

    return optax.GradientTransformationExtraArgs(lambda params: outside(inner.init(params)), update)


class Matrices(NamedTuple):
    """The network's matrices, transposed: products are weight @ x with x [F, entries]."""

    entry: Float[Array, "H 16"]
    row: Float[Array, "H 6"]
    column: Float[Array, "H 6"]
    time: Float[Array, "H 11"]
    b0: Float[Array, "H 1"]
    w1: Float[Array, "H H"]
    b1: Float[Array, "H 1"]
    w2: Float[Array, "2 H"]
    b2: Float[Array, "2 1"]


class Blocks(NamedTuple):
    """How k matrices [a, b] are cut: blocks of whole rows, or of a piece of one row. The last ones may overlap."""

    shape: tuple[int, int, int]  # k, a, b
    rows: int
    columns: int


class Start(NamedTuple):
    """Where a block begins."""

    matrix: jax.Array | int
    row: jax.Array | int
    column: jax.Array | int


def arrange(meta_params: base.MetaParams) -> Matrices:
    """φ as the products take it."""
    w0, w1, w2 = (meta_params[name].T for name in ("w0", "w1", "w2"))
    b0, b1, b2 = (meta_params[name][:, None] for name in ("b0", "b1", "b2"))
    names = (spec.ENTRY_COLUMNS, spec.ROW_COLUMNS, spec.COLUMN_COLUMNS, spec.TIME_COLUMNS)
    entry, row, column, time = (w0[:, columns] for columns in names)
    # Without the barrier XLA folds the transposes into the products, and its fast CPU product takes plain w @ x only.
    return jax.lax.optimization_barrier(Matrices(entry, row, column, time, b0, w1, b1, w2, b2))


def first_bias(weights: Matrices, clock: Int[Array, ""] | Float[Array, ""]) -> Float[Array, "H 1"]:
    """The first bias with the time inputs, equal for all entries, folded in."""
    return weights.b0 + product(weights.time, features.time_inputs(clock)[:, None])


OneTensor = tuple[jax.Array, jax.Array, features.Moments, features.Layout]  # gradient, parameter, its moments, layout


def apply_network(weights: Matrices, bias: Float[Array, "H 1"], tensors: list[OneTensor]) -> list[Float[Array, "2 _"]]:
    """The two outputs for every entry of every tensor: a list of [2, entries], in the order of `as_matrices`."""
    layouts = [of for *_, of in tensors]
    small = [i for i, of in enumerate(layouts) if is_small(of)]
    large = [i for i in range(len(tensors)) if i not in small]

    def network(of: features.Layout, arrays: tuple[jax.Array, jax.Array, features.Moments]) -> Float[Array, "2 _"]:
        return matrix_network(weights, bias, *arrays, of)

    done = over_alike(network, [layouts[i] for i in large], [tensors[i][:3] for i in large])
    outputs = dict(zip(large, done, strict=True))
    # Inside shard_map a part that shares its pass with whole tensors would make JAX take these for parts too.
    for sharded in (False, True):
        together = [i for i in small if (layouts[i].sharded is not None) == sharded]
        if together:
            sizes = [math.prod(layouts[i].shape) for i in together]
            x = jnp.concatenate([features.normalized_inputs(*tensors[i]) for i in together], axis=1)
            done = jnp.split(flat_network(weights, bias, x), list(itertools.accumulate(sizes))[:-1], axis=1)
            outputs |= dict(zip(together, done, strict=True))
    return [outputs[i] for i in range(len(tensors))]


def block_size() -> int:
    return CPU_BLOCK if jax.default_backend() == "cpu" else OTHER_BLOCK


def is_small(of: features.Layout) -> bool:
    """Tensors that share one pass: few entries, narrow rows, or no rows and columns at all."""
    k, a, b = features.matrix_shape(of)
    return of.axes is None or k * a * b <= block_size() or b < 16 or a * b < 256


def flat_network(weights: Matrices, bias: Float[Array, "H 1"], x: Float[Array, "28 n"]) -> Float[Array, "2 n"]:
    """The network on normalised inputs."""
    first = jnp.concatenate([weights.entry, weights.row, weights.column], axis=1)
    blocks = cut((1, 1, x.shape[1]))
    return over_blocks(lambda at: later_layers(weights, product(first, entries(x, blocks, at)) + bias), blocks, x)


def matrix_network(
    weights: Matrices,
    bias: Float[Array, "H 1"],
    grad: features.Entries,
    param: features.Entries,
    moments: features.Moments,
    of: features.Layout,
) -> Float[Array, "2 kab"]:
    """The network on one tensor of two axes or more.

    The row and column inputs pass the first layer in their own small spaces; of the two sums, the one that is constant
    along a row (`outer`) is added row by row. The other (`inner`) is repeated to fill a block once per tensor, because
    XLA's CPU code for adding it along short rows is not vectorised. For the same reason blocks are flat throughout.
    """
    x, blocks = features.inputs(grad, param, moments, of), cut(features.matrix_shape(of))
    (k, a, b), rows, columns = blocks

    def first_layer(weight: jax.Array, x: jax.Array) -> jax.Array:
        flat = x.reshape(x.shape[0], -1)
        return product(weight * features.normalizer(flat, of), flat).reshape(-1, *x.shape[1:])

    row, column = first_layer(weights.row, x.row), first_layer(weights.column, x.column)
    outer, inner = (row, column) if x.row.shape[-1] == 1 else (column, row)
    outer = outer.reshape(-1, k * a)
    inner = jnp.broadcast_to(inner + bias[:, :, None, None], (len(inner), k, rows, b)).reshape(-1, k, rows * b)
    weight = weights.entry * features.normalizer(x.entry, of)

    def block(at: Start) -> jax.Array:
        hidden = product(weight, entries(x.entry, blocks, at))
        repeated = jax.lax.dynamic_slice(inner, (0, at.matrix, at.column), (len(inner), 1, rows * columns))
        hidden = hidden + repeated[:, 0]
        by_row = jax.lax.dynamic_slice_in_dim(outer, at.matrix * a + at.row, rows, axis=1)
        hidden = hidden.reshape(len(hidden), rows, columns) + by_row[:, :, None]
        return later_layers(weights, hidden.reshape(len(hidden), -1))

    return over_blocks(block, blocks, x.entry)


def later_layers(weights: Matrices, hidden: Float[Array, "H n"]) -> Float[Array, "2 n"]:
    """From the sums of the first layer to the outputs."""
    hidden = product(weights.w1, jax.nn.relu(hidden)) + weights.b1
    return product(weights.w2, jax.nn.relu(hidden)) + weights.b2


def product(weight: Float[Array, "m k"], x: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return jnp.matmul(weight, x, precision=HIGHEST)


def cut(shape: tuple[int, int, int]) -> Blocks:
    """Blocks of at most block_size() entries, as even as they come."""
    (_, a, b), limit = shape, block_size()
    if b > limit:
        return Blocks(shape, 1, -(-b // -(-b // limit)))
    return Blocks(shape, -(-a // -(-a // max(1, limit // max(1, b)))), b)


def entries(x: jax.Array, blocks: Blocks, at: Start) -> jax.Array:
    """[F, k·a·b] -> [F, rows·columns]: a block lies in one piece."""
    return jax.lax.dynamic_slice_in_dim(x, position(blocks, at), blocks.rows * blocks.columns, axis=1)


def position(blocks: Blocks, at: Start) -> jax.Array | int:
    _, a, b = blocks.shape
    return (at.matrix * a + at.row) * b + at.column


def over_blocks(block: Callable[[Start], jax.Array], blocks: Blocks, x: jax.Array) -> jax.Array:
    """block: start -> [2, rows·columns] of inputs x, called for one block after the other. Returns: [2, k·a·b]."""
    (k, a, b), rows, columns = blocks
    if rows * columns == k * a * b:
        return block(Start(0, 0, 0))
    down, across = -(-a // rows), -(-b // columns)

    def body(i: jax.Array, outputs: jax.Array) -> jax.Array:
        # Clamped: where the last block overlaps the one before, the same values are written twice.
        row = jnp.minimum(i // across % down * rows, a - rows)
        column = jnp.minimum(i % across * columns, b - columns)
        at = Start(i // (across * down), row, column)
        return jax.lax.dynamic_update_slice_in_dim(outputs, block(at), position(blocks, at), axis=1)

    return jax.lax.fori_loop(0, k * down * across, body, jnp.zeros_like(x, shape=(2, k * a * b)))
