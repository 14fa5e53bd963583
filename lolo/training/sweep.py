"""`lolo sweep FILE`: a grid of recipes as independent runs, and one table of what came out.

The file is TOML: a recipe's name, a folder, fields that all runs share, tables of fields that are changed one table at
a time, and a grid. Every combination of the grid is run with each of the tables. The run folders are all the state
there is: a sweep that was stopped, or had failures, resumes when started again.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lolo.files import disk, jsonl, settings
from lolo.files.settings import RecipeError
from lolo.optimizers import weights_file
from lolo.runtime import interrupt, launch, parallel
from lolo.training import build, recipes, run_folder, run_log, run_start
from lolo.training.recipes import Recipe

LAST_STEPS = 100  # outer steps that the reported loss is the mean of
KEYS = {"recipe": str, "out": str, "fields": dict, "runs": list, "grid": dict}
KINDS = {str: "a string", dict: "a table: [{}], then lines of field = value", list: "tables, each below [[{}]]"}


class SweepError(ValueError):
    """A sweep file that can't be used; says which line of it, and what to do."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    number: int
    name: str  # of its folder
    varied: dict[str, Any]  # by dotted name: the fields that differ between runs, of the grid and of [[runs]]
    recipe: Recipe
    out: Path


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A grid of runs."""

    base: str  # name of the recipe
    out: Path
    runs: list[Planned]


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names: {"outer": {"steps": 5}} -> {"outer.steps": 5}."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        name = "tasks" if prefix + name == "task" else prefix + name
        more = flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
        if twice := flat.keys() & more.keys():
            raise SweepError(f"a table of the sweep has {min(twice)} twice; take one out.")
        flat |= more
    return flat


def changed(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    """The recipe with these fields, each checked as one read from a file. Raises RecipeError."""
    choices = {name: value for name, value in fields.items() if name.endswith(".name")}  # first: they bring fields
    for name, value in choices.items():
        recipe = settings.with_field(recipe, name, value)
    data, known = recipes.to_dict(recipe), settings.fields(recipe)
    for name, value in fields.items():
        if name not in known:
            raise settings.unknown_field(recipe, name)
        *section, last = name.split(".")
        place = data
        for part in section:
            place = place[part]
        place[last] = [value] if name == "tasks" and isinstance(value, str) else value
    recipe = recipes.from_dict(data)
    build.build(recipe)  # looks every name up too: a wrong one must not wait for its turn
    return run_start.pinned(recipe)


def read(path: Path) -> Sweep:
    """The runs that a file describes. Raises SweepError, RecipeError, TaskError."""
    try:
        described = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SweepError(f"{path} can't be read as TOML: {error}.") from error
    for name in described:
        if name not in KEYS:
            raise settings.unknown("key of a sweep", name, KEYS)
        if not isinstance(described[name], KEYS[name]):
            if KEYS[name] is list and isinstance(described[name], dict):
                raise SweepError(f"{path}: write [[{name}]] instead of [{name}].")
            raise SweepError(f"{path}: {name} = {described[name]!r} must be {KINDS[KEYS[name]].format(name)}.")
    base = described.get("recipe", "lolo")
    recipe = settings.pick(recipes.RECIPES, "recipe", base)
    common, grid = (flatten(described.get(name, {})) for name in ("fields", "grid"))
    for one in described.get("runs", ()):
        if not isinstance(one, dict):
            raise SweepError(f"{path}: runs = {one!r} must be {KINDS[list].format('runs')}.")
    one_by_one = [flatten(one) for one in described.get("runs", ())] or [{}]
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise SweepError(f"{path}: grid.{name} = {values!r} must be a list of at least one value.")
        if name in common:
            raise SweepError(f"{path}: {name} is both in [fields] and in [grid]; take it out of one.")
        if any(name in one for one in one_by_one):
            raise SweepError(f"{path}: {name} is both in [[runs]] and in [grid]; take it out of one.")
    out = Path(described.get("out", Path("runs") / path.stem))
    runs: list[Planned] = []
    columns = list(dict.fromkeys(name for one in (*one_by_one, grid) for name in one))
    for number, (one, *values) in enumerate(itertools.product(one_by_one, *grid.values())):
        own = one | dict(zip(grid, values, strict=True))
        words = "-".join(f"{name.rpartition('.')[2]}={value}" for name, value in own.items())
        name = f"{number:03d}-{re.sub('[^A-Za-z0-9=._-]+', '_', words)}"[:100].rstrip("-")
        try:
            planned = changed(recipe, common | own)
        except ValueError as error:  # RecipeError, TaskError
            raise RecipeError(f"{path}, {words or 'without changes'}: {error}") from error
        there = settings.fields(planned)
        varied = {name: _plain(there.get(name)) for name in columns}
        runs.append(Planned(number, name, varied, planned, out / name))
    names: dict[Recipe, str] = {}
    for run in runs:
        if run.recipe in names:
            raise SweepError(f"{path}: {names[run.recipe]} and {run.name} are the same run; take one out.")
        names[run.recipe] = run.name
    return Sweep(base, out, runs)


def _plain(value: Any) -> Any:
    """A field's value as a row has it: no sums of users' files."""
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return settings.without_sha256(value) if isinstance(value, str) else value


def state_of(run: Planned) -> str:
    """done, begun or waiting. Raises SweepError: its folder holds another run."""
    if not (run.out / "recipe.json").is_file():
        return "waiting"
    differs = settings.diff(run_folder.read_recipe(run.out), run.recipe)
    if differs:
        words = settings.differences(differs, "there", "in the file")
        raise SweepError(f"{run.out} holds another run ({words}). Give the sweep another `out`, or undo the change.")
    last = run.out / "last.safetensors"
    done = last.is_file() and weights_file.read_weights(last).card.get("outer_step") == run.recipe.outer.steps
    if done:
        return "done"
    return "begun" if run_folder.checkpoints(run.out) else "waiting"


def failure_file(run: Planned) -> Path:
    """Where it stands why a run failed; beside its folder."""
    return run.out.with_name(f"{run.name}.failed")


def row(run: Planned) -> dict[str, Any]:
    """What a run's folder tells: its fields, how far it is, and its losses."""
    state, reason = state_of(run), None
    if state != "done" and failure_file(run).is_file():
        state, reason = "failed", failure_file(run).read_text(encoding="utf-8", errors="replace").strip()
    rows = run_log.log_rows(run.out)
    steps = [r for r in rows if "task_loss" in r]
    held = [float(r["validation"]["held_loss"]) for r in rows if "validation" in r]
    return {
        "run": run.name,
        **run.varied,
        "state": state,
        "outer_steps": len(steps),
        "task_loss": run_log.mean_task_loss(steps[-LAST_STEPS:]) if steps else None,
        "best_validation_loss": min(held) if held else None,
        "reason": reason,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table; what failed is in it, and listed below with the reason."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return "+".join(map(str, value))
        return "–" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)

    names = [name for name in rows[0] if name != "reason"]
    lines = [" | ".join(names), " | ".join("---" for _ in names)]
    lines += [" | ".join(cell(r[name]) for name in names) for r in rows]
    text = "\n".join(f"| {line} |" for line in lines) + "\n"
    text += f"\ntask_loss: mean over the last {LAST_STEPS} outer steps. One run per row.\n"
    failed = [r for r in rows if r["state"] == "failed"]
    if failed:
        text += f"\n{len(failed)} of {len(rows)} runs failed:\n\n"
        text += "".join(f"- {r['run']}: {r['reason']}\n" for r in failed)
    return text


