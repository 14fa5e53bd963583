"""Tensors of which each process has some rows: what the processes of a group compute together, for all tensors at once.

A step of one batch of tensors is a generator. It yields what it can't know from its own rows, `Sums` or
`WholeMatrices`, and gets it back complete; whole tensors yield nothing. `run` drives all of them in lockstep and
answers all `Sums` with one all-reduce, all `WholeMatrices` with two all-to-alls, so that their number
does not depend on the number of tensors.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import torch

LARGEST_TURN = 1 << 26  # entries of whole matrices that a process gathers at a time: 256 MiB of float32
SMALL_MATRIX = 1 << 16  # entries of a matrix that is orthogonalised together with others of its shape


class Share(NamedTuple):
    """How a tensor's rows are divided: N processes have ⌈rows / N⌉ each, the last ones fewer or none (torch.chunk)."""

    shape: tuple[int, ...]  # of the whole tensor
    group: Any  # ProcessGroup: the N processes
    device: torch.device  # kind of device that the group's collectives want


class Sums(NamedTuple):
    """Numbers to be added over the processes of a group; every process has as many."""

    tensors: list[torch.Tensor]
    share: Share


class WholeMatrices(NamedTuple):
    """Rows of T matrices, and what is to be computed of the whole ones."""

    rows: torch.Tensor  # [T, n, columns], n of this process
    share: Share
    function: Callable[[torch.Tensor], torch.Tensor]  # [T, rows, columns] -> [T, rows, columns]


Rounds = Generator[Sums | WholeMatrices, list[torch.Tensor], None]
"""A step of some tensors: the answer to `Sums` is their totals, that to `WholeMatrices` the rows of the results."""


