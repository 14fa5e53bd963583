"""`norm_fc` in PyTorch by Triton's kernels, on NVIDIA's GPUs: a few launches for all tensors of a param group.

Nothing here waits for the GPU, and a step can be captured in a CUDA graph after it has been taken once. Triton comes
with PyTorch's builds for CUDA; it is imported when the first CUDA tensor is to be moved. TRITON_INTERPRET=1 runs the
kernels on a CPU, slowly, if LOLO_KERNEL=triton asks for them.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from lolo.kernels import library
from lolo.optimizers import norm_fc_spec as spec
from lolo.torch import layouts
from lolo.torch.blocks import MOMENTS, Workspace
from lolo.torch.layouts import BlockLayout
from lolo.torch.sharding import State
from lolo.torch.triton_table import (
    AT,
    LIMIT,
    NARROW,
    POINTERS,
    QUANTITIES,
    TILES,
    Extents,
    LaunchPlan,
    adam_plan,
    plan,
)

FORM = "triton"
OLDEST = (3, 4)  # of Triton, that compiles these kernels. It comes with PyTorch 2.8.
MOST_PLANS = 64  # kept: they differ by which parameters have a gradient
TOGETHER = 1 << 22  # entries of matrices in one batch of Newton-Schulz, if they are several
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
LEAN = {"maxnreg": 168}
"""Registers of a thread for the network of 8 units: it spills none, and three blocks share an SM."""

Orthogonalize = Callable[[torch.Tensor, BlockLayout, tuple[int, ...]], torch.Tensor]


class Located(NamedTuple):
    """A parameter as the kernels see it, [K, A, B]; [1, 1, N] on AdamW."""

    param: torch.Tensor
    place: BlockLayout | None  # None: AdamW
    grad: torch.Tensor
    value: torch.Tensor  # the parameter, or a copy that becomes the parameter
    aligned: bool  # four entries beside each other can be read at once

    @property
    def kind(self) -> str:
        if self.place is None:
            return "adam"
        if not self.place.factored:
            return "flat"
        return "narrow" if self.place.shape[2] <= NARROW else "wide"


class Launch:
    """What stays of a launch from step to step: its plan, and the table on the device while addresses are the same."""

    def __init__(self, made: LaunchPlan, device: torch.device):
        self.plan = made
        self.owners = torch.from_numpy(made.owners).to(device)
        self.stretches = torch.from_numpy(made.stretches).to(device)
        self.addresses: np.ndarray | None = None
        self.table = torch.empty(0, dtype=torch.int64)
        self.spare: tuple[torch.Tensor, torch.Tensor] | None = None  # pinned, on the device: for a capture
        self.captured: list[Any] = []  # what graphs read when they are replayed

    def upload(self, addresses: np.ndarray, device: torch.device) -> torch.Tensor:
        """The table on the device, int64 [T, FIELDS]. addresses: [T, POINTERS]."""
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.spare is None and device.type == "cuda" and not capturing:
            empty = torch.empty(self.plan.rows.shape, dtype=torch.int64, pin_memory=True)
            self.spare = empty, torch.empty_like(empty, device=device, pin_memory=False)
        if self.addresses is not None and np.array_equal(addresses, self.addresses):
            if capturing:
                self.captured.append(self.table)
            return self.table
        rows = self.plan.rows.copy()
        rows[:, : len(POINTERS)] = addresses
        table = torch.from_numpy(rows)
        if capturing:
            return self._upload_in_capture(table)
        self.addresses = addresses
        self.table = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
        return self.table

    def _upload_in_capture(self, table: torch.Tensor) -> torch.Tensor:
        """The graph copies the table at each replay, from memory that nobody else writes to."""
        if self.spare is None:
            raise RuntimeError(
                "LoLO captures one step in a CUDA graph, and needs a step outside of one before: take one or more "
                "steps first, and one between two captures."
            )
        (pinned, there), self.spare = self.spare, None
        pinned.copy_(table)
        there.copy_(pinned, non_blocking=True)
        self.captured.append((pinned, there))
        return there


def form(device: torch.device, required: bool) -> str | None:
    """FORM where Triton's kernels run; None: the plain path. Raises KernelError if they are required and don't run."""
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        reason = None if interpreted and required else "on a CPU they need TRITON_INTERPRET=1."
    else:
        reason = refused(device)
    if reason is None:
        return FORM
    if required:
        raise library.KernelError(f"{library.VARIABLE}={FORM}: Triton's kernels do not run on {device}; {reason}")
    return None


@functools.cache
def refused(device: torch.device) -> str | None:
    """Why Triton's kernels do not run on an accelerator; None if they do. Warns where they should."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "they are written for NVIDIA's GPUs."
    try:
        import triton
    except ImportError:
        return "Triton is not installed."
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"Triton {triton.__version__} is too old: {'.'.join(map(str, OLDEST))} or newer is needed."
    try:
        with torch.cuda.device(device):
            kernels().probe[(1,)](torch.empty(1, device=device))
    except Exception as error:  # whatever a compiler or a driver can say; without a C compiler Triton starts no kernel
        reason = f"Triton says: {type(error).__name__}: {error}"
        warnings.warn(f"norm_fc runs without its GPU kernels on {device}, slowly. {reason}", stacklevel=2)
        return reason
    return None


