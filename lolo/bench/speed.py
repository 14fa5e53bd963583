"""The parts of `lolo bench`: speed on this machine, as ratios within one run.

Every comparison is interleaved (one call of each, again and again) and reported as a median of times: on a busy machine
the ratios are meaningful, the absolute numbers less so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from lolo.bench import batch_speed, kernel_speed, parts_speed, textbook
from lolo.bench.timing import Line, has_torch, interleaved
from lolo.files import disk, jsonl, settings
from lolo.method import meta
from lolo.method.task import Splits, Task
from lolo.optimizers import norm_fc, norm_fc_kernel, small_fc
from lolo.runtime import parallel
from lolo.runtime.environment import peak_memory_mb, provenance
from lolo.studies import plots, style
from lolo.tasks import models
from lolo.tasks.classification import classification
from lolo.training import recipes
from lolo.training.how import How
from lolo.training.offload import Offloaded
from lolo.training.run import prepare
from lolo.trees import PyTree, count_bytes

PAIRS, BATCH = 8, 128
# name -> widths of the MLP, inner steps per timed call (fewer where a step is long)
SIZES: dict[str, tuple[tuple[int, ...], int]] = {
    "7x7-32-32-10": ((49, 32, 32, 10), 50),
    "28x28-32-32-10": ((784, 32, 32, 10), 20),
    "55x55-128-128-10": ((3025, 128, 128, 10), 2),
    "3072-128-128-128-1000": ((3072, 128, 128, 128, 1000), 2),
}
# Arithmetic of our form per parameter: the products of 16, 32 and 32 inputs with the weights.
FLOPS_PER_PARAMETER = 2 * (16 * 32 + 32 * 32 + 32 * 2)


def synthetic(widths: tuple[int, ...]) -> Splits:
    """A classifier of random bytes with an MLP of these widths."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2048, widths[0]), np.uint8)
    labels = rng.integers(0, widths[-1], 2048, np.int32)

    def pick(data: PyTree, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (data[0][indices].astype(jnp.float32) - 127.5) / 73.6, data[1][indices]

    parts = {split: (images, labels) for split in Splits._fields}
    sizes = {split: 2048 for split in parts}
    return classification(parts, models.mlp(widths), pick, classes=widths[-1], batch=BATCH, sizes=sizes)


def lanes(task: Task, optimizer: Callable, steps: int, sequential: bool) -> tuple[Callable, tuple]:
    """16 trajectories (8 pairs, both signs) of `steps` inner steps, spread over the devices as one program."""
    over = parallel.mesh(PAIRS)
    everywhere, spread = PartitionSpec(), PartitionSpec(parallel.AXIS)

    def one(task: Task, meta_params: PyTree, params: PyTree, key: jax.Array) -> jax.Array:
        transformation = optimizer(meta_params)

        def step(carry: tuple, n: jax.Array) -> tuple[tuple, jax.Array]:
            params, state = carry
            batch = task.sample(jax.random.fold_in(key, n), n)
            (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, {}, batch, key)
            updates, state = transformation.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, transformation.init(params)), jnp.arange(steps))[1]

    def all_lanes(task: Task, *args: Any) -> jax.Array:
        if sequential:
            return jax.lax.map(lambda lane: one(task, *lane), args)
        return jax.vmap(partial(one, task))(*args)

    phi = small_fc.small_fc().init(jax.random.key(0))
    trajectories = 2 * PAIRS
    noise = jax.random.split(jax.random.key(1), trajectories)
    perturbed = jax.vmap(lambda key: jax.tree.map(lambda x: x + 0.01 * jax.random.normal(key, x.shape), phi))(noise)
    params = jax.vmap(lambda key: task.init(key)[0])(jax.random.split(jax.random.key(2), trajectories))
    keys = jnp.repeat(jax.random.split(jax.random.key(3), PAIRS), 2, axis=0)
    mapped = jax.shard_map(
        all_lanes, mesh=over, in_specs=(everywhere, spread, spread, spread), out_specs=spread, check_vma=False
    )
    return jax.jit(mapped), (parallel.place(task, over), perturbed, params, keys)


