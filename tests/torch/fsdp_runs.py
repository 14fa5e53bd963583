"""What `test_fsdp.py` runs in 1, 2 and 4 processes: python tests/torch/fsdp_runs.py FOLDER

Each world of processes writes what it found to FOLDER; the tests compare. All are forked from one process, which has
imported everything.
"""

import copy
import functools
import json
import math
import os
import pathlib
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent.parent)]

from drawn import draw_meta_params, draw_norm_fc, norm_fc_file  # noqa: E402

from lolo.torch import LoLO, rounds  # noqa: E402

STEPS, SAVED_AFTER, RESUMED = 50, 5, 3
BATCH, LENGTH, WORDS, WIDTH = 8, 6, 23, 12
# Axis 0 the largest, the second largest, neither (alone, and with another axis); ties, rows fewer than processes.
SHAPES = {
    "largest": (30, 12), "second": (12, 30), "kept": (5, 8, 24), "kept with others": (2, 8, 5, 3), "tie": (16, 16),
    "kernel": (6, 4, 3, 3), "rows fewer than processes": (3, 40), "one row": (1, 7), "vector": (13,), "twin": (30, 12),
    "short vector": (2,), "blocks": (300, 200),
}  # fmt: skip


def tame(draw):
    """φ whose network says little, so that training with it does well enough to compare losses."""
    phi = draw()
    return phi | {"w2": phi["w2"] * np.float32(0.1)}


WEIGHTS = {"small_fc": "lolo-anytime", "norm_fc": norm_fc_file(tame(draw_norm_fc))}
RATES = {"small_fc": 10.0, "norm_fc": 0.02}
DRAWN = {"small_fc": draw_meta_params(), "norm_fc": norm_fc_file(weight_decay=0.1, step_rms="adam", adam_beta2=0.999)}
STEEP = {"small_fc": 100.0, "norm_fc": 0.1}
"""Learning rates of a step that is much larger than what float32 rounds off its parameter."""


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = torch.nn.Linear(WIDTH, 30), torch.nn.Linear(30, WIDTH)
        self.few, self.back = torch.nn.Linear(WIDTH, 3), torch.nn.Linear(3, WIDTH)  # with 4 processes one has no row

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, WIDTH // 2)).movedim(-3, 0).transpose(-2, -3)
        x = x + self.out(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2)
        )
        return x + self.down(torch.relu(self.up(x))) + self.back(torch.tanh(self.few(x)))