@functools.cache
def kernels() -> Any:
    """The kernels by name. This imports Triton, which takes a second, and which is not everywhere."""
    from lolo.torch import triton_adam, triton_passes, triton_rows

    return types.SimpleNamespace(**{**vars(triton_rows), **vars(triton_passes), **vars(triton_adam)})


def type_of(dtype: torch.dtype) -> Any:
    language = kernels().tl
    return {torch.float32: language.float32, torch.bfloat16: language.bfloat16, torch.float16: language.float16}[dtype]


def prepare(param: torch.Tensor, place: BlockLayout | None) -> Located:
    """Say where a parameter and its gradient lie; where they can't be seen as [K, A, B], in a copy."""
    view = place or layouts.flat(param)
    assert param.grad is not None
    grad, value = layouts.arrange(param.grad.resolve_neg(), view), layouts.arrange(param, view)
    if place is None:
        grad, value = grad.contiguous(), value.contiguous()
    return Located(param, place, grad, value, all(map(_is_aligned, (grad, value))))


def extents_of(located: Located) -> Extents:
    assert located.place is not None
    strides = located.grad.stride(), located.value.stride()
    return Extents(located.place.shape, *strides, located.place.last_is_largest)


def _is_aligned(x: torch.Tensor) -> bool:
    *others, last = x.stride()
    return last == 1 and x.shape[2] % 4 == 0 and not any(n % 4 for n in others) and x.data_ptr() % 16 == 0


def step(
    params: Sequence[tuple[torch.Tensor, BlockLayout | None]],
    state: State,
    group: Mapping[str, Any],
    phi: torch.Tensor,
    space: Workspace,
    orthogonalize: Orthogonalize,
) -> None:
    """One step of parameters on a device. See `lolo.torch.kernel.step`, which has the same arguments."""
    alike = defaultdict[Any, list[Located]](list)
    for param, place in params:
        located = prepare(param, place)
        moments = [state[param][name] for name in ("momentum", "rms")]
        aligned = located.aligned and not any(x.data_ptr() % 16 for x in moments)
        types = (located.grad.dtype, located.value.dtype, moments[0].dtype)
        alike[located.kind, types, aligned].append(located)
    torch._foreach_add_([state[param]["step"] for param, _ in params], 1)
    with torch.cuda.device(space.device) if space.device.type == "cuda" else contextlib.nullcontext():
        for (kind, types, aligned), members in alike.items():
            names = ("GRAD_TYPE", "PARAM_TYPE", "MOMENTUM_TYPE")
            common = {name: type_of(dtype) for name, dtype in zip(names, types, strict=True)} | {"ALIGNED": aligned}
            for some in batches(members):
                if kind == "adam":
                    adam(some, state, group, space, common)
                else:
                    learn(some, kind, state, group, phi, space, orthogonalize, common)
                for located in some:
                    keep(located)


def batches(members: list[Located]) -> list[list[Located]]:
    """Tensors of equal shape side by side, in lists of at most LIMIT entries if they are several."""
    found: list[list[Located]] = []
    entries = LIMIT
    for located in sorted(members, key=lambda x: tuple(x.param.shape)):
        entries += located.param.numel()
        if entries > LIMIT:
            found.append([])
            entries = located.param.numel()
        found[-1].append(located)
    return found


def keep(located: Located) -> None:
    """The parameter has changed, and autograd is to know."""
    if located.value.data_ptr() == located.param.data_ptr():
        torch.autograd.graph.increment_version(located.param)
    else:
        place = located.place or layouts.flat(located.param)
        located.param.copy_(layouts.restore(located.value, place, located.param.shape))


def table_of(
    some: list[Located], key: Any, make: Callable[[], LaunchPlan], state: State, space: Workspace
) -> tuple[Launch, torch.Tensor]:
    """What a launch over tensors needs, and its table on the device."""
    if key not in space.plans:
        for old in [name for name, launch in space.plans.items() if not launch.captured][: -MOST_PLANS + 1]:
            del space.plans[old]
        space.plans[key] = Launch(make(), space.device)
    addresses = np.zeros((len(some), len(POINTERS)), np.int64)
    for index, located in enumerate(some):
        own = state[located.param]
        addresses[index, 0], addresses[index, 1] = located.grad.data_ptr(), located.value.data_ptr()
        for name in MOMENTS:
            if name in own:
                addresses[index, AT[name]] = own[name].data_ptr()
        addresses[index, AT["count"]] = own["step"].data_ptr()
    launch: Launch = space.plans[key]
    return launch, launch.upload(addresses, space.device)


