"""A meta-training under way: its state, data, weights, checkpoints and log."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lolo.evaluation import long_runs
from lolo.files import jsonl, settings
from lolo.files.disk import FileError
from lolo.files.user_code import HERE
from lolo.method import meta
from lolo.method.task import Splits, Task
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.runtime import environment, parallel
from lolo.tasks.by_name import resolve
from lolo.tasks.feed import Feed
from lolo.training import build, checkpoints, offload, own_parts, recipes, run_log, slots
from lolo.training.how import How
from lolo.training.loggers import Logger, LoggerError, Open, scalars
from lolo.training.recipes import Recipe
from lolo.training.run_folder import RunError
from lolo.training.run_start import meta_training_tasks
from lolo.trees import count_bytes

META_STREAM = 0  # streams of meta-trainings: their order is drawn from (this, seed, task, epoch)
VALIDATION_SEEDS = 900_000  # evaluation seeds of validation unrolls count from here


@dataclasses.dataclass
class Run:
    """A meta-training under way."""

    recipe: Recipe
    how: How
    tasks: dict[str, Splits]
    validation_tasks: dict[str, Splits]  # whose loss chooses the best weights: `tasks`, or others
    setup: meta.Setup
    mesh: Mesh
    step: slots.Step | offload.Offloaded
    state: meta.MetaState
    out: Path | None = None  # the run's folder
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # of the log
    feeds: tuple[Feed, ...] = ()  # of the tasks' data, while the loop runs
    saved: int = -1  # outer step of the newest checkpoint
    saved_at: float = 0.0
    writing: Future[Path] | None = None  # of a large checkpoint, in a thread
    loggers: dict[str, Logger] = dataclasses.field(default_factory=dict)  # that take the log's rows too, by name

    # The state

    @property
    def done(self) -> int:
        """Outer steps done."""
        return int(self.state.outer_step)

    @property
    def inner_steps(self) -> int:
        """Inner steps of all trajectories in one outer step."""
        unroll, pairs = self.recipe.unroll, self.recipe.estimator.pairs
        return unroll.truncation * unroll.truncations_per_update * 2 * pairs * len(self.tasks)

    def complete_state(self) -> meta.MetaState:
        """The state with all of its replay buffers, wherever they are: what a checkpoint holds."""
        return self.step.complete(self.state) if isinstance(self.step, offload.Offloaded) else self.state

    def load(self, state: meta.MetaState) -> None:
        """Continue from the state of `complete_state`."""
        if isinstance(self.step, offload.Offloaded):
            self.state = self.step.place(state)
        else:
            self.state = parallel.place(state, self.mesh, slots.state_specs(state))

    def sizes(self) -> dict[str, int]:
        """Bytes of buffers, inner states and expert, for run.json."""
        pairs, state = self.recipe.estimator.pairs, self.complete_state()
        return {
            "buffer_bytes_per_slot": sum(count_bytes(s.local.replay.states) for s in state.slots) // pairs,
            "inner_state_bytes": sum(count_bytes(s.local.inner) for s in state.slots) // (2 * pairs),
            "expert_bytes": sum(count_bytes(s.local.inner.expert) for s in state.slots),
        }

    # The data

    @contextmanager
    def feeding(self) -> Iterator[None]:
        """Data from here on. A stream's cursor needs no state: every outer step takes one segment."""
        steps = self.recipe.unroll.truncation * self.recipe.unroll.truncations_per_update
        self.feeds = tuple(
            Feed(splits.train, steps, (META_STREAM, self.recipe.seed, group), self.done)
            for group, splits in enumerate(self.tasks.values())
        )
        try:
            yield
        finally:
            for feed in self.feeds:
                feed.close()

    def next_tasks(self) -> tuple[Task, ...]:
        """The tasks with the data of the next outer step."""
        return tuple(feed.next(lambda data: parallel.place(data, self.mesh)) for feed in self.feeds)

    def streams(self) -> dict[str, dict[str, int]]:
        """Where the streams of tasks larger than memory are."""
        places = {name: feed.place_in_stream() for name, feed in zip(self.tasks, self.feeds, strict=True)}
        return {name: place for name, place in places.items() if place is not None}

    def check_streams(self, saved: dict[str, dict[str, int]]) -> None:
        """Raise RunError where a streamed data set is not the one that the checkpoint's cursor is a place in."""
        with self.feeding():
            for name, place in self.streams().items():
                if saved.get(name) != place:
                    raise RunError(
                        f"the data of {name} are at {place} after {self.done} outer steps, at {saved.get(name)} in the "
                        "checkpoint: they are not the same data. Put back those that the run began with."
                    )

    # The weights

    def weights(self) -> pretrained.Weights:
        """The present φ with its recipe and what is known about it."""
        about = {"outer_step": self.done, **run_log.realised(self.rows)}
        if self.rows and "validation" in self.rows[-1]:
            about["validation"] = self.rows[-1]["validation"]
        phi = jax.tree.map(jnp.asarray, jax.device_get(self.state.meta_params))  # whole, on one device
        return pretrained.Weights(phi, self.recipe.learner, recipes.to_dict(self.recipe), about)

    def save_weights(self, name: str) -> None:
        """Write `name`.safetensors into the run's folder."""
        if self.out is not None and self.how.group.leads:
            pretrained.save(self.out / f"{name}.safetensors", self.weights())

    def measure(self) -> dict[str, Any]:
        """Long unrolls with the present φ: train loss and loss on the validation split, means over seeds and tasks.

        The tasks are those of `validation.tasks`, or, where there are none, the meta-training tasks.
        """
        settings = self.recipe.validation
        steps = settings.steps or 10 * self.recipe.unroll.length
        steps = max(steps // long_runs.WINDOW, 1) * long_runs.WINDOW
        seeds = [VALIDATION_SEEDS + i for i in range(settings.seeds)]
        make = pretrained.maker(self.recipe.learner)
        phi = [jax.device_get(self.state.meta_params)] * len(seeds)
        train, held = [], []
        for splits in self.validation_tasks.values():
            curves = long_runs.run(parallel.local(splits.train), splits.validation, make, phi, seeds, steps)
            limit = splits.train.loss_limit or float("inf")
            train.append(np.mean(np.where(np.isfinite(curves.train_loss[:, -1]), curves.train_loss[:, -1], limit)))
            held.append(np.mean(np.where(np.isfinite(curves.final["loss"]), curves.final["loss"], limit)))
        return {"steps": steps, "train_loss": float(np.mean(train)), "held_loss": float(np.mean(held))}

    # The checkpoints

    def save_checkpoint(self) -> None:
        """Write the complete state, unless this outer step is saved already or its numbers are bad.

        A state of LARGE_CHECKPOINT bytes or more is written by a thread while the next outer steps run; one at a time.
        """
        if self.out is None or self.saved == self.done or int(self.state.bad_steps):
            return
        self.finish_checkpoint()
        arrays, local = checkpoints.state_arrays(self.complete_state())
        about = {
            "recipe": recipes.to_dict(self.recipe),
            "versions": environment.versions(),
            "streams": self.streams(),
            "path": architecture.path_of(self.recipe.learner),
        }
        rows = parallel.local_rows(self.mesh, self.recipe.estimator.pairs)
        agree = self.how.group.agree
        write = partial(
            checkpoints.write_checkpoint, self.out, self.done, arrays, about, own=local, rows=rows, agree=agree
        )
        if sum(x.nbytes for x in (*arrays.values(), *local.values())) < checkpoints.LARGE_CHECKPOINT:
            write()
        else:
            writer = ThreadPoolExecutor(1)
            self.writing = writer.submit(write)
            writer.shutdown(wait=False)
        self.saved, self.saved_at = self.done, time.monotonic()

    def finish_checkpoint(self) -> None:
        """Wait for the checkpoint that a thread is writing; raises what went wrong there."""
        if self.writing is not None:
            writing, self.writing = self.writing, None
            writing.result()

    # The log

    def add_row(self, row: dict[str, Any]) -> None:
        """Add a row to the log: in memory, in the folder, and to the loggers."""
        self.rows.append(row)
        if self.out is not None and self.how.group.leads:
            jsonl.append_json_line(self.out / "log.jsonl", row)
        self.to_loggers(row)

    def to_loggers(self, row: dict[str, Any]) -> None:
        """Give a row to the loggers. One that fails is dropped: it must not end a meta-training."""
        for name, logger in list(self.loggers.items()):
            try:
                logger.add(scalars(row, list(self.tasks)), row["step"])
            except Exception as error:  # whatever another library raises
                del self.loggers[name]
                self.how.log(
                    f"--log {name} failed ({error}); it gets no more steps. `lolo resume --log {name}` rebuilds it."
                )

    @contextmanager
    def logging(self, openers: dict[str, Open]) -> Iterator[None]:
        """Loggers that hold the run's rows so far and take the next ones. Raises LoggerError."""
        try:
            for name, open_ in openers.items() if self.how.group.leads else ():
                try:
                    self.loggers[name] = open_(self.out or Path(), settings.fields(self.recipe))
                except Exception as error:  # of whatever kind the other library raises
                    raise LoggerError(f"--log {name} can't be opened ({error}).") from error
            for row in self.rows:
                self.to_loggers(row)
            yield
        finally:
            for logger in self.loggers.values():
                logger.close()


def check_init(init: weights_file.WeightsFile, learner: architecture.LearnerSettings) -> None:
    """Raise FileError unless φ of a weights file means the same in a recipe's learner."""
    own = init.recipe.get("learner", init.learner)  # φ means what it was meta-trained as, however it is deployed
    given = architecture.learner_from_dict(own, "--init weights")
    row = architecture.of(learner)
    differs = [
        f"learner.{name} is {theirs!r} there and {ours!r} in the recipe"
        for name, (theirs, ours) in settings.diff(given, learner).items()
        if name not in row.deployment
    ]
    if differs:
        raise FileError(f"--init weights are of another learner: {', '.join(differs)}. Give the same values.")
    weights_file.check_meta_params(init.meta_params, learner.name, row.shapes(learner), "--init weights")


def check_own_parts(recipe: Recipe, setup: meta.Setup, tasks: tuple[Task, ...], state: meta.MetaState) -> None:
    """Trace a step where a recipe has parts of a user's, before there is a folder. Raises UserCodeError if it fails."""
    parts = own_parts.used(recipe)
    if not parts:
        return
    with settings.failures_of(f"a step with {', '.join(parts)}"):
        jax.eval_shape(partial(meta.meta_step, setup), tasks, state)


def prepare(
    recipe: Recipe,
    how: How | None = None,
    init: weights_file.WeightsFile | None = None,
    tasks: dict[str, Splits] | None = None,
    folders: Sequence[Path] = HERE,
) -> Run:
    """Build, place and compile what a recipe names. Raises RecipeError, TaskError, FileError, RunError.

    folders: where `path.py` of a task, of a validation task too, and of the recipe's own parts is looked for.
    """
    how, recipe = how or How(), own_parts.load(recipe, folders)
    setup = build.build(recipe)
    if how.offload:
        if how.group.processes > 1:
            raise RunError("offload=True keeps replay buffers with one process; leave it out with several.")
        offload.check(recipe)
        setup = setup._replace(capacity=1)
    given = tasks or {}
    names = recipe.tasks if tasks is None else meta_training_tasks(recipe, tasks)
    splits, held = (
        {name: given[name] if name in given else resolve(name, folders) for name in each}
        for each in (names, recipe.validation.tasks)
    )
    mesh = parallel.global_mesh(recipe.estimator.pairs // recipe.estimator.slots_per_block, how.devices)
    own_tasks = tuple(s.train for s in splits.values())
    meta_params = None
    if init is not None:
        check_init(init, recipe.learner)
        meta_params = jax.tree.map(jnp.asarray, init.meta_params)
    state = slots.init_state(lambda: meta.meta_init(setup, own_tasks, jax.random.key(recipe.seed), meta_params), mesh)
    check_own_parts(recipe, setup, own_tasks, state)
    step = offload.Offloaded(recipe, setup, state, mesh) if how.offload else slots.compile_step(setup, state, mesh)
    placed = parallel.place(own_tasks, mesh)
    splits = {name: s._replace(train=task) for (name, s), task in zip(splits.items(), placed, strict=True)}
    return Run(recipe, how, splits, held or splits, setup, mesh, step, state)
