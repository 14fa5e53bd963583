"""The host loop of meta-training: run outer steps, log, validate, save, resume.

A run's folder holds `recipe.json`, `run.json` (versions, commit, machine), `log.jsonl` (one object per outer step),
`checkpoints/`, and the weights `last.safetensors` and `best.safetensors`.
"""

from __future__ import annotations

import dataclasses
import platform
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lolo import checkpoints, evaluation, recipes, run_folder, sinks, slots
from lolo.files import disk, jsonl, tensors
from lolo.files.disk import FileError
from lolo.files.settings import RecipeError, diff, fields, pick
from lolo.method import meta
from lolo.method.task import Splits, Task
from lolo.offload import Offloaded
from lolo.offload import check as check_offload
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.recipes import Recipe
from lolo.runtime import environment, interrupt, parallel
from lolo.runtime.process_group import ALONE, ProcessGroup
from lolo.sinks import SinkError
from lolo.tasks.by_name import pin, resolve
from lolo.tasks.feed import Feed
from lolo.trees import count_bytes

META_STREAM = 0  # streams of meta-trainings: their order is drawn from (this, seed, task, epoch)
VALIDATION_SEEDS = 900_000  # evaluation seeds of validation unrolls count from here
LARGE_CHECKPOINT = 32 << 20  # bytes from which on a thread writes it
BAD = ("nothing", "the loss", "the gradient", "the imitation distance")


class RunError(ValueError):
    """A run folder that can't be used as asked; says which, and what to do."""


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


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run folder. Raises RunError, FileError, RecipeError."""
    if not (run / "recipe.json").is_file():
        raise RunError(f"{run} holds no run: there is no recipe.json. Start one with `lolo train RECIPE --out {run}`.")
    try:
        return recipes.from_dict(disk.read_json(run / "recipe.json"))
    except RecipeError as error:
        raise RecipeError(f"{run}/recipe.json: {error}") from error


def require_free(run: Path, recipe: Recipe) -> None:
    """Raise RunError unless a folder is empty, new, or holds this run and it never came to a checkpoint."""
    holding = (run / "recipe.json").is_file()
    changed = diff(read_recipe(run), recipe) if holding else {}
    if changed or (holding and run_folder.checkpoints(run)):
        differs = (
            "; ".join(f"{name}: {a!r} there, {b!r} asked" for name, (a, b) in changed.items()) or "the same recipe"
        )
        raise RunError(f"{run} already holds a run ({differs}). Go on with `lolo resume {run}`, or give another --out.")
    # A run killed while it claimed the folder leaves run.json, or half of a file, and nothing else.
    ours = re.compile(r"run\.json|\.(run|recipe)\.json\.\d+\.tmp")
    foreign = run.is_dir() and any(not ours.fullmatch(path.name) for path in run.iterdir())
    if not holding and run.exists() and (not run.is_dir() or foreign):
        raise RunError(f"{run} exists and is not an empty folder; give another --out.")


def create_run(run: Path, recipe: Recipe, about: dict[str, Any]) -> None:
    """Claim a folder for a run, as `require_free` allows. Raises RunError."""
    require_free(run, recipe)
    try:
        run.mkdir(parents=True, exist_ok=True)
        disk.write_json(run / "run.json", about)
        disk.write_json(run / "recipe.json", recipes.to_dict(recipe))
    except OSError as error:
        raise RunError(f"{run} can't be written ({error.strerror}); give another --out.") from error


def read_about(run: Path) -> dict[str, Any]:
    """What run.json says of a run: versions, commit, machine, command; {} without one. Raises FileError."""
    about = disk.read_json(run / "run.json") if (run / "run.json").is_file() else {}
    if not isinstance(about, dict):
        raise FileError(f"{run}/run.json: expected a JSON object.")
    return about


def logged_to(run: Path) -> list[str]:
    """The sinks that a run was started with. Raises FileError."""
    names = read_about(run).get("log", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(f"{run}/run.json: log is {names!r}; expected a list of names.")
    return names


def state_arrays(state: meta.MetaState) -> tuple[tensors.Arrays, tensors.Arrays]:
    """A MetaState as named arrays, for a checkpoint: what lies on every device, and this process's rows of the rest."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    specs = jax.tree.leaves(slots.state_specs(state))
    everywhere: tensors.Arrays = {}
    own: tensors.Arrays = {}
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        (own if parallel.AXIS in spec else everywhere)[jax.tree_util.keystr(path)] = parallel.own_part(leaf)
    return everywhere, own


