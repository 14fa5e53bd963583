"""The host loop of meta-training: run outer steps, log, validate, save, resume.

A run's folder holds `recipe.json`, `run.json` (versions, commit, machine), `log.jsonl` (one object per outer step),
`checkpoints/`, and the weights `last.safetensors` and `best.safetensors`.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lolo.files import disk, jsonl
from lolo.method.task import Splits
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.runtime import environment, parallel
from lolo.training import checkpoints, loggers, run_folder, run_log, run_start
from lolo.training.how import How, Progress
from lolo.training.recipes import Recipe
from lolo.training.run import Run, prepare
from lolo.training.run_folder import RunError


class DivergedError(RuntimeError):
    """Every pair had non-finite numbers for too many outer steps in a row.

    >>> small = {"outer.steps": 2, "unroll.length": 20, "unroll.truncation": 10, "validation.every": 0}
    >>> wild = {"learner.step_mult": 1e30, "outer.max_bad_steps": 1}
    >>> try:
    ...     lolo.train("naive", task="quadratic", **small, **wild)
    ... except lolo.DivergedError as error:
    ...     print(error.exit_status)
    4
    """

    exit_status = 4  # of `lolo`


@dataclasses.dataclass(frozen=True)
class Result:
    """How a call of `train` or `resume` ended."""

    weights: pretrained.Weights  # the last φ
    step: int  # outer steps done
    finished: bool  # False: stopped on request, can be resumed
    out: Path | None
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list, repr=False)  # of the log, see `run_log`


def train(
    recipe: Recipe,
    out: Path | str | None = None,
    how: How | None = None,
    *,
    init: str | Path | None = None,
    tasks: dict[str, Splits] | None = None,
) -> Result:
    """Meta-train by a recipe, in this process or, with all of a process group calling this alike, in several.

    Args:
      recipe: what to do; `dataclasses.replace` or `lolo.with_field` changes fields.
      out: a new or empty folder for log, checkpoints and weights; None keeps nothing on disk.
      how: devices, processes, checkpoints, loggers, progress. The result does not depend on it.
      init: weights to start from, a name or a path.
      tasks: your own splits by name, instead of the recipe's; `resume` needs them again. Those that the recipe names in
        validation.tasks are for validation alone.

    Raises: RecipeError, TaskError, FileError, RunError, LoggerError for bad input; DivergedError. With a process
    group, DifferError and ProcessGroupError too.
    """
    how = how or How()
    if how.loggers and out is None:
        raise RunError(f"loggers={how.loggers} needs a run folder; give `out`.")
    openers = loggers.openers(how.loggers or ())
    if tasks is not None:
        recipe = dataclasses.replace(recipe, tasks=run_start.meta_training_tasks(recipe, tasks))
    recipe = run_start.pinned(recipe, tasks or ())
    source = None if init is None else weights_file.read_weights(init)
    run_start.require_alike(how.group, recipe, {"--init": source and source.sha256, "--devices": how.devices})
    run = prepare(recipe, how, source, tasks)
    if out is not None:
        run.out = Path(out)
        about = {
            **environment.provenance(),
            **run.sizes(),
            "folder": os.getcwd(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "init": None if source is None else source.sha256,
            "processes": how.group.processes,
            "path": architecture.path_of(recipe.learner),
            "log": list(openers),
        }
        run_start.create(run.out, recipe, about, how.group)
    with run_start.exclusive(run.out, how.group), run.logging(openers):
        how.on_start(run)
        return finish(run)


def resume(out: Path | str, how: How | None = None, *, tasks: dict[str, Splits] | None = None) -> Result:
    """Continue a run from its newest complete checkpoint; the result is that of a run never interrupted.

    The group may have another number of processes than the one that wrote the checkpoint. `tasks` are those that
    `train` was given; a task `path.py:function` is found from any current folder. Loggers are rebuilt from log.jsonl:
    no step is there twice or missing.

    Raises RunError: no run there, no complete checkpoint, other tasks, or recipe.json is not the checkpoint's;
    LoggerError. With a process group, as `train`.

    >>> small = {"outer.steps": 2, "unroll.length": 20, "unroll.truncation": 10, "validation.every": 0}
    >>> result = lolo.train("lolo", "runs/a", task="quadratic", **small, **{"learner.name": "sgd"})
    >>> lolo.resume("runs/a").step  # finished before, so it only reads the weights
    2
    """
    folder, how = Path(out), how or How()
    recipe = run_folder.read_recipe(folder)
    given = recipe.tasks if tasks is None else run_start.meta_training_tasks(recipe, tasks)
    if given != recipe.tasks:
        raise RunError(f"{folder} is a run on tasks={recipe.tasks}, not {given}; give those it began with.")
    openers = loggers.openers(run_folder.logged_to(folder) if how.loggers is None else how.loggers)
    run_start.require_alike(how.group, recipe, {"--devices": how.devices})
    with run_start.exclusive(folder, how.group):
        run = prepare(recipe, how, None, tasks, run_folder.task_folders(folder))
        run.out = folder
        restore(run)
        if how.group.leads and how.loggers is not None:
            disk.write_json(folder / "run.json", {**run_folder.read_about(folder), "log": list(openers)})
        how.log(f"resumed {folder} at outer step {run.done} of {recipe.outer.steps}.")
        with run.logging(openers):
            return finish(run)


def restore(run: Run) -> None:
    """State and log of the newest complete checkpoint in the run's folder. Raises RunError, FileError."""
    folder, group = run.out or Path(), run.how.group
    rows = parallel.local_rows(run.mesh, run.recipe.estimator.pairs)
    newest = checkpoints.newest_checkpoint(folder, run.how.log, rows, group.agree)
    if newest is None:
        if not run_folder.untouched(folder):
            raise RunError(f"{folder} has no complete checkpoint; start again with `lolo train` and another --out.")
        return
    arrays, manifest = newest
    checkpoints.check_manifest(manifest, folder, run.recipe, run.how.log, run.how.other_path)
    shapes = checkpoints.state_shapes(jax.eval_shape(run.complete_state), rows)
    run.load(checkpoints.state_from_arrays(arrays, shapes, str(folder)))
    run.check_streams(manifest.get("streams", {}))
    run.saved, run.saved_at = run.done, time.monotonic()
    run.rows = [row for row in run_log.log_rows(folder) if row["step"] < run.done]
    if group.leads:
        text = "".join(f"{jsonl.json_line(row)}\n" for row in run.rows)
        disk.write_bytes(folder / "log.jsonl", text.encode())