def numbers_of(group: Mapping[str, Any], space: Workspace) -> dict[str, Any]:
    """Learning rate and weight decay. A learning rate that is a tensor on the device stays there."""
    rate, decay = group["lr"], float(group["weight_decay"])
    on_device = isinstance(rate, torch.Tensor) and rate.device.type != "cpu"
    rate = rate.to(space.device, torch.float32) if on_device else float(rate)
    return {"rate": rate, "decay": decay, "RATE_IS_TENSOR": on_device}


def sign_of(group: Mapping[str, Any]) -> float:
    return -1.0 if group["maximize"] else 1.0


def adam(
    some: list[Located], state: State, group: Mapping[str, Any], space: Workspace, common: Mapping[str, Any]
) -> None:
    """AdamW's step of tensors that are one piece of memory each."""
    sizes = tuple(located.param.numel() for located in some)
    launch, table = table_of(some, ("adam", sizes), lambda: adam_plan(sizes), state, space)
    numbers = {**numbers_of(group, space), "adam_scale": float(group["adam_scale"]), "sign": sign_of(group)}
    beta2 = float(group["adam_beta2"])
    numbers |= {"rms_gain": 1 - beta2, "rms_decay_log": math.log2(beta2) if beta2 else -math.inf}
    kernels().adam[(len(launch.plan.owners),)](table, launch.owners, **numbers, **common, **OPTIONS)


def learn(
    some: list[Located],
    kind: str,
    state: State,
    group: Mapping[str, Any],
    phi: torch.Tensor,
    space: Workspace,
    orthogonalize: Orthogonalize,
    common: Mapping[str, Any],
) -> None:
    """The network's step of tensors of one kind: of `TILES`."""
    run, hidden = kernels(), spec.hidden_of(phi.numel())
    extents = tuple(map(extents_of, some))
    launch, table = table_of(some, (kind, hidden, extents), lambda: plan(extents, kind, hidden), state, space)
    scratch = torch.empty(launch.plan.floats, dtype=torch.float32, device=space.device)
    factored, orthogonal = kind != "flat", kind != "flat" and group["orthogonal"]
    height, width = TILES[kind]
    tile = {"HEIGHT": height, "WIDTH": width, **OPTIONS}
    regions, stretches = (len(launch.plan.owners),), (len(launch.plan.stretches),)
    here, sign = (table, launch.owners, scratch), sign_of(group)
    lean = LEAN if hidden <= 8 and space.device.type == "cuda" else {}
    if factored:
        run.add_squares[regions](*here, sign, GRAD_TYPE=common["GRAD_TYPE"], ALIGNED=common["ALIGNED"], **tile)
        run.average[stretches](table, launch.stretches, scratch, **tile)
        run.project[stretches](table, launch.stretches, scratch, phi, HIDDEN=hidden, **OPTIONS)
    run.measure[regions](*here, sign, FACTORED=factored, **common, **tile, **lean)
    padded = 1 << (hidden - 1).bit_length()
    run.scale[(len(some), QUANTITIES)](table, scratch, phi, HIDDEN=hidden, PADDED=padded, BLOCK=256, **OPTIONS)
    network = {"HIDDEN": hidden, "BASELINE": group["baseline"] == "momentum", "MASKED": not orthogonal}
    run.move[regions](*here, phi, sign, FACTORED=factored, **network, **common, **tile, **lean)
    if orthogonal:
        for members, steps in matrices(some, launch.plan, scratch):
            first = members[0]
            assert first.place is not None
            steps.copy_(orthogonalize(steps, first.place, tuple(first.param.shape)))
        run.measure_orthogonal[regions](*here, ALIGNED=common["ALIGNED"], **tile)
    run.normalize[(len(some),)](table, scratch, HIDDEN=hidden, BLOCK=256, **OPTIONS)
    if group["step_rms"] == "adam":
        kinds = {"MOMENTUM_TYPE": common["MOMENTUM_TYPE"], "ALIGNED": common["ALIGNED"]}
        run.measure_adam[regions](*here, **kinds, **tile)
        run.size_as_adam[(len(some),)](table, scratch, HIDDEN=hidden, BLOCK=256, **OPTIONS)
    numbers = {**numbers_of(group, space), "PARAM_TYPE": common["PARAM_TYPE"], "ALIGNED": common["ALIGNED"]}
    run.finish[regions](*here, **numbers, HIDDEN=hidden, MASKED=not orthogonal, **tile)


def matrices(some: list[Located], made: LaunchPlan, scratch: torch.Tensor) -> list[tuple[list[Located], torch.Tensor]]:
    """Tensors of equal shape in batches, and their steps, [T, K, A, B], which lie side by side in the scratch."""
    found: list[list[int]] = []
    for index, located in enumerate(some):
        shape, size = located.param.shape, located.param.numel()
        if not found or some[found[-1][0]].param.shape != shape or (len(found[-1]) + 1) * size > TOGETHER:
            found.append([])
        found[-1].append(index)
    batched = []
    for indices in found:
        members, start = [some[index] for index in indices], made.steps[indices[0]]
        place = members[0].place
        assert place is not None
        steps = scratch[start : start + sum(x.param.numel() for x in members)]
        batched.append((members, steps.view(len(members), *place.shape)))
    return batched
