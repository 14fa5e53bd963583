"""One step of `norm_fc` by the CPU kernel (lolo/kernels), as one call for all tensors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lolo.kernels import library
from lolo.kernels.library import ADAM, FACTORED, VECTOR
from lolo.optimizers import sharding
from lolo.optimizers.base import MetaParams
from lolo.optimizers.factored import FactoredAxes
from lolo.optimizers.norm_fc_features import NormFcMoments

STEP, FINISH = "lolo_norm_fc_step", "lolo_norm_fc_finish"
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)  # of parameters and gradients


R = TypeVar("R")
Moved: TypeAlias = tuple[jax.Array, NormFcMoments]  # the update of a tensor, and its moments after the gradient


class KernelTensor(NamedTuple):
    """One tensor of a step."""

    grad: jax.Array  # [*shape]
    param: jax.Array
    moments: NormFcMoments
    axes: FactoredAxes | None
    learned: bool
    adam_sized: bool  # whether its step gets the root mean square of AdamW's, not 1
    orthogonalize: Callable[[jax.Array], jax.Array] | None  # what comes before the step's normalisation; None: nothing


@functools.cache
def register() -> bool:
    """Make the kernel known to XLA. Returns: whether there is one, built for XLA."""
    built = library.load()
    if built is None or not hasattr(built, f"{STEP}_xla"):
        return False
    try:
        for name in (STEP, FINISH):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(built, f"{name}_xla")), platform="cpu")
    except Exception:  # of whatever kind: XLA's way to say that the library was built for another version of its FFI
        return False
    return True


def one_device() -> bool:
    """Whether what is traced here runs on one CPU at a time: there is one, or shard_map gives each its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    alone = jax.device_count() == 1 if mesh.empty else set(mesh.manual_axes) == set(mesh.axis_names)
    return alone and jax.default_backend() == "cpu"


def path(kernel: str) -> str:
    """What the update of whole float32 parameters runs on: "plain", or "kernel " and its form."""
    return library.path(kernel) if jax.default_backend() == "cpu" and register() else "plain"


def form(kernel: str, state_dtype: Any, axis_name: str | None, trees: Any) -> str | None:
    """The form of the kernel that serves; None: the plain path. trees: gradients and parameters.

    Raises KernelError for a form that does not run here.
    """
    chosen, leaves = library.form(kernel), jax.tree.leaves(trees)
    serves = (
        chosen is not None
        and axis_name is None
        and state_dtype == jnp.float32
        and all(x.dtype in DTYPES for x in leaves)
        and one_device()
        and not any(sharding.varying_axes(x) for x in leaves)
        and register()
    )
    return chosen if serves else None


def with_derivatives_of(plain: Callable[..., R], kernel: Callable[..., R]) -> Callable[..., R]:
    """The kernel's function, for JAX to take derivatives of: those of the plain path's."""
    run = jax.custom_jvp(kernel)
    run.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return run


def step(
    form: str,
    meta_params: MetaParams,
    baseline: bool,
    count: Int[Array, ""],
    numbers: Float[Array, "3"],
    decays: Sequence[float | jax.Array],
    tensors: Sequence[KernelTensor],
) -> list[Moved]:
    """Updates in float32 and moments after the gradient.

    Args:
      count: steps done so far.
      numbers: learning rate, adam_scale, and 1 − adam_beta2.
      decays: weight decay of each tensor.
    """
    done = [(jnp.zeros_like(x.param, jnp.float32), x.moments) for x in tensors]
    present = [i for i, x in enumerate(tensors) if x.param.size]
    if not present:
        return done
    places = [place_of(tensors[i]) for i in present]
    words = [
        place.words(baseline, tensors[i].orthogonalize is not None, tensors[i].adam_sized)
        for i, place in zip(present, places, strict=True)
    ]
    phi = {name: x.astype(jnp.float32) for name, x in meta_params.items()}
    network = [phi["w0"], phi["b0"], phi["w1"], phi["b1"], phi["w2"][:, 0], phi["b2"][0]]
    arguments: list[jax.Array] = [count, numbers, stacked(decays, present), *network]
    results: list[jax.ShapeDtypeStruct] = []
    aliases: dict[int, int] = {}
    for i, place in zip(present, places, strict=True):
        arrays = arranged(tensors[i], place)
        first = len(arguments) + 2  # what comes after gradient and parameter is updated in place
        aliases |= {first + k: len(results) + 1 + k for k in range(len(arrays) - 2)}
        results += [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in arrays[1:]]
        arguments += arrays
    call = jax.ffi.ffi_call(STEP, results, vmap_method="broadcast_all", input_output_aliases=aliases)
    hidden, number = meta_params["b0"].shape[0], library.FORMS.index(form)
    found = iter(call(*arguments, tensors=np.array(words).ravel(), hidden=np.int64(hidden), form=np.int64(number)))
    for i, place in zip(present, places, strict=True):
        done[i] = restored(found, tensors[i], place)
    return finished(form, count, numbers, decays, tensors, done)


def stacked(decays: Sequence[float | jax.Array], chosen: Sequence[int]) -> Float[Array, "T"]:
    return jnp.stack([jnp.asarray(decays[i], jnp.float32) for i in chosen])


