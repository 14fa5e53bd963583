"""Time of a step of PyTorch's LoLO on parameters that FSDP2 has cut, on 1, 2, 4 ... processes of this machine.

    python tools/bench_fsdp.py [--processes 1 2 4] [--steps 20] [--layers 4] [--width 256]

The parameters are those of a transformer's blocks, with random gradients, on CPUs and through gloo, one thread for each
process. Prints the time that passes, and the CPU time of the busiest process: the first says nothing where there are
more processes than free cores.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lolo.files import tensors
from lolo.optimizers import norm_fc_spec
from lolo.optimizers.weights_file import WeightsFile
from lolo.torch import LoLO


def norm_fc(orthogonal):
    """Weights of which only the shapes matter here."""
    rng = np.random.default_rng(0)
    shapes = norm_fc_spec.weight_shapes(8)
    phi = {name: 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    learner = dataclasses.asdict(norm_fc_spec.NormFcSettings(orthogonal=orthogonal))
    return WeightsFile(phi, learner, {}, {}, tensors.digest(phi))


OPTIMIZERS = {
    "AdamW": lambda params: torch.optim.AdamW(params, foreach=True),
    "small_fc": LoLO,
    "norm_fc": lambda params: LoLO(params, norm_fc(orthogonal=False), kernel="plain"),
    "norm_fc, Newton-Schulz": lambda params: LoLO(params, norm_fc(orthogonal=True), kernel="plain"),
}


def parameters(mesh, layers, width):
    """Two vectors and four matrices for each layer, 12 · width² entries."""
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width), (width,), (width,)]
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in shapes * layers:
        param, grad = (
            distribute_tensor(0.02 * torch.randn(shape, generator=generator), mesh, [Shard(0)]) for _ in "pg"
        )
        params.append(torch.nn.Parameter(param))
        params[-1].grad = grad
    return params


def measure(rank, size, args, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/{size}", rank=rank, world_size=size)
    mesh, times = init_device_mesh("cpu", (size,)), {}
    optimizers = {name: make(parameters(mesh, args.layers, args.width)) for name, make in OPTIMIZERS.items()}
    for step in range(args.steps + 1):
        for name, optimizer in optimizers.items():  # interleaved: other load falls on all alike
            dist.barrier()
            start, work = time.perf_counter(), time.process_time()
            optimizer.step()
            work = torch.tensor(time.process_time() - work)
            dist.all_reduce(work, dist.ReduceOp.MAX)
            if step:
                times.setdefault(name, []).append((time.perf_counter() - start, work.item()))
    if rank == 0:
        medians = {name: [1000 * statistics.median(x) for x in zip(*own, strict=True)] for name, own in times.items()}
        cells = (f"{passed:.0f} ({work:.0f})" for passed, work in medians.values())
        print(f"| {size} | {' | '.join(cells)} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    given = parser.parse_args()
    size, cores = f"{12 * given.layers * given.width**2 / 1e6:.1f}M parameters", f"{os.cpu_count()} cores"
    print(f"Medians of {given.steps} steps, ms (CPU time): {size}, torch {torch.__version__}, {cores}")
    print(f"| processes | {' | '.join(OPTIMIZERS)} |\n|{' ---: |' * (1 + len(OPTIMIZERS))}", flush=True)
    with tempfile.TemporaryDirectory() as store:
        for count in given.processes:
            mp.start_processes(measure, (count, given, store), nprocs=count, start_method="fork")
