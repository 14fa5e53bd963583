"""How long one training step takes with each entrant: what turns steps to a target into seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lolo.evaluation import long_runs
from lolo.method import inner
from lolo.race import tuning, workloads
from lolo.race.entrants import Entrant
from lolo.race.records import StepTime
from lolo.studies import candidates

ROUNDS = 7  # all entrants one after the other in each; the median counts
SECONDS = 0.2  # that one measurement takes, about


def measure(
    workload: str, entrants: Sequence[Entrant], device: str, on_done: Callable[[int], None] = lambda count: None
) -> list[StepTime]:
    """The step times of all entrants on a workload, measured in turn."""
    of = workloads.WORKLOADS[workload]
    programs = []
    for entrant in entrants:
        (named,) = candidates.read(entrant.optimizers[:1], code=entrant.code).values()
        programs.append(_program(of.task, tuning.candidate(named, of.task, of.steps)))
        on_done(1)
    found = np.array([[program() for program in programs] for _ in range(ROUNDS)])
    medians = np.median(found, axis=0)
    return [StepTime(workload, one.name, float(f"{t:.3g}"), device) for one, t in zip(entrants, medians, strict=True)]


def _program(task_name: str, entry: long_runs.Candidate) -> Callable[[], float]:
    """A function that runs some steps and gives the seconds of one, compiled and warm."""
    task = workloads.splits_of(task_name).train
    setting = jax.tree.map(jnp.asarray, entry.setting)

    def steps(setting: object, state: inner.InnerState, count: jax.Array) -> inner.InnerState:
        optimizer = entry.make(setting)

        def step(i: jax.Array, state: inner.InnerState) -> inner.InnerState:
            key = jax.random.fold_in(jax.random.key(0), i)
            return inner.inner_step(task, optimizer, None, jnp.ones(()), state, key)[0]

        return jax.lax.fori_loop(0, count, step, state)

    run = jax.jit(steps)
    start = jax.jit(lambda setting: inner.begin(task, entry.make(setting), None, jax.random.key(0)))(setting)

    def timed(count: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(setting, start, count))
        return time.perf_counter() - began

    timed(1)
    count = max(1, round(SECONDS / max(timed(3) / 3, 1e-6)))
    return lambda: timed(count) / count
