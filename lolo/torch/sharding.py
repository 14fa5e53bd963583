"""DTensors, as FSDP2 (`fully_shard`) makes them: what lies on this process, and state that lies as they do.

A DTensor may be replicated, or cut along axis 0 by one axis of its mesh. State that belongs to entries is cut where the
parameter is. So is the factored moment that has axis 0; the other one, a mean over axis 0, is replicated, since every
process computes it from the same sums. `torch.distributed.checkpoint` can bring both to any number of processes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any, NamedTuple

import torch

from lolo.torch.rounds import Share, rows_of

State = MutableMapping[torch.Tensor, dict[str, torch.Tensor]]  # of a `torch.optim.Optimizer`, by parameter


class Zeros(NamedTuple):
    """What is kept for a parameter under one name, zero at first."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int | None  # along which the parameter's axis 0 lies, alone or before others; None: it is a mean over it


class Opened(NamedTuple):
    """Parameters and their state as plain tensors, of DTensors the part that lies here."""

    params: list[torch.Tensor]
    state: State
    shares: dict[torch.Tensor, Share]  # of those that are cut


def dtensors(tensors: Iterable[Any]) -> list[Any]:
    """Those of them that are DTensors. There is none before its module is imported, which takes a second."""
    module = sys.modules.get("torch.distributed.tensor")
    return [] if module is None else [x for x in tensors if isinstance(x, module.DTensor)]


def is_dtensor(x: Any) -> bool:
    return bool(dtensors((x,)))


def is_cut_along_rows(param: Any) -> bool:
    """Whether a DTensor lies as LoLO wants it: whole everywhere, or cut along axis 0 by one axis of the mesh."""
    cuts = [placement for placement in param.placements if not placement.is_replicate()]
    return len(cuts) <= 1 and all(type(cut).__name__ == "Shard" and cut.dim == 0 for cut in cuts)


def kinds(params: list[torch.Tensor]) -> set[str]:
    """Kinds of the devices on which the processes of DTensors compute together."""
    return {param.device_mesh.device_type for param in dtensors(params)}


def lies_here(param: torch.Tensor) -> bool:
    """Whether this process is one of those that have a tensor; a DTensor's mesh may leave it out."""
    return not is_dtensor(param) or param.device_mesh.get_coordinate() is not None


def share_of(param: Any) -> Share | None:
    """How the rows of a DTensor are divided; None where it is whole everywhere."""
    for axis, placement in enumerate(param.placements):
        if not placement.is_replicate():
            mesh = param.device_mesh
            return Share(tuple(param.shape), mesh.get_group(axis), torch.device(mesh.device_type))
    return None


def opened(params: list[torch.Tensor], state: State, zeros: Callable[[torch.Tensor], dict[str, Zeros]]) -> Opened:
    """What a step works on: the tensors themselves, and for DTensors views of what lies here."""
    if not dtensors(params):
        return Opened(params, state, {})
    local: list[torch.Tensor] = []
    states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
    shares: dict[torch.Tensor, Share] = {}
    for param in params:
        if not is_dtensor(param):
            local.append(param)
            states[param] = state[param]
            continue
        here, grad = param.to_local().detach(), param.grad.to_local()
        torch.autograd.graph.increment_version(param)  # which moves unseen by autograd, since `here` does
        if grad.dtype != here.dtype:
            here.grad_dtype = grad.dtype  # as the parameter's grad_dtype allows
        here.grad = grad
        local.append(here)
        states[here] = {"step": state[param]["step"]}
        for name, place in zeros(param).items():
            lies = local_shape(place, param.shape, here.shape)
            states[here][name] = state[param][name].to_local().view(lies)
        share = share_of(param)
        if share is None:
            continue
        shares[here], rows = share, rows_of(share)
        if rows[torch.distributed.get_rank(share.group)] != here.shape[0]:
            raise ValueError(
                f"a parameter of shape {tuple(param.shape)} has {here.shape[0]} rows on this process; LoLO expects the "
                f"processes to have {rows}, as fully_shard and distribute_tensor divide them."
            )
    return Opened(local, states, shares)


def local_shape(place: Zeros, whole: torch.Size, local: torch.Size) -> tuple[int, ...]:
    """Shape of the part of a state that lies here, of a parameter [*whole] of which [*local] lies here."""
    if place.axis is None or not whole:
        return place.shape
    axis = place.axis
    return (*place.shape[:axis], place.shape[axis] // whole[0] * local[0], *place.shape[axis + 1 :])


def divisible_shape(place: Zeros, whole: torch.Size) -> tuple[int, ...]:
    """Shape of a state whose axis of the parameter's rows has been parted from others in its place, if it has any."""
    if place.axis is None or not whole or place.shape[place.axis] == whole[0]:
        return place.shape
    axis = place.axis
    return (*place.shape[:axis], whole[0], place.shape[axis] // whole[0], *place.shape[axis + 1 :])


def zeros_beside(param: Any, place: Zeros) -> torch.Tensor:
    """Zeros as a parameter's state: where the parameter is, and divided as it is."""
    if not is_dtensor(param):
        return torch.zeros(place.shape, device=param.device, dtype=place.dtype)
    local = param.to_local()
    lies = torch.zeros(local_shape(place, param.shape, local.shape), device=local.device, dtype=place.dtype)
    return beside(param, place, lies)


def beside(param: Any, place: Zeros, local: torch.Tensor) -> torch.Tensor:
    """A DTensor made of the parts of a state that lie on each process."""
    from torch.distributed.tensor import DTensor  # takes a second, and is there where a DTensor is

    shape = divisible_shape(place, param.shape)
    stride = torch.empty(shape, device="meta").stride()
    parted = (*shape[: place.axis], -1, *shape[place.axis + 1 :]) if place.axis is not None else shape
    placements = placements_beside(param, place)
    return DTensor.from_local(
        local.view(parted), param.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def placements_beside(param: Any, place: Zeros) -> tuple[Any, ...]:
    """How a state of a DTensor is divided."""
    from torch.distributed.tensor import Replicate, Shard

    cut = Replicate() if place.axis is None else Shard(place.axis)
    return tuple(placement if placement.is_replicate() else cut for placement in param.placements)


def check_division(value: Any, param: Any, place: Zeros) -> None:
    """Raise ValueError for a saved state that is a DTensor, but not as it would lie beside the parameter."""
    if not is_dtensor(value):
        return
    same = is_dtensor(param) and value.device_mesh == param.device_mesh
    if not same or value.placements != placements_beside(param, place):
        raise ValueError(
            f"the saved state of a parameter of shape {tuple(param.shape)} is divided among processes otherwise "
            "than the parameter: use get_optimizer_state_dict and set_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict, which bring it to these."
        )


def taken_up(value: Any, param: Any, place: Zeros) -> torch.Tensor:
    """A copy of a saved state that `check_division` has passed, as it lies beside the parameter."""
    if is_dtensor(value):
        local = value.to_local()
    elif is_dtensor(param):
        share, local = share_of(param), value
        if share is not None and place.axis is not None:
            rows = rows_of(share)
            rank = torch.distributed.get_rank(share.group)
            each = place.shape[place.axis] // param.shape[0]
            local = value.reshape(place.shape).narrow(place.axis, sum(rows[:rank]) * each, rows[rank] * each)
    else:
        return value.detach().clone().reshape(place.shape).to(param.device, place.dtype)
    local = local.detach().to(param.device, place.dtype).clone(memory_format=torch.contiguous_format)
    return beside(param, place, local)