def gather(sweep: Sweep) -> str:
    """Write `table.md` and `rows.jsonl` into the sweep's folder; returns the table."""
    rows = [row(run) for run in sweep.runs]
    text = table(rows)
    disk.write_bytes(sweep.out / "rows.jsonl", "".join(f"{jsonl.json_line(r)}\n" for r in rows).encode())
    disk.write_bytes(sweep.out / "table.md", text.encode())
    return text


def command(run: Planned, base: str, devices: int) -> list[str]:
    """What `lolo` is given to start a run, or to resume it."""
    if state_of(run) == "begun":
        return ["resume", str(run.out), "--devices", str(devices)]
    options = []
    for name, (_, value) in settings.diff(recipes.RECIPES[base], run.recipe).items():
        options += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return ["train", base, *options, "--devices", str(devices), "--out", str(run.out)]


class Pool:
    """Runs in child processes, a few at a time."""

    def __init__(self, stop: interrupt.Stop, log: Callable[[str], None]) -> None:
        self.stop, self.log = stop, log
        self.children: set[subprocess.Popen] = set()

    def one(self, run: Planned, argv: list[str]) -> None:
        """A run to its end; why it failed is kept beside its folder."""
        if self.stop.requested is not None:
            return
        run.out.parent.mkdir(parents=True, exist_ok=True)
        failure_file(run).unlink(missing_ok=True)
        log = run.out.with_name(f"{run.name}.log")
        with open(log, "ab") as output:
            before = output.tell()
            with subprocess.Popen(
                [sys.executable, "-m", "lolo.cli", *argv],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=os.environ | {launch.WATCHED: "1"},  # else a second sweep could meet the runs of a killed one
                start_new_session=True,  # Ctrl-C comes to the sweep alone
            ) as child:
                self.children.add(child)
                status = child.wait()
                self.children.discard(child)
        if status == -signal.SIGTERM and self.stop.requested is not None:  # asked before it could listen
            status = 3
        if status not in (0, 3):
            printed = log.read_bytes()[before:].decode(errors="replace")
            lines = [line for line in printed.splitlines() if line.strip()]
            ended = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
            reason = f"{ended}: {lines[-1] if lines else 'it printed nothing'}"
            disk.write_bytes(failure_file(run), f"{reason}\n".encode())
            self.log(f"{run.name} failed ({reason}). All that it printed: {log}")
        else:
            self.log(f"{run.name} {'is done' if status == 0 else 'stopped'}.")

    def pass_on_stop(self, finished: threading.Event) -> None:
        """Ask each of the children to stop once the sweep was asked; one that is just being started, a moment later."""
        asked_to_stop: set[subprocess.Popen] = set()
        while not finished.wait(0.1):
            if self.stop.requested is not None:
                for child in self.children - asked_to_stop:
                    child.terminate()
                    asked_to_stop.add(child)


