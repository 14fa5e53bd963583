"""The page of `lolo report`: one HTML file about meta-trainings, evaluations and studies, readable offline.

Folders may come from strangers: everything is checked when it is read, and escaped when it is written.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lolo.evaluation import long_runs
from lolo.evaluation.statistics import Row
from lolo.files import disk, jsonl, settings
from lolo.files.disk import FileError
from lolo.files.settings import RecipeError
from lolo.optimizers import weights_file
from lolo.optimizers.weights_file import WeightsFile
from lolo.report import charts, markup
from lolo.report.charts import Series
from lolo.report.markup import Html, details, join, table, tag
from lolo.studies import definitions, tables
from lolo.studies.rows import load_rows
from lolo.training import doctor, recipes, run_folder
from lolo.training.build import check
from lolo.training.findings import Finding, Verdict
from lolo.training.recipes import Recipe

MAX_OPTIMIZERS = 32  # in one evaluation: a chart has that many distinct lines
NEWEST = 20  # validations in a table


class Level(NamedTuple):
    """The level of a part's headings."""

    parts: str  # h3, or h4 inside another part

    def heading(self, text: str) -> Html:
        return tag(self.parts, text)


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about these folders. Returns where: `out`, or report.html in the first folder.

    Raises FileError (a folder holds nothing to report, or a file in it is not what it should be) and ValueError.
    """
    if not folders:
        raise ValueError("name at least one folder, for instance: lolo report runs/quick")
    out = out or folders[0] / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise ValueError(f"--out {out} must end in .html")
    disk.write_bytes(out, build(folders).encode())
    return out


def build(folders: Sequence[Path]) -> str:
    """The page about these folders, each once. Raises FileError."""
    unique = list({folder.resolve(): folder for folder in folders}.values())
    names = [folder.resolve().name for folder in unique]
    parts = [part_of(folder) for folder in unique]
    contents = [tag("li", tag("a", str(folder), href=f"#part{i}")) for i, folder in enumerate(unique)]
    sections = [
        tag("section", tag("h2", str(folder)), join(part), id=f"part{i}")
        for i, (folder, part) in enumerate(zip(unique, parts, strict=True))
    ]
    several = [tag("nav", tag("ul", *contents), aria_label="Contents")] if len(unique) > 1 else []
    return markup.page(f"LoLO report: {', '.join(names)}", *several, *sections)


def part_of(folder: Path) -> list[Html]:
    """The part of the page about a folder, by the folder's contents. Raises FileError."""
    if (folder / "recipe.json").is_file():
        return run_part(folder, Level("h3"))
    if rows_of(folder) or run_folders(folder):
        return study_part(folder)
    raise FileError(
        f"{folder} holds neither a meta-training (recipe.json), nor an evaluation (rows-TASK.jsonl), nor a study."
    )


def rows_of(folder: Path) -> list[Path]:
    """The rows of an evaluation or a study, then those of its parts."""
    places = (folder, *(folder / part for part in definitions.STUDY))
    return [path for place in places for path in sorted(place.glob("rows-*.jsonl"))]


def run_folders(study: Path) -> list[Path]:
    """The meta-trainings of a study."""
    return sorted(path.parent for path in (study / "runs").glob("*/recipe.json"))


class RunFolder(NamedTuple):
    """What a meta-training wrote; all but the recipe may be missing."""

    path: Path
    recipe: Recipe
    log: doctor.Log
    about: dict[str, Any]
    weights: dict[str, WeightsFile]  # best, last


def read_run(path: Path) -> RunFolder:
    """A run's folder, checked. Raises FileError."""
    try:
        recipe = run_folder.read_recipe(path)
        check(recipe)
    except RecipeError as error:
        raise FileError(f"{path}/recipe.json: {error}") from error
    logs = [path / name for name in ("log.jsonl", "validation.jsonl") if (path / name).is_file()]
    log = doctor.read_log(logs[0], len(recipe.tasks)) if logs else doctor.Log([], [])
    weights = {
        name: weights_file.read_weights(path / f"{name}.safetensors")
        for name in ("best", "last")
        if (path / f"{name}.safetensors").is_file()
    }
    return RunFolder(path, recipe, log, run_folder.read_about(path), weights)


