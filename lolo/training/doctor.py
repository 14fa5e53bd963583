"""Is a meta-training healthy? `lolo doctor RUN` reads a run's folder and says so in plain words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lolo.files import jsonl
from lolo.files.disk import FileError
from lolo.training import build, run_folder, run_log
from lolo.training.checkpoints import read_checkpoint


class Finding(NamedTuple):
    """One thing looked at."""

    good: bool
    what: str  # what was found, with its numbers
    try_: tuple[str, ...] = ()  # what to do about it, most promising first


class Log(NamedTuple):
    """A run's log, its numbers checked."""

    steps: list[dict[str, Any]]  # of each outer step
    validations: list[dict[str, Any]]  # step, and what was measured after it


def read_log(path: Path, tasks: int) -> Log:
    """The log of a run on `tasks` tasks. Raises FileError for rows that no run writes."""
    log = Log([], [])
    for count, row in enumerate(jsonl.read_json_lines(path, run_log.log_row), 1):
        at, step = f"{path}, row {count}: ", row["step"]
        if "validation" in row:
            log.validations.append({"step": step, **row["validation"]})
            continue
        if log.steps and step <= log.steps[-1]["step"]:
            raise FileError(f"{at}step {step} comes after step {log.steps[-1]['step']}.")
        for name in ("task_loss", "bc_loss", "delta_task_rms", "delta_bc_rms"):
            if len(row[name]) != tasks:
                raise FileError(f"{at}{name} has {len(row[name])} numbers; the recipe has {tasks} tasks.")
        log.steps.append({**row, "first_bad": [bad["first"] for bad in row["first_bad"]] if row["dropped"] else []})
    return log


def examine(run: Path) -> list[Finding]:
    """Findings about a run, in the order in which to read them. Raises RunError, FileError."""
    recipe = run_folder.read_recipe(run)
    build.check(recipe)
    path = run / "log.jsonl"
    steps, validations = read_log(path, len(recipe.tasks)) if path.is_file() else Log([], [])
    if not steps:
        return [Finding(False, f"{run} has a recipe, but no outer step was done.", (f"lolo resume {run}",))]
    pairs = recipe.estimator.pairs
    return [
        progress(run, steps, recipe.outer.steps),
        loss_trend(steps, validations),
        signal(steps, pairs),
        dropped_pairs(steps, pairs * len(recipe.tasks)),
        start_steps(steps, recipe),
        alpha(steps, recipe),
        checkpoints(run),
    ]


def progress(run: Path, steps: list[dict[str, Any]], total: int) -> Finding:
    """How far the run is, and how fast."""
    done = steps[-1]["step"] + 1
    rate = float(np.median([row["inner_steps_per_second"] for row in steps[-200:]]))
    words = f"{done} of {total} outer steps done, {rate:,.0f} inner steps per second."
    return Finding(done >= total, words, () if done >= total else (f"resume with: lolo resume {run}",))


