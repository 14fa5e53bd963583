"""The comparisons behind `lolo reproduce`: what is meta-trained, what it is compared with, and the report.

A study's folder holds `runs/` (one folder per meta-training) and, for each task, rows (`rows-TASK.jsonl`), what is
known about them (`about-TASK.json`), table, report and pictures, named alike.
Every study goes on where it was stopped when it is started again.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lolo import evaluation, files, plots, pretrained, recipes, training
from lolo import tasks as tasks_
from lolo.evaluation import Contestant, Row
from lolo.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Study:
    """Methods meta-trained on tasks with several seeds, and evaluated past their unroll."""

    about: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...] = ("naive", "bc-only", "lolo")
    meta_seeds: int = 1
    eval_steps: int = 10_000
    eval_seeds: int = 5
    baselines: tuple[str, ...] = ("adamw:1e-3", "adamw:grid")
    changes: tuple[tuple[str, Any], ...] = ()  # recipe fields, for every method


SMOKE = (
    ("outer.steps", 4),
    ("unroll.length", 100),
    ("unroll.truncation", 50),
    ("estimator.pairs", 2),
    ("validation.every", 0),
)

STUDIES: dict[str, Study] = {
    "quick": Study(
        about="one meta-seed, shortened meta-training: what a fresh machine shows within ten minutes",
        tasks=("fashion-mlp",),
        changes=(("outer.steps", 1000), ("validation.every", 0)),
    ),
    "books": Study(
        about="next character of English books, three meta-seeds",
        tasks=("books-mlp",),
        meta_seeds=3,
        changes=(("outer.steps", 2000),),
    ),
    "mini": Study(
        about="both embedded tasks at the paper's number of outer steps, three meta-seeds",
        tasks=("fashion-mlp", "books-mlp"),
        meta_seeds=3,
    ),
}

Told = Callable[[str, int, int, str], None]
"""Progress: what is under way, units done, units in all, and a word on how it goes."""


def silent(what: str, done: int, total: int, word: str) -> None:
    """Tells nobody."""


def recipe_of(study: Study, method: str, task: str, seed: int) -> Recipe:
    """The recipe of one meta-training of a study."""
    recipe = dataclasses.replace(recipes.RECIPES[method], tasks=(task,), seed=seed)
    for name, value in study.changes:
        recipe = recipes.with_field(recipe, name, value)
    return recipe


def meta_train(
    study: Study,
    method: str,
    task: str,
    seed: int,
    out: Path,
    stop: training.Stop,
    told: Told,
    say: Callable[[str], None],
) -> Path:
    """Weights of one meta-training: found, resumed or made."""
    recipe = recipe_of(study, method, task, seed)
    run = out / "runs" / f"{task}-{method}-seed{seed}"
    what = f"{method} on {task}, meta-seed {seed}"

    def progress(p: training.Progress) -> None:
        told(what, p.step, p.total, f"loss {p.task_loss:.3f} α {p.alpha:.2f} K {p.start_step:.0f}")

    if (run / "recipe.json").is_file():
        changed = recipes.diff(training.read_recipe(run), recipe)
        if changed:
            raise training.RunError(f"{run} holds another recipe ({', '.join(changed)} differ); give another --out.")
        if finished(run, recipe):
            return run / "last.safetensors"
        result = training.resume(run, stop=stop, told=progress, say=say)
    else:
        result = training.train(recipe, run, stop=stop, told=progress, say=say)
    if not result.finished:
        raise Interrupted(f"stopped. Go on with the same command: what is done in {out} is kept.")
    return run / "last.safetensors"


def finished(run: Path, recipe: Recipe) -> bool:
    """Whether a run's last weights are those of its last outer step. Its checkpoints and log may be gone by then."""
    path = run / "last.safetensors"
    return path.is_file() and files.read_weights(path).card.get("outer_step") == recipe.outer.steps


class Interrupted(RuntimeError):
    """A study was asked to stop."""


# --- evaluation of named optimizers -------------------------------------------------------------------------------


