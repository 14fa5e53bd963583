"""What a meta-training or an evaluation would need, before it runs: memory, arithmetic, time. Nothing is allocated.

Memory is what XLA says about the very program that would run, compiled from shapes alone. Arithmetic is counted by
`lolo.training.cost`. The time on an H100 is an estimate from stated assumptions, not a measurement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lolo.evaluation import long_runs
from lolo.method import inner, meta
from lolo.method.task import Splits, Task
from lolo.optimizers import architecture, pretrained
from lolo.runtime import parallel
from lolo.tasks.by_name import outline
from lolo.training import build, cost, recipes
from lolo.training.offload import check as check_offload
from lolo.training.recipes import Recipe
from lolo.training.slots import compile_step
from lolo.trees import PyTree, count_bytes

GPU_BYTES = 80e9
PEAK = {"bfloat16": 989e12, "float32": 495e12, "float32, highest precision": 67e12}
"""FLOP/s of an H100 SXM, dense, from its data sheet. JAX computes float32 products as TF32 unless told otherwise."""

BANDWIDTH = 3.35e12  # bytes/s
UTILISATION = 0.4
LAUNCH_SECONDS = 5e-6
ASSUMED = (
    f"assumed: {UTILISATION:.0%} of {PEAK['bfloat16'] / 1e12:.0f} TFLOP/s (bfloat16), {PEAK['float32'] / 1e12:.0f} "
    f"(float32 as TF32) or {PEAK['float32, highest precision'] / 1e12:.0f} (the learned optimizer's float32) or of "
    f"{BANDWIDTH / 1e12:.2f} TB/s, whichever is slower, and at least {LAUNCH_SECONDS * 1e6:.0f} µs for each matrix "
    "product. Not measured on one."
)


class Memory(NamedTuple):
    """Bytes on one device at the peak of a compiled program."""

    state: int  # what goes in and comes back, less the data
    data: int  # of the split that is trained on: all of it, or one segment
    held_out: int  # validation and test splits
    temporary: int  # what the program holds only while it runs

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


class Plan(NamedTuple):
    """What a command would need."""

    what: str
    parts: dict[str, int]  # of `memory.state`: bytes by name
    memory: Memory
    devices: int  # that each need this memory
    unit: str  # what `flops` and `seconds` are for
    flops: float
    seconds: float  # on an H100, estimated
    units: int
    streamed: tuple[str, ...]  # tasks whose data stay on disk


def shapes(tree: PyTree) -> PyTree:
    """Arrays or shapes as `jax.ShapeDtypeStruct`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def segment(task: Task, steps: int) -> Task:
    """The task with the shapes of a segment, if it streams."""
    if task.stream is None:
        return task
    columns = task.stream.columns
    data = tuple(jax.ShapeDtypeStruct((steps, task.batch, *c.shape[1:]), c.dtype) for c in columns)
    return dataclasses.replace(task, data=data)


def memory_of(compiled: Any, train: int, held: int = 0, beside: int = 0) -> Memory:
    """From XLA's analysis of a compiled program.

    Args:
      train, held: bytes of data among its arguments.
      beside: bytes of data that lie on the device and are no arguments.
    """
    analysis = compiled.memory_analysis()
    state = analysis.argument_size_in_bytes - train - held
    new = max(analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    return Memory(state, train, held + beside, analysis.temp_size_in_bytes + new)


def inner_step_cost(setup: meta.Setup, task: Task) -> cost.Cost:
    """One inner step of one trajectory."""
    phi = jax.eval_shape(setup.learned.init, jax.random.key(0))

    def step(meta_params: PyTree, task: Task, state: inner.InnerState, key: jax.Array) -> Any:
        learner = setup.learned.optimizer(meta_params)
        return inner.inner_step(task, learner, setup.expert, jnp.ones(()), state, key, setup.imitation_loss)

    begin = partial(inner.begin, expert=setup.expert)
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda phi, key: begin(task, setup.learned.optimizer(phi), key=key), phi, key)
    return cost.count(step, phi, task, state, key)