def state_from_arrays(arrays: tensors.Arrays, like: meta.MetaState, source: str) -> meta.MetaState:
    """The MetaState of `state_arrays`; `like` gives names, shapes and dtypes. Raises FileError."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    if set(arrays) != {name for name, _ in named}:
        odd = sorted(set(arrays) ^ {name for name, _ in named})
        raise FileError(f"{source}: tensors do not match the recipe; first difference: {odd[0]!r}.")
    for name, leaf in named:
        if arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype:
            raise FileError(
                f"{source}: {name!r} is {arrays[name].dtype}{arrays[name].shape}, expected {leaf.dtype}{leaf.shape}."
            )
    return jax.tree_util.tree_unflatten(structure, [arrays[name] for name, _ in named])


_VALIDATION_ROW = jsonl.fields(
    step=jsonl.whole_number,
    validation=jsonl.fields(steps=jsonl.whole_number, train_loss=jsonl.number, held_loss=jsonl.number),
)
_STEP_ROW = jsonl.fields(
    step=jsonl.whole_number,
    **dict.fromkeys(("task_loss", "bc_loss", "delta_task_rms", "delta_bc_rms"), jsonl.listed(jsonl.number, least=1)),
    **dict.fromkeys(("alpha_mix", "alpha_loss", "gradient_ratio", "gradient_norm", "signal_to_noise"), jsonl.number),
    dropped=jsonl.whole_number,
    **dict.fromkeys(("starts", "reached"), jsonl.listed(jsonl.whole_number)),
    inner_steps_per_second=jsonl.number,
)
_FIRST_BAD = jsonl.listed(
    jsonl.fields(task=jsonl.string, slot=jsonl.whole_number, start_step=jsonl.whole_number, first=jsonl.string), least=1
)


def log_row(row: Any) -> dict[str, Any]:
    """A row of `log_step` or of a validation, checked. Raises ValueError."""
    if isinstance(row, dict) and "validation" in row:
        return _VALIDATION_ROW(row)
    row = _STEP_ROW(row)
    return jsonl.fields(first_bad=_FIRST_BAD)(row) if row["dropped"] else row


def state_shapes(state: meta.MetaState, rows: tuple[int, int]) -> meta.MetaState:
    """Shapes of what `state_arrays` gives where these rows lie."""

    def shape(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
        whole = tuple(leaf.shape)
        return jax.ShapeDtypeStruct((rows[1] - rows[0], *whole[1:]) if parallel.AXIS in spec else whole, leaf.dtype)

    return jax.tree.map(shape, state, slots.state_specs(state))


def require_alike(gang: ProcessGroup, recipe: Recipe, more: dict[str, Any]) -> None:
    """Raise DifferError unless all processes have the same recipe, versions and kind of device. Starts JAX."""
    if gang.processes == 1:
        return
    cure = "Start every process with the same versions, command and files."
    facts = {f"{name}'s version": version for name, version in environment.versions().items()}
    gang.require_equal(facts | {"the machine": platform.machine()} | fields(recipe) | more, cure)
    device = jax.local_devices()[0]  # only now: it connects the processes' XLA, which must be of one version
    gang.require_equal({"the device": f"{device.platform}: {device.device_kind}"}, cure)


def go_on(run: Path, recipe: Recipe, gang: ProcessGroup) -> bool:
    """Whether a folder holds a run of this recipe that has a checkpoint, as process 0 sees it.

    Raises RunError: it holds a run of another recipe, or not every process sees it.
    """

    def look(_: list[Any]) -> bool:
        if not (run / "recipe.json").is_file():
            return False
        changed = diff(read_recipe(run), pinned(recipe))
        if changed:
            differs = "; ".join(f"{name}: {a!r} there, {b!r} asked" for name, (a, b) in changed.items())
            raise RunError(f"{run} already holds another run ({differs}); give another --out.")
        return bool(run_folder.checkpoints(run))

    going_on = gang.settle(None, look)
    if going_on:
        require_shared(gang, run)
    return going_on


def pinned(recipe: Recipe) -> Recipe:
    """The recipe with its tasks named as they are stored."""
    return dataclasses.replace(recipe, tasks=tuple(pin(name) for name in recipe.tasks))


def log_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of the log, [] before the first. Raises FileError for a row that is not `log_step`'s or a validation's."""
    return list(jsonl.read_json_lines(run / "log.jsonl", log_row)) if (run / "log.jsonl").is_file() else []