def contestants(
    names: Sequence[str | Path], splits: tasks_.Splits, steps: int, advanced: Callable[[int], None] = lambda n: None
) -> tuple[list[Contestant], dict[str, pretrained.Weights]]:
    """Optimizers by name: weights (a shipped name or a file), `adamw:1e-3`, `adam:…`, `sgdm:…`, `adamw:grid`.

    Returns: the contestants, and the weights among them by label and meta-seed. Raises ValueError, FileError.
    """
    kinds: dict[str, Any] = {}
    found, weights = [], {}
    for name in map(str, names):
        kind, separator, setting = name.partition(":")
        if separator and kind in evaluation.BASELINES:
            found.append(_baseline(kind, setting, splits, steps, advanced))
        elif separator and not Path(name).exists():
            raise recipes.unknown("optimizer", kind, evaluation.BASELINES)
        else:
            loaded = pretrained.load(name)
            label, seed = _label(loaded, name, kinds, {(c.label, c.meta_seed) for c in found})
            found.append(Contestant(label, seed, pretrained.architecture(loaded.learner).optimizer, loaded.meta_params))
            weights[f"{label}, meta-seed {seed}"] = loaded
    return found, weights


def _baseline(
    kind: str, setting: str, splits: tasks_.Splits, steps: int, advanced: Callable[[int], None]
) -> Contestant:
    if setting == "grid":
        return evaluation.best_of_grid(splits, kind, steps, advanced=advanced)
    try:
        lr = float(setting)
    except ValueError:
        raise ValueError(f"{kind}:{setting}: give a learning rate ({kind}:1e-3) or {kind}:grid.") from None
    if not 0 < lr < float("inf"):
        raise ValueError(f"{kind}:{setting}: the learning rate must be a positive number.")
    return evaluation.baseline(kind, lr, steps)


def _label(
    weights: pretrained.Weights, name: str, kinds: dict[str, Any], taken: set[tuple[str, int | None]]
) -> tuple[str, int | None]:
    """Method and meta-seed of weights: from their recipe if it is a known method, else the file's name.

    `kinds` holds what each label stands for. Rows of one label are meta-seeds of one recipe: weights that differ from
    those before them in more than the seed, or are in use with other settings than in meta-training, get a row of
    their own.
    """
    kind: Any = (None, weights.learner)
    label, seed = Path(name).stem, None
    if weights.recipe:
        try:
            recipe = recipes.from_dict(weights.recipe)
        except recipes.RecipeError as error:
            raise recipes.RecipeError(f"{name}: the recipe in its metadata can't be read: {error}") from error
        seed, kind = recipe.seed, (dataclasses.replace(recipe, seed=0), weights.learner)
        if weights.learner == recipe.learner:
            label = recipes.method_of(recipe) or label
    another = kinds.setdefault(label, kind) != kind or (label, seed) in taken
    return (name, seed) if another else (label, seed)


def evaluate(
    names: Sequence[str | Path], task: str, steps: int, seeds: int, told: Told = silent
) -> tuple[list[Row], dict[str, pretrained.Weights]]:
    """Every named optimizer on a task, from the same inits and batches; see `contestants`."""
    picks = sum(str(name).endswith(":grid") for name in names) * len(evaluation.GRID) * len(evaluation.PICK_SEEDS)
    total, done = (len(names) * seeds + picks) * steps, 0

    def advanced(count: int) -> None:
        nonlocal done
        done += count
        told(f"evaluating on {task}", done, total, "")

    splits = tasks_.resolve(task)
    entries, weights = contestants(names, splits, steps, advanced)
    return evaluation.compare(task, splits, entries, range(seeds), steps, advanced=advanced), weights


# --- reports ------------------------------------------------------------------------------------------------------


def shown(i: evaluation.Interval, signed: bool = False) -> str:
    """An interval in a cell of a table."""
    mean = f"{i.mean:+.4f}" if signed else f"{i.mean:.4f}"
    half = f" ± {i.half:.4f}" if math.isfinite(i.half) else ""
    return f"{mean}{half} (n={i.n} {i.unit})" if i.n > 1 else f"{mean} (single run)"