def bench_update(names: Sequence[str] = tuple(SIZES), seconds: float = 10.0) -> Iterator[Line]:
    """Inner steps per second in meta-training: our form against the textbook's, and against a matrix product."""
    for name in names:
        widths, steps = SIZES[name]
        task = synthetic(widths).train
        parameters = sum(a * b + b for a, b in zip(widths, widths[1:], strict=False))
        forms = {
            "ours": (small_fc.small_fc().optimizer, True),
            "textbook, vmap": (textbook.small_fc, False),
            "textbook, lax.map": (textbook.small_fc, True),
        }
        calls: dict[str, Callable[[], Any]] = {}
        for form, (optimizer, sequential) in forms.items():
            program, args = lanes(task, optimizer, steps, sequential)
            calls[form] = partial(program, *args)
        calls["product"] = product_call()
        times = interleaved(calls, seconds)
        rates = {form: 2 * PAIRS * steps / times[form] for form in forms}
        for form, rate in rates.items():
            yield Line(f"{name}: {form}", rate, "inner steps/s")
        best = max(rates["textbook, vmap"], rates["textbook, lax.map"])
        yield Line(f"{name}: ours / textbook under vmap", rates["ours"] / rates["textbook, vmap"], "x")
        yield Line(f"{name}: ours / the better textbook", rates["ours"] / best, "x")
        model_flops = 6 * BATCH * parameters
        achieved = rates["ours"] * (parameters * FLOPS_PER_PARAMETER + model_flops) / 1e9
        peak = product_flops() / times["product"] / 1e9
        yield Line(f"{name}: arithmetic, share of a 1024³ product", 100 * achieved / peak, "%", f"{peak:.0f} GFLOP/s")


def product_flops() -> float:
    return 2.0 * 1024**3 * len(parallel.mesh(PAIRS).devices)


def product_call() -> Callable[[], Any]:
    """One 1024³ float32 product on every device at once."""
    over = parallel.mesh(PAIRS)
    count = len(over.devices)
    spread = PartitionSpec(parallel.AXIS)
    x = jax.random.normal(jax.random.key(0), (count, 1024, 1024))
    mapped = jax.shard_map(lambda x: x @ x, mesh=over, in_specs=spread, out_specs=spread)
    return partial(jax.jit(mapped), parallel.place(x, over, spread))


class OuterStep(NamedTuple):
    """One outer step of a recipe, compiled."""

    call: Callable[[], Any]
    state: meta.MetaState  # shapes
    memory: int  # bytes that the program needs: arguments, results and temporaries


def outer_step(
    recipe: recipes.Recipe, splits: dict[str, Splits] | None = None, devices: int | None = None
) -> OuterStep:
    """Build and compile what `lolo train` would run. Every call sees the same segment of streamed data."""
    run = prepare(recipe, How(devices=devices), tasks=splits)
    assert not isinstance(run.step, Offloaded)
    with run.feeding():
        data = run.next_tasks()
    compiled = run.step.lower(data, run.state).compile()
    analysis: Any = compiled.memory_analysis()
    sizes = (analysis.argument_size_in_bytes, analysis.output_size_in_bytes, analysis.temp_size_in_bytes)
    shapes = jax.eval_shape(lambda: run.state)

    def call() -> Any:
        run.state, _ = compiled(data, run.state)
        return run.state.meta_params

    return OuterStep(call, shapes, sum(sizes) - analysis.alias_size_in_bytes)


def on(task: str, name: str = "lolo") -> recipes.Recipe:
    """A recipe by its name, on one task."""
    return settings.with_field(recipes.RECIPES[name], "tasks", (task,))