def realised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where inner training went: quantiles of the steps reached, and all realised start steps with their counts."""
    reached = np.array([step for row in rows for step in row.get("reached", [])])
    starts = np.array([step for row in rows for step in row.get("starts", [])])
    if not reached.size:
        return {}
    quantiles = {f"{q}%": int(np.percentile(reached, q)) for q in (50, 90, 99, 100)}
    values, counts = np.unique(starts // 250 * 250, return_counts=True)
    return {
        "realised_steps": quantiles,
        "start_steps_per_250": {int(v): int(c) for v, c in zip(values, counts, strict=True)},
    }


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
    sinks: dict[str, sinks.Sink] = dataclasses.field(default_factory=dict)  # that take the log's rows too, by name
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


def check_init(init: weights_file.WeightsFile, learner: architecture.Learner) -> None:
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
    setup = recipes.build(recipe)
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
    about = {"outer_step": run.done, **realised(run.rows)}
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
    arrays, own = state_arrays(run.whole_state())
    about = {"recipe": recipes.to_dict(run.recipe), "versions": environment.versions(), "streams": run.streams()}
    rows = parallel.own_rows(run.over, run.recipe.estimator.pairs)
    write = partial(
        checkpoints.write_checkpoint, run.out, run.done, arrays, about, own=own, rows=rows, settle=run.gang.settle
    )
    if sum(x.nbytes for x in (*arrays.values(), *own.values())) < LARGE_CHECKPOINT:
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
    steps = max(steps // evaluation.WINDOW, 1) * evaluation.WINDOW
    seeds = [VALIDATION_SEEDS + i for i in range(settings.seeds)]
    make = pretrained.architecture(run.recipe.learner).optimizer
    phi = jax.device_get(run.state.meta_params)
    train, held = [], []
    for splits in run.tasks.values():
        curves = evaluation.run(parallel.local(splits.train), splits.validation, make, [phi] * len(seeds), seeds, steps)
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
    to_sinks(run, row)


def to_sinks(run: Run, row: dict[str, Any]) -> None:
    for name, sink in list(run.sinks.items()):
        try:
            sink.add(sinks.scalars(row, list(run.tasks)), row["step"])
        except Exception as error:  # whatever another library raises must not end a meta-training
            del run.sinks[name]
            run.say(f"--log {name} failed ({error}); it gets no more steps. `lolo resume --log {name}` rebuilds it.")


def sink_openers(names: Sequence[str]) -> dict[str, sinks.Open]:
    """Sinks by name. Raises RecipeError for an unknown one, SinkError for a missing extra."""
    for name in names:
        pick(sinks.SINKS, "log", name)
    return {name: sinks.opener(name) for name in names}


@contextmanager
def logging_to(run: Run, openers: dict[str, sinks.Open], say: Callable[[str], None]) -> Iterator[None]:
    """Sinks that hold the run's rows so far and take the next ones. Raises SinkError."""
    run.say = say
    try:
        for name, open_ in openers.items() if run.gang.leads else ():
            try:
                run.sinks[name] = open_(run.out or Path(), fields(run.recipe))
            except Exception as error:  # of whatever kind the other library raises
                raise SinkError(f"--log {name} can't be opened ({error}).") from error
        for row in run.rows:
            to_sinks(run, row)
        yield
    finally:
        for sink in run.sinks.values():
            sink.close()


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
            best_before = best_validation(run.rows)
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


def best_validation(rows: list[dict[str, Any]]) -> float | None:
    """The lowest validation loss so far."""
    return min((row["validation"]["held_loss"] for row in rows if "validation" in row), default=None)


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
    openers = sink_openers(log)
    recipe = pinned(recipe) if tasks is None else dataclasses.replace(recipe, tasks=tuple(tasks))
    source = None if init is None else weights_file.read_weights(init)
    require_alike(gang, recipe, {"--init": source and source.sha256, "--devices": devices})
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
        claim(gang, run.out, recipe, {**about, "log": list(log)})
    with alone_in(run.out, gang), logging_to(run, openers, say):
        return to_the_end(run, stop or interrupt.Stop(), told, say)


