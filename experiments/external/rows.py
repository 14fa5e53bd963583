"""What both experiments share: the criterion, the rows and the picture."""

import argparse
import itertools
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lolo.evaluation.statistics import Row
from lolo.files import disk, jsonl
from lolo.runtime import environment
from lolo.studies import headline, style

WINDOW = 100  # steps of every mean of train losses
LIMIT = 1.2  # the last mean may be this many times the smallest running one
GRID = (3e-4, 1e-3, 3e-3, 1e-2)  # AdamW's learning rates; the default is 1e-3 in both libraries
DEFAULT = 1e-3
MEND = 0.1  # the weight decay that docs/choices.md found to help far past meta-training
GRID_SEED = 1000  # the learning rate is picked here, and nothing else is run on it

Make = Callable[..., Any]  # what a library builds its optimizer with
Run = Callable[[Make, int, int], tuple[np.ndarray, dict[int, float]]]
"""(optimizer's maker, seed, steps) -> train loss of every step, held-out loss by step."""


def judged(train: np.ndarray, held: dict[int, float]) -> dict[str, Any]:
    """One run as a row: finite throughout, and the last mean at most LIMIT times the smallest running one?"""
    sums = np.cumsum(np.concatenate([[0.0], np.asarray(train, np.float64)]))
    running = (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW
    finite = bool(np.isfinite(train).all() and np.isfinite(list(held.values())).all())
    last, smallest = float(running[-1]), float(running.min())
    ratio = last / smallest if finite and smallest > 0 else 1.0 if last == smallest else math.inf
    return {
        "finite": finite,
        "last_100": last,
        "smallest_100": smallest,
        "ratio": ratio,
        "passed": finite and ratio <= LIMIT,
        "held_last": held[max(held)],
        "train_curve": [float(f"{x:.5g}") for x in np.reshape(train, (-1, WINDOW)).mean(axis=1)],
        "held_curve": {str(step): float(f"{x:.5g}") for step, x in held.items()},
    }


def as_rows(rows: list[dict[str, Any]], title: str) -> list[Row]:
    """As pictures and findings take them."""
    found = []
    for row in rows:
        label = re.sub(r" \(.*\)", "", row["optimizer"].replace(", weight decay ", " weight_decay=")).lower()
        last, lowest, held = row["last_100"], row["smallest_100"], row["held_last"]
        curves = row["train_curve"], list(row["held_curve"].values())
        steps, lost = WINDOW * len(curves[0]), not row["finite"]
        found.append(Row(title, label, None, row["seed"], steps, last, lowest, held, {"loss": held}, lost, *curves))
    return found


@style.styled
def picture(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Train and held-out loss against the step, mean and range over seeds."""
    judged_rows, held_steps = as_rows(rows, title), [int(step) for step in rows[0]["held_curve"]]
    labels = list(dict.fromkeys(row.optimizer for row in judged_rows))
    finding = headline.sentence(judged_rows, labels, "held_loss")
    figure, axes = style.panels(2, f"Held-out loss: {finding}")
    steps = WINDOW * np.arange(1, len(rows[0]["train_curve"]) + 1)
    for axis, field, x in zip(axes, ("train_curve", "held_curve"), (steps, held_steps), strict=True):
        lines = []
        for label in labels:
            values = style.drawable(np.array([getattr(row, field) for row in judged_rows if row.optimizer == label]))
            lines.append(style.Line(label, np.array(x), values.mean(0), values.min(0), values.max(0)))
        style.draw_lines(axis, lines)
        style.step_axis(axis, float(x[0]), float(x[-1]))
        if max(line.y.max() for line in lines) > 10 * min(line.y.min() for line in lines):
            style.log_axis(axis)
        axis.set_ylabel("cross entropy (nats)")
    style.explain(axes[0], title, f"train loss, means of {WINDOW} steps; bands: range over seeds")
    style.explain(axes[1], "held-out loss")
    for axis in axes:
        style.name_lines(axis)
    style.save_figure(figure, path)


def experiment(run: Run, learned: Make, adamw: Make, name: str, title: str, seeds: int) -> None:
    """The command: pick AdamW's learning rate on GRID_SEED, run all on seeds 0, 1, …, write rows and picture.

    `learned` takes the keyword weight_decay besides, `adamw` lr.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    about = {
        "experiment": title,
        "steps": options.steps,
        "criterion": f"all finite, and the last mean of {WINDOW} train losses ≤ {LIMIT} × the smallest running one",
        **environment.provenance(),
    }
    grid = {lr: judged(*run(partial(adamw, lr=lr), GRID_SEED, options.steps))["last_100"] for lr in GRID}
    about |= {"grid": {f"{lr:g}": loss for lr, loss in grid.items()}, "grid_seed": GRID_SEED}
    best = min(grid, key=lambda lr: (not np.isfinite(grid[lr]), grid[lr]))
    print(about["grid"], flush=True)
    makers: dict[str, Make] = {
        "lolo-small": learned,
        f"lolo-small, weight decay {MEND:g}": partial(learned, weight_decay=MEND),
        f"AdamW {DEFAULT:g} (default)": partial(adamw, lr=DEFAULT),
    }
    if best != DEFAULT:
        makers[f"AdamW {best:g} (best of grid)"] = partial(adamw, lr=best)
    rows: list[dict[str, Any]] = []
    for seed, (label, make) in itertools.product(range(options.seeds), makers.items()):
        rows.append({"optimizer": label, "seed": seed, **judged(*run(make, seed, options.steps))})
        print({key: value for key, value in rows[-1].items() if not key.endswith("curve")}, flush=True)
        lines = "".join(jsonl.json_line(row) + "\n" for row in (about, *rows))
        disk.write_bytes(options.out / f"{name}.jsonl", lines.encode())
    picture(rows, title, options.out / f"{name}.svg")