def run_part(path: Path, level: Level) -> list[Html]:
    """A meta-training: facts, health, curves, start steps, validations, recipe, how to reproduce it."""
    run = read_run(path)
    findings = [level.heading("Health"), findings_list(doctor.examine(path))] if run.log.steps else []
    return [
        facts(run),
        *findings,
        level.heading("Curves"),
        tag("div", join([*run_curves(run), start_histogram({"": starts_of(run)})]), class_="charts"),
        *validation_table(run),
        recipe_table(run.recipe),
        level.heading("How to reproduce"),
        *reproduction(run),
    ]


def facts(run: RunFolder) -> Html:
    """One paragraph: method, tasks, and outer steps done."""
    method = recipes.method_of(run.recipe) or "a method of its own"
    words = f"Meta-training of {method} on {', '.join(run.recipe.tasks)}, seed {run.recipe.seed}. "
    if run.log.steps:
        words += f"{run.log.steps[-1]['step'] + 1} of {run.recipe.outer.steps} outer steps done."
    else:
        words += f"{run.recipe.outer.steps} outer steps requested; the log of outer steps is not in this folder."
    return tag("p", words)


def findings_list(findings: Sequence[Finding]) -> Html:
    """Health, in the words of `lolo doctor --no-evaluate`."""
    items = []
    for finding in findings:
        kind = "good" if finding.verdict is Verdict.OK else "look"
        advice = [tag("ul", *(tag("li", f"try: {one}") for one in finding.advice))] if finding.advice else []
        items.append(tag("li", tag("strong", finding.verdict.value, class_=kind), f" {finding.what}", *advice))
    return tag("ul", join(items), class_="findings")


def run_curves(run: RunFolder) -> list[Html]:
    """Curves over the outer step: losses, imitation, the hand-over, the meta-gradient, validation."""
    drawn = []
    if run.log.steps:
        x = np.array([row["step"] for row in run.log.steps])

        def per_task(field: str) -> list[Series]:
            values = np.array([row[field] for row in run.log.steps])  # [steps, tasks]
            return [Series(task, x, values[:, i]) for i, task in enumerate(run.recipe.tasks)]

        def single(label: str, field: str) -> Series:
            return Series(label, x, np.array([row[field] for row in run.log.steps]))

        alphas = [single("in the step (Eq. 1)", "alpha_mix"), single("in the loss (Eq. 3)", "alpha_loss")]
        drawn = [
            charts.curves("Task loss of truncations", per_task("task_loss"), "outer step", "task loss"),
            charts.curves("Distance to the expert (Eq. 2)", per_task("bc_loss"), "outer step", "imitation loss"),
            charts.curves("Weight of the learned optimizer", alphas, "outer step", "α"),
            charts.curves(
                "Signal-to-noise of the meta-gradient", [single("", "signal_to_noise")], "outer step", "signal-to-noise"
            ),
        ]
    if run.log.validations:
        x = np.array([row["step"] for row in run.log.validations])
        losses = [
            Series(label, x, np.array([row[field] for row in run.log.validations]))
            for label, field in (("train loss", "train_loss"), ("held-out loss", "held_loss"))
        ]
        drawn.insert(0, charts.curves("Validation: long unrolls", losses, "outer step", "loss after the unroll"))
    return drawn


Counts = tuple[np.ndarray, np.ndarray]  # values [n] and how often each was seen [n]


def starts_of(run: RunFolder) -> Counts:
    """Start steps of unrolls: from the log, else from the card of the last weights, in bins of 250."""
    starts = [start for row in run.log.steps for start in row["starts"]]
    if starts or "last" not in run.weights:
        return np.array(starts, np.float64), np.ones(len(starts))
    return card_starts(run.weights["last"].card, f"{run.path}/last.safetensors")


def card_starts(card: dict[str, Any], source: str) -> Counts:
    """Start steps of a weights file's card. Raises FileError."""
    counts = card.get("start_steps_per_250", {})
    if not isinstance(counts, dict) or not all(str(step).isdecimal() and len(str(step)) <= 12 for step in counts):
        raise FileError(f"{source}: start_steps_per_250 must map steps to counts.")
    weights = jsonl.checked(jsonl.listed(jsonl.whole_number), list(counts.values()), f"{source}: start_steps_per_250")
    return np.array([int(step) for step in counts], np.float64), np.array(weights, np.float64)


def start_histogram(counts: dict[str, Counts]) -> Html:
    """Histogram of the start steps of unrolls."""
    return charts.histogram("Start steps of unrolls", counts, "start step K")