def claim(gang: ProcessGroup, out: Path, recipe: Recipe, about: dict[str, Any]) -> None:
    """`create_run` on process 0. Raises RunError where it does, and unless every process sees the folder then."""
    gang.settle(None, lambda _: create_run(out, recipe, about))
    require_shared(gang, out)


@contextmanager
def alone_in(folder: Path | None, gang: ProcessGroup) -> Iterator[None]:
    """Raise RunError, on every process, where other processes write into this run's folder."""
    with ExitStack() as held:
        free = folder is None or not gang.leads or held.enter_context(disk.locked(folder))

        def decide(seen: list[bool]) -> None:
            if not all(seen):
                raise RunError(f"another process is at work on {folder}; wait for it, stop it, or give another folder.")

        gang.settle(free, decide)
        yield


def require_shared(gang: ProcessGroup, out: Path) -> None:
    """Raise RunError unless every process sees the run in this folder."""

    def decide(seen: list[Any]) -> None:
        if not all(seen):
            raise RunError(
                f"process {seen.index(False)} does not see {out}: --out must be a folder that all hosts share."
            )

    gang.settle((out / "recipe.json").is_file(), decide)


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
    recipe = read_recipe(folder)
    if tasks is not None and tuple(tasks) != recipe.tasks:
        raise RunError(f"{folder} is a run on tasks={recipe.tasks}, not {tuple(tasks)}; give those it began with.")
    openers = sink_openers(logged_to(folder) if log is None else log)
    require_alike(gang, recipe, {"--devices": devices})
    with alone_in(folder, gang):
        over = parallel.global_mesh(recipe.estimator.pairs // recipe.estimator.slots_per_block, devices)
        rows = parallel.own_rows(over, recipe.estimator.pairs)
        newest = checkpoints.newest_checkpoint(folder, say, rows, gang.settle)
        if newest is None and not untouched(folder):
            raise RunError(f"{folder} has no whole checkpoint; start again with `lolo train` and another --out.")
        if newest is not None:
            check_manifest(newest[1], folder, recipe, say)
        run = prepare(recipe, None, tasks, devices, gang, offload)
        run.out, run.checkpoint_seconds = folder, checkpoint_seconds
        if newest is not None:
            arrays, manifest = newest
            run.load(state_from_arrays(arrays, state_shapes(jax.eval_shape(run.whole_state), rows), str(folder)))
            check_streams(run, manifest.get("streams", {}))
            run.saved, run.saved_at = run.done, time.monotonic()
            run.rows = [row for row in log_rows(folder) if row["step"] < run.done]
        if gang.leads and newest is not None:
            text = "".join(f"{jsonl.json_line(row)}\n" for row in run.rows)
            disk.write_bytes(folder / "log.jsonl", text.encode())
        if gang.leads and log is not None:
            disk.write_json(folder / "run.json", {**read_about(folder), "log": list(log)})
        say(f"resumed {folder} at outer step {run.done} of {recipe.outer.steps}.")
        with logging_to(run, openers, say):
            return to_the_end(run, stop or interrupt.Stop(), told, say)


def untouched(run: Path) -> bool:
    """Whether a run was killed before its first checkpoint, and its recipe alone says where it starts."""
    if run_folder.checkpoints(run) or (run / "log.jsonl").exists() or (run / "last.safetensors").exists():
        return False
    about = disk.read_json(run / "run.json")
    return isinstance(about, dict) and "init" in about and about["init"] is None


def check_manifest(manifest: dict[str, Any], run: Path, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Raise RunError if a checkpoint is of another recipe; say so if it is of other versions."""
    changed = diff(recipes.from_dict(manifest.get("recipe")), recipe)
    if changed:
        differs = "; ".join(f"{name}: {a!r} in the checkpoint, {b!r} now" for name, (a, b) in changed.items())
        raise RunError(f"{run}/recipe.json is not the recipe of the checkpoint ({differs}). Undo the change.")
    if manifest.get("versions") != environment.versions():
        say(f"versions differ from the checkpoint's ({manifest.get('versions')}): the result may differ in last bits.")


def check_streams(run: Run, saved: dict[str, dict[str, int]]) -> None:
    """Raise RunError where a streamed data set is not the one that the checkpoint's cursor is a place in."""
    with run.feeding():
        for name, place in run.streams().items():
            if saved.get(name) != place:
                raise RunError(
                    f"the data of {name} are at {place} after {run.done} outer steps, at {saved.get(name)} in the "
                    "checkpoint: they are not the same data. Put back those that the run began with."
                )
