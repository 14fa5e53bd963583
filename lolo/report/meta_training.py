"""The part of the page about a meta-training: its curves, recipe, how to reproduce it, and its health."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lolo.files import jsonl, settings
from lolo.files.disk import FileError
from lolo.files.settings import RecipeError
from lolo.optimizers import weights_file
from lolo.optimizers.weights_file import WeightsFile
from lolo.report import charts
from lolo.report.markup import Html, details, join, table, tag
from lolo.studies import comparison_report, names, plots
from lolo.studies.plots import Counts
from lolo.studies.style import Curve
from lolo.training import doctor, recipes, run_folder
from lolo.training.build import check
from lolo.training.findings import CONCLUSIONS, Finding, Verdict, overall
from lolo.training.recipes import Recipe

NEWEST = 20  # validations in a table


class Level(NamedTuple):
    """The level of a part's headings."""

    parts: str  # h3, or h4 inside another part

    def heading(self, text: str) -> Html:
        return tag(self.parts, text)


class RunFolder(NamedTuple):
    """What a meta-training wrote; all but the recipe may be missing."""

    path: Path
    recipe: Recipe
    log: doctor.Log
    health: list[Finding]  # without a log, nothing
    about: dict[str, Any]
    weights: dict[str, WeightsFile]  # best, last


def read_run(path: Path) -> RunFolder:
    """A run's folder, checked. Raises FileError."""
    try:
        recipe = run_folder.recipe_in(path)
        if recipe is None:
            raise FileError(f"{path} holds no meta-training: neither recipe.json nor last.safetensors with a recipe.")
        check(recipe)
    except RecipeError as error:
        raise FileError(f"{run_folder.told_by(path)}: {error}") from error
    logs = [path / name for name in ("log.jsonl", "validation.jsonl") if (path / name).is_file()]
    log = doctor.read_log(logs[0], len(recipe.tasks)) if logs else doctor.Log([], [])
    weights = {
        name: weights_file.read_weights(path / f"{name}.safetensors")
        for name in ("best", "last")
        if (path / f"{name}.safetensors").is_file()
    }
    health = doctor.examine(path) if log.steps else []
    return RunFolder(path, recipe, log, health, run_folder.read_about(path), weights)


def run_verdict(run: RunFolder) -> str:
    """What the log says of a meta-training's health, in one sentence; φ itself was not looked at."""
    if not run.health:
        return "the log of outer steps is not in this folder."
    return CONCLUSIONS[overall([*run.health, Finding(Verdict.LEFT_OUT, "", decides=True)])]


def run_part(run: RunFolder, level: Level) -> list[Html]:
    """A meta-training: facts, curves, start steps, validations, recipe, how to reproduce it, and last its health."""
    return [
        facts(run),
        level.heading("Curves"),
        tag("div", join([*run_curves(run), start_histogram({names.OURS: starts_of(run)})]), class_="charts"),
        *validation_table(run),
        recipe_table(run.recipe),
        level.heading("How to reproduce"),
        *reproduction(run),
        *([level.heading("Health"), findings_list(run.health)] if run.health else []),
    ]


def facts(run: RunFolder) -> Html:
    """One paragraph: method, tasks, and outer steps done."""
    method = recipes.method_of(run.recipe) or "a method of its own"
    tasks = ", ".join(map(settings.without_sha256, run.recipe.tasks))
    words = f"Meta-training of {method} on {tasks}, seed {run.recipe.seed}. "
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

        def per_task(field: str) -> list[Curve]:
            values = np.array([row[field] for row in run.log.steps])  # [steps, tasks]
            return [Curve(settings.without_sha256(task), x, values[:, i]) for i, task in enumerate(run.recipe.tasks)]

        def single(label: str, field: str) -> Curve:
            return Curve(label, x, np.array([row[field] for row in run.log.steps]))

        alphas = [single("in the step (Eq. 1)", "alpha_mix"), single("in the loss (Eq. 3)", "alpha_loss")]
        drawn = [
            charts.curves("Task loss of truncations", per_task("task_loss"), "outer step", "task loss"),
            charts.curves("Distance to the expert (Eq. 2)", per_task("bc_loss"), "outer step", "imitation loss"),
            charts.curves("Weight of the learned optimizer", alphas, "outer step", "α"),
            charts.curves(
                "Signal-to-noise of the meta-gradient", [single("", "signal_to_noise")], "outer step", "signal-to-noise"
            ),
        ]
        ratio = single("", "gradient_ratio")
        if (ratio.y > 0).any():  # there is imitation
            positive = ratio._replace(y=np.where(ratio.y > 0, ratio.y, np.nan))
            title = "Norm of the imitation's gradient over the task's, before they are normalised (Eq. 5)"
            drawn.append(charts.curves(title, [positive], "outer step", "ratio of norms", log=True))
    if run.log.validations:
        x = np.array([row["step"] for row in run.log.validations])
        losses = [
            Curve(label, x, np.array([row[field] for row in run.log.validations]))
            for label, field in (("train loss", "train_loss"), ("held-out loss", "held_loss"))
        ]
        drawn.insert(0, charts.curves("Validation: long unrolls", losses, "outer step", "loss after the unroll"))
    return drawn


def starts_of(run: RunFolder) -> Counts:
    """Start steps of unrolls: from the log, else from the card of the last weights, in bins of 250."""
    starts = [start for row in run.log.steps for start in row["starts"]]
    if starts or "last" not in run.weights:
        return np.array(starts, np.float64), np.ones(len(starts))
    return card_starts(run.weights["last"].card, f"{run.path}/last.safetensors")


def card_starts(card: dict[str, Any], source: str) -> Counts:
    """Start steps of a stranger's card, checked. Raises FileError."""
    counts = card.get("start_steps_per_250", {})
    if not isinstance(counts, dict) or not all(str(step).isdecimal() and len(str(step)) <= 12 for step in counts):
        raise FileError(f"{source}: start_steps_per_250 must map steps to counts.")
    jsonl.checked(jsonl.listed(jsonl.whole_number), list(counts.values()), f"{source}: start_steps_per_250")
    return comparison_report.card_counts(card)


def start_histogram(counts: dict[str, Counts]) -> Html:
    """Histogram of the start steps of unrolls."""
    title = "Start steps of unrolls"
    if not any(weights.sum() > 0 for _, weights in counts.values()):
        return charts.nothing(title)
    return charts.figure(title, plots.start_steps(counts), list(counts))


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