def finish(run: Run) -> Result:
    """Outer steps until the recipe's last, a request to stop, or numbers gone bad for too long.

    Then the processes of a group part; all come to the same end.
    """
    try:
        with run.feeding():
            stopped = outer_steps(run)
    except DivergedError:
        run.finish_checkpoint()
        run.how.group.leave()
        raise
    finally:
        run.finish_checkpoint()
    if stopped:
        where = f" Resume with: lolo resume {run.out}" if run.out else ""
        by = run.how.stop.requested or "another process"
        run.how.log(f"stopped by {by} after outer step {run.done} of {run.recipe.outer.steps}.{where}")
    run.how.group.leave()
    return Result(run.weights(), run.done, run.done >= run.recipe.outer.steps, run.out, run.rows)


def outer_steps(run: Run) -> bool:
    """Run outer steps; whether a stop was requested. The caller has opened the data and waits for a checkpoint."""
    recipe, how, total = run.recipe, run.how, run.recipe.outer.steps
    any_process = parallel.any_process(run.mesh)
    stopping = False
    run.save_checkpoint()
    while run.done < total:
        # Processes have clocks and signals of their own, and must do the same.
        stopping, due = any_process(
            how.stop.requested is not None, time.monotonic() - run.saved_at > how.checkpoint_seconds
        )
        if stopping:
            break
        if due:
            run.save_checkpoint()
        began = time.perf_counter()
        run.state, metrics = run.step(run.next_tasks(), run.state)
        jax.block_until_ready(run.state.meta_params)
        seconds = time.perf_counter() - began
        row = run_log.step_row(jax.device_get(metrics), list(run.tasks), run.done - 1, run.inner_steps / seconds)
        run.add_row(row)
        bad_steps = int(run.state.bad_steps)
        if bad_steps >= recipe.outer.max_bad_steps:
            raise DivergedError(diagnosis(run, row))
        every = recipe.validation.every
        if every and (run.done % every == 0 or run.done == total) and not bad_steps:
            validate(run)
        loss, starts = run_log.mean_task_loss([row]), float(np.mean(jax.device_get(metrics.tasks.start_step)))
        how.on_progress(Progress(run.done, total, loss, row["alpha_mix"], starts, seconds))
    run.save_checkpoint()
    run.save_weights("last")
    return stopping


def validate(run: Run) -> None:
    """Measure the present φ on the validation split, keep it as `best` if it is, and save the run."""
    best_before = run_log.best_validation(run.rows)
    measured = run.measure()
    run.add_row({"step": run.done - 1, "validation": measured})
    if best_before is None or measured["held_loss"] < best_before:
        run.save_weights("best")
    if run.done < run.recipe.outer.steps:  # else it is written at the end
        run.save_weights("last")
    run.save_checkpoint()


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
