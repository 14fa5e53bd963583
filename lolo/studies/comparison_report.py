"""The report on optimizers compared on a task: table, rows, pictures, and the command that makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lolo.evaluation import long_runs
from lolo.evaluation.statistics import Row
from lolo.files import disk
from lolo.optimizers import pretrained
from lolo.runtime import environment
from lolo.studies import evaluation_folder, plots, tables
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
    title = f"{task}, {rows[0].steps:,} steps"
    plots.save_figure(plots.curves(rows, unroll, title), out / f"curves-{name}.png")
    pictures = [f"![curves](curves-{name}.png)", *pictures]
    if len({row.optimizer for row in rows}) > len(plots.COLOURS):  # too many for an eye to follow
        plots.save_figure(plots.finals(rows, title), out / f"finals-{name}.png")
        pictures.insert(0, f"![losses at the last step](finals-{name}.png)")
    digests = {label: evaluation_folder.phi_digest(one) for label, one in weights.items()}
    started: dict[str, Counter[str]] = {}  # of each method, over its meta-seeds
    seen = set()
    for label, one in weights.items():
        counts, key = one.card.get("start_steps_per_250"), (digests[label], repr(one.recipe))
        if counts and key not in seen:  # the same weights may be deployed in several ways
            started.setdefault(label.partition(", meta-seed ")[0], Counter()).update(counts)
            seen.add(key)
    if 0 < len(started) <= len(plots.COLOURS):
        plots.save_figure(plots.start_steps(started), out / f"start-steps-{name}.png")
        pictures.append(f"![realised start steps](start-steps-{name}.png)")
    about = {"command": command, "note": note, "unroll": unroll, **environment.provenance()}
    kept = {label: {"sha256": digests[label], "card": w.card} for label, w in weights.items()}
    disk.write_json(out / f"about-{name}.json", disk.json_safe({**about, "weights": kept}))
    diverged = sum(row.diverged for row in rows)
    paragraphs = [
        f"# {task}, {rows[0].steps:,} inner steps",
        note,
        text,
        f"Train loss: mean over the last {long_runs.WINDOW} steps. ±: 95 % t interval. All optimizers start from the "
        f"same inits and see the same batches; {diverged} of {len(rows)} runs diverged. The grid's learning rate was "
        "picked on other seeds.",
        tables.meta_seed_tables(rows),
        *pictures,
        f"Command: `{command}`. Versions: {about['versions']}. Commit: {about['commit']}. "
        f"Machine: {about['machine']['device']}, {about['machine']['cores']} cores.",
    ]
    report = "\n\n".join(filter(None, paragraphs)) + "\n"
    disk.write_bytes(out / f"report-{name}.md", report.encode())
    return text
