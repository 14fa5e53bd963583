"""The host loop of meta-training: run outer steps, log, validate, save, resume.

A run's folder holds `recipe.json`, `run.json` (versions, commit, machine), `log.jsonl` (one object per outer step),
`checkpoints/`, and the weights `last.safetensors` and `best.safetensors`.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lolo import evaluation, files, meta, parallel, pretrained, recipes
from lolo import tasks as tasks_
from lolo.offload import Offloaded
from lolo.offload import check as check_offload
from lolo.problem import Feed
from lolo.recipes import Recipe
from lolo.trees import count_bytes

META_STREAM = 0  # streams of meta-trainings: their order is drawn from (this, seed, task, epoch)
VALIDATION_SEEDS = 900_000  # evaluation seeds of validation unrolls count from here
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


class Stop:
    """Asks a running `train` to end after the current outer step."""

    requested: str | None = None  # why


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C ask to stop; a second Ctrl-C interrupts at once."""

    def handler(number: int, frame: Any) -> None:
        if stop.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = signal.Signals(number).name

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def versions() -> dict[str, str]:
    """Versions that decide the bytes of a result."""
    return {name: metadata.version(name) for name in ("lolo", "jax", "jaxlib", "optax", "numpy")}


def provenance() -> dict[str, Any]:
    """Versions, commit (if run from a checkout) and machine."""
    package = Path(__file__).parent
    commit = None
    if (package.parent / ".git").exists():
        asked = subprocess.run(
            ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        commit = asked.stdout.strip() or None
    device = jax.local_devices()[0]
    return {
        "versions": versions(),
        "commit": commit,
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "device": f"{device.platform}: {device.device_kind}",
            "devices": len(jax.local_devices()),
            "cores": parallel.cores(),
        },
    }


# --- run folders --------------------------------------------------------------------------------------------------


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run folder. Raises RunError, FileError, RecipeError."""
    if not (run / "recipe.json").is_file():
        raise RunError(f"{run} holds no run: there is no recipe.json. Start one with `lolo train RECIPE --out {run}`.")
    return recipes.from_dict(files.read_json(run / "recipe.json"))


def create_run(run: Path, recipe: Recipe, about: dict[str, Any]) -> None:
    """Claim an empty or new folder. Raises RunError if something else is there."""
    if (run / "recipe.json").is_file():
        changed = recipes.diff(read_recipe(run), recipe)
        differs = (
            "; ".join(f"{name}: {a!r} there, {b!r} asked" for name, (a, b) in changed.items()) or "the same recipe"
        )
        raise RunError(f"{run} already holds a run ({differs}). Go on with `lolo resume {run}`, or give another --out.")
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise RunError(f"{run} exists and is not an empty folder; give another --out.")
    try:
        run.mkdir(parents=True, exist_ok=True)
        files.write_json(run / "run.json", about)
        files.write_json(run / "recipe.json", recipes.to_dict(recipe))
    except OSError as error:
        raise RunError(f"{run} can't be written ({error.strerror}); give another --out.") from error


def state_arrays(state: meta.MetaState) -> files.Arrays:
    """A MetaState as named arrays, for a checkpoint."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def state_from_arrays(arrays: files.Arrays, like: meta.MetaState, source: str) -> meta.MetaState:
    """The MetaState of `state_arrays`; `like` gives names, shapes and dtypes. Raises FileError."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    named = [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves]
    if set(arrays) != {name for name, _ in named}:
        odd = sorted(set(arrays) ^ {name for name, _ in named})
        raise files.FileError(f"{source}: tensors do not match the recipe; first difference: {odd[0]!r}.")
    for name, leaf in named:
        if arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype:
            raise files.FileError(
                f"{source}: {name!r} is {arrays[name].dtype}{arrays[name].shape}, expected {leaf.dtype}{leaf.shape}."
            )
    return jax.tree_util.tree_unflatten(structure, [arrays[name] for name, _ in named])


def log_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of the log, [] before the first."""
    return list(files.read_json_lines(run / "log.jsonl")) if (run / "log.jsonl").is_file() else []


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


# --- the loop -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """A meta-training under way."""

    recipe: Recipe
    tasks: dict[str, tasks_.Splits]
    setup: meta.Setup
    over: Any  # the mesh
    step: parallel.Step | Offloaded
    state: meta.MetaState
    out: Path | None
    rows: list[dict[str, Any]]  # of the log
    feeds: tuple[Feed, ...] = ()  # of the tasks' data, while the loop runs
    checkpoint_seconds: float = 20.0  # between two checkpoints, at least
    saved: int = -1  # outer step of the newest checkpoint
    saved_at: float = 0.0

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
            self.state = parallel.place(state, self.over, parallel.state_specs(state))

    def train_tasks(self) -> tuple[tasks_.Task, ...]:
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

    def next_tasks(self) -> tuple[tasks_.Task, ...]:
        """The tasks with the data of the next outer step."""
        return tuple(feed.next(lambda data: parallel.place(data, self.over)) for feed in self.feeds)

    def streams(self) -> dict[str, dict[str, int]]:
        """Where the streams of tasks larger than memory are."""
        places = {name: feed.place_in_stream() for name, feed in zip(self.tasks, self.feeds, strict=True)}
        return {name: place for name, place in places.items() if place is not None}