def scoring_cost(held: Task, examples: int) -> float:
    """FLOPs of scoring `examples` examples."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, stats = jax.eval_shape(held.init, key)
    batch = min(held.score_batch, examples)
    indices = jax.ShapeDtypeStruct((batch,), jnp.int32)
    one = cost.count(lambda p, s, data, i: held.score(p, s, held.examples(data, i)), params, stats, held.data, indices)
    return one.flops * examples / batch


def h100_seconds(step: cost.Cost, together: int = 1) -> float:
    """Estimated time of a step by the assumptions in `ASSUMED`; `together`: trajectories in one kernel."""

    def seconds(p: cost.Product) -> float:
        work = p.times * max(p.flops / PEAK[p.kind], p.nbytes / BANDWIDTH) / UTILISATION
        # Once, however often it turns: blocks that suit a CPU's cache are one product on a GPU.
        return max(work, LAUNCH_SECONDS / together)

    return sum(map(seconds, step.products))


def compiled_step(setup: meta.Setup, tasks: tuple[Task, ...], over: Any) -> tuple[Any, meta.MetaState]:
    """The outer step compiled from shapes, and the shapes of its state."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda key: meta.meta_init(setup, tasks, key), key)
    step: Any = compile_step(setup, state, over)
    return step.lower(shapes(tasks), state).compile(), state


def work_of(
    recipe: Recipe, setup: meta.Setup, splits: Sequence[Splits], chosen_by: Sequence[Splits]
) -> tuple[float, float]:
    """FLOPs and H100 seconds of one outer step, with its share of the validations, which run on `chosen_by`."""
    own, block = recipe.validation, recipe.estimator.slots_per_block
    steps = recipe.unroll.truncation * recipe.unroll.truncations_per_update * 2 * recipe.estimator.pairs
    validations = recipe.outer.steps // own.every if own.every else 0
    share = validations * own.seeds / recipe.outer.steps
    flops = seconds = 0.0
    for task, _, _ in splits:
        step = inner_step_cost(setup, segment(task, recipe.unroll.truncation))
        flops += step.flops * steps
        seconds += h100_seconds(step, 1 if block == 1 else 2 * block) * steps
    for task, held, _ in chosen_by if share else ():
        step = inner_step_cost(setup, segment(task, recipe.unroll.truncation))
        check = _long_run(step, held, own.steps or 10 * recipe.unroll.length)
        flops, seconds = flops + share * check[0], seconds + share * check[1]
    return flops, seconds


def outlook(recipe: Recipe, setup: meta.Setup, splits: Sequence[Splits], chosen_by: Sequence[Splits]) -> str:
    """One line before a run: sizes and arithmetic, without compiling anything."""
    setup, group = setup._replace(capacity=recipe.replay.capacity), tuple(s.train for s in splits)
    state = jax.eval_shape(lambda: meta.meta_init(setup, group, jax.random.key(0)))
    flops, _ = work_of(recipe, setup, splits, chosen_by)
    buffers = _size(count_bytes([slots.local.replay for slots in state.slots]))
    return (
        f"state {_size(count_bytes(state))}, replay buffers {buffers} of it; data "
        f"{_size(count_bytes([task.data for task in group]))}; {_flops(flops * recipe.outer.steps)} in all. "
        "More: --dry-run."
    )


