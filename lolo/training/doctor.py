"""Is a meta-training healthy? What a run's log and checkpoints say of it; `trial` measures what its φ does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lolo.evaluation import statistics
from lolo.files import jsonl
from lolo.files.disk import FileError
from lolo.training import build, run_folder, run_log
from lolo.training.checkpoints import read_checkpoint
from lolo.training.findings import Finding, Verdict, above
from lolo.training.recipes import Recipe

LEAST_BLOCKS = 5  # of whole unrolls, for an interval
MOST_BLOCKS = 20  # longer ones instead, so that they are as good as independent
LEAST_VALIDATIONS = 4  # for a trend


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
    """Findings in the log and the checkpoints of a run, in the order in which to read them.

    `trial.examine` says what its φ does. Raises RunError, FileError, RecipeError.
    """
    recipe = run_folder.read_recipe(run)
    build.check(recipe)
    path = run / "log.jsonl"
    steps, validations = read_log(path, len(recipe.tasks)) if path.is_file() else Log([], [])
    if not steps:
        words = f"{run} has a recipe, but no outer step was done."
        return [Finding(Verdict.SHORT, words, (f"lolo resume {run}",), decides=True)]
    with np.errstate(all="ignore"):  # numbers of any size; what is not finite is said to be so
        return [
            finished(run, steps, recipe.outer.steps),
            validation_trend(validations) if validations else loss_trend(steps, recipe),
            signal(steps, recipe),
            dropped_pairs(steps, recipe.estimator.pairs * len(recipe.tasks)),
            start_steps(steps, recipe),
            alpha(steps, recipe),
            checkpoints(run),
        ]


def outer_steps_per_unroll(recipe: Recipe) -> int:
    """Outer steps in which an unroll of full length ends."""
    return max(recipe.unroll.length // (recipe.unroll.truncation * recipe.unroll.truncations_per_update), 1)


def block_means(values: Sequence[float], recipe: Recipe) -> NDArray[np.float64]:
    """Means over blocks of whole unrolls, at most MOST_BLOCKS of equal length; outer steps left over come first.

    Outer steps of one unroll share noise and state, and are no independent measurements; blocks nearly are.
    """
    unroll = outer_steps_per_unroll(recipe)
    unrolls = len(values) // unroll
    length = max(unrolls // MOST_BLOCKS, 1) * unroll
    blocks = len(values) // length
    if not blocks:
        return np.empty(0)
    return np.asarray(values[-blocks * length :], np.float64).reshape(blocks, length).mean(axis=1)


def finished(run: Path, steps: list[dict[str, Any]], total: int) -> Finding:
    """How far the run is, and how fast."""
    done = steps[-1]["step"] + 1
    rate = float(np.median([row["inner_steps_per_second"] for row in steps[-200:]]))
    words = f"{done} of {total} outer steps done, {rate:,.0f} inner steps per second."
    if done >= total:
        return Finding(Verdict.OK, words, decides=True)
    return Finding(Verdict.SHORT, words, (f"resume with: lolo resume {run}",), decides=True)


def validation_trend(validations: list[dict[str, Any]]) -> Finding:
    """Whether the last validation is as good as the best.

    What lies between them may be 2 %, or twice the median change between those before, if that is more.
    """
    measured = np.array([row["held_loss"] for row in validations], np.float64)
    finite = measured[np.isfinite(measured)]
    best = float(finite.min()) if finite.size else math.nan
    last = float(measured[-1])
    words = f"validation loss: first {measured[0]:.4f}, best {best:.4f}, last {last:.4f}"
    if not math.isfinite(last):
        return Finding(Verdict.FAIL, f"{words}.", ("use best.safetensors", "a smaller outer.lr"))
    if len(finite) < LEAST_VALIDATIONS:
        words += f"; a trend needs {LEAST_VALIDATIONS} validations."
        return Finding(Verdict.SHORT, words, ("a smaller validation.every",))
    margin = max(0.02 * abs(best), 2 * float(np.median(np.abs(np.diff(finite[:-1])))))
    if last <= best + margin:
        return Finding(Verdict.OK, f"{words}; as good as the best within {margin:.4f}.")
    advice = ("use best.safetensors", "a smaller outer.lr or outer.final_lr", "more estimator.pairs")
    return Finding(Verdict.FAIL, f"{words}: above the best by more than {margin:.4f}.", advice)


def loss_trend(steps: list[dict[str, Any]], recipe: Recipe) -> Finding:
    """Whether the training loss went up, where it can tell: in a run without expert and without replay."""
    losses = [float(np.mean(row["task_loss"])) for row in steps if not row["dropped"]]  # NaN where all were dropped
    blocks = block_means(losses, recipe)
    if len(blocks) < LEAST_BLOCKS:
        words = f"task loss: {len(losses)} outer steps without dropped pairs hold {len(blocks)} unrolls one after the "
        return Finding(Verdict.SHORT, f"{words}other; a trend needs {LEAST_BLOCKS}.")
    words = f"task loss: {blocks[0]:.4f} in the first unrolls, {blocks[-1]:.4f} in the last"
    if recipe.replay.threshold < 1 or steps[0]["alpha_mix"] < 1:
        words += "; it follows the expert and the start steps too, and tells nothing of φ."
        return Finding(Verdict.SHORT, words, ("validation.every 50 measures φ during the run",))
    half = len(blocks) // 2
    change = float(blocks[-half:].mean() - blocks[:half].mean())
    error = math.sqrt((blocks[-half:].var(ddof=1) + blocks[:half].var(ddof=1)) / half) if half > 1 else math.nan
    verdict = above(-change - 2 * error, -change + 2 * error, 0.0)
    words += f"; it changed by {change:+.4f} ± {2 * error:.4f} from the first half to the second."
    return Finding(verdict, words, ("a smaller outer.lr", "more estimator.pairs") if verdict is Verdict.FAIL else ())


def signal(steps: list[dict[str, Any]], recipe: Recipe) -> Finding:
    """Whether the meta-gradients of the run, summed up, hold more signal than noise.

    q = ‖mean‖² / mean ‖g_pair‖² over the n pairs of all tasks is 1/n on average where the pairs' signs are chance,
    however large each pair is. ρ = (n·q − 1) / (n − 1) is then the share of a pair's square that all pairs agree on,
    and T meta-gradients that point one way sum up to a signal-to-noise of n·T·ρ / (1 − ρ).

    J truncations of an update count as J pairs where each has a noise of its own, which ES alone promises. Otherwise n
    lies between, and the interval is that of both ends.
    """
    fewest = recipe.estimator.pairs * len(recipe.tasks)
    most = fewest * recipe.unroll.truncations_per_update
    if recipe.estimator.kind == "es":
        fewest = most
    if fewest == 1:
        return Finding(Verdict.SHORT, "signal-to-noise of the meta-gradient: can't be told from one pair.")
    ratios = [row["signal_to_noise"] for row in steps if not row["dropped"]]
    shares = [x / (1 + x) for x in ratios if 0 <= x < math.inf]
    blocks = block_means(shares, recipe)
    words = "signal-to-noise of the sum of all meta-gradients"
    if len(blocks) < LEAST_BLOCKS:
        words += f": {len(shares)} outer steps without dropped pairs hold {len(blocks)} unrolls one after the other"
        return Finding(Verdict.SHORT, f"{words}; an interval needs {LEAST_BLOCKS}.", ("more outer.steps",))
    measured = statistics.interval([float(x) for x in blocks], "blocks")

    def summed(share: float, pairs: int) -> float:
        agreed = min(max((pairs * share - 1) / (pairs - 1), 0.0), 1 - 1e-6)
        return pairs * len(steps) * agreed / (1 - agreed)

    low, high = summed(measured.mean - measured.half, fewest), summed(measured.mean + measured.half, most)
    words += (
        f": {summed(measured.mean, fewest):.1f}, 95 % interval {low:.1f} to {high:.1f}, from {len(blocks)} blocks of "
    )
    verdict = above(low, high, 1.0)
    advice = ("more estimator.pairs", "a larger estimator.sigma", "more outer.steps", "estimator.kind nres")
    return Finding(verdict, f"{words}unrolls; must be above 1.", () if verdict is Verdict.OK else advice)


def dropped_pairs(steps: list[dict[str, Any]], slots: int) -> Finding:
    """How many pairs had non-finite numbers."""
    dropped = sum(row["dropped"] for row in steps)
    share = dropped / (slots * len(steps))
    words = f"{dropped} pairs dropped for non-finite numbers, {100 * share:.2f} % of all."
    if share <= 0.01:
        return Finding(Verdict.OK, words)
    kinds = [first for row in steps for first in row["first_bad"]] or ["unknown"]
    first = max(sorted(set(kinds)), key=kinds.count)
    advice = ("a smaller learner.step_mult", "a smaller imitation.lr", "non-finite numbers in the task's data?")
    return Finding(Verdict.FAIL, f"{words} Most often {first} went bad first.", advice)


def start_steps(steps: list[dict[str, Any]], recipe: Recipe) -> Finding:
    """Where unrolls started, against the stationary mean (1 − P_th) / P_th · N/2.

    An unroll starts where one about M unrolls before it was, so that the mean is reached after about M / P_th unrolls.
    """
    starts = np.array([k for row in steps for k in row["starts"]], float)
    if not starts.size:
        return Finding(Verdict.FAIL, "no unroll was started.", ("start again with `lolo train`",))
    if recipe.replay.threshold >= 1:
        fresh = bool((starts == 0).all())
        words = "every unroll starts from a random init: the buffer is off."
        return Finding(Verdict.OK, words) if fresh else Finding(Verdict.FAIL, f"not {words}")
    threshold = max(recipe.replay.threshold, 1e-9)
    stationary = (1 - threshold) / threshold * recipe.unroll.length / 2
    words = (
        f"{len(starts)} unrolls, start step: mean {starts.mean():.0f}, largest {starts.max():.0f}; "
        f"{100 * float((starts == 0).mean()):.0f} % fresh. The mean tends to {stationary:.0f}"
    )
    needed = math.ceil(recipe.replay.capacity / threshold)
    late = starts[len(starts) // 2 :]
    if len(starts) < needed * recipe.estimator.pairs * len(recipe.tasks):
        return Finding(Verdict.SHORT, f"{words}, after about {needed} unrolls of each pair.")
    if late.mean() > 0.2 * stationary:
        return Finding(Verdict.OK, f"{words}.")
    return Finding(Verdict.FAIL, f"{words}.", ("more outer.steps", "a smaller replay.threshold", "dropped pairs?"))


def alpha(steps: list[dict[str, Any]], recipe: Recipe) -> Finding:
    """How far the hand-over from the expert is."""
    mix, loss = steps[-1]["alpha_mix"], steps[-1]["alpha_loss"]
    words = f"the learned optimizer's weight: {mix:.2f} in the step (Eq. 1), {loss:.2f} in the loss (Eq. 3)."
    if mix >= 1 and loss >= 1:
        return Finding(Verdict.OK, words)
    if steps[-1]["step"] + 1 < recipe.outer.steps:
        return Finding(Verdict.SHORT, f"{words} The hand-over continues.")
    advice = ("imitation.alpha_mix linear and imitation.alpha_loss linear end at 1",)
    return Finding(Verdict.FAIL, words + " It never stood on its own.", advice)


def checkpoints(run: Path) -> Finding:
    """Whether the newest checkpoint is complete."""
    steps = run_folder.checkpoints(run)
    if not steps:
        return Finding(Verdict.FAIL, "there is no checkpoint.", ("start again with `lolo train`",))
    try:
        read_checkpoint(run, steps[-1])
    except FileError as error:
        words = f"the newest checkpoint is damaged: {error}"
        return Finding(Verdict.FAIL, words, ("lolo resume uses the one before it",))
    return Finding(Verdict.OK, f"{len(steps)} checkpoints, the newest at outer step {steps[-1]} is complete.")
