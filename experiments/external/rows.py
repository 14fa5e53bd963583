"""What both experiments share: the criterion, the rows and the picture."""

import argparse
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lolo.files import disk, jsonl
from lolo.runtime import environment
from lolo.studies import plots

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


def picture(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Train and held-out loss against the step, one line a run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    colours = dict(zip(dict.fromkeys(row["optimizer"] for row in rows), plots.COLOURS, strict=False))
    for row in rows:
        style = {"color": colours[row["optimizer"]], "linewidth": 1.2, "label": row["optimizer"]}
        axes[0].plot(WINDOW * np.arange(1, len(row["train_curve"]) + 1), row["train_curve"], **style)
        axes[1].plot([int(step) for step in row["held_curve"]], list(row["held_curve"].values()), **style)
    for axis, name in zip(axes, (f"train loss (mean of {WINDOW} steps, nats)", "held-out loss (nats)"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="step", ylabel=name)
        axis.grid(True, which="both", alpha=0.2)
    handles = {line.get_label(): line for line in axes[0].get_lines()}
    axes[0].legend(handles.values(), handles, fontsize=8, frameon=False)
    figure.suptitle(title)
    plots.save_figure(figure, path)


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
    picture(rows, title, options.out / f"{name}.png")