def run_all(
    sweep: Sweep,
    workers: int | None,
    only: int | None,
    stop: interrupt.Stop,
    log: Callable[[str], None],
) -> None:
    """Run what is not done, `workers` at a time: by default one for each core, each with its share of the cores."""
    if only is not None and not 0 <= only < len(sweep.runs):
        raise SweepError(f"--only {only} must be the number of a run, from 0 to {len(sweep.runs) - 1}.")
    if workers is not None and workers < 1:
        raise SweepError(f"--workers {workers} must be at least 1.")
    due = [run for run in sweep.runs if only in (None, run.number) and state_of(run) != "done"]
    if not due:
        return
    at_once = min(workers or parallel.cores(), len(due))
    devices = max(parallel.cores() // at_once, 1)
    log(f"{len(due)} of {len(sweep.runs)} runs to do, {at_once} at a time; logs beside the run folders in {sweep.out}.")
    pool, finished = Pool(stop, log), threading.Event()
    watcher = threading.Thread(target=pool.pass_on_stop, args=(finished,))
    watcher.start()
    try:
        with ThreadPoolExecutor(at_once) as threads:
            list(threads.map(lambda run: pool.one(run, command(run, sweep.base, devices)), due))
    finally:
        finished.set()
        watcher.join()


def slurm_script(path: Path, sweep: Sweep) -> str:
    """A SLURM array with one task for each run."""
    here, name = shlex.quote(os.getcwd()), re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem)
    lolo = f"lolo sweep {shlex.quote(str(path))}"
    return f"""#!/bin/bash
# Give this to sbatch. Each task resumes where it was stopped. Afterwards: {lolo} --table
#SBATCH --job-name={name}
#SBATCH --array=0-{len(sweep.runs) - 1}
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output={name}-%a.out
cd {here}
# srun has not passed --cpus-per-task on by itself since SLURM 22.05.
exec srun --cpus-per-task="$SLURM_CPUS_PER_TASK" {lolo} --only "$SLURM_ARRAY_TASK_ID" --workers 1
"""
