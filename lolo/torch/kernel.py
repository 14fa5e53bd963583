"""`norm_fc` in PyTorch by a kernel: which one serves a param group, and the CPU kernel (lolo/kernels).

That is one call for all tensors of the group. On a GPU it is `triton_kernel`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from lolo.kernels import library
from lolo.kernels.library import ADAM, FACTORED, VECTOR
from lolo.optimizers import norm_fc_spec as spec
from lolo.torch import layouts, triton_kernel
from lolo.torch.blocks import MOMENTS, Workspace
from lolo.torch.layouts import BlockLayout
from lolo.torch.sharding import State, Zeros

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = (torch.Tensor, torch.nn.Parameter)  # a subclass may keep its numbers anywhere


class Placed(NamedTuple):
    """A parameter as the kernel sees it."""

    param: torch.Tensor
    place: BlockLayout | None  # None: AdamW
    direct: bool  # whether the kernel writes into the parameter; otherwise into `out`
    entry: library.Tensor
    held: list[torch.Tensor]  # what the entry points to
    step: torch.Tensor | None  # [K, A, B], of the network, where it is to be orthogonalised


def form(group: Mapping[str, Any], space: Workspace) -> str | None:
    """The form of the kernel that serves a param group's tensors; None: the plain path. Raises KernelError."""
    chosen = chosen_form(group["kernel"], space.device)
    return chosen if chosen == triton_kernel.FORM or group["state_dtype"] == torch.float32 else None


def chosen_form(kernel: str, device: torch.device) -> str | None:
    """The form that runs on a device: as `library.form` has it, and Triton's on a GPU."""
    requested = os.environ.get(library.VARIABLE, "")
    if device.type == "cpu" and (requested != triton_kernel.FORM or kernel == "plain"):
        return library.form(kernel)
    if kernel == "plain" or requested in library.OFF:
        return None
    return triton_kernel.form(device, required=requested == triton_kernel.FORM)


def path(device: torch.device) -> str:
    """What runs on a device, as the benchmark names it: "plain", or "kernel " and its form."""
    chosen = chosen_form("auto", device)
    return "plain" if chosen is None else f"kernel {chosen}"


def serves(param: torch.Tensor, state: State, expected: Mapping[str, Zeros]) -> bool:
    """Whether the kernel can move a parameter. expected: its moments.

    The kernel works on addresses: a moment that is not what it should be, as others may have left it, is not for it.
    """
    if type(param) not in KINDS or type(param.grad) not in KINDS or param.dtype not in DTYPES:
        return False
    assert param.grad is not None
    own, device = state[param], param.device
    if param.grad.dtype not in DTYPES or own["step"].device != device:
        return False
    return all(_is(own.get(name), shape, dtype, device) for name, (shape, dtype, *_) in expected.items())


def _is(x: Any, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> bool:
    return type(x) in KINDS and x.shape == shape and x.dtype == dtype and x.device == device and x.is_contiguous()


def prepare(
    param: torch.Tensor,
    state: dict[str, torch.Tensor],
    group: Mapping[str, Any],
    place: BlockLayout | None,
    step: torch.Tensor | None,
) -> Placed:
    """Count the step, and say where everything lies. step: [K, A, B], where it is to be orthogonalised."""
    view = place or layouts.flat(param)
    assert param.grad is not None
    grad = layouts.arrange(param.grad, view).float().resolve_neg().contiguous()
    grad = -grad if group["maximize"] else grad
    value = layouts.arrange(param, view)
    direct = value.dtype == torch.float32 and value.is_contiguous() and value.data_ptr() == param.data_ptr()
    value = value if direct else value.float().contiguous()
    out = value if direct else torch.empty_like(value)
    moments = {name: state[name] for name in MOMENTS if name in state}
    state["step"] += 1
    kept, other, last = view.shape
    entry = library.Tensor(grad=grad.data_ptr(), param=value.data_ptr(), out=out.data_ptr(), size=param.numel())
    entry.kind = ADAM if place is None else FACTORED if place.factored else VECTOR
    entry.outer, entry.a, entry.inner, entry.b = kept, other, 1, last
    entry.last_is_largest, entry.baseline = view.last_is_largest, group["baseline"] == "momentum"
    entry.unfinished, entry.in_place = step is not None, direct
    entry.adam_sized = place is not None and group["step_rms"] == "adam"
    entry.count, entry.decay = int(state["step"]), float(group["weight_decay"])
    for name, moment in moments.items():
        setattr(entry, name, moment.data_ptr())
        setattr(entry, f"new_{name}", moment.data_ptr())
    return Placed(param, place, direct, entry, [grad, value, out, *moments.values()], step)


def step(
    form: str,
    params: list[tuple[torch.Tensor, BlockLayout | None]],
    state: State,
    group: Mapping[str, Any],
    phi: torch.Tensor,
    space: Workspace,
    orthogonalize: Callable[[torch.Tensor, BlockLayout, tuple[int, ...]], torch.Tensor],
) -> None:
    """One step of parameters of one device.

    Args:
      params: each with its layout; without one it gets AdamW.
      phi: [30·H + 2·H + H² + H + 1], φ's arrays one after the other.
      orthogonalize: ([1, K, A, B], layout, shape) -> [1, K, A, B].
    """
    if form == triton_kernel.FORM:
        triton_kernel.step(params, state, group, phi, space, orthogonalize)
        return
    tensors = []
    for param, place in params:
        waits = place is not None and place.factored and group["orthogonal"]
        unfinished = torch.empty(place.shape, dtype=torch.float32, device=space.device) if place and waits else None
        tensors.append(prepare(param, state[param], group, place, unfinished))
    for tensor in tensors:
        tensor.entry.step = None if tensor.step is None else tensor.step.data_ptr()
    # A thread finishes a tensor before it begins the next one, and leaves its steps in one place.
    threads = min(torch.get_num_threads(), len(tensors))
    sizes = sorted((t.entry.size for t in tensors if t.place and t.step is None), reverse=True)
    steps = space.take("step", sum(sizes[:threads]) or 1)
    settings = library.Settings(float(group["lr"]), float(group["adam_scale"]), 1 - float(group["adam_beta2"]))
    library.step(form, [tensor.entry for tensor in tensors], pointers(phi), settings, steps.data_ptr(), threads)
    for tensor in tensors:
        if tensor.step is not None and tensor.place is not None:
            done = orthogonalize(tensor.step.unsqueeze(0), tensor.place, tuple(tensor.param.shape)).contiguous()
            tensor.entry.step = done.data_ptr()
            library.finish(form, [tensor.entry], settings)
        if tensor.direct:
            torch.autograd.graph.increment_version(tensor.param)
        else:
            out = tensor.held[2]
            tensor.param.add_(layouts.restore(out, tensor.place or layouts.flat(tensor.param), tensor.param.shape))


def pointers(phi: torch.Tensor) -> library.Phi:
    """Where φ's arrays lie: of H² + 33·H + 1 numbers."""
    hidden = spec.hidden_of(phi.numel())
    found, at = library.Phi(hidden=hidden), phi.data_ptr()
    for name, size in zip(("w0", "b0", "w1", "b1", "w2", "b2"), (30, 1, hidden, 1, 1, 0), strict=True):
        setattr(found, name, at)
        at += 4 * size * hidden
    return found
