"""The host loop of meta-training: run outer steps, log, validate, save, resume.

A run's folder holds `recipe.json`, `run.json` (versions, commit, machine), `log.jsonl` (one object per outer step),
`checkpoints/`, and the weights `last.safetensors` and `best.safetensors`.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lolo.files import disk, jsonl
from lolo.method.task import Splits
from lolo.optimizers import pretrained, weights_file
from lolo.runtime import environment, interrupt, parallel
from lolo.runtime.process_group import ALONE, ProcessGroup
from lolo.training import checkpoints, run_folder, run_log
from lolo.training.recipes import Recipe
from lolo.training.run import (
    Run,
    add_row,
    check_streams,
    finish_checkpoint,
    log_step,
    logger_openers,
    logging_to,
    prepare,
    save_checkpoint,
    save_weights,
    validate,
    weights_of,
)
from lolo.training.run_folder import RunError
from lolo.trees import count_bytes


class DivergedError(RuntimeError):
    """Every pair had non-finite numbers for too many outer steps in a row."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What `train` tells after every outer step."""

    step: int  # outer steps done
    total: int
    task_loss: float
    alpha: float
    start_step: float  # mean K over slots
    seconds: float  # that the outer step took


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    weights: pretrained.Weights  # the last φ
    step: int  # outer steps done
    finished: bool  # False: stopped on request, can be resumed
    out: Path | None


def loop(run: Run, stop: interrupt.Stop, told: Callable[[Progress], None], say: Callable[[str], None]) -> Result:
    """Outer steps until the recipe's last, a request to stop, or numbers gone bad for too long."""
    try:
        with run.feeding():
            return outer_steps(run, stop, told, say)
    finally:
        finish_checkpoint(run)


def outer_steps(run: Run, stop: interrupt.Stop, told: Callable[[Progress], None], say: Callable[[str], None]) -> Result:
    """The loop itself, while the tasks' data are fed, but for a checkpoint that may still be being written."""
    recipe, total = run.recipe, run.recipe.outer.steps
    any_process = parallel.any_process(run.over)
    stopping = False
    save_checkpoint(run)
    while run.done < total:
        # Processes have clocks and signals of their own, and must do the same.
        stopping, due = any_process(
            stop.requested is not None, time.monotonic() - run.saved_at > run.checkpoint_seconds
        )
        if stopping:
            break
        if due:
            save_checkpoint(run)
        began = time.perf_counter()
        run.state, metrics = run.step(run.next_tasks(), run.state)
        jax.block_until_ready(run.state.meta_params)
        seconds = time.perf_counter() - began
        row = log_step(run, metrics, seconds)
        bad_steps = int(run.state.bad_steps)
        if bad_steps >= recipe.outer.max_bad_steps:
            raise DivergedError(diagnosis(run, row))
        every = recipe.validation.every
        if every and (run.done % every == 0 or run.done == total) and not bad_steps:
            best_before = run_log.best_validation(run.rows)
            measured = validate(run)
            add_row(run, {"step": run.done - 1, "validation": measured})
            if best_before is None or measured["held_loss"] < best_before:
                save_weights(run, "best")
            if run.done < total:  # else it is written below
                save_weights(run, "last")
            save_checkpoint(run)
        loss = float(np.mean(row["task_loss"]))
        starts = float(np.mean(jax.device_get(metrics.start_step)))
        told(Progress(run.done, total, loss, row["alpha_mix"], starts, seconds))
    save_checkpoint(run)
    save_weights(run, "last")
    if stopping:
        where = f" Go on with: lolo resume {run.out}" if run.out else ""
        say(f"stopped by {stop.requested or 'another process'} after outer step {run.done} of {total}.{where}")
    return Result(weights_of(run), run.done, run.done >= total, run.out)


def to_the_end(run: Run, stop: interrupt.Stop, told: Callable[[Progress], None], say: Callable[[str], None]) -> Result:
    """`loop`, after which the processes part: all come to the same end."""
    try:
        result = loop(run, stop, told, say)
    except DivergedError:
        run.gang.dissolve()
        raise
    run.gang.dissolve()
    return result


def diagnosis(run: Run, row: dict[str, Any]) -> str:
    """Why a run stopped, from its last row."""
    first = row["first_bad"][0] if row["dropped"] else None
    where = "The meta-gradient itself was not finite."
    if first is not None:
        where = (
            f"In task {first['task']!r}, slot {first['slot']}, start step {first['start_step']}, {first['first']} went "
            "bad first."
        )
    kept = f" The last good checkpoint is at outer step {run.saved}." if run.saved >= 0 else ""
    return (
        f"every pair had non-finite numbers in {run.recipe.outer.max_bad_steps} outer steps in a row, up to outer step "
        f"{row['step']}; meta-parameters were left unchanged. {where}{kept} Try a smaller learner.step_mult or "
        "imitation.lr, or look for non-finite numbers in the task's data."
    )


