"""The report on optimizers compared on a task: table, rows, pictures, and the command that makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lolo.evaluation import long_runs
from lolo.evaluation.statistics import Row
from lolo.files import disk, settings
from lolo.optimizers import pretrained
from lolo.runtime import environment
from lolo.studies import evaluation_folder, headline, plots, style, tables
from lolo.studies.rows import file_name, save_rows


def write_report(
    out: Path,
    task: str,
    rows: Sequence[Row],
    weights: dict[str, pretrained.Weights],
    command: str,
    note: str = "",
    pictures: Sequence[str] = (),
) -> str:
    """Rows, pictures and a short report with the table in `out`, named after the task. Returns the table.

    `pictures`: further ones for the report, Markdown.
    """
    name = file_name(task)
    save_rows(out / f"rows-{name}.jsonl", rows)  # first: whatever goes wrong below, they took the time
    text = tables.table(rows)
    unrolls = {w.recipe["unroll"]["length"] for w in weights.values() if w.recipe}
    unroll = unrolls.pop() if len(unrolls) == 1 else None
    about = {"command": command, "note": note, "unroll": unroll, **environment.provenance()}
    kept = {label: {"sha256": evaluation_folder.phi_digest(w), "card": w.card} for label, w in weights.items()}
    disk.write_json(out / f"about-{name}.json", disk.json_safe({**about, "weights": kept}))
    pictures = [*draw(out, name, rows, unroll, kept), *pictures]
    diverged = sum(row.diverged for row in rows)
    paragraphs = [
        f"# {settings.without_sha256(task)}, {rows[0].steps:,} inner steps",
        f"Train loss: {headline.sentence(rows)}.",
        note,
        text,
        f"Train loss: mean over the last {long_runs.WINDOW} steps. ±: 95 % t interval. All optimizers start from the "
        f"same inits and see the same batches; {diverged} of {len(rows)} runs diverged. The grid's learning rate was "
        "picked on other seeds.",
        tables.meta_seed_tables(rows),
        *pictures,
        f"{environment.stated(command, about)} "
        f"Machine: {about['machine']['device']}, {about['machine']['cores']} cores.",
    ]
    report = "\n\n".join(filter(None, paragraphs)) + "\n"
    disk.write_bytes(out / f"report-{name}.md", report.encode())
    return text


def draw(
    out: Path, name: str, rows: Sequence[Row], unroll: int | None, kept: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Write the pictures of rows, KIND-`name`.svg. Returns them as Markdown.

    unroll: of the weights' meta-training, if all have one. kept: sha256 and card of the weights, by label.
    """
    pictures = {"curves": plots.curves(rows, unroll)}
    if len({row.optimizer for row in rows}) > headline.FEW:
        pictures = {"finals": plots.finals(rows), **pictures}
    starts = plots.starts_by_method(
        {label: (one["sha256"], card_counts(one["card"])) for label, one in kept.items() if "card" in one}
    )
    if 0 < len(starts) <= headline.FEW:
        pictures["start-steps"] = plots.start_steps(starts)
    for kind, picture in pictures.items():
        style.save_figure(picture, out / f"{kind}-{name}.svg")
    return [f"![{WORDS[kind]}]({kind}-{name}.svg)" for kind in pictures]


def card_counts(card: Mapping[str, Any]) -> plots.Counts:
    """Start steps of a weights file's card."""
    counts = card.get("start_steps_per_250") or {}
    return np.array([float(step) for step in counts]), np.array([*counts.values()], float)


WORDS = {"finals": "losses at the last step", "curves": "curves", "start-steps": "realised start steps"}