class Transformer(torch.nn.Module):
    """Embedding and output layer are tied, positions are frozen."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(WORDS, WIDTH)
        self.positions = torch.nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.1, requires_grad=False)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words):
        x = self.embedding(words) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_model():
    torch.manual_seed(0)
    model = Transformer()
    with torch.no_grad():
        model.embedding.weight.mul_(0.2)
    return model


def shard(model, mesh, **options):
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def optimizer_of(model, architecture, **options):
    """Each block in a param group of its own, the embedding on AdamW in norm_fc."""
    embedding = {"is_matrix": False} if architecture == "norm_fc" else {}
    groups = [{"params": [model.embedding.weight], **embedding}, {"params": list(model.norm.parameters())}]
    groups += [{"params": list(block.parameters())} for block in model.blocks]
    return LoLO(groups, **{"weights": WEIGHTS[architecture], "lr": RATES[architecture]} | options)


def loss_of(model, step, share=slice(None)):
    """The mean loss of a batch's part. Each word is a function of the one before it."""
    words = torch.randint(WORDS, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    for _ in range(LENGTH):
        words = torch.cat([words, (words[:, -1:] * 3 + 1) % WORDS], dim=1)
    words = words[share]
    logits = model(words[:, :LENGTH]).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


def part():
    size = BATCH // dist.get_world_size()
    return slice(dist.get_rank() * size, (dist.get_rank() + 1) * size)


def train(model, optimizer, steps, start=0, before_step=lambda: None):
    """Losses of the whole batch."""
    losses = []
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss = loss_of(model, step, part() if dist.is_initialized() else slice(None))
        loss.backward()
        before_step()
        optimizer.step()
        loss = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return losses


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def difference(ours, theirs):
    """‖a − b‖ / ‖b‖"""
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()


# What is compared


def tensors(mesh, placements, architecture):
    """After two steps of whole tensors, one step from the same state: relative differences of updates."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}
    grads = [{name: torch.randn(x.shape, generator=generator) for name, x in values.items()} for _ in range(3)]
    grads[2]["twin"] = grads[2]["twin"] * 1e-3
    plain = {name: torch.nn.Parameter(x.clone()) for name, x in values.items()}
    options = {"weights": DRAWN[architecture], "lr": STEEP[architecture]}
    optimizer = LoLO(plain.values(), **options | ({"kernel": "plain"} if architecture == "norm_fc" else {}))

    def step(optimizer, params, given, place=lambda x: x):
        for name, param in params.items():
            param.grad = place(given[name])
        optimizer.step()

    for given in grads[:2]:
        step(optimizer, plain, given)

    def place(x):
        return distribute_tensor(x, mesh, placements)

    cut = {name: torch.nn.Parameter(place(x.detach().clone())) for name, x in plain.items()}
    sharded = LoLO(cut.values(), **options)
    sharded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # whole tensors, of which each takes its rows
    before = {name: x.detach().clone() for name, x in plain.items()}
    step(optimizer, plain, grads[2])
    step(sharded, cut, grads[2], place)
    found = {name: difference(whole(cut[name]) - before[name], plain[name] - before[name]) for name in plain}
    for name, param in plain.items():
        for key, value in optimizer.state[param].items():
            ours = whole(sharded.state[cut[name]][key]).reshape(value.shape)
            found[f"{name}: {key}"] = difference(ours.double(), value.double())
    return found


def mixed(mesh, architecture, dtype):
    """Three steps of plain, replicated and cut tensors in one group: the largest difference of parameters."""
    options = {"weights": DRAWN[architecture], "lr": STEEP[architecture], "maximize": True}
    options |= {"state_dtype": torch.bfloat16} if architecture == "norm_fc" else {"freeze_unseen": True}
    generator = torch.Generator().manual_seed(0)
    plain = [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.1).to(dtype)) for shape in SHAPES.values()]
    plain.append(torch.nn.Parameter(torch.tensor(0.3, dtype=dtype)))
    places = [None, Replicate(), *[Shard(0)] * (len(plain) - 3), Replicate()]  # the last is a scalar

    def placed(x, place):
        return x.detach().clone() if place is None else distribute_tensor(x.detach().clone(), mesh, [place])

    ours = [torch.nn.Parameter(placed(*pair)) for pair in zip(plain, places, strict=True)]
    optimizers = [LoLO(params, **options) for params in (plain, ours)]
    for _ in range(3):
        for param, other, place in zip(plain, ours, places, strict=True):
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
            other.grad = placed(param.grad, place)
        for optimizer in optimizers:
            optimizer.step()
    return max(difference(whole(x).float(), y.detach().float()) for x, y in zip(ours, plain, strict=True))


def one_matrix(mesh, architecture, dtype=torch.float32, bad=None):
    """One step of a matrix, whole and cut, with float32 gradients: the difference, or -1 where NaN are not the same.

    bad: what stands in the last row of the gradient, which one process has.
    """
    values = torch.linspace(-1, 1, 40, dtype=torch.float32).view(5, 8).to(dtype)
    grad = torch.linspace(-1, 1, 40, dtype=torch.float32).view(5, 8).cos()
    if bad is not None:
        grad[-1, 0] = bad
    plain = torch.nn.Parameter(values.clone())
    ours = torch.nn.Parameter(distribute_tensor(values.clone(), mesh, [Shard(0)]))
    for param, given in ((plain, grad), (ours, distribute_tensor(grad, mesh, [Shard(0)]))):
        if dtype != torch.float32:
            param.grad_dtype = torch.float32
        param.grad = given
        LoLO([param], weights=DRAWN[architecture], lr=STEEP[architecture]).step()
    found, expected = whole(ours).float(), plain.detach().float()
    if not torch.equal(found.isnan(), expected.isnan()):
        return -1.0
    return difference(found.nan_to_num(), expected.nan_to_num()) if bad is None else float(expected.isnan().sum())


def with_default_dtype(dtype, function):
    torch.set_default_dtype(dtype)
    try:
        return function()
    finally:
        torch.set_default_dtype(torch.float32)


def beside_a_smaller_mesh(mesh, architecture):
    """One step where only process 0 has one of two tensors: the difference of the other one, how many have a state."""
    small = DeviceMesh("cpu", [0])
    generator = torch.Generator().manual_seed(0)
    values, grad = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    params = [torch.nn.Parameter(distribute_tensor(values.clone(), place, [Shard(0)])) for place in (small, mesh)]
    for param, place in zip(params, (small, mesh), strict=True):
        param.grad = distribute_tensor(grad.clone(), place, [Shard(0)])
    plain = torch.nn.Parameter(values.clone())
    plain.grad = grad
    optimizers = [
        LoLO(some, weights=DRAWN[architecture], lr=STEEP[architecture], weight_decay=0.0) for some in (params, [plain])
    ]
    for optimizer in optimizers:
        optimizer.step()
    return [difference(whole(params[1]), plain.detach()), len(optimizers[0].state)]


def transformer_step(model, sharded, architecture):
    """One step of the transformer from the same state and with the same gradients: relative differences."""
    twin = make_model()
    for param, other in zip(twin.parameters(), model.parameters(), strict=True):
        param.data.copy_(whole(other))
    other = optimizer_of(twin, architecture, lr=STEEP[architecture])
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(twin, other, get_optimizer_state_dict(model, sharded, options=options), options=options)
    sharded.zero_grad()
    loss_of(model, 1000, part()).backward()
    for optimizer in (sharded, other):
        for group in optimizer.param_groups:
            group["lr"] = STEEP[architecture]
    for param, source in zip(twin.parameters(), model.parameters(), strict=True):
        param.grad = None if source.grad is None else whole(source.grad)
    before = [x.detach().clone() for x in twin.parameters()]
    sharded.step()
    other.step()
    found = {}
    pairs = zip(model.named_parameters(), twin.parameters(), before, strict=True)
    for (name, ours), theirs, start in pairs:
        if ours.requires_grad:
            found[name] = difference(whole(ours) - start, theirs - start)
        else:
            assert torch.equal(whole(ours), start) and ours not in sharded.state
    return found


def counted(model, optimizer):
    """Collectives of one step: what this process gives to each, and how many torch has seen."""
    given = []
    all_reduce, all_to_all = dist.all_reduce, dist.all_to_all_single

    def counting_reduce(tensor, *args, **kwargs):
        given.append(("all_reduce", tensor.numel()))
        return all_reduce(tensor, *args, **kwargs)

    def counting_exchange(output, tensor, *args, **kwargs):
        given.append(("all_to_all", tensor.numel()))
        return all_to_all(output, tensor, *args, **kwargs)

    loss_of(model, 2000, part()).backward()
    dist.all_reduce, dist.all_to_all_single = counting_reduce, counting_exchange
    try:
        with CommDebugMode() as mode:
            optimizer.step()
    finally:
        dist.all_reduce, dist.all_to_all_single = all_reduce, all_to_all
    return {"given": given, "seen by torch": mode.get_total_counts()}


def trained_as(mesh, architecture, steps=6, clip=False, **options):
    """Losses of FSDP2 with options of its own."""
    model = shard(make_model(), mesh, **options)
    optimizer = optimizer_of(model, architecture)

    def before_step():
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

    return train(model, optimizer, steps, before_step=before_step)


def accumulated(architecture, steps=6):
    """Losses of DDP, each batch in two halves."""
    model = torch.nn.parallel.DistributedDataParallel(make_model())
    optimizer, losses = optimizer_of(model.module, architecture), []
    middle = (part().start + part().stop) // 2
    for step in range(steps):
        optimizer.zero_grad()
        with model.no_sync():
            first = loss_of(model, step, slice(part().start, middle)) / 2
            first.backward()
        second = loss_of(model, step, slice(middle, part().stop)) / 2
        second.backward()
        optimizer.step()
        loss = (first + second).detach()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
    return losses


def exchanged(mesh, architecture, steps=6):
    """Losses where the optimizer came first, and Accelerate's FSDP2 plug-in exchanged its parameters."""
    from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

    model = make_model()
    optimizer = optimizer_of(model, architecture)
    before = {name: param.data_ptr() for name, param in model.named_parameters()}
    for group in optimizer.param_groups:  # as Accelerator.prepare does, which needs an accelerator
        for index, param in enumerate(group["params"]):
            group["params"][index] = torch.empty(1)
            group["params"][index].data_ptr = param.data_ptr()
    shard(model, mesh)
    fsdp2_switch_optimizer_parameters(optimizer, {before[name]: param for name, param in model.named_parameters()})
    return train(model, optimizer, steps)


def checkpoint(folder, model, optimizer, load):
    """Save, or load what another world saved."""
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    if not load:
        dcp.save(state, checkpoint_id=folder)
        return
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def error_of(function):
    try:
        function()
    except (Exception, CheckpointException) as error:  # whatever it is, the tests look at it
        return f"{type(error).__name__}: {error}"
    return "no error"


# The worlds


def alone(rank, size, folder):
    """What one process without sharding finds."""
    found = {}
    for architecture in WEIGHTS:
        model = make_model()
        found[f"{architecture} losses"] = train(model, optimizer_of(model, architecture), STEPS)
        model = make_model()
        optimizer = optimizer_of(model, architecture)

        def clip(model=model):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)

        found[f"{architecture} clipped"] = train(model, optimizer, 6, before_step=clip)
    return found