def train(
    recipe: Recipe,
    out: Path | str | None = None,
    *,
    init: str | Path | None = None,
    tasks: dict[str, Splits] | None = None,
    devices: int | None = None,
    gang: ProcessGroup = ALONE,
    offload: bool = False,
    checkpoint_seconds: float = 20.0,
    log: Sequence[str] = (),
    stop: interrupt.Stop | None = None,
    told: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Result:
    """Meta-train by a recipe, in this process or, with all of a gang calling this alike, in several.

    Args:
      recipe: what to do; `dataclasses.replace` or `recipes.with_field` changes fields.
      out: a new or empty folder for log, checkpoints and weights; None keeps nothing on disk.
      init: weights to go on from, a name or a path.
      tasks: your own splits by name, in place of the recipe's; `resume` needs them again.
      devices: how many of JAX's local devices to use at most; the result does not depend on it.
      gang: the processes that run it together, from `gang.join`; `out` is then a folder that all see. The result does
        not depend on their number. Process 0 logs, tells and says.
      offload: keep the replay buffers in the host's memory, in one process; the result does not depend on it.
      checkpoint_seconds: time between two checkpoints, at least; one is also written at the start, at each
        validation, and at the end.
      log: names of `sinks.SINKS` that take the log's rows too; needs `out`.
      stop: set its `requested` to end after the current outer step.
      told: called after every outer step; say: called with messages for people.

    Raises: RecipeError, TaskError, FileError, RunError, SinkError for bad input; DivergedError. With a gang,
    DifferError and GangError too.
    """
    if log and out is None:
        raise RunError(f"log={tuple(log)} needs a run folder; give `out`.")
    openers = logger_openers(log)
    recipe = run_folder.pinned(recipe) if tasks is None else dataclasses.replace(recipe, tasks=tuple(tasks))
    source = None if init is None else weights_file.read_weights(init)
    run_folder.require_alike(gang, recipe, {"--init": source and source.sha256, "--devices": devices})
    run = prepare(recipe, source, tasks, devices, gang, offload)
    run.checkpoint_seconds = checkpoint_seconds
    if out is not None:
        run.out = Path(out)
        sizes = {
            "buffer_bytes_per_slot": sum(count_bytes(s.replay.states) for s in run.whole_state().slots)
            // recipe.estimator.pairs,
            "inner_state_bytes": sum(count_bytes(s.inner) for s in run.state.slots) // (2 * recipe.estimator.pairs),
            "expert_bytes": sum(count_bytes(s.inner.expert) for s in run.state.slots),
        }
        about = {**environment.provenance(), **sizes, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
        about["init"] = None if source is None else source.sha256
        about["processes"] = gang.processes
        run_folder.create_shared(gang, run.out, recipe, {**about, "log": list(log)})
    with run_folder.exclusive(run.out, gang), logging_to(run, openers, say):
        return to_the_end(run, stop or interrupt.Stop(), told, say)


def resume(
    out: Path | str,
    *,
    tasks: dict[str, Splits] | None = None,
    devices: int | None = None,
    gang: ProcessGroup = ALONE,
    offload: bool = False,
    checkpoint_seconds: float = 20.0,
    log: Sequence[str] | None = None,
    stop: interrupt.Stop | None = None,
    told: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Result:
    """Go on with a run from its newest whole checkpoint; the result is that of a run never interrupted.

    The gang may have another number of processes than the one that wrote the checkpoint. `tasks` are those that
    `train` was given. `log`: as in `train`; None: where the run logged before. Rebuilt from log.jsonl: no step is twice
    there or missing.

    Raises RunError: no run there, no whole checkpoint, other tasks, or recipe.json is not the checkpoint's; SinkError.
    As `train` for gangs.
    """
    folder = Path(out)
    recipe = run_folder.read_recipe(folder)
    if tasks is not None and tuple(tasks) != recipe.tasks:
        raise RunError(f"{folder} is a run on tasks={recipe.tasks}, not {tuple(tasks)}; give those it began with.")
    openers = logger_openers(run_folder.logged_to(folder) if log is None else log)
    run_folder.require_alike(gang, recipe, {"--devices": devices})
    with run_folder.exclusive(folder, gang):
        over = parallel.global_mesh(recipe.estimator.pairs // recipe.estimator.slots_per_block, devices)
        rows = parallel.own_rows(over, recipe.estimator.pairs)
        newest = checkpoints.newest_checkpoint(folder, say, rows, gang.settle)
        if newest is None and not run_folder.untouched(folder):
            raise RunError(f"{folder} has no whole checkpoint; start again with `lolo train` and another --out.")
        if newest is not None:
            checkpoints.check_manifest(newest[1], folder, recipe, say)
        run = prepare(recipe, None, tasks, devices, gang, offload)
        run.out, run.checkpoint_seconds = folder, checkpoint_seconds
        if newest is not None:
            arrays, manifest = newest
            shapes = checkpoints.state_shapes(jax.eval_shape(run.whole_state), rows)
            run.load(checkpoints.state_from_arrays(arrays, shapes, str(folder)))
            check_streams(run, manifest.get("streams", {}))
            run.saved, run.saved_at = run.done, time.monotonic()
            run.rows = [row for row in run_log.log_rows(folder) if row["step"] < run.done]
        if gang.leads and newest is not None:
            text = "".join(f"{jsonl.json_line(row)}\n" for row in run.rows)
            disk.write_bytes(folder / "log.jsonl", text.encode())
        if gang.leads and log is not None:
            disk.write_json(folder / "run.json", {**run_folder.read_about(folder), "log": list(log)})
        say(f"resumed {folder} at outer step {run.done} of {recipe.outer.steps}.")
        with logging_to(run, openers, say):
            return to_the_end(run, stop or interrupt.Stop(), told, say)