def meta_seed_tables(rows: Sequence[Row]) -> str:
    """Markdown: each φ by itself, and paired differences within each meta-seed; "" without several meta-seeds."""
    seeds = sorted({row.meta_seed for row in rows if row.meta_seed is not None})
    learned = list(dict.fromkeys(row.optimizer for row in rows if row.meta_seed is not None))
    if len(seeds) < 2:
        return ""
    heads = [f"meta-seed {seed}" for seed in seeds]

    def lines(what: str, cells: dict[str, list[str]]) -> list[str]:
        body = [f"| {name} | {' | '.join(values)} |" for name, values in cells.items()]
        return [f"| {what} | {' | '.join(heads)} |", "| --- |" + " --- |" * len(seeds), *body]

    def only(seed: int) -> list[Row]:
        return [row for row in rows if row.meta_seed == seed]

    def in_each(cell: Callable[[list[Row]], str]) -> list[str]:
        return [cell(only(seed)) for seed in seeds]

    def losses(label: str, mine: list[Row]) -> str:
        end, lowest = (evaluation.summary(mine, label, field).mean for field in ("train_loss", "train_minimum"))
        return f"{end:.4f} ({end - lowest:+.4f})"

    def gap(a: str, b: str, mine: list[Row]) -> str:
        return shown(evaluation.paired_difference(mine, a, b), signed=True)

    def have(labels: Sequence[str]) -> bool:
        return all(any(row.optimizer == label for row in only(seed)) for label in labels for seed in seeds)

    each = {label: in_each(partial(losses, label)) for label in learned if have([label])}
    pairs = {f"{a} − {b}": in_each(partial(gap, a, b)) for a, b in itertools.combinations(learned, 2) if have([a, b])}
    first = lines("train loss (above its own lowest mean of 100 steps)", each)
    return "\n".join([*first, "", *lines("difference in train loss, within a meta-seed", pairs)] if pairs else first)


def cells(rows: Sequence[Row], reference: str | None = None) -> list[list[str]]:
    """Header and one row per optimizer: means with 95 % intervals, and paired differences with `reference`."""
    labels = list(dict.fromkeys(row.optimizer for row in rows))
    reference = reference or labels[0]
    differences = [f"{reference} − it, train", f"{reference} − it, held-out"]
    found = [["optimizer", "train loss", "held-out loss", *differences, "diverged"]]

    def difference(label: str, field: str) -> str:
        if label == reference:
            return ""
        try:
            return shown(evaluation.paired_difference(rows, reference, label, field), signed=True)
        except ValueError:  # several meta-seeds on either side, and none in common
            return "no pairs"

    for label in sorted(labels, key=lambda name: evaluation.summary(rows, name).mean):
        mine = [row for row in rows if row.optimizer == label]
        line = [label, shown(evaluation.summary(rows, label)), shown(evaluation.summary(rows, label, "held_loss"))]
        line += [difference(label, field) for field in ("train_loss", "held_loss")]
        found.append([*line, f"{sum(row.diverged for row in mine)} of {len(mine)}"])
    return found


def reference_of(rows: Sequence[Row]) -> str:
    """The optimizer that the others are compared with: lolo, else the first."""
    labels = [row.optimizer for row in rows]
    return "lolo" if "lolo" in labels else labels[0]


def table(rows: Sequence[Row]) -> str:
    """`cells` as Markdown, compared with LoLO, or with the first optimizer."""
    header, *lines = cells(rows, reference_of(rows))
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines, whole or not at all."""
    files.write_bytes(path, "".join(files.json_line(dataclasses.asdict(row)) + "\n" for row in rows).encode())


_ROW_FIELDS: dict[str, Callable[[Any], Any]] = {
    "task": files.text,
    "optimizer": files.text,
    "meta_seed": lambda value: None if value is None else files.whole(value),
    "seed": files.whole,
    "steps": files.whole,
    "train_loss": files.number,
    "train_minimum": files.number,
    "held_loss": files.number,
    "held": files.named(files.number),
    "diverged": files.flag,
    "train_curve": files.listed(files.number),
    "held_curve": files.listed(files.number),
}


def _row(row: Any) -> dict[str, Any]:
    row = files.fields(**_ROW_FIELDS)(row)
    other = sorted(set(row) - set(_ROW_FIELDS))
    if other:
        raise ValueError(f"field {other[0]!r} is not of this version of lolo")
    if {len(row["train_curve"]) * evaluation.WINDOW, len(row["held_curve"]) * evaluation.WINDOW} != {row["steps"]}:
        raise ValueError(f"its curves have no number for each {evaluation.WINDOW} of {row['steps']} steps")
    return row


def load_rows(path: Path) -> list[Row]:
    """Rows of `save_rows`, checked: one task, at least one row, curves of one length. Raises FileError."""
    rows = [Row(**row) for row in files.read_json_lines(path, _row)]
    shapes = {(row.task, row.steps, len(row.train_curve), len(row.held_curve)) for row in rows}
    if len(shapes) != 1:
        raise files.FileError(f"{path}: expected rows of one task and one number of steps, found {len(shapes)} kinds.")
    return rows


def file_name(task: str) -> str:
    """What the files of a task are named after: its name, or the name of the user's file and function."""
    path, _, function = task.partition("@")[0].rpartition(":")
    return f"{Path(path).stem}-{function}" if path else task


