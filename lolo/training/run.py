"""A meta-training under way: its state, data, weights, checkpoints and log."""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lolo.evaluation import long_runs
from lolo.files import jsonl
from lolo.files.disk import FileError
from lolo.files.settings import fields, pick
from lolo.method import meta
from lolo.method.task import Splits, Task
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.runtime import environment, parallel
from lolo.runtime.process_group import ALONE, ProcessGroup
from lolo.tasks.by_name import resolve
from lolo.tasks.feed import Feed
from lolo.training import build, checkpoints, loggers, recipes, run_log, slots
from lolo.training.loggers import Logger, LoggerError
from lolo.training.offload import Offloaded
from lolo.training.offload import check as check_offload
from lolo.training.recipes import Recipe
from lolo.training.run_folder import RunError

META_STREAM = 0  # streams of meta-trainings: their order is drawn from (this, seed, task, epoch)
VALIDATION_SEEDS = 900_000  # evaluation seeds of validation unrolls count from here
BAD = ("nothing", "the loss", "the gradient", "the imitation distance")


@dataclasses.dataclass
class Run:
    """A meta-training under way."""

    recipe: Recipe
    tasks: dict[str, Splits]
    setup: meta.Setup
    over: Any  # the mesh
    step: slots.Step | Offloaded
    state: meta.MetaState
    out: Path | None
    rows: list[dict[str, Any]]  # of the log
    gang: ProcessGroup = ALONE  # the processes that run it together
    feeds: tuple[Feed, ...] = ()  # of the tasks' data, while the loop runs
    checkpoint_seconds: float = 20.0  # between two checkpoints, at least
    saved: int = -1  # outer step of the newest checkpoint
    saved_at: float = 0.0
    writing: Future[Path] | None = None  # of a large checkpoint, in a thread
    loggers: dict[str, Logger] = dataclasses.field(default_factory=dict)  # that take the log's rows too, by name
    say: Callable[[str], None] = print

    @property
    def done(self) -> int:
        return int(self.state.outer_step)

    def whole_state(self) -> meta.MetaState:
        """The state with all of its replay buffers, wherever they are: what a checkpoint holds."""
        return self.step.whole(self.state) if isinstance(self.step, Offloaded) else self.state

    def load(self, state: meta.MetaState) -> None:
        """Go on from the state of `whole_state`."""
        if isinstance(self.step, Offloaded):
            self.state = self.step.place(state)
        else:
            self.state = parallel.place(state, self.over, slots.state_specs(state))

    def train_tasks(self) -> tuple[Task, ...]:
        return tuple(splits.train for splits in self.tasks.values())

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """Data from here on. A stream's cursor needs no state: every outer step takes one segment."""
        steps = self.recipe.unroll.truncation * self.recipe.unroll.truncations_per_update
        self.feeds = tuple(
            Feed(task, steps, (META_STREAM, self.recipe.seed, group), self.done)
            for group, task in enumerate(self.train_tasks())
        )
        try:
            yield
        finally:
            for feed in self.feeds:
                feed.close()

    def next_tasks(self) -> tuple[Task, ...]:
        """The tasks with the data of the next outer step."""
        return tuple(feed.next(lambda data: parallel.place(data, self.over)) for feed in self.feeds)

    def streams(self) -> dict[str, dict[str, int]]:
        """Where the streams of tasks larger than memory are."""
        places = {name: feed.place_in_stream() for name, feed in zip(self.tasks, self.feeds, strict=True)}
        return {name: place for name, place in places.items() if place is not None}


def check_init(init: weights_file.WeightsFile, learner: architecture.LearnerSettings) -> None:
    """Raise FileError unless φ of a weights file means the same in a recipe's learner."""
    own = init.recipe.get("learner", init.learner)  # φ means what it was meta-trained as, however it is used
    given = architecture.learner_from_dict(own, "--init weights")
    of_use: dict[str, Any] = {  # may differ
        name: getattr(learner, name) for name in ("weight_decay", "clock_limit", "step_decay")
    }
    if dataclasses.replace(given, **of_use) != learner:
        differs = [
            f"learner.{name} is {theirs!r} there and {ours!r} in the recipe"
            for name, theirs in dataclasses.asdict(given).items()
            if name not in of_use and theirs != (ours := getattr(learner, name))
        ]
        raise FileError(f"--init weights are of another learner: {', '.join(differs)}. Give the same values.")