def world(rank, size, folder):
    mesh = init_device_mesh("cpu", (size,))
    found = {}
    for architecture in WEIGHTS:
        found[f"{architecture} tensors"] = tensors(mesh, [Shard(0)], architecture)
        if size == 2:
            found[f"{architecture} replicated"] = tensors(mesh, [Replicate()], architecture)
            largest, rounds.LARGEST_TURN = rounds.LARGEST_TURN, 400
            found[f"{architecture} in turns"] = tensors(mesh, [Shard(0)], architecture)
            rounds.LARGEST_TURN = largest
            for dtype in (torch.float32, torch.bfloat16):
                found[f"{architecture} mixed {dtype}"] = mixed(mesh, architecture, dtype)
            bfloat16 = functools.partial(with_default_dtype, torch.bfloat16)
            found[f"{architecture} default dtype"] = bfloat16(functools.partial(one_matrix, mesh, architecture))
            found[f"{architecture} gradient's dtype"] = one_matrix(mesh, architecture, torch.bfloat16)
            found[f"{architecture} NaN"] = [one_matrix(mesh, architecture, bad=x) for x in (math.nan, math.inf)]
            found[f"{architecture} smaller mesh"] = beside_a_smaller_mesh(mesh, architecture)
            add, rounds.add = rounds.add, lambda requests: [request.tensors for request in requests]
            found[f"{architecture} without sums"] = tensors(mesh, [Shard(0)], architecture)
            rounds.add = add
        if size == 4:
            grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "rows"))
            found[f"{architecture} on a grid"] = tensors(grid, [Replicate(), Shard(0)], architecture)
        model = shard(make_model(), mesh)
        optimizer = optimizer_of(model, architecture)
        found[f"{architecture} losses"] = train(model, optimizer, STEPS)
        found[f"{architecture} rows"] = {name: len(x.to_local()) for name, x in model.named_parameters()}
        found[f"{architecture} counted"] = counted(model, optimizer)
        found[f"{architecture} transformer"] = transformer_step(model, optimizer, architecture)
        found[f"{architecture} clipped"] = trained_as(mesh, architecture, clip=True)
        if size == 2:
            offload = CPUOffloadPolicy(pin_memory=False)
            found[f"{architecture} offloaded"] = trained_as(mesh, architecture, offload_policy=offload)
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            found[f"{architecture} bfloat16"] = trained_as(mesh, architecture, mp_policy=policy)
            found[f"{architecture} exchanged"] = exchanged(mesh, architecture)
            found[f"{architecture} accumulated"] = accumulated(architecture)
        found |= checkpoints(folder, mesh, architecture)
    if size == 2:
        found["refusals"] = refusals(mesh)
    return found