def loss_trend(steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> Finding:
    """Whether validation, or the training loss where there is none, went down."""
    measured = [row["held_loss"] for row in validations]
    if len(measured) >= 2:
        best, last = min(measured), measured[-1]
        words = f"validation loss: first {measured[0]:.4f}, best {best:.4f}, last {last:.4f}."
        if last <= best * 1.02:
            return Finding(True, words)
        advice = ("use best.safetensors", "a smaller outer.lr or outer.final_lr", "more estimator.pairs")
        return Finding(False, words + " The last is more than 2 % above the best.", advice)
    tenth = max(len(steps) // 10, 1)
    first, last = (run_log.mean_task_loss(part) for part in (steps[:tenth], steps[-tenth:]))
    words = f"task loss: {first:.4f} in the first tenth of the outer steps, {last:.4f} in the last."
    return Finding(last <= first, words, () if last <= first else ("a smaller outer.lr", "more estimator.pairs"))


def signal(steps: list[dict[str, Any]], pairs: int) -> Finding:
    """Signal-to-noise of the meta-gradient against what pure noise would give, 1 / (P − 1)."""
    if pairs == 1:
        return Finding(True, "signal-to-noise of the meta-gradient: can't be told from one pair.")
    ratio, noise = float(np.median([row["signal_to_noise"] for row in steps[-500:]])), 1 / (pairs - 1)
    words = f"signal-to-noise of the meta-gradient: {ratio:.3f}; noise alone gives {noise:.3f} with {pairs} pairs."
    if ratio > noise:
        return Finding(True, words)
    return Finding(False, words, ("more estimator.pairs", "a larger estimator.sigma", "estimator.kind nres"))


def dropped_pairs(steps: list[dict[str, Any]], slots: int) -> Finding:
    """How many pairs had non-finite numbers."""
    dropped = sum(row["dropped"] for row in steps)
    share = dropped / (slots * len(steps))
    words = f"{dropped} pairs dropped for non-finite numbers, {100 * share:.2f} % of all."
    if share <= 0.01:
        return Finding(True, words)
    kinds = [first for row in steps for first in row["first_bad"]] or ["unknown"]
    first = max(sorted(set(kinds)), key=kinds.count)
    advice = ("a smaller learner.step_mult", "a smaller imitation.lr", "non-finite numbers in the task's data?")
    return Finding(False, f"{words} Most often {first} went bad first.", advice)


def start_steps(steps: list[dict[str, Any]], recipe: Any) -> Finding:
    """Where unrolls started, against the stationary mean (1 − P_th) / P_th · N/2."""
    starts = np.array([k for row in steps for k in row["starts"]], float)
    if not starts.size:
        return Finding(False, "no unroll was started.", ("start again with `lolo train`",))
    if recipe.replay.threshold >= 1:
        return Finding(bool((starts == 0).all()), "every unroll starts from a random init: the buffer is off.")
    threshold = max(recipe.replay.threshold, 1e-9)
    stationary = (1 - threshold) / threshold * recipe.unroll.length / 2
    words = (
        f"{len(starts)} unrolls, start step: mean {starts.mean():.0f}, largest {starts.max():.0f}; "
        f"{100 * float((starts == 0).mean()):.0f} % fresh. The mean tends to {stationary:.0f}."
    )
    late = starts[len(starts) // 2 :]
    if late.size < 20 or late.mean() > 0.2 * stationary:
        return Finding(True, words)
    return Finding(False, words, ("more outer.steps", "a smaller replay.threshold", "look for dropped pairs"))


def alpha(steps: list[dict[str, Any]], recipe: Any) -> Finding:
    """How far the hand-over from the expert is."""
    mix, loss = steps[-1]["alpha_mix"], steps[-1]["alpha_loss"]
    words = f"the learned optimizer's weight: {mix:.2f} in the step (Eq. 1), {loss:.2f} in the loss (Eq. 3)."
    finished = steps[-1]["step"] + 1 >= recipe.outer.steps
    if not finished or (mix >= 1 and loss >= 1):
        return Finding(True, words)
    advice = ("imitation.alpha_mix linear and imitation.alpha_loss linear end at 1",)
    return Finding(False, words + " It never stood on its own.", advice)


def checkpoints(run: Path) -> Finding:
    """Whether the newest checkpoint is whole."""
    steps = run_folder.checkpoints(run)
    if not steps:
        return Finding(False, "there is no checkpoint.", ("start again with `lolo train`",))
    try:
        read_checkpoint(run, steps[-1])
    except FileError as error:
        return Finding(False, f"the newest checkpoint is damaged: {error}", ("lolo resume uses the one before it",))
    return Finding(True, f"{len(steps)} checkpoints, the newest at outer step {steps[-1]} is whole.")


def report(findings: list[Finding]) -> str:
    """Findings as lines for a terminal."""
    lines = []
    for finding in findings:
        lines.append(f"{'ok  ' if finding.good else 'LOOK'}  {finding.what}")
        lines += [f"      try: {advice}" for advice in finding.try_]
    return "\n".join(lines)