def validation_table(run: RunFolder) -> list[Html]:
    """The newest validations, best marked."""
    rows = run.log.validations
    if not rows:
        return []
    best = min(range(len(rows)), key=lambda i: (np.isnan(rows[i]["held_loss"]), rows[i]["held_loss"]))
    chosen = sorted({best, *range(len(rows))[-NEWEST:]})
    cells = [
        (str(rows[i]["step"] + 1), f"{rows[i]['train_loss']:.4f}", f"{rows[i]['held_loss']:.4f}", "best" * (i == best))
        for i in chosen
    ]
    caption = f"Validation with {rows[-1]['steps']:,} inner steps; {len(chosen)} of {len(rows)} shown"
    return [table(caption, ["outer steps done", "train loss", "held-out loss", "note"], cells)]


def recipe_table(recipe: Recipe) -> Html:
    """Every field of the recipe, and LoLO's default where it differs."""
    changed = settings.diff(recipes.LOLO, recipe)
    rows = [
        (name, format_value(value), format_value(changed[name][0]) if name in changed else "")
        for name, value in settings.fields(recipe).items()
    ]
    return details(
        f"Recipe: {len(changed)} of {len(rows)} fields differ from LoLO's defaults",
        table("Recipe", ["field", "value", "LoLO's default, if another"], rows),
    )


def format_value(value: Any) -> str:
    """A value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def train_command(recipe: Recipe) -> str:
    """The command that meta-trains by this recipe."""
    method = recipes.method_of(recipe) or "lolo"
    words = ["lolo", "train", method]
    for name, (_, value) in settings.diff(recipes.RECIPES[method], recipe).items():
        words += [f"--{name}", *(value if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def reproduction(run: RunFolder) -> list[Html]:
    """Command, seed, versions, commit, machine, and the hashes of the weights."""
    init = run.about.get("init")
    rows = [("seed", str(run.recipe.seed)), *provenance_rows(run.about)]
    rows += [("started from weights with sha256", str(init))] if init else []
    rows += [(f"sha256 of {name}.safetensors", file.sha256) for name, file in run.weights.items()]
    return [
        tag("pre", tag("code", train_command(run.recipe))),
        tag("p", "Same recipe, seed, versions and kind of device: same weights, byte for byte."),
        table("What made it", ["what", "value"], rows),
    ]


def provenance_rows(about: dict[str, Any]) -> list[tuple[str, str]]:
    """Command, versions, commit and machine, as recorded."""
    if about.get("stated") is not None:
        return [("stated in its report", str(about["stated"]))]
    command = about.get("command")
    if isinstance(command, list):
        command = shlex.join(map(str, command))
    rows = [("command given", command), ("commit", about.get("commit"))]
    for what in ("versions", "machine"):
        parts = about.get(what)
        rows.append((what, ", ".join(f"{k} {v}" for k, v in parts.items()) if isinstance(parts, dict) else None))
    return [(what, "not written down" if value is None else str(value)) for what, value in rows]


def study_part(folder: Path) -> list[Html]:
    """An evaluation or a study: each task's comparison, then each meta-training, to be opened."""
    parts: list[Html] = []
    for path in rows_of(folder):
        if path.parent != folder:
            parts.append(tag("h3", f"Part {path.parent.name}"))
        parts += comparison(path.parent, path)
    runs = run_folders(folder)
    if runs:
        parts.append(tag("h3", "Meta-trainings"))
        parts += [details(path.name, *run_part(path, Level("h4"))) for path in runs]
    return parts


def comparison(folder: Path, path: Path) -> list[Html]:
    """One task: table with intervals, curves, start steps, every run, how to reproduce it."""
    rows = load_rows(path)
    labels = list(dict.fromkeys(row.optimizer for row in rows))
    if len(labels) > MAX_OPTIMIZERS:
        raise FileError(f"{path}: {len(labels)} optimizers; at most {MAX_OPTIMIZERS} are drawn.")
    about = read_about(path)
    starts = weight_starts(folder, about, about_path(path))
    histogram = [start_histogram(starts)] if starts else []
    unroll = about.get("unroll")
    mark = (
        None if unroll is None else float(jsonl.checked(jsonl.whole_number, unroll, f"{path}: unroll of about-*.json"))
    )
    return [
        tag("h3", f"{rows[0].task}, {rows[0].steps:,} inner steps"),
        tag("p", str(about.get("note") or "")),
        summary_table(rows),
        tag("p", EXPLANATION),
        tag("div", join([*comparison_curves(rows, labels, mark), *histogram]), class_="charts"),
        details(f"Every run: {len(rows)}", run_table(rows)),
        table(f"How to reproduce: {rows[0].task}", ["what", "value"], provenance_rows(about)),
    ]