def checkpoints(folder, mesh, architecture):
    """Two processes save; one and four resume, and all continue."""
    found, path = {}, folder / f"{architecture} checkpoint"
    model = shard(make_model(), mesh)
    optimizer = optimizer_of(model, architecture)
    if mesh.size() == 2:
        train(model, optimizer, SAVED_AFTER)
        checkpoint(path, model, optimizer, load=False)
        for kind, name, weights in (
            ("weights", architecture, DRAWN[architecture]),
            ("architecture", *next(row for row in WEIGHTS.items() if row[0] != architecture)),
        ):
            other = optimizer_of(model, name, weights=weights)
            load = functools.partial(checkpoint, path, model, other, load=True)
            found[f"{architecture} other {kind}"] = error_of(load)
    else:
        checkpoint(path, model, optimizer, load=True)
    found[f"{architecture} resumed"] = train(model, optimizer, RESUMED, SAVED_AFTER)
    kernel = torch.nn.Parameter(distribute_tensor(torch.ones(*SHAPES["kept with others"]), mesh, [Shard(0)]))
    kernel.grad = distribute_tensor(torch.ones(kernel.shape), mesh, [Shard(0)])
    optimizer = LoLO([kernel], weights=DRAWN[architecture])
    optimizer.step()
    state = {name: x for name, x in optimizer.state[kernel].items() if isinstance(x, DTensor)}
    found[f"{architecture} state"] = {name: [str(x.placements[0]), *x.shape] for name, x in state.items()}
    return found