def finished(
    form: str,
    count: Int[Array, ""],
    numbers: Float[Array, "3"],
    decays: Sequence[float | jax.Array],
    tensors: Sequence[KernelTensor],
    done: list[Moved],
) -> list[Moved]:
    """The same with updates instead of steps where they are to be orthogonalised."""
    steps = {i: x.orthogonalize(done[i][0]) for i, x in enumerate(tensors) if x.orthogonalize and x.param.size}
    if not steps:
        return done
    arguments: list[jax.Array] = [count, numbers, stacked(decays, list(steps))]
    aliases: dict[int, int] = {}
    for k, (i, direction) in enumerate(steps.items()):
        aliases[len(arguments)] = k
        arguments += [direction, done[i][1].rms, tensors[i].param.astype(jnp.float32)]
        arguments += [done[i][1].momentum] if tensors[i].adam_sized else []
    results = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in steps.values()]
    call = jax.ffi.ffi_call(FINISH, results, vmap_method="broadcast_all", input_output_aliases=aliases)
    words = [[VECTOR, 1, 1, 1, x.size, 1, 0, 0, int(tensors[i].adam_sized)] for i, x in steps.items()]
    updates = call(*arguments, tensors=np.array(words).ravel(), form=np.int64(library.FORMS.index(form)))
    for i, update in zip(steps, updates, strict=True):
        done[i] = update, done[i][1]
    return done


class Place(NamedTuple):
    """How the kernel sees a tensor: as [outer, a, inner, b] in memory, a and b its factored axes."""

    kind: int
    extents: tuple[int, int, int, int]
    last_is_largest: bool
    order: tuple[int, ...] | None  # of the axes where they must be transposed: a factored axis has to be the last

    def words(self, baseline: bool, unfinished: bool, adam_sized: bool) -> list[int]:
        return [self.kind, *self.extents, *map(int, (self.last_is_largest, baseline, unfinished, adam_sized))]

    def arrange(self, x: jax.Array, without: int | None = None) -> jax.Array:
        """[..., *shape less one axis] -> the same with its axes in the kernel's order."""
        if self.order is None:
            return x
        kept = [axis for axis in self.order if axis != without]
        lead = x.ndim - len(kept)
        return jnp.transpose(x, [*range(lead), *(lead + sorted(kept).index(axis) for axis in kept)])

    def restore(self, x: jax.Array, without: int | None = None) -> jax.Array:
        """The inverse of `arrange`."""
        if self.order is None:
            return x
        kept = [axis for axis in self.order if axis != without]
        lead = x.ndim - len(kept)
        return jnp.transpose(x, [*range(lead), *(lead + kept.index(axis) for axis in sorted(kept))])


def place_of(tensor: KernelTensor) -> Place:
    shape, axes = tensor.param.shape, tensor.axes
    if not tensor.learned or axes is None:
        return Place(VECTOR if tensor.learned else ADAM, (1, 1, 1, tensor.param.size), True, None)
    order = None
    if max(axes) != len(shape) - 1:
        order = (*(axis for axis in range(len(shape)) if axis not in axes), axes.second, axes.largest)
    ordered = order or tuple(range(len(shape)))
    first, last = sorted(map(ordered.index, axes))
    outer, a, inner = ordered[:first], ordered[first], ordered[first + 1 : last]
    extents = (math.prod(shape[i] for i in outer), shape[a], math.prod(shape[i] for i in inner), shape[ordered[-1]])
    return Place(FACTORED, extents, ordered[-1] == axes.largest, order)


def arranged(tensor: KernelTensor, place: Place) -> list[jax.Array]:
    """Gradient, parameter, momenta, rms, and the factored moments that there are, as the kernel takes them."""
    check_moments(tensor, place)
    (momentum, rms, row, column), axes = NormFcMoments(*(x.astype(jnp.float32) for x in tensor.moments)), tensor.axes
    arrays = [place.arrange(x) for x in (tensor.grad.astype(jnp.float32), tensor.param.astype(jnp.float32))]
    arrays += [place.arrange(momentum), place.arrange(rms)]
    if place.kind == FACTORED and axes is not None:
        arrays += [place.arrange(row, axes.largest), place.arrange(column, axes.second)]
    return [*arrays, row] if place.kind == VECTOR else arrays


def check_moments(tensor: KernelTensor, place: Place) -> None:
    """Raise ValueError for moments of another shape than the parameter's: the kernel does not look at shapes."""
    shape, axes = tensor.param.shape, tensor.axes

    def less(axis: int) -> tuple[int, ...]:
        return (3, *shape[:axis], *shape[axis + 1 :])

    expected = [(1 if place.kind == ADAM else 3, *shape), shape]
    if place.kind == FACTORED and axes is not None:
        expected += [less(axes.largest), less(axes.second)]
    if place.kind == VECTOR:
        expected.append((3, *shape))
    found = [x.shape for x in tensor.moments[: len(expected)]]
    if found != expected:
        raise ValueError(f"norm_fc: the state of a parameter of shape {shape} has shapes {found}; expected {expected}.")


def restored(arrays: Iterator[jax.Array], tensor: KernelTensor, place: Place) -> Moved:
    """What the kernel gives for one tensor: its update or step, and its moments."""
    out, momentum, rms = (place.restore(next(arrays)) for _ in range(3))
    moments, axes = tensor.moments._replace(momentum=momentum, rms=rms), tensor.axes
    if place.kind == VECTOR:
        moments = moments._replace(row=next(arrays))
    if place.kind == FACTORED and axes is not None:
        row, column = place.restore(next(arrays), axes.largest), place.restore(next(arrays), axes.second)
        moments = moments._replace(row=row, column=column)
    return out, moments