def check_free(out: Path, task: str) -> None:
    """Raise RunError unless an evaluation of a task may be written into `out`."""
    for name in ("recipe.json", f"rows-{file_name(task)}.jsonl"):
        if (out / name).exists():
            raise training.RunError(f"{out} already holds {name} of another run; give another --out.")
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        raise training.RunError(f"{out} can't be written ({nearest} is in the way); give another --out.")


def write_report(
    out: Path,
    task: str,
    rows: Sequence[Row],
    weights: dict[str, pretrained.Weights],
    command: str,
    note: str = "",
) -> str:
    """Rows, table, pictures and a short report in `out`, named after the task. Returns the table."""
    name = file_name(task)
    save_rows(out / f"rows-{name}.jsonl", rows)  # first: whatever goes wrong below, they took the time
    text = table(rows)
    unrolls = {w.recipe["unroll"]["length"] for w in weights.values() if w.recipe}
    unroll = unrolls.pop() if len(unrolls) == 1 else None
    plots.save_figure(plots.curves(rows, unroll, f"{task}, {rows[0].steps:,} steps"), out / f"curves-{name}.png")
    pictures = [f"![curves](curves-{name}.png)"]
    cards = {label: w.card for label, w in weights.items() if w.card.get("start_steps_per_250")}
    if cards:
        plots.save_figure(plots.start_steps(cards), out / f"start-steps-{name}.png")
        pictures.append(f"![realised start steps](start-steps-{name}.png)")
    about = {"command": command, "note": note, "unroll": unroll, **training.provenance()}
    kept = {
        label: {"sha256": files.digest({k: np.asarray(x) for k, x in w.meta_params.items()}), "card": w.card}
        for label, w in weights.items()
    }
    files.write_json(out / f"about-{name}.json", files.json_safe({**about, "weights": kept}))
    diverged = sum(row.diverged for row in rows)
    paragraphs = [
        f"# {task}, {rows[0].steps:,} inner steps",
        note,
        text,
        f"Train loss: mean over the last {evaluation.WINDOW} steps. ±: 95 % t interval. All optimizers start from the "
        f"same inits and see the same batches; {diverged} of {len(rows)} runs diverged. The grid's learning rate was "
        "picked on other seeds.",
        meta_seed_tables(rows),
        *pictures,
        f"Command: `{command}`. Versions: {about['versions']}. Commit: {about['commit']}. "
        f"Machine: {about['machine']['device']}, {about['machine']['cores']} cores.",
    ]
    report = "\n\n".join(filter(None, paragraphs)) + "\n"
    files.write_bytes(out / f"report-{name}.md", report.encode())
    files.write_bytes(out / f"table-{name}.md", (text + "\n").encode())
    return text


def reproduce(
    name: str,
    out: Path,
    *,
    smoke: bool = False,
    stop: training.Stop | None = None,
    told: Told = silent,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run a study, or what is left of it. Returns the table of each task. Raises Interrupted."""
    study, stop = STUDIES[name], stop or training.Stop()
    if smoke:
        study = dataclasses.replace(study, meta_seeds=1, eval_steps=200, eval_seeds=2, changes=(*study.changes, *SMOKE))
    began, tables = time.monotonic(), {}

    def heard(what: str, done: int, total: int, word: str) -> None:
        told(what, done, total, word)
        if stop.requested is not None:
            raise Interrupted(f"stopped. Go on with the same command: what is meta-trained in {out} is kept.")

    for task in study.tasks:
        weights: list[str | Path] = [
            meta_train(study, method, task, seed, out, stop, told, say)
            for seed in range(study.meta_seeds)
            for method in study.methods
        ]
        names = [*weights, *study.baselines]
        rows, loaded = evaluate(names, task, study.eval_steps, study.eval_seeds, heard)
        minutes = (time.monotonic() - began) / 60
        note = f"Study `{name}`: {study.about}. This call took {minutes:.1f} minutes so far."
        tables[task] = write_report(out, task, rows, loaded, f"lolo reproduce {name}", note)
    return tables
