"""The comparisons behind `lolo reproduce`: what is meta-trained, what it is compared with, and the report.

A study's folder holds `runs/` (one folder per meta-training) and, for each task, rows, what is known about them
(`about-TASK.json`), table, report and pictures.
Every study goes on where it was stopped when it is started again.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
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
    found, weights = [], {}
    for name in map(str, names):
        kind, separator, setting = name.partition(":")
        if separator and kind in evaluation.BASELINES:
            found.append(_baseline(kind, setting, splits, steps, advanced))
        elif separator and not Path(name).exists():
            raise recipes.unknown("optimizer", kind, evaluation.BASELINES)
        else:
            loaded = pretrained.load(name)
            label, seed = _label(loaded, name, {(c.label, c.meta_seed) for c in found})
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


def _label(weights: pretrained.Weights, name: str, taken: set[tuple[str, int | None]]) -> tuple[str, int | None]:
    """Method and meta-seed of weights: from their recipe if it is a known method, else the file's name."""
    label, seed = Path(name).stem, None
    if weights.recipe:
        recipe = recipes.from_dict(weights.recipe)
        label, seed = recipes.method_of(recipe) or label, recipe.seed
    return (name, seed) if (label, seed) in taken else (label, seed)


def eval_units(names: Sequence[str | Path], seeds: int, steps: int) -> int:
    """Inner steps that `contestants` and `compare` will run together."""
    picks = sum(str(name).endswith(":grid") for name in names) * len(evaluation.GRID) * len(evaluation.PICK_SEEDS)
    return (len(names) * seeds + picks) * steps


# --- reports ------------------------------------------------------------------------------------------------------


def cells(rows: Sequence[Row], reference: str | None = None) -> list[list[str]]:
    """Header and one row per optimizer: means with 95 % intervals, and paired differences with `reference`."""
    labels = list(dict.fromkeys(row.optimizer for row in rows))
    reference = reference or labels[0]
    differences = [f"{reference} − it, train", f"{reference} − it, held-out"]
    found = [["optimizer", "train loss", "held-out loss", *differences, "diverged"]]

    def shown(i: evaluation.Interval, signed: bool = False) -> str:
        mean = f"{i.mean:+.4f}" if signed else f"{i.mean:.4f}"
        return f"{mean} ± {i.half:.4f} (n={i.n} {i.unit})" if i.n > 1 else f"{mean} (single run)"

    for label in sorted(labels, key=lambda name: evaluation.summary(rows, name).mean):
        mine = [row for row in rows if row.optimizer == label]
        line = [label, shown(evaluation.summary(rows, label)), shown(evaluation.summary(rows, label, "held_loss"))]
        for field in ("train_loss", "held_loss"):
            difference = "" if label == reference else shown(
                evaluation.paired_difference(rows, reference, label, field), signed=True
            )  # fmt: skip
            line.append(difference)
        found.append([*line, f"{sum(row.diverged for row in mine)} of {len(mine)}"])
    return found


def reference_of(rows: Sequence[Row]) -> str:
    """The optimizer that the others are compared with: lolo, else the first."""
    labels = [row.optimizer for row in rows]
    return "lolo" if "lolo" in labels else labels[0]


def table(rows: Sequence[Row], reference: str | None = None) -> str:
    """`cells` as Markdown."""
    header, *lines = cells(rows, reference)
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def save_rows(path: Path, rows: Sequence[Row]) -> None:
    """Rows as JSON lines, whole or not at all."""
    files.write_bytes(path, "".join(files.json_line(dataclasses.asdict(row)) + "\n" for row in rows).encode())


def load_rows(path: Path) -> list[Row]:
    """Rows of `save_rows`, checked: one task, at least one row, curves of one length. Raises FileError."""
    rows = [_row(row, f"{path}, row {count}: ") for count, row in enumerate(files.read_json_lines(path), 1)]
    shapes = {(row.task, row.steps, len(row.train_curve), len(row.held_curve)) for row in rows}
    if len(shapes) != 1:
        raise files.FileError(f"{path}: expected rows of one task and one number of steps, found {len(shapes)} kinds.")
    return rows