def in_turns(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds over `rounds` consecutive calls of each, one of each in turn, after one to warm up."""
    return interleaved(calls, 0.0, rounds)


def bench_methods(rounds: int = 200) -> list[Line]:
    """LoLO's outer step against NAIVE's: time over consecutive outer steps, restarts and pushes included; memory."""
    steps = {name: outer_step(on("fashion-mlp", name)) for name in ("naive", "bc-only", "lolo")}
    medians = in_turns({name: step.call for name, step in steps.items()}, rounds)
    lines = [Line(f"outer step of {name} on fashion-mlp", 1000 * t, "ms", f"n={rounds}") for name, t in medians.items()]
    lines.append(Line("outer step, lolo / naive", medians["lolo"] / medians["naive"], "x"))
    for name, step in steps.items():
        slots = step.state.slots[0]
        inner = count_bytes(slots.local.inner) / (2 * PAIRS)
        lines.append(
            Line(f"{name}: buffer per slot", count_bytes(slots.local.replay.states) / PAIRS / inner, "inner states")
        )
        lines.append(Line(f"{name}: memory of the outer step's program", step.memory / 1e6, "MB"))
    return lines


GROWTH: dict[str, dict[str, recipes.Recipe | tuple[int, ...]]] = {
    "pairs": {str(n): settings.with_field(on("fashion-mlp"), "estimator.pairs", n) for n in (2, 4, 8, 16)},
    "truncation": {str(n): settings.with_field(on("fashion-mlp"), "unroll.truncation", n) for n in (10, 25, 50, 100)},
    "tasks": {
        str(n): settings.with_field(recipes.LOLO, "tasks", ("fashion-mlp", "books-mlp", "quadratic")[:n])
        for n in (1, 2, 3)
    },
    "parameters": {
        str(sum(a * b + b for a, b in zip(widths, widths[1:], strict=False))): widths
        for widths in ((64, 16, 16, 10), (64, 64, 64, 10), (256, 128, 64, 10), (784, 256, 64, 10))
    },
}


def bench_growth(rounds: int = 10) -> Iterator[Line]:
    """How an outer step of LoLO grows with pairs, truncation, tasks and parameters, one at a time."""
    for what, variants in GROWTH.items():
        calls = {}
        for value, variant in variants.items():
            if isinstance(variant, tuple):
                splits = {"synthetic": synthetic(variant)}
                calls[value] = outer_step(settings.with_field(on("synthetic"), "unroll.truncation", 10), splits).call
            else:
                calls[value] = outer_step(variant).call
        for value, seconds in in_turns(calls, rounds).items():
            yield Line(f"growth with {what}: {value}", 1000 * seconds, "ms", f"n={rounds}")


def block_times(
    recipe: recipes.Recipe,
    splits: dict[str, Splits] | None = None,
    devices: int | None = None,
    rounds: int = 5,
) -> dict[int, float]:
    """Median seconds of an outer step for each `slots_per_block` that is a power of two and leaves no device idle."""
    pairs = recipe.estimator.pairs
    workers = len(parallel.mesh(pairs, devices).devices)
    sizes = [size for size in (1 << i for i in range(pairs.bit_length())) if pairs % (size * workers) == 0]
    calls = {
        str(size): outer_step(settings.with_field(recipe, "estimator.slots_per_block", size), splits, devices).call
        for size in sizes or [1]
    }
    return {int(size): seconds for size, seconds in in_turns(calls, rounds).items()}


def bench_blocks(rounds: int = 20) -> list[Line]:
    """Times by `slots_per_block`, the number of slots that vmap runs together."""
    return [
        Line(f"outer step with slots_per_block {size}", 1000 * seconds, "ms", f"n={rounds}")
        for size, seconds in block_times(on("fashion-mlp"), rounds=rounds).items()
    ]


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "small_fc": {"learner.name": "small_fc"},
    "norm_fc, plain": {"learner.name": "norm_fc", "learner.orthogonal": False},
    "norm_fc, kernel": {"learner.name": "norm_fc", "learner.orthogonal": False, "learner.kernel": "auto"},
    "norm_fc, Newton-Schulz": {"learner.name": "norm_fc", "learner.orthogonal": True},
}
"""What `lolo bench architectures` compares: recipe fields."""


def bench_architectures(
    tasks: Sequence[str] = ("fashion-mlp", "fashion-conv", "books-transformer"),
    rounds: int = 20,
    variants: dict[str, dict[str, Any]] = ARCHITECTURES,
) -> Iterator[Line]:
    """Inner steps per second of naive-LO by architecture, all devices together, and the state of a trajectory."""
    for task in tasks:
        splits = {"synthetic": synthetic(SIZES[task][0])} if task in SIZES else None
        calls: dict[str, Callable[[], Any]] = {}
        for name, fields in variants.items():
            recipe = on("synthetic" if splits else task, "naive")
            for field, value in fields.items():
                recipe = settings.with_field(recipe, field, value)
            step = outer_step(recipe, splits) if splits else outer_step(recipe)
            calls[name] = step.call
            learner = count_bytes(step.state.slots[0].local.inner.learner) / (2 * PAIRS)
            params = count_bytes(step.state.slots[0].local.inner.params) / (2 * PAIRS)
            yield Line(f"{task}: state of {name}", learner / params, "times the parameters' bytes")
        medians = in_turns(calls, rounds)
        for name, seconds in medians.items():
            rate = 2 * PAIRS * recipe.unroll.truncation / seconds
            yield Line(f"{task}: inner steps with {name}", rate, "inner steps/s", f"n={rounds}")
        for name in list(variants)[1:]:
            yield Line(f"{task}: speed of {name} / small_fc", medians["small_fc"] / medians[name], "x")


def bench_inference() -> list[Line]:
    """The optimizer's step at inference (optax, jitted) on MLPs of 1M and 10M parameters, beside AdamW and Muon."""
    learned = {
        "lolo": small_fc.small_fc(),
        "norm_fc, plain": norm_fc.norm_fc(orthogonal=False),
        "norm_fc, Newton-Schulz": norm_fc.norm_fc(),
    }
    optimizers = {name: one.optimizer(one.init(jax.random.key(0))) for name, one in learned.items()}
    rivals = {"adamw": optax.adamw(1e-3), "muon": optax.contrib.muon(1e-3)}
    lines = []
    for label, widths in {"1M": (784, 640, 640, 128, 10), "10M": (1024, 2560, 2560, 256, 10)}.items():
        params = models.mlp(widths).init(jax.random.key(0))[0]
        grads = jax.tree.map(lambda x: 0.01 * x, params)
        calls: dict[str, Callable[[], Any]] = {}
        for name, optimizer in {**optimizers, **rivals}.items():
            state = optimizer.init(params)
            calls[name] = partial(jax.jit(optimizer.update), grads, state, params)
            lines.append(Line(f"state on {label} parameters: {name}", count_bytes(state) / 1e6, "MB"))
        times = interleaved(calls, 6.0)
        lines += [Line(f"step on {label} parameters: {name}", 1000 * t, "ms") for name, t in times.items()]
        for name in learned:
            lines.append(Line(f"step on {label} parameters: {name} / adamw", times[name] / times["adamw"], "x"))
        ratio = times["norm_fc, Newton-Schulz"] / times["muon"]
        lines.append(Line(f"step on {label} parameters: norm_fc, Newton-Schulz / muon", ratio, "x"))
    return lines


CHILD = """
import os, sys, time
if sys.argv[3] == "pin":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
began = time.perf_counter()
from lolo.bench import speed
from lolo.runtime import environment
environment.set_up(int(sys.argv[1]) if sys.argv[1] != "0" else None)
import jax
call = speed.outer_step(speed.on("fashion-mlp")).call
jax.block_until_ready(call())
first = time.perf_counter() - began
times = []
for _ in range(int(sys.argv[2])):
    t = time.perf_counter(); jax.block_until_ready(call()); times.append(time.perf_counter() - t)
import statistics
print(first, statistics.median(times) if times else 0.0)
"""


def child(devices: int, steps: int, cache: str, pin: bool) -> tuple[float, float]:
    """Seconds to the first outer step and median seconds of later ones, in a new process."""
    environment = {**os.environ, "LOLO_CACHE": cache}
    command = [sys.executable, "-c", CHILD, str(devices), str(steps), "pin" if pin else ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, median = done.stdout.split()[-2:]
    return float(first), float(median)


def bench_start_and_cores() -> list[Line]:
    """Time to the first outer step, cold and with the cache; all cores against one pinned core."""
    with tempfile.TemporaryDirectory() as cache:
        cold, _ = child(0, 0, cache, pin=False)
        warm, _ = child(0, 0, cache, pin=False)
        one, many = [], []
        for _ in range(3):
            one.append(child(1, 20, cache, pin=True)[1])
            many.append(child(0, 20, cache, pin=False)[1])
    lines = [Line("first outer step of fashion-mlp, cold", cold, "s"), Line("the same with the cache", warm, "s")]
    ratio = statistics.median(one) / statistics.median(many)
    return [
        *lines,
        Line(f"{parallel.cores()} cores / one pinned core", ratio, "x", "medians of 3 runs of 20 outer steps"),
    ]


def bench_torch(seconds: float = 12.0) -> Iterator[Line]:
    """The optimizer's step in PyTorch, if it is installed: see `lolo.bench.torch_speed`."""
    if not has_torch():
        yield Line("torch is not installed: pip install 'lolo[torch]'", float("nan"), "", "skipped")
        return
    from lolo.bench import torch_speed

    yield from torch_speed.measure(seconds)


def bench_kernel(rounds: int = 15) -> Iterator[Line]:
    """The CPU kernel of norm_fc: at inference beside AdamW and Muon, in meta-training beside small_fc."""
    yield from kernel_speed.measure(has_torch(), rounds=rounds)
    variants = {name: fields for name, fields in ARCHITECTURES.items() if not fields.get("learner.orthogonal")}
    yield from bench_architectures(("fashion-mlp", "28x28-32-32-10"), rounds, variants)


PARTS: dict[str, Callable[[], Iterable[Line]]] = {
    "update": bench_update,
    "methods": bench_methods,
    "architectures": bench_architectures,
    "use": bench_inference,
    "torch": bench_torch,
    "kernel": bench_kernel,
    "parts": parts_speed.measure,
    "batches": batch_speed.measure,
    "start": bench_start_and_cores,
    "blocks": bench_blocks,
    "growth": bench_growth,
}


def run(parts: Sequence[str], out: Path | None, log: Callable[[str], None] = print) -> list[Line]:
    """Measure and log each line; with `out` (a JSON file) write them, and a picture of the growth beside it."""
    lines: list[Line] = []
    log(f"norm_fc runs on: {norm_fc_kernel.path('auto')}")
    chosen = [settings.pick(PARTS, "part of the benchmark", part) for part in parts]
    for part in chosen:
        for line in part():
            log(f"{line.what:60} {line.value:12.3f} {line.unit}  {line.note}".rstrip())
            lines.append(line)
    if out is not None:
        peak = peak_memory_mb()
        about = {"lines": [dataclasses.asdict(line) for line in lines], "peak_memory_mb": peak}
        disk.write_json(out, json.loads(jsonl.json_line({**about, **provenance()})))
        grown = growth_curves(lines)
        if grown:
            style.save_figure(plots.growth(grown), out.with_suffix(".svg"))
    return lines


def growth_curves(lines: Sequence[Line]) -> dict[str, list[tuple[float, float]]]:
    """Curves of the growth: what grows -> (its value, ms of an outer step)."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        what, colon, value = line.what.removeprefix("growth with ").partition(": ")
        if line.what.startswith("growth with ") and colon:
            curves.setdefault(what, []).append((float(value), line.value))
    return curves
