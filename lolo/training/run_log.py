"""Rows of a run's log: one per outer step, one per validation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lolo.files import jsonl
from lolo.method import meta
from lolo.runtime import environment

OF_TASKS = ("task_loss", "bc_loss", "delta_task_rms", "delta_bc_rms")
"""Fields of `meta.TaskMetrics` that a row holds, one number per task; NaN where every pair of the task was dropped."""
OF_STEP = ("alpha_mix", "alpha_loss", "gradient_ratio", "gradient_norm", "signal_to_noise")
"""Fields of `meta.Metrics` that a row holds, one number each."""
BAD = ("nothing", "the loss", "the gradient", "the imitation distance")  # what `meta.first_bad` counts

_VALIDATION_ROW = jsonl.fields(
    step=jsonl.whole_number,
    validation=jsonl.fields(steps=jsonl.whole_number, train_loss=jsonl.number, held_loss=jsonl.number),
)
_STEP_ROW = jsonl.fields(
    step=jsonl.whole_number,
    **dict.fromkeys(OF_TASKS, jsonl.listed(jsonl.number, least=1)),
    **dict.fromkeys(OF_STEP, jsonl.number),
    dropped=jsonl.whole_number,
    **dict.fromkeys(("starts", "reached"), jsonl.listed(jsonl.whole_number)),
    inner_steps_per_second=jsonl.number,
)
_FIRST_BAD = jsonl.listed(
    jsonl.fields(task=jsonl.string, slot=jsonl.whole_number, start_step=jsonl.whole_number, first=jsonl.string), least=1
)


def step_row(metrics: meta.Metrics, tasks: Sequence[str], step: int, speed: float) -> dict[str, Any]:
    """The row of outer step `step`, whose metrics are NumPy arrays; `speed`: inner steps per second."""
    of_tasks = metrics.tasks
    nothing = of_tasks.dropped.all(axis=1)  # [G]: the means are over no pair
    row: dict[str, Any] = {
        "step": step,
        **{name: np.where(nothing, np.nan, getattr(of_tasks, name)).tolist() for name in OF_TASKS},
        **{name: float(getattr(metrics, name)) for name in OF_STEP},
        "dropped": int(of_tasks.dropped.sum()),
        "starts": of_tasks.starts[of_tasks.starts >= 0].tolist(),
        "reached": of_tasks.reached.ravel().tolist(),
        "inner_steps_per_second": round(speed, 1),
        "peak_memory_mb": environment.peak_memory_mb(),
    }
    if row["dropped"]:
        row["first_bad"] = [
            {
                "task": name,
                "slot": int(p),
                "start_step": int(of_tasks.start_step[g, p]),
                "first": BAD[of_tasks.first_bad[g, p]],
            }
            for g, name in enumerate(tasks)
            for p in np.flatnonzero(of_tasks.dropped[g])
        ]
    return row


def log_row(row: Any) -> dict[str, Any]:
    """A row of `step_row` or of a validation, checked. Raises ValueError."""
    if isinstance(row, dict) and "validation" in row:
        return _VALIDATION_ROW(row)
    row = _STEP_ROW(row)
    return jsonl.fields(first_bad=_FIRST_BAD)(row) if row["dropped"] else row


def log_rows(run: Path) -> list[dict[str, Any]]:
    """Rows of the log, [] before the first. Raises FileError for a row that is not `step_row`'s or a validation's."""
    return list(jsonl.read_json_lines(run / "log.jsonl", log_row)) if (run / "log.jsonl").is_file() else []


def mean_task_loss(rows: list[dict[str, Any]]) -> float:
    """Mean over tasks of each one's mean over these outer steps. Steps without one good pair of a task do not count.

    NaN for no rows, and where a task had no good pair at all. Logs of before hold 0 instead of NaN there.
    """
    of_tasks = zip(*(row["task_loss"] for row in rows), strict=False)
    measured = [[loss for loss in losses if not math.isnan(loss)] for losses in of_tasks]
    return float(np.mean([np.mean(losses) if losses else math.nan for losses in measured])) if measured else math.nan


def realised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Where inner training went: quantiles of the steps reached, and all realised start steps with their counts."""
    reached = np.array([step for row in rows for step in row.get("reached", [])])
    starts = np.array([step for row in rows for step in row.get("starts", [])])
    if not reached.size:
        return {}
    quantiles = {f"{q}%": int(np.percentile(reached, q)) for q in (50, 90, 99, 100)}
    values, counts = np.unique(starts // 250 * 250, return_counts=True)
    return {
        "realised_steps": quantiles,
        "start_steps_per_250": {int(v): int(c) for v, c in zip(values, counts, strict=True)},
    }


def best_validation(rows: list[dict[str, Any]]) -> float | None:
    """The lowest validation loss so far."""
    return min((row["validation"]["held_loss"] for row in rows if "validation" in row), default=None)