def _row(row: dict[str, Any], at: str) -> Row:
    if set(row) != {field.name for field in dataclasses.fields(Row)}:
        raise files.FileError(f"{at}is of another version of lolo: it has {', '.join(map(repr, row))}.")
    if not isinstance(row["task"], str) or not isinstance(row["optimizer"], str):
        raise files.FileError(f"{at}task and optimizer must be strings.")
    if not isinstance(row["held"], dict) or not isinstance(row["diverged"], bool):
        raise files.FileError(f"{at}held must be an object, and diverged true or false.")
    losses: dict[str, Any] = {
        name: files.number(row[name], at + name) for name in ("train_loss", "train_minimum", "held_loss")
    }
    curves: dict[str, Any] = {name: files.numbers(row[name], at + name) for name in ("train_curve", "held_curve")}
    steps = files.whole(row["steps"], f"{at}steps")
    if not steps or any(len(curve) * evaluation.WINDOW != steps for curve in curves.values()):
        raise files.FileError(f"{at}its curves have no number for each {evaluation.WINDOW} of {steps} steps.")
    meta_seed = row["meta_seed"]
    return Row(
        row["task"],
        row["optimizer"],
        None if meta_seed is None else files.whole(meta_seed, f"{at}meta_seed"),
        files.whole(row["seed"], f"{at}seed"),
        steps,
        **losses,
        held={str(name): files.number(value, f"{at}held.{name}") for name, value in row["held"].items()},
        diverged=row["diverged"],
        **curves,
    )


def write_report(
    out: Path,
    task: str,
    rows: Sequence[Row],
    weights: dict[str, pretrained.Weights],
    command: str,
    note: str = "",
) -> str:
    """Rows, table, pictures and a short report in `out`. Returns the table."""
    text = table(rows, reference_of(rows))
    unrolls = {w.recipe["unroll"]["length"] for w in weights.values() if w.recipe}
    unroll = unrolls.pop() if len(unrolls) == 1 else None
    save_rows(out / f"rows-{task}.jsonl", rows)
    plots.save_figure(plots.curves(rows, unroll, f"{task}, {rows[0].steps:,} steps"), out / f"curves-{task}.png")
    pictures = f"![curves](curves-{task}.png)\n"
    cards = {label: w.card for label, w in weights.items() if w.card.get("start_steps_per_250")}
    if cards:
        plots.save_figure(plots.start_steps(cards), out / f"start-steps-{task}.png")
        pictures += f"\n![realised start steps](start-steps-{task}.png)\n"
    about = {"command": command, "note": note, "unroll": unroll, **training.provenance()}
    kept = {
        label: {"sha256": files.digest({k: np.asarray(x) for k, x in w.meta_params.items()}), "card": w.card}
        for label, w in weights.items()
    }
    files.write_json(out / f"about-{task}.json", files.json_safe({**about, "weights": kept}))
    diverged = sum(row.diverged for row in rows)
    report = (
        f"# {task}, {rows[0].steps:,} inner steps\n\n{note}\n\n{text}\n\n"
        f"Train loss: mean over the last {evaluation.WINDOW} steps. ±: 95 % t interval. All optimizers start from the "
        f"same inits and see the same batches; {diverged} of {len(rows)} runs diverged. The grid's learning rate was "
        f"picked on other seeds.\n\n{pictures}\n"
        f"Command: `{command}`. Versions: {about['versions']}. Commit: {about['commit']}. "
        f"Machine: {about['machine']['device']}, {about['machine']['cores']} cores.\n"
    )
    files.write_bytes(out / f"report-{task}.md", report.encode())
    files.write_bytes(out / f"table-{task}.md", (text + "\n").encode())
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
    for task in study.tasks:
        weights = [
            meta_train(study, method, task, seed, out, stop, told, say)
            for seed in range(study.meta_seeds)
            for method in study.methods
        ]
        names = [*map(str, weights), *study.baselines]
        total, done = eval_units(names, study.eval_seeds, study.eval_steps), 0

        def advanced(steps: int, total: int = total, task: str = task) -> None:
            nonlocal done
            done += steps
            told(f"evaluating on {task}", done, total, "")

        splits = tasks_.resolve(task)
        entries, loaded = contestants(names, splits, study.eval_steps, advanced)
        rows = evaluation.compare(task, splits, entries, range(study.eval_seeds), study.eval_steps, advanced=advanced)
        minutes = (time.monotonic() - began) / 60
        note = f"Study `{name}`: {study.about}. This call took {minutes:.1f} minutes so far."
        tables[task] = write_report(out, task, rows, loaded, f"lolo reproduce {name}", note)
    return tables