def prepare(
    recipe: Recipe,
    init: weights_file.WeightsFile | None,
    tasks: dict[str, Splits] | None,
    devices: int | None,
    gang: ProcessGroup = ALONE,
    offload: bool = False,
) -> Run:
    """Build, place and compile what a recipe names. Raises RecipeError, TaskError, FileError."""
    setup = build.build(recipe)
    if offload:
        if gang.processes > 1:
            raise RunError("offload=True keeps replay buffers with one process; leave it out with several.")
        check_offload(recipe)
        setup = setup._replace(capacity=1)
    splits = {name: resolve(name) for name in recipe.tasks} if tasks is None else tasks
    over = parallel.global_mesh(recipe.estimator.pairs // recipe.estimator.slots_per_block, devices)
    own_tasks = tuple(s.train for s in splits.values())
    meta_params = None
    if init is not None:
        check_init(init, recipe.learner)
        meta_params = jax.tree.map(jnp.asarray, init.meta_params)
    state = slots.init_state(lambda: meta.meta_init(setup, own_tasks, jax.random.key(recipe.seed), meta_params), over)
    compiled = Offloaded(recipe, setup, state, over) if offload else slots.compile_step(setup, state, over)
    train_tasks = parallel.place(own_tasks, over)
    placed = {
        name: Splits(task, s.validation, s.test) for (name, s), task in zip(splits.items(), train_tasks, strict=True)
    }
    return Run(recipe, placed, setup, over, compiled, state, None, [], gang)


def weights_of(run: Run) -> pretrained.Weights:
    """The present φ with its recipe and what is known about it."""
    about = {"outer_step": run.done, **run_log.realised(run.rows)}
    if run.rows and "validation" in run.rows[-1]:
        about["validation"] = run.rows[-1]["validation"]
    phi = jax.device_get(run.state.meta_params)
    return pretrained.Weights(phi, run.recipe.learner, recipes.to_dict(run.recipe), about)


def save_weights(run: Run, name: str) -> None:
    """Write `name`.safetensors into the run's folder."""
    if run.out is not None and run.gang.leads:
        pretrained.save(run.out / f"{name}.safetensors", weights_of(run))


def save_checkpoint(run: Run) -> None:
    """Write the whole state, unless this outer step is saved already or its numbers are bad.

    A state of LARGE_CHECKPOINT bytes or more is written by a thread while the next outer steps run; one at a time.
    """
    if run.out is None or run.saved == run.done or int(run.state.bad_steps):
        return
    finish_checkpoint(run)
    arrays, own = checkpoints.state_arrays(run.whole_state())
    about = {"recipe": recipes.to_dict(run.recipe), "versions": environment.versions(), "streams": run.streams()}
    rows = parallel.own_rows(run.over, run.recipe.estimator.pairs)
    write = partial(
        checkpoints.write_checkpoint, run.out, run.done, arrays, about, own=own, rows=rows, settle=run.gang.settle
    )
    if sum(x.nbytes for x in (*arrays.values(), *own.values())) < checkpoints.LARGE_CHECKPOINT:
        write()
    else:
        writer = ThreadPoolExecutor(1)
        run.writing = writer.submit(write)
        writer.shutdown(wait=False)
    run.saved, run.saved_at = run.done, time.monotonic()


def finish_checkpoint(run: Run) -> None:
    """Wait for the checkpoint that a thread is writing; raises what went wrong there."""
    if run.writing is not None:
        writing, run.writing = run.writing, None
        writing.result()


def validate(run: Run) -> dict[str, Any]:
    """Long unrolls with the present φ: train loss and loss on the validation split, means over seeds and tasks."""
    settings = run.recipe.validation
    steps = settings.steps or 10 * run.recipe.unroll.length
    steps = max(steps // long_runs.WINDOW, 1) * long_runs.WINDOW
    seeds = [VALIDATION_SEEDS + i for i in range(settings.seeds)]
    make = pretrained.architecture(run.recipe.learner).optimizer
    phi = jax.device_get(run.state.meta_params)
    train, held = [], []
    for splits in run.tasks.values():
        curves = long_runs.run(parallel.local(splits.train), splits.validation, make, [phi] * len(seeds), seeds, steps)
        limit = splits.train.loss_limit or float("inf")
        train.append(np.mean(np.where(np.isfinite(curves.train_loss[:, -1]), curves.train_loss[:, -1], limit)))
        held.append(np.mean(np.where(np.isfinite(curves.final["loss"]), curves.final["loss"], limit)))
    return {"steps": steps, "train_loss": float(np.mean(train)), "held_loss": float(np.mean(held))}


def log_step(run: Run, metrics: meta.Metrics, seconds: float) -> dict[str, Any]:
    """The row of one outer step; written if the run has a folder."""
    m = jax.device_get(metrics)
    inner_steps = run.recipe.unroll.truncation * run.recipe.unroll.truncations_per_update * 2 * m.start_step.size
    row = {
        "step": run.done - 1,
        "task_loss": m.task_loss.tolist(),
        "bc_loss": m.bc_loss.tolist(),
        "alpha_mix": float(m.alpha_mix),
        "alpha_loss": float(m.alpha_loss),
        "delta_task_rms": m.delta_task_rms.tolist(),
        "delta_bc_rms": m.delta_bc_rms.tolist(),
        "gradient_ratio": float(m.gradient_ratio),
        "gradient_norm": float(m.gradient_norm),
        "signal_to_noise": float(m.signal_to_noise),
        "dropped": int(m.dropped.sum()),
        "starts": m.starts[m.starts >= 0].tolist(),
        "reached": m.reached.ravel().tolist(),
        "inner_steps_per_second": round(inner_steps / seconds, 1),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    if row["dropped"]:
        row["first_bad"] = [
            {"task": name, "slot": int(p), "start_step": int(m.start_step[g, p]), "first": BAD[m.first_bad[g, p]]}
            for g, name in enumerate(run.tasks)
            for p in np.flatnonzero(m.dropped[g])
        ]
    add_row(run, row)
    return row


def add_row(run: Run, row: dict[str, Any]) -> None:
    run.rows.append(row)
    if run.out is not None and run.gang.leads:
        jsonl.append_json_line(run.out / "log.jsonl", row)
    to_loggers(run, row)


def to_loggers(run: Run, row: dict[str, Any]) -> None:
    for name, logger in list(run.loggers.items()):
        try:
            logger.add(loggers.scalars(row, list(run.tasks)), row["step"])
        except Exception as error:  # whatever another library raises must not end a meta-training
            del run.loggers[name]
            run.say(f"--log {name} failed ({error}); it gets no more steps. `lolo resume --log {name}` rebuilds it.")


def logger_openers(names: Sequence[str]) -> dict[str, loggers.Open]:
    """Sinks by name. Raises RecipeError for an unknown one, SinkError for a missing extra."""
    for name in names:
        pick(loggers.LOGGERS, "log", name)
    return {name: loggers.opener(name) for name in names}


@contextmanager
def logging_to(run: Run, openers: dict[str, loggers.Open], say: Callable[[str], None]) -> Iterator[None]:
    """Sinks that hold the run's rows so far and take the next ones. Raises SinkError."""
    run.say = say
    try:
        for name, open_ in openers.items() if run.gang.leads else ():
            try:
                run.loggers[name] = open_(run.out or Path(), fields(run.recipe))
            except Exception as error:  # of whatever kind the other library raises
                raise LoggerError(f"--log {name} can't be opened ({error}).") from error
        for row in run.rows:
            to_loggers(run, row)
        yield
    finally:
        for logger in run.loggers.values():
            logger.close()


def check_streams(run: Run, saved: dict[str, dict[str, int]]) -> None:
    """Raise RunError where a streamed data set is not the one that the checkpoint's cursor is a place in."""
    with run.feeding():
        for name, place in run.streams().items():
            if saved.get(name) != place:
                raise RunError(
                    f"the data of {name} are at {place} after {run.done} outer steps, at {saved.get(name)} in the "
                    "checkpoint: they are not the same data. Put back those that the run began with."
                )