def largest_rows(share: Share) -> int:
    """Rows of the process that has most."""
    return -(-share.shape[0] // share.group.size())


def rows_of(share: Share) -> list[int]:
    """Rows of every process."""
    step, rows = largest_rows(share), share.shape[0]
    return [min(step, max(0, rows - rank * step)) for rank in range(share.group.size())]


def run(steps: Iterable[Rounds]) -> None:
    """Finish all steps. Every process of a group must have the same ones, in the same order."""
    waiting = [(rounds, request) for rounds in steps if (request := next(rounds, None)) is not None]
    while waiting:
        kind = WholeMatrices if any(isinstance(request, WholeMatrices) for _, request in waiting) else Sums
        groups = defaultdict[Any, list[int]](list)
        for index, (_, request) in enumerate(waiting):
            if isinstance(request, kind):
                groups[request.share.group].append(index)
        following: dict[int, Sums | WholeMatrices | None] = {}
        for members in groups.values():
            answer = exchange if kind is WholeMatrices else add
            for index, complete in zip(members, answer([waiting[index][1] for index in members]), strict=True):
                following[index] = advance(waiting[index][0], complete)
        left = [(rounds, following.get(index, request)) for index, (rounds, request) in enumerate(waiting)]
        waiting = [(rounds, request) for rounds, request in left if request is not None]


def advance(rounds: Rounds, complete: list[torch.Tensor]) -> Sums | WholeMatrices | None:
    """What a step asks for next; None where it is finished."""
    try:
        return rounds.send(complete)
    except StopIteration:
        return None


def add(requests: list[Any]) -> list[list[torch.Tensor]]:
    """Totals of the `Sums` of one group, by one all-reduce."""
    numbers = [x for request in requests for x in request.tensors]
    share = requests[0].share
    if not numbers or share.group.size() == 1:
        return [request.tensors for request in requests]
    flat = torch.cat([x.flatten().to(share.device) for x in numbers])
    with naming_the_cause(share):
        torch.distributed.all_reduce(flat, group=share.group)
    parts = iter(flat.split([x.numel() for x in numbers]))
    return [[next(parts).view(x.shape).to(x.device) for x in request.tensors] for request in requests]


def exchange(requests: list[Any]) -> list[list[torch.Tensor]]:
    """Results for the `WholeMatrices` of one group: each whole matrix is worked on by one process, by turns."""
    share = requests[0].share
    if share.group.size() == 1:
        return [[request.function(request.rows)] for request in requests]
    rows = [matrix for request in requests for matrix in request.rows]
    origin = [request for request in requests for _ in request.rows]
    shapes = tuple((request.share.shape[0], request.rows.shape[2]) for request in origin)
    results: dict[int, torch.Tensor] = {}
    for owned in turns(shapes, share.group.size(), LARGEST_TURN):
        results |= turn(owned, rows, origin)
    in_order = iter([results[index] for index in range(len(rows))])
    return [[torch.stack([next(in_order) for _ in request.rows])] for request in requests]


@functools.lru_cache(maxsize=64)
def turns(shapes: tuple[tuple[int, int], ...], processes: int, largest: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Which process works on which matrices in which turn: the costliest first, each for who has least to do.

    shapes: [rows, columns] of all matrices. Returns, for each turn and process, indices of matrices of at most
    `largest` entries together, or of one.
    """
    load, bins = [0] * processes, [[list[int]()] for _ in range(processes)]
    size = [math.prod(shape) for shape in shapes]
    cost = [min(shape) ** 2 * (2 * max(shape) + min(shape)) for shape in shapes]  # of an iteration, in products
    for index in sorted(range(len(shapes)), key=lambda index: -cost[index]):
        process = load.index(min(load))
        load[process] += cost[index]
        last = bins[process][-1]
        if last and sum(size[i] for i in last) + size[index] > largest:
            bins[process].append(last := [])
        last.append(index)
    count = max(map(len, bins))
    return tuple(tuple(tuple(own[turn]) if turn < len(own) else () for own in bins) for turn in range(count))


def turn(
    owned: tuple[tuple[int, ...], ...], rows: list[torch.Tensor], origin: list[WholeMatrices]
) -> dict[int, torch.Tensor]:
    """One turn: bring the rows of each matrix to its owner, and those of the result back.

    Args:
      owned: indices of matrices, for each process.
      rows: [n, columns], this process's rows of every matrix.
      origin: the request of each.
    """
    share = origin[0].share
    here = torch.distributed.get_rank(share.group)
    counts, columns = {i: rows_of(origin[i].share) for i in owned[here]}, [x.shape[1] for x in rows]
    sizes = [[counts[i][process] * columns[i] for i in owned[here]] for process in range(len(owned))]
    outgoing = [sum(rows[i].numel() for i in own) for own in owned]
    incoming = [sum(size) for size in sizes]
    order = [i for own in owned for i in own]
    device = rows[0].device

    def swap(pieces: list[torch.Tensor], sent: list[int], received: list[int]) -> torch.Tensor:
        empty = rows[0].new_empty(0)  # for a process that has nothing to give, of the others' dtype
        flat = torch.cat([empty, *(x.flatten() for x in pieces)]).to(share.device)
        found = flat.new_empty(sum(received))
        with naming_the_cause(share):
            torch.distributed.all_to_all_single(found, flat, received, sent, group=share.group)
        return found

    # What computes is the device of the collectives: with parameters offloaded to the CPU, the accelerator.
    flat = swap([rows[i] for i in order], outgoing, incoming)
    parts = [piece.split(size) for piece, size in zip(flat.split(incoming), sizes, strict=True)]
    whole = {i: torch.cat([part[at] for part in parts]).view(-1, columns[i]) for at, i in enumerate(owned[here])}
    done = computed(whole, origin)
    pieces = [list(done[i].split(counts[i])) for i in owned[here]]
    flat = swap([own[process] for process in range(len(owned)) for own in pieces], incoming, outgoing)
    results = flat.to(device).split([rows[i].numel() for i in order])
    return {i: result.view(rows[i].shape) for i, result in zip(order, results, strict=True)}


def computed(whole: dict[int, torch.Tensor], origin: list[WholeMatrices]) -> dict[int, torch.Tensor]:
    """The results of whole matrices, small ones of equal shape together."""
    alike = defaultdict[Any, list[int]](list)
    for i, matrix in whole.items():
        alike[matrix.shape if matrix.numel() <= SMALL_MATRIX else i].append(i)
    done: dict[int, torch.Tensor] = {}
    for members in alike.values():
        results = origin[members[0]].function(torch.stack([whole[i] for i in members]))
        done |= dict(zip(members, results, strict=True))
    return done


@contextlib.contextmanager
def naming_the_cause(share: Share) -> Iterator[None]:
    """A collective that fails says what it was for. Raises RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        rank, size = torch.distributed.get_rank(share.group), share.group.size()
        raise RuntimeError(
            f"LoLO's step on process {rank} of {size} waits for the others' rows, and one of them does not answer: it "
            "ended, or is silent for longer than the process group's timeout. What that process printed says why; "
            f"start all of them again from a checkpoint. ({str(error).splitlines()[0]})"
        ) from error