def of_training(recipe: Recipe, devices: int | None = 1, offload: bool = False) -> Plan:
    """The plan of `lolo train`. Raises RecipeError, TaskError."""
    setup = build.build(recipe)
    if offload:
        check_offload(recipe)
        setup = setup._replace(capacity=1)
    splits, held = ([outline(name) for name in names] for names in (recipe.tasks, recipe.validation.tasks))
    steps = recipe.unroll.truncation * recipe.unroll.truncations_per_update
    tasks = tuple(segment(s.train, steps) for s in splits)
    over = parallel.mesh(recipe.estimator.pairs // recipe.estimator.slots_per_block, devices)
    compiled, state = compiled_step(setup, tasks, over)
    slots, count = state.slots, over.devices.size
    train = count_bytes([task.data for task in tasks])
    beside = count_bytes([(s.validation.data, s.test.data) for s in splits])
    beside += count_bytes([[segment(s.train, long_runs.WINDOW).data, s.validation.data, s.test.data] for s in held])
    whole, inner_bytes = count_bytes(state), count_bytes([s.local.inner for s in slots])
    buffers = count_bytes([s.local.replay for s in slots])
    parts = {
        "inner states": inner_bytes // count,
        "replay buffers": buffers // count,
        "meta-parameters, noise and the rest": whole - inner_bytes - buffers,
    }
    flops, seconds = work_of(recipe, setup, splits, held or splits)
    return Plan(
        f"meta-training on {', '.join(recipe.tasks)}",
        parts,
        memory_of(compiled, train, beside=beside),
        count,
        "outer step, its share of validation included",
        flops,
        seconds,
        recipe.outer.steps,
        tuple(n for n, s in zip(recipe.tasks, splits, strict=True) if s.train.stream),
    )


def _long_run(step: cost.Cost, held: Task, steps: int) -> tuple[float, float]:
    """FLOPs and H100 seconds of one evaluation run; scoring is taken to be as fast as training."""
    scored = len(long_runs.curve_steps(steps)) * min(held.score_examples, held.size) + held.size
    scoring = scoring_cost(held, scored)
    flops = step.flops * steps + scoring
    return flops, h100_seconds(step) * flops / step.flops


def of_evaluation(name: str, learner: architecture.LearnerSettings, optimizers: int, seeds: int, steps: int) -> Plan:
    """The plan of `lolo eval`, as if every optimizer were a learned one: runs one after the other on one device.

    The states of all seeds are held at once; those of a streamed task are run seed by seed.
    """
    setup = build.build(dataclasses.replace(recipes.NAIVE, learner=learner, tasks=(name,)))
    splits = outline(name)
    task = segment(splits.train, long_runs.WINDOW)
    make = pretrained.maker(learner)
    phi = jax.eval_shape(setup.learned.init, jax.random.key(0))
    compiled, state = long_runs.compiled_window(task, splits.test, make, phi, 1 if task.stream else seeds)
    flops, seconds = _long_run(inner_step_cost(setup, task), splits.test, steps)
    held, beside = count_bytes(splits.test.data), count_bytes(splits.validation.data)
    return Plan(
        f"evaluating on {name}",
        {"inner states": count_bytes(state)},
        memory_of(compiled, count_bytes(task.data), held, beside),
        1,
        f"run of {steps:,} steps",
        flops,
        seconds,
        optimizers * seeds,
        (name,) if splits.train.stream else (),
    )


def available_bytes() -> int | None:
    """Memory that is free here: of the first GPU, or of the machine. None where it is unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return None


def report(plan: Plan) -> str:
    """The plan in words."""
    memory, there = plan.memory, available_bytes()
    needed = memory.total * (plan.devices if jax.default_backend() == "cpu" else 1)
    here = "unknown" if there is None else f"{'yes' if needed <= there else 'NO'}, {_size(there)} are free"
    total = plan.seconds * plan.units
    lines = [
        f"{plan.what}. Nothing was run.",
        "",
        f"memory at the peak, by the compiled program's own analysis{_on(plan.devices)}",
        *(f"  {name:<38}{_size(size):>10}" for name, size in plan.parts.items()),
        f"  {'data, train':<38}{_size(memory.data):>10}{'  one segment; the set is streamed' if plan.streamed else ''}",
        f"  {'data, held out':<38}{_size(memory.held_out):>10}",
        f"  {'while the program runs':<38}{_size(memory.temporary):>10}",
        f"  {'together':<38}{_size(memory.total):>10}",
        f"fits here: {here}",
        f"fits an 80 GB GPU: {'yes' if memory.total <= GPU_BYTES else 'NO'}{_cure(memory)}",
        "",
        f"arithmetic: {_flops(plan.flops)} per {plan.unit}; {plan.units:,} of them: {_flops(plan.flops * plan.units)}",
        f"time on one H100, estimated: {_time(total)}",
        f"  {ASSUMED}",
    ]
    return "\n".join(lines)


def _on(devices: int) -> str:
    return f", on each of {devices} devices" if devices > 1 else ""


def _cure(memory: Memory) -> str:
    if memory.total <= GPU_BYTES:
        return ""
    if memory.temporary > memory.state:
        return "; raise the task's micro_batches, or lower its batch"
    return "; lower estimator.pairs or replay.capacity, or keep replay buffers on the host with --offload"


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _flops(flops: float) -> str:
    for word, unit in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= unit:
            return f"{flops / unit:.3g} {word}"
    return f"{flops / 1e6:.3g} MFLOP"


def _time(seconds: float) -> str:
    for word, unit in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= unit:
            return f"{seconds / unit:.2g} {word}"
    return f"{seconds:.2g} seconds"