def refusals(mesh):
    wide, param = (torch.nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(axis)])) for axis in (1, 0))
    optimizer = LoLO([param], weights=DRAWN["small_fc"])
    param.grad = distribute_tensor(torch.zeros(4, 4), mesh, [Replicate()])
    product = (param * param).sum()
    whole_param = torch.nn.Parameter(torch.zeros(4, 4))
    whole_param.grad, other = torch.ones(4, 4), LoLO([whole_param], weights=DRAWN["small_fc"])
    other.step()
    gradient = error_of(optimizer.step)
    param.grad = distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)])
    optimizer.step()
    return {
        "moved before backward": error_of(product.backward),
        "state": error_of(lambda: other.load_state_dict(optimizer.state_dict())),
        "kept": not any(isinstance(x, DTensor) for x in other.state[whole_param].values()),
        "columns": error_of(lambda: LoLO([("head.weight", wide)], weights=DRAWN["small_fc"])),
        "gradient": gradient,
    }


def lost(rank, size, folder, how):
    """What process 0 sees, and after how many seconds, when the other one is killed or stopped before a step."""
    model = shard(make_model(), init_device_mesh("cpu", (size,)))
    optimizer = optimizer_of(model, "norm_fc")
    train(model, optimizer, 1)
    loss_of(model, 1, part()).backward()
    dist.barrier()
    if rank == 1:
        (folder / f"{how} pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    start = time.monotonic()
    error = error_of(optimizer.step)
    (folder / f"{how}.json").write_text(json.dumps({"error": error, "seconds": time.monotonic() - start}))
    if how == "stopped":
        os.kill(int((folder / f"{how} pid").read_text()), signal.SIGKILL)
    os._exit(0)  # a group that has lost a process can't be destroyed


def forked(size, folder, work, *args, timeout=300):
    """Run `work(rank, size, folder, *args)` in the processes of a group, or in one without a group."""
    given = (size, folder, work, args, timeout)
    context = mp.start_processes(in_group, given, nprocs=max(1, size), start_method="fork", join=False)
    if work is lost:
        for process in context.processes:
            process.join()
    else:
        while not context.join():
            pass


def in_group(rank, size, folder, work, args, timeout):
    torch.set_num_threads(1)
    if size:
        store, limit = f"file://{folder}/store-{'-'.join((work.__name__, *args))}-{size}", timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=limit)
    found = work(rank, size, folder, *args)
    (folder / f"{work.__name__}-{size}-{rank}.json").write_text(json.dumps(found))
    if size:
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = pathlib.Path(sys.argv[1])
    forked(0, path, alone)
    for processes in (2, 1, 4):  # two save what the others resume
        forked(processes, path, world)
    for way in ("killed", "stopped"):
        forked(2, path, lost, way, timeout=8)