def prepare(
    recipe: Recipe,
    init: files.WeightsFile | None,
    tasks: dict[str, tasks_.Splits] | None,
    devices: int | None,
    offload: bool = False,
) -> Run:
    """Build, place and compile what a recipe names. Raises RecipeError, TaskError, FileError."""
    setup = recipes.build(recipe)
    if offload:
        check_offload(recipe)
        setup = setup._replace(capacity=1)
    splits = tasks or {name: tasks_.resolve(name) for name in recipe.tasks}
    over = parallel.mesh(recipe.estimator.pairs // recipe.estimator.slots_per_block, devices)
    train_tasks = parallel.place(tuple(s.train for s in splits.values()), over)
    meta_params = None
    if init is not None:
        meta_params = init.meta_params
        expected = {k: v.shape for k, v in jax.eval_shape(setup.learned.init, jax.random.key(0)).items()}
        found = {k: v.shape for k, v in meta_params.items()}
        if found != expected:
            raise files.FileError(f"--init weights have tensors {found}; the recipe's learner has {expected}.")
    key = jax.random.key(recipe.seed)
    state = jax.jit(lambda key, phi: meta.meta_init(setup, train_tasks, key, phi))(key, meta_params)
    compiled = Offloaded(recipe, setup, state, over) if offload else parallel.compile_step(setup, state, over)
    placed = {
        name: tasks_.Splits(task, s.validation, s.test)
        for (name, s), task in zip(splits.items(), train_tasks, strict=True)
    }
    state = parallel.place(state, over, parallel.state_specs(state))
    return Run(recipe, placed, setup, over, compiled, state, None, [])


def weights_of(run: Run, card: dict[str, Any] | None = None) -> pretrained.Weights:
    """The present φ with its recipe and what is known about it."""
    about = {"outer_step": run.done, **realised(run.rows), **(card or {})}
    phi = jax.device_get(run.state.meta_params)
    return pretrained.Weights(phi, run.recipe.learner, recipes.to_dict(run.recipe), about)


def save_weights(run: Run, name: str, card: dict[str, Any] | None = None) -> None:
    """Write `name`.safetensors into the run's folder."""
    if run.out is not None:
        pretrained.save(run.out / f"{name}.safetensors", weights_of(run, card))


def save_checkpoint(run: Run) -> None:
    """Write the whole state, unless this outer step is saved already or its numbers are bad."""
    if run.out is None or run.saved == run.done or int(run.state.bad_steps):
        return
    about = {"recipe": recipes.to_dict(run.recipe), "versions": versions(), "streams": run.streams()}
    files.write_checkpoint(run.out, run.done, state_arrays(jax.device_get(run.whole_state())), about)
    run.saved, run.saved_at = run.done, time.monotonic()


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
        curves = evaluation.run(splits.train, splits.validation, make, [phi] * len(seeds), seeds, steps)
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
        "starts": m.start_step[m.started > 0].tolist(),
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
    if run.out is not None:
        files.append_json_line(run.out / "log.jsonl", row)


def loop(run: Run, stop: Stop, told: Callable[[Progress], None], say: Callable[[str], None]) -> Result:
    """Outer steps until the recipe's last, a request to stop, or numbers gone bad for too long."""
    with run.feeding():
        return outer_steps(run, stop, told, say)


def outer_steps(run: Run, stop: Stop, told: Callable[[Progress], None], say: Callable[[str], None]) -> Result:
    """The loop itself, while the tasks' data are fed."""
    recipe, total = run.recipe, run.recipe.outer.steps
    save_checkpoint(run)
    while run.done < total and stop.requested is None:
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
                save_weights(run, "best", {"validation": measured})
            save_weights(run, "last", {"validation": measured})
            save_checkpoint(run)
        elif time.monotonic() - run.saved_at > run.checkpoint_seconds:
            save_checkpoint(run)
        loss = float(np.mean(row["task_loss"]))
        starts = float(np.mean(jax.device_get(metrics.start_step)))
        told(Progress(run.done, total, loss, row["alpha_mix"], starts, seconds))
    save_checkpoint(run)
    save_weights(run, "last")
    if stop.requested is not None and run.done < total:
        where = f" Go on with: lolo resume {run.out}" if run.out else ""
        say(f"stopped by {stop.requested} after outer step {run.done} of {total}.{where}")
    return Result(weights_of(run), run.done, run.done >= total, run.out)


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
    tasks: dict[str, tasks_.Splits] | None = None,
    devices: int | None = None,
    offload: bool = False,
    checkpoint_seconds: float = 20.0,
    stop: Stop | None = None,
    told: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Result:
    """Meta-train by a recipe, in this process.

    Args:
      recipe: what to do; `dataclasses.replace` or `recipes.with_field` changes fields.
      out: a new or empty folder for log, checkpoints and weights; None keeps nothing on disk.
      init: weights to go on from, a name or a path.
      tasks: your own splits by name, in place of the recipe's names (then only this call can resume the run).
      devices: how many of JAX's local devices to use at most; the result does not depend on it.
      offload: keep the replay buffers in the host's memory; the result does not depend on it.
      checkpoint_seconds: time between two checkpoints, at least; one is also written at the start, at each
        validation, and at the end.
      stop: set its `requested` to end after the current outer step.
      told: called after every outer step; say: called with messages for people.

    Raises: RecipeError, TaskError, FileError, RunError for bad input; DivergedError.
    """
    if tasks is None:
        recipe = dataclasses.replace(recipe, tasks=tuple(tasks_.pin(name) for name in recipe.tasks))
    source = None if init is None else files.read_weights(init)
    run = prepare(recipe, source, tasks, devices, offload)
    run.checkpoint_seconds = checkpoint_seconds
    if out is not None:
        run.out = Path(out)
        sizes = {
            "buffer_bytes_per_slot": sum(count_bytes(s.replay.states) for s in run.whole_state().slots)
            // recipe.estimator.pairs,
            "inner_state_bytes": sum(count_bytes(s.inner) for s in run.state.slots) // (2 * recipe.estimator.pairs),
            "expert_bytes": sum(count_bytes(s.inner.expert) for s in run.state.slots),
        }
        about = {**provenance(), **sizes, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
        about["init"] = None if source is None else source.sha256
        create_run(run.out, recipe, about)
    return loop(run, stop or Stop(), told, say)


def resume(
    out: Path | str,
    *,
    tasks: dict[str, tasks_.Splits] | None = None,
    devices: int | None = None,
    offload: bool = False,
    checkpoint_seconds: float = 20.0,
    stop: Stop | None = None,
    told: Callable[[Progress], None] = lambda progress: None,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr),
) -> Result:
    """Go on with a run from its newest whole checkpoint; the result is that of a run never interrupted.

    Raises RunError: no run there, no whole checkpoint, or recipe.json is not the checkpoint's.
    """
    folder = Path(out)
    recipe = read_recipe(folder)
    newest = files.newest_checkpoint(folder, say)
    if newest is None:
        raise RunError(f"{folder} has no whole checkpoint; start again with `lolo train` and another --out.")
    arrays, manifest = newest
    changed = recipes.diff(recipes.from_dict(manifest.get("recipe")), recipe)
    if changed:
        differs = "; ".join(f"{name}: {a!r} in the checkpoint, {b!r} now" for name, (a, b) in changed.items())
        raise RunError(f"{folder}/recipe.json is not the recipe of the checkpoint ({differs}). Undo the change.")
    if manifest.get("versions") != versions():
        say(f"versions differ from the checkpoint's ({manifest.get('versions')}): the result may differ in last bits.")
    run = prepare(recipe, None, tasks, devices, offload)
    run.checkpoint_seconds = checkpoint_seconds
    like = jax.eval_shape(run.whole_state)
    run.load(state_from_arrays(arrays, like, str(folder)))
    check_streams(run, manifest.get("streams", {}))
    run.out, run.saved, run.saved_at = folder, run.done, time.monotonic()
    run.rows = [row for row in log_rows(folder) if row.get("step", -1) < run.done]
    text = "".join(f"{files.json_line(row)}\n" for row in run.rows)
    files.write_bytes(folder / "log.jsonl", text.encode())
    say(f"resumed {folder} at outer step {run.done} of {recipe.outer.steps}.")
    return loop(run, stop or Stop(), told, say)


def check_streams(run: Run, saved: dict[str, dict[str, int]]) -> None:
    """Raise RunError where a streamed data set is not the one that the checkpoint's cursor is a place in."""
    with run.feeding():
        for name, place in run.streams().items():
            if saved.get(name) != place:
                raise RunError(
                    f"the data of {name} are at {place} after {run.done} outer steps, at {saved.get(name)} in the "
                    "checkpoint: they are not the same data. Put back those that the run began with."
                )


def user_cache() -> Path:
    """Folder for compiled programs: $LOLO_CACHE, or lolo in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("LOLO_CACHE") or os.path.join(base, "lolo"))


def set_up(devices: int | None = None) -> None:
    """For programs: one CPU device per core, and compiled programs kept in the user's cache folder."""
    parallel.use_cores(devices)
    jax.config.update("jax_compilation_cache_dir", str(user_cache() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
