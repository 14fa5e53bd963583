"""What the φ of a run does on the run's own tasks, beside the φ it began with, its expert, and Adam.

All train from the same inits and on the same batches. The log can't say this: its losses are those of inner states that
the expert made, or that were restarted late.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from numpy.typing import NDArray

from lolo.data.errors import DataError
from lolo.evaluation import long_runs, rivals, statistics
from lolo.method import meta
from lolo.method.task import Splits, TaskError
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.tasks.by_name import resolve
from lolo.training import build, own_parts, recipes, run_folder
from lolo.training.findings import Finding, Verdict, above
from lolo.training.recipes import Recipe
from lolo.trees import PyTree

SEEDS = tuple(range(910_000, 910_005))  # of evaluation; no validation, pick of a rate or report has them
MOST_STEPS = 2_000  # inner steps of each run; twice the unroll, if that is less
POINTS = 20  # of each curve; a quarter of the steps is one of them
ADAM_RATES = (1e-3, 1e-2, 1e-1)
SECONDS = 300.0  # the default limit of the whole trial
MARGIN = 0.02  # share of the gain by which the expert may be missed
LEAST_GAIN = 0.002  # share of the gain that counts as progress

OnSteps = Callable[[str, int, int], None]  # task, inner steps done, of how many


class TooLong(Exception):
    """The trial reached its limit of time."""


class TrialLosses(NamedTuple):
    """Validation loss of each optimizer on one task, each [seeds]."""

    steps: int  # inner steps
    initial: NDArray[np.float32]  # before the first step
    trained: NDArray[np.float32]  # the run's φ after `steps`
    untrained: NDArray[np.float32] | None  # the φ that it began with; None: the run does not say which
    expert: NDArray[np.float32]
    expert_early: NDArray[np.float32]  # after a quarter of the steps
    adam_early: dict[float, NDArray[np.float32]]  # Adam after a quarter of the steps, by its rate


def examine(run: Path, seconds: float = SECONDS, on_steps: OnSteps = lambda task, done, total: None) -> list[Finding]:
    """Findings about what φ, `last.safetensors`, does on each meta-training task.

    Raises RunError, FileError, RecipeError.
    """
    recipe = own_parts.load(run_folder.read_recipe(run), run_folder.task_folders(run))
    build.check(recipe)
    path = run / "last.safetensors"
    if not path.is_file():
        words = "what φ does: there is no last.safetensors."
        return [Finding(Verdict.LEFT_OUT, words, (f"lolo resume {run}",), decides=True)]
    trained = weights_file.read_weights(path).meta_params
    shapes = architecture.of(recipe.learner).shapes(recipe.learner)
    weights_file.check_meta_params(trained, recipe.learner.name, shapes, str(path))
    first = None if run_folder.read_about(run).get("init") is not None else first_meta_params(recipe)
    deadline, findings = time.monotonic() + seconds, list[Finding]()
    for name in recipe.tasks:
        try:
            splits = resolve(name, run_folder.task_folders(run))
            losses = measure(name, splits, recipe, trained, first, deadline, on_steps)
        except (TaskError, DataError) as error:  # its file or its data are not here, or were given in Python
            findings.append(Finding(Verdict.LEFT_OUT, f"{name}: {error}", decides=True))
            continue
        except TooLong:
            words = f"{name}: what φ does takes more than the {seconds:.0f} seconds allowed."
            findings.append(Finding(Verdict.LEFT_OUT, words, ("a larger --seconds",), decides=True))
            break
        findings += judge(name, losses, build.build_expert(recipe) is not None, recipe.imitation.lr)
    return findings


def first_meta_params(recipe: Recipe) -> PyTree:
    """φ before the first outer step, as the run drew it from its seed."""
    return meta.first_params(architecture.build_learner(recipe.learner), jax.random.key(recipe.seed))


@functools.cache
def expert_maker(given: recipes.ImitationSettings, decay: float) -> long_runs.Make:
    """The expert as an optimizer by itself; one object for equal settings. It has one setting, which does nothing."""
    if given.expert == "adam-of-learner":  # the same numbers without a learner's state to read
        given = dataclasses.replace(given, expert="adam")
    expert = build.expert_of(given, decay)
    return lambda setting: expert


def stand_still(setting: Any) -> optax.GradientTransformation:
    """No step at all: what is scored after it is the init."""
    return optax.set_to_zero()


def measure(
    name: str,
    splits: Splits,
    recipe: Recipe,
    trained: PyTree,
    untrained: PyTree | None,
    deadline: float,
    on_steps: OnSteps,
) -> TrialLosses:
    """All runs on one task. Raises TooLong once the clock is past `deadline`."""
    window = max(min(2 * recipe.unroll.length, MOST_STEPS) // POINTS, 1)
    steps, quarter, done = window * POINTS, window * POINTS // 4, 0
    phis = [trained] if untrained is None else [trained, untrained]
    total = len(SEEDS) * (window + len(phis) * steps + steps + len(ADAM_RATES) * quarter)

    def tell(count: int) -> None:
        nonlocal done
        done += count
        on_steps(name, done, total)
        if time.monotonic() > deadline:
            raise TooLong

    def curves(make: long_runs.Make, values: list[Any], steps: int) -> NDArray[np.float32]:
        """Validation loss [values, seeds, points]."""
        each = [value for value in values for _ in SEEDS]
        seeds = list(SEEDS) * len(values)
        ran = long_runs.run(splits.train, splits.validation, make, each, seeds, steps, tell, window)
        return ran.held_loss.reshape(len(values), len(SEEDS), -1)

    decay = architecture.of(recipe.learner).expert_decay(recipe.learner)
    initial = curves(stand_still, [0.0], window)[0, :, -1]
    adam = curves(rivals.maker("adam"), [{"lr": rate, "weight_decay": 0.0} for rate in ADAM_RATES], quarter)
    expert = curves(expert_maker(recipe.imitation, decay), [0.0], steps)[0]
    learned = curves(pretrained.maker(recipe.learner), phis, steps)
    return TrialLosses(
        steps,
        initial,
        trained=learned[0, :, -1],
        untrained=None if untrained is None else learned[1, :, -1],
        expert=expert[:, -1],
        expert_early=expert[:, POINTS // 4 - 1],
        adam_early={rate: adam[i, :, -1] for i, rate in enumerate(ADAM_RATES)},
    )


def gain(losses: TrialLosses, after: NDArray[np.float32]) -> NDArray[np.float64]:
    """By how much each run got below the loss of its init, [seeds]; 0 where it got above it or diverged."""
    reached = np.where(np.isfinite(after), after, np.inf).astype(np.float64)
    return np.maximum(losses.initial - reached, 0.0)


def judge(name: str, losses: TrialLosses, imitates: bool, rate: float) -> list[Finding]:
    """Findings about one task. `imitates`: the run has an expert, of learning rate `rate`."""
    found = [against_the_start(name, losses), against_the_expert(name, losses)]
    return [*found, expert_itself(name, losses, rate)] if imitates else found


def compared(losses: TrialLosses, ours: NDArray[np.float32], theirs: NDArray[np.float32], least: float) -> Verdict:
    """Whether ours gained more than theirs by `least`, a share of the larger gain; paired by seed, 95 % t interval."""
    gains, others = gain(losses, ours), gain(losses, theirs)
    larger = np.maximum(gains, others)
    if not larger.any():
        return Verdict.FAIL
    # By each seed's own scale: inits lie at different heights, and are not what is compared.
    shares = (gains - others) / np.where(larger > 0, larger, 1.0)
    difference = statistics.interval([float(x) for x in shares], "seeds")
    return above(difference.mean - difference.half, difference.mean + difference.half, least)


def loss_of(after: NDArray[np.float32]) -> str:
    """Mean over seeds, for people: 0.4213, or nan or inf, where a run diverged."""
    return f"{after.mean(dtype=np.float64):.4g}"


def against_the_start(name: str, losses: TrialLosses) -> Finding:
    """Whether φ is better than the φ that the run began with, or, where that is not known, than no training."""
    begun = losses.initial if losses.untrained is None else losses.untrained
    what = "no step at all" if losses.untrained is None else "the untrained φ"
    words = (
        f"{name}: validation loss {loss_of(losses.initial)} at the start, {loss_of(losses.trained)} after "
        f"{losses.steps} steps with φ, {loss_of(begun)} with {what}."
    )
    verdict = compared(losses, losses.trained, begun, LEAST_GAIN)
    advice = () if verdict is Verdict.OK else ("more outer.steps", "a larger outer.lr if nothing changed, else smaller")
    return Finding(verdict, words, advice, decides=True)


def against_the_expert(name: str, losses: TrialLosses) -> Finding:
    """Whether φ gets at least as far as its expert does in a quarter of the steps."""
    words = (
        f"{name}: the recipe's expert has {loss_of(losses.expert)} after {losses.steps} steps, and "
        f"{loss_of(losses.expert_early)} after a quarter of them, which φ must reach."
    )
    verdict = compared(losses, losses.trained, losses.expert_early, -MARGIN)
    advice = () if verdict is Verdict.OK else ("more outer.steps", "more estimator.pairs")
    return Finding(verdict, words, advice, decides=True)


def expert_itself(name: str, losses: TrialLosses, rate: float) -> Finding:
    """Whether the expert is worth imitating: it gets as far as the best of a few Adams in a quarter of the steps."""
    best = max(losses.adam_early, key=lambda rate: float(gain(losses, losses.adam_early[rate]).mean()))
    words = (
        f"{name}: Adam with lr {best:g}, the best of {len(losses.adam_early)} rates, has "
        f"{loss_of(losses.adam_early[best])} after a quarter of the steps, which the expert must reach in all."
    )
    verdict = compared(losses, losses.expert, losses.adam_early[best], -MARGIN)
    advice = () if verdict is Verdict.OK else (f"another imitation.lr than {rate:g}",)
    return Finding(verdict, words, advice)
