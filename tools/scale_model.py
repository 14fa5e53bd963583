"""The cost of one outer step on many devices: counts from the recipe, time from numbers measured on one device.

  python tools/scale_model.py measure        # on a quiet machine; prints the next line with its numbers
  python tools/scale_model.py simulate --inner-step-us A --replicated-ns B --fixed-ms C

`docs/scale.md` says what the terms are. Network latency and bandwidth are assumptions that you give.
"""

import dataclasses
import json
import statistics
import time
from functools import partial

import jax
import jax.numpy as jnp
import tyro

from lolo.bench import speed
from lolo.files import settings
from lolo.method import meta
from lolo.method.inner import StepRecord
from lolo.method.task import Task
from lolo.runtime import environment, parallel
from lolo.tasks import by_name
from lolo.training import build, recipes
from lolo.training.how import How
from lolo.training.recipes import Recipe
from lolo.training.run import prepare

WORD = 4  # bytes
FLAGS = 2  # does any process want to stop; is a checkpoint due


@dataclasses.dataclass(frozen=True)
class Counts:
    """One outer step of a recipe. Bytes and FLOPs are those of all pairs, wherever they run."""

    gathers: int  # all-gathers: one for each truncation of each task
    gathered_bytes: int  # what every device holds after them
    inner_steps: int  # both signs
    inner_flops: float  # of all inner steps
    replicated_numbers: int  # pairs × meta-parameters: drawn, and contracted, on every device

    @property
    def messages(self) -> int:
        """Collectives: the all-gathers, and where there are several processes one all-reduce of FLAGS words."""
        return self.gathers + 1

    def received_bytes(self, devices: int) -> float:
        """What each device receives in the all-gathers."""
        return self.gathered_bytes * (devices - 1) / devices