EXPLANATION = (
    f"Train loss: mean over the last {long_runs.WINDOW} steps. ±: 95 % t interval. All optimizers start from the same "
    "inits and see the same batches. A learning rate called best was picked on other seeds."
)


def summary_table(rows: Sequence[Row]) -> Html:
    """The study's table."""
    with np.errstate(all="ignore"):  # losses of diverged runs may be infinite
        header, *lines = tables.cells(rows, tables.reference_of(rows))
    # "0.3261 ± 0.0112" and "(n=5 seeds)" stay on one line each.
    unbroken = [[line[0], *(re.sub(r" (?!\()", "\u00a0", cell) for cell in line[1:])] for line in lines]
    return table("Means, and differences paired by seed; negative: better than that optimizer", header, unbroken)


def comparison_curves(rows: Sequence[Row], labels: Sequence[str], mark: float | None) -> list[Html]:
    """Train and held-out loss against the inner step: means and ranges over runs."""
    x = np.array(long_runs.curve_steps(rows[0].steps))
    if mark is not None and not 0 < mark <= x[-1]:
        mark = None
    unroll = "" if mark is None else f"; dotted line: the unroll in meta-training, {mark:,.0f} steps"
    drawn = []
    for field, name in (("train_curve", "Train loss"), ("held_curve", "Held-out loss")):
        series = []
        for label in labels:
            values = charts.drawable(np.array([getattr(row, field) for row in rows if row.optimizer == label]))
            finite = np.isfinite(values).any(axis=0)
            mean, low, high = (
                np.where(finite, of(np.where(finite, values, 0.0), axis=0), np.nan)
                for of in (np.nanmean, np.nanmin, np.nanmax)
            )
            series.append(Series(label, x, mean, low, high))
        title = f"{name}, mean and range over runs{unroll}"
        drawn.append(charts.curves(title, series, "inner step", name.lower(), log_x=True, mark=mark))
    return drawn


def run_table(rows: Sequence[Row]) -> Html:
    """Every run of an evaluation."""
    cells = [
        (
            row.optimizer,
            "" if row.meta_seed is None else str(row.meta_seed),
            str(row.seed),
            f"{row.train_loss:.4f}",
            f"{row.train_minimum:.4f}",
            f"{row.held_loss:.4f}",
            "diverged" if row.diverged else "",
        )
        for row in rows
    ]
    header = ["optimizer", "meta-seed", "seed", "train loss", "its minimum", "held-out loss", "note"]
    return table(f"Runs on {rows[0].task}", header, cells)


def about_path(rows: Path) -> Path:
    """about-TASK.json beside rows-TASK.jsonl."""
    return rows.with_name(rows.name.replace("rows-", "about-", 1)).with_suffix(".json")


def read_about(rows: Path) -> dict[str, Any]:
    """The record beside rows-TASK.jsonl; of older folders, the command in the report. Raises FileError."""
    path = about_path(rows)
    older = path.with_name(path.name.replace("about-", "report-", 1)).with_suffix(".md")
    if path.is_file():
        about = disk.read_json(path)
        if not isinstance(about, dict):
            raise FileError(f"{path}: expected a JSON object.")
        return about
    if older.is_file() and older.stat().st_size <= disk.MAX_JSON_BYTES:
        lines = older.read_text(encoding="utf-8", errors="replace").splitlines()
        return {"stated": next((line for line in reversed(lines) if line.startswith("Command: ")), None)}
    return {}


def weight_starts(folder: Path, about: dict[str, Any], source: Path) -> dict[str, Counts]:
    """Start steps of the compared weights: as written down, else from the weights in the folder."""
    kept = about.get("weights")
    if isinstance(kept, dict):
        cards = {str(label): one.get("card") for label, one in kept.items() if isinstance(one, dict)}
    else:
        cards = {path.stem: weights_file.read_weights(path).card for path in sorted(folder.glob("*.safetensors"))}
    starts = {
        label: card_starts(card, f"{source}: {label}")
        for label, card in list(cards.items())[:MAX_OPTIMIZERS]
        if isinstance(card, dict)
    }
    return {label: counts for label, counts in starts.items() if counts[0].size}
