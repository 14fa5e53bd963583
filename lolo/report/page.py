"""The page of `lolo report`: one HTML file about meta-trainings, evaluations and studies, readable offline.

Folders may come from strangers: everything is checked when it is read, and escaped when it is written.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lolo.evaluation import long_runs
from lolo.evaluation.statistics import Row
from lolo.files import disk, jsonl, settings
from lolo.files.disk import FileError
from lolo.optimizers import weights_file
from lolo.report import charts, markup, meta_training
from lolo.report.markup import Html, details, join, table, tag
from lolo.studies import definitions, headline, names, plots, tables
from lolo.studies.plots import Counts
from lolo.studies.rows import load_rows
from lolo.training import run_folder


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
    """The page about these folders, each once: verdicts, then comparisons, then meta-trainings. Raises FileError."""
    unique = sorted({folder.resolve(): folder for folder in folders}.values(), key=is_run)
    titles = [folder.resolve().name for folder in unique]
    verdicts, parts = zip(*map(part_of, unique), strict=True)
    contents = [tag("li", tag("a", str(folder), href=f"#part{i}")) for i, folder in enumerate(unique)]
    sections = [
        tag("section", tag("h2", str(folder)), join(part), id=f"part{i}")
        for i, (folder, part) in enumerate(zip(unique, parts, strict=True))
    ]
    several = [tag("nav", tag("ul", *contents), aria_label="Contents")] if len(unique) > 1 else []
    verdict = tag("ul", *(line for of_folder in verdicts for line in of_folder), class_="findings verdict")
    return markup.page(f"LoLO report: {', '.join(titles)}", tag("h2", "Verdict"), verdict, *several, *sections)


def is_run(folder: Path) -> bool:
    """Whether a folder is a meta-training's, of which no more than the last weights may be kept."""
    return run_folder.told_by(folder) is not None


Section = tuple[list[Html], list[Html]]
"""What is to be said of a folder first, in lines of a list; and the part of the page about it."""


def part_of(folder: Path) -> Section:
    """By the folder's contents. Raises FileError."""
    if is_run(folder):
        run = meta_training.read_run(folder)
        verdict = tag("li", tag("strong", f"{folder}: "), meta_training.run_verdict(run))
        return [verdict], meta_training.run_part(run, meta_training.Level("h3"))
    if rows_of(folder) or run_folders(folder):
        return study_part(folder)
    raise FileError(
        f"{folder} holds neither a meta-training (recipe.json or last.safetensors), nor an evaluation "
        "(rows-TASK.jsonl), nor a study."
    )


def rows_of(folder: Path) -> list[Path]:
    """The rows of an evaluation or a study, then those of its parts."""
    places = (folder, *(folder / part for part in definitions.STUDY))
    return [path for place in places for path in sorted(place.glob("rows-*.jsonl"))]


def run_folders(study: Path) -> list[Path]:
    """The meta-trainings of a study."""
    return sorted(path for path in (study / "runs").glob("*") if is_run(path))


def study_part(folder: Path) -> Section:
    """An evaluation or a study: each task's comparison, then each meta-training, to be opened."""
    verdicts: list[Html] = []
    parts: list[Html] = []
    for path in rows_of(folder):
        rows, where = load_rows(path), ""
        if path.parent != folder:
            where = f"{path.parent.name}, "
            parts.append(tag("h3", f"Part {path.parent.name}"))
        verdicts.append(tag("li", tag("strong", f"{where}{place_of(rows)}: "), verdict_of(rows)))
        parts += comparison(path.parent, path, rows)
    runs = run_folders(folder)
    if runs:
        parts.append(tag("h3", "Meta-trainings"))
        level = meta_training.Level("h4")
        parts += [details(path.name, *meta_training.run_part(meta_training.read_run(path), level)) for path in runs]
    return verdicts or [tag("li", tag("strong", f"{folder}: "), "nothing was compared.")], parts


def place_of(rows: Sequence[Row]) -> str:
    """Task and number of steps, in words."""
    return f"{settings.without_sha256(rows[0].task)}, {rows[0].steps:,} inner steps"


def verdict_of(rows: Sequence[Row]) -> str:
    """How ours ends beside the best rival, in train loss and in held-out loss."""
    with np.errstate(all="ignore"):  # losses of diverged runs may be infinite
        found = {name: headline.sentence(rows, field=field) for name, field in plots.LOSSES.items()}
    return " ".join(f"{name.capitalize()} loss: {sentence}." for name, sentence in found.items())


def comparison(folder: Path, path: Path, rows: Sequence[Row]) -> list[Html]:
    """One task: table with intervals, curves, start steps, every run, how to reproduce it."""
    about = read_about(path)
    starts = weight_starts(folder, about, about_path(path))
    histogram = [meta_training.start_histogram(starts)] if 0 < len(starts) <= headline.FEW else []
    unroll = about.get("unroll")
    if unroll is not None:
        unroll = jsonl.checked(jsonl.whole_number, unroll, f"{path}: unroll of about-*.json")
    return [
        tag("h3", place_of(rows)),
        tag("p", str(about.get("note") or "")),
        summary_table(rows),
        tag("p", EXPLANATION),
        tag("div", join([*comparison_curves(rows, unroll), *histogram]), class_="charts"),
        details(f"Every run: {len(rows)}", run_table(rows)),
        table(
            f"How to reproduce: {settings.without_sha256(rows[0].task)}",
            ["what", "value"],
            [("task", rows[0].task), *meta_training.provenance_rows(about)],
        ),
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


def comparison_curves(rows: Sequence[Row], unroll: int | None) -> list[Html]:
    """Train and held-out loss against the inner step: means and ranges over runs, of a few; the table has all."""
    labels, last = headline.few(rows), long_runs.curve_steps(rows[0].steps)[-1]
    mark = unroll if unroll is not None and 0 < unroll <= last else None
    dotted = "" if mark is None else f"dotted line: the unroll in meta-training, {mark:,} steps"
    return [
        charts.figure(
            f"{name.capitalize()} loss of {len(labels)} of {len({row.optimizer for row in rows})} optimizers",
            plots.curves(rows, mark, labels, [name]),
            [*map(names.in_words, labels), dotted],
        )
        for name in plots.LOSSES
    ]


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
    """Start steps of the compared methods: as written down, else from the weights in the folder."""
    kept = about.get("weights")
    if isinstance(kept, dict):
        given = {label: one for label, one in kept.items() if isinstance(one, dict)}
        found = {label: (str(one.get("sha256")), one.get("card")) for label, one in given.items()}
    else:
        files = [(path.stem, weights_file.read_weights(path)) for path in sorted(folder.glob("*.safetensors"))]
        found = {re.sub(r"-seed(\d+)$", r", meta-seed \1", stem): (file.sha256, file.card) for stem, file in files}
    return plots.starts_by_method(
        {
            label: (sha256, meta_training.card_starts(card, f"{source}: {label}"))
            for label, (sha256, card) in found.items()
            if isinstance(card, dict)
        }
    )