def counts(recipe: Recipe) -> Counts:
    """What one outer step does, from the recipe alone."""
    setup = build.build(recipe)
    pairs, steps = recipe.estimator.pairs, recipe.unroll.truncation
    rounds = recipe.unroll.truncations_per_update * len(recipe.tasks)
    phi = sum(x.size for x in jax.tree.leaves(jax.eval_shape(setup.learned.init, jax.random.key(0))))
    flops = 0.0
    for name in recipe.tasks:
        task = by_name.resolve(name).train
        params = sum(x.size for x in jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0))[0]))
        one = 6.0 * task.batch * params + speed.FLOPS_PER_PARAMETER * params
        flops += one * recipe.unroll.truncations_per_update * pairs * 2 * steps
    # For each pair: task loss, gradient norm and each part of bc, of each step of either sign, and its start step.
    words = pairs * (2 * steps * (2 + len(jax.tree.leaves(setup.imitation_loss.weights))) + 1)
    return Counts(rounds, rounds * words * WORD, rounds * pairs * 2 * steps, flops, rounds * pairs * phi)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds on one device, and the network."""

    inner_step: float  # one sign of one pair, one inner step
    replicated: float  # one number of one pair's noise: drawing it, and its part in the contraction
    fixed: float  # an outer step without the two
    latency: float  # of one message between neighbours
    bandwidth: float  # bytes per second of one device's link


def outer_step(recipe: Recipe, count: Counts, measured: Measured, devices: int) -> dict[str, float]:
    """Seconds of one outer step on `devices` devices, by what takes them. All-gathers run around a ring."""
    pairs = recipe.estimator.pairs
    busiest = -(-pairs // devices) / pairs  # share of the pairs on the device that has most
    ring = 2 if devices > 1 else 0  # the all-reduce of the flags: there and back
    return {
        "inner": count.inner_steps * busiest * measured.inner_step,
        "replicated": count.replicated_numbers * measured.replicated,
        "network": (count.gathers + ring) * (devices - 1) * measured.latency
        + count.received_bytes(devices) / measured.bandwidth,
        "fixed": measured.fixed,
    }


def of_task(task: str, pairs: int) -> Recipe:
    """LoLO on this task with so many pairs."""
    recipe = settings.with_field(recipes.LOLO, "tasks", (task,))
    return settings.with_field(recipe, "estimator.pairs", pairs)


def table(task: str, measured: Measured, pairs_of: dict[int, int]) -> str:
    """One row for each number of devices."""
    lines = [
        "| devices | pairs | outer step, s | inner steps/s | efficiency | inner | replicated | network | fixed |",
        "| ---: " * 9 + "|",
    ]
    for devices, pairs in pairs_of.items():
        recipe = of_task(task, pairs)
        count = counts(recipe)
        parts = outer_step(recipe, count, measured, devices)
        total = sum(parts.values())
        alone = of_task(task, max(pairs // devices, 1))
        one = counts(alone)
        best = one.inner_steps / sum(outer_step(alone, one, measured, 1).values())  # of a device by itself
        rate = count.inner_steps / total
        shares = " | ".join(f"{100 * part / total:.0f} %" for part in parts.values())
        lines.append(
            f"| {devices} | {pairs} | {total:.4g} | {rate:,.0f} | {100 * rate / (devices * best):.0f} % | {shares} |"
        )
    return "\n".join(lines)


def simulate(
    inner_step_us: float,
    replicated_ns: float,
    fixed_ms: float,
    latency_us: float = 20.0,
    bandwidth_gbit: float = 10.0,
    task: str = "fashion-mlp",
    pairs: int = 4096,
    pairs_per_device: int = 8,
    most: int = 4096,
) -> None:
    """Tables for 1 to `most` devices: a fixed number of pairs, and a fixed number of pairs per device.

    Args:
      inner_step_us: measured, microseconds of one inner step on one device.
      replicated_ns: measured, nanoseconds per number of noise.
      fixed_ms: measured, milliseconds of an outer step that are neither.
      latency_us: assumed, of a message between neighbours. bandwidth_gbit: assumed, of a device's link.
    """
    measured = Measured(
        inner_step_us * 1e-6, replicated_ns * 1e-9, fixed_ms * 1e-3, latency_us * 1e-6, bandwidth_gbit * 1e9 / 8
    )
    sizes = [2**i for i in range(0, most.bit_length(), 2) if 2**i <= most]
    print(f"{task}, {measured}\n\n{pairs} pairs, whatever the number of devices:\n")
    print(table(task, measured, {n: pairs for n in sizes if n <= pairs}))
    print(f"\n{pairs_per_device} pairs per device:\n")
    print(table(task, measured, {n: n * pairs_per_device for n in sizes}))


def replicated_work(setup: meta.Setup, task: Task, pairs: int, key: jax.Array) -> jax.Array:
    """What every device does for all pairs in one truncation: draw noise and direction, contract them with Δs."""
    phi = setup.learned.init(key)
    keys = jax.random.split(key, pairs)
    state = jax.vmap(setup.estimator.init, in_axes=(0, None))(keys, phi)
    noise, directions, _ = jax.vmap(setup.estimator.sample)(keys, state)
    records = StepRecord(*jax.random.uniform(key, (len(StepRecord._fields), 1, pairs, 2, setup.truncation)))
    seen = meta.Truncation(records, jax.tree.map(lambda x: x[None], directions), *[jnp.zeros((1, pairs))] * 3)
    gradients, _ = meta.collect(setup, task, jnp.float32(0.5), seen)
    return sum(jnp.sum(x) for x in jax.tree.leaves((gradients.fused, noise)))


def measure(task: str = "fashion-mlp", pairs: int = 8, steps: int = 100, out: str | None = None) -> None:
    """Measure the three numbers on one device of this machine: medians over `steps` outer steps, interleaved.

    Args:
      out: JSON file for the numbers.
    """
    environment.set_up(1)
    recipe = of_task(task, pairs)
    short = recipe.unroll.truncation
    runs = {}
    for length in (short, 2 * short):
        runs[length] = prepare(settings.with_field(recipe, "unroll.truncation", length), How(devices=1))
    replicated = jax.jit(partial(replicated_work, runs[short].setup, by_name.resolve(task).train, pairs))
    times: dict[object, list[float]] = {length: [] for length in (*runs, "replicated")}
    for turn in range(steps + 5):  # the first compile and warm up
        for length, run in runs.items():
            began = time.perf_counter()
            run.state, _ = run.step(run.train_tasks(), run.state)
            jax.block_until_ready(run.state.meta_params)
            times[length].append(time.perf_counter() - began)
        began = time.perf_counter()
        replicated(jax.random.key(turn)).block_until_ready()
        times["replicated"].append(time.perf_counter() - began)
    medians = {name: statistics.median(values[5:]) for name, values in times.items()}
    count = counts(recipe)
    inner = (medians[2 * short] - medians[short]) / count.inner_steps
    fixed = medians[short] - inner * count.inner_steps - medians["replicated"]
    found = {
        "inner_step_us": inner * 1e6,
        "replicated_ns": medians["replicated"] / count.replicated_numbers * 1e9,
        "fixed_ms": max(fixed, 0.0) * 1e3,
    }
    words = " ".join(f"--{name.replace('_', '-')} {value:.4g}" for name, value in found.items())
    print(f"{task}, {pairs} pairs, {steps} outer steps, {jax.devices()[0].device_kind}, {parallel.cores()} cores")
    print(f"python tools/scale_model.py simulate --task {task} {words}")
    if out:
        with open(out, "w") as file:
            json.dump({"task": task, "pairs": pairs, "steps": steps, "seconds": str(medians), **found}, file, indent=2)


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"measure": measure, "simulate": simulate})
