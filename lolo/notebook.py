"""Meta-train and compare from Python, with names, a progress bar, tables and pictures: `lolo.train`, `lolo.compare`."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import optax

from lolo.cli import progress
from lolo.evaluation import long_runs
from lolo.evaluation.statistics import Row
from lolo.files import settings
from lolo.files.settings import RecipeError
from lolo.method.task import Splits, check_splits
from lolo.optimizers import pretrained
from lolo.studies import candidates, plots, tables
from lolo.tasks import by_name
from lolo.training import loop, recipes
from lolo.training.how import How
from lolo.training.recipes import Recipe

# Anything else is refused in words.
Tasks: TypeAlias = str | Splits | tuple[str, ...] | list[str] | Mapping[str, Splits] | Any
Optimizer: TypeAlias = Any  # an optax optimizer, Weights, or a name


@dataclasses.dataclass(frozen=True)
class TrainResult(loop.Result):
    """How `lolo.train` ended: `weights`, `step`, `finished`, `out`, and a picture."""

    def plot(self) -> Any:
        """A matplotlib figure of the losses in meta-training against the outer step."""
        return plots.meta_training(self.rows, self.weights.recipe["tasks"])


def train(
    recipe: str | Recipe = "lolo",
    out: Path | str | None = None,
    how: How | None = None,
    *,
    task: Tasks | None = None,
    init: str | Path | None = None,
    tasks: Mapping[str, Splits] | Any = None,
    **fields: Any,
) -> TrainResult:
    """Meta-train by a recipe, with a progress bar; in this process, or in all of a process group that call it alike.

    Args:
      recipe: a name of `lolo recipes`, with changes behind it if you like, "lolo outer.steps=100"; or a Recipe.
      out: a new or empty folder for log, checkpoints and weights; None keeps nothing on disk.
      how: devices, processes, checkpoints, loggers, progress. The result does not depend on it.
      task: what is meta-trained on: a name of `lolo tasks`, path.py:function, your `lolo.Splits`, several names, or
        several `lolo.Splits` by name.
      init: weights to start from, a name or a path.
      tasks: your own splits by name, where there are several; `resume` needs them again. Those that the recipe names
        in validation.tasks are for validation alone.
      fields: of the recipe, by dotted names: `**{"outer.steps": 100}`.

    Raises: RecipeError, TaskError, FileError, RunError, LoggerError for bad input; DivergedError. With a process
    group, DifferError and ProcessGroupError too.

    >>> small = {"outer.steps": 2, "unroll.length": 20, "unroll.truncation": 10, "validation.every": 0}
    >>> result = lolo.train("lolo", task="quadratic", **small)
    >>> result.weights
    Weights(small_fc, 2,402 numbers, meta-trained on quadratic, T = 2)
    """
    recipe = recipes.variant(recipe) if isinstance(recipe, str) else recipe
    for name, value in fields.items():
        recipe = settings.with_field(recipe, name, value)
    if task is not None and tasks is not None:
        raise RecipeError(f"task={task!r} and tasks={tasks!r} can't both be given; leave one out.")
    if tasks is not None and not isinstance(tasks, Mapping):
        raise RecipeError(f"tasks={tasks!r} must be your own splits by name; names of tasks are given as task=.")
    if _is_names(task):
        recipe = settings.with_field(recipe, "tasks", [task] if isinstance(task, str) else task)
    elif task is not None:
        tasks = task if isinstance(task, Mapping) else {"task": task}
    given = None if tasks is None else {str(name): splits for name, splits in tasks.items()}
    for name, splits in (given or {}).items():
        check_splits(splits, name)
    how = how or How()
    if how.on_progress is not How().on_progress:
        return TrainResult(**vars(loop.train(recipe, out, how, init=init, tasks=given)))
    with progress.progress_display() as display:
        shown = dataclasses.replace(
            how, on_progress=lambda p: display("meta-training", p.step, p.total, progress.in_words(p))
        )
        return TrainResult(**vars(loop.train(recipe, out, shown, init=init, tasks=given)))


def _is_names(task: Any) -> bool:
    several = isinstance(task, list | tuple) and not isinstance(task, Splits)
    return isinstance(task, str) or (several and all(isinstance(name, str) for name in task))


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Optimizers on one task: one row for each optimizer and seed."""

    rows: list[Row]

    def table(self) -> str:
        """Means over seeds with 95 % intervals, and paired differences with the first optimizer, as Markdown."""
        return tables.markdown(tables.cells(self.rows))

    def plot(self) -> Any:
        """A matplotlib figure of train and held-out loss against the step."""
        return plots.curves(self.rows)

    def __repr__(self) -> str:
        return self.table()

    _repr_markdown_ = table


def compare(
    optimizers: Mapping[Any, Optimizer],
    task: str | Splits | Any,
    steps: int = 1000,
    seeds: int = 3,
    held: str = "test",
) -> Comparison:
    """Train a task with each optimizer, from the same inits and batches.

    Args:
      optimizers: by the name that they have in table and picture: optax optimizers, weights, or names as `lolo eval`
        takes them.
      task: a name of `lolo tasks`, path.py:function, or your `lolo.Splits`.
      steps: inner steps of each run; seeds: runs per optimizer.
      held: the split that is scored, "test" or "validation".

    Raises ValueError, FileError.

    >>> comparison = lolo.compare({"mine": optax.sgd(0.1), "AdamW": "adamw:1e-2"}, "quadratic", steps=100, seeds=2)
    >>> comparison.rows[0].optimizer
    'mine'
    """
    if not optimizers or not isinstance(optimizers, Mapping):
        raise ValueError("compare needs an optimizer by its name, for instance {'AdamW': 'adamw:1e-3'}.")
    long_runs.check_steps(steps)
    if not isinstance(seeds, numbers.Integral) or seeds < 1 or held not in ("test", "validation"):
        raise ValueError(
            f"seeds={seeds!r} must be a whole number, at least 1, and held={held!r} 'test' or 'validation'."
        )
    splits = by_name.resolve(task) if isinstance(task, str) else task
    check_splits(splits, "task")
    entries = [entry(str(name), optimizer, splits, steps) for name, optimizer in optimizers.items()]
    total, done = len(entries) * seeds * steps, 0
    with progress.progress_display() as display:

        def on_steps(count: int) -> None:
            nonlocal done
            done += count
            display("comparing", done, total, "steps")

        name = task if isinstance(task, str) else "task"
        return Comparison(long_runs.compare(name, splits, entries, range(seeds), steps, held, on_steps))


def entry(name: str, optimizer: Optimizer, splits: Splits, steps: int) -> long_runs.Candidate:
    """An optimizer as a candidate of that name. Raises ValueError for what is none."""
    if isinstance(optimizer, pretrained.Weights):
        return long_runs.Candidate(name, None, pretrained.maker(optimizer.learner), optimizer.meta_params)
    if isinstance(optimizer, str | Path):
        (named,) = candidates.read([optimizer]).values()
        return candidates.candidate(named, splits, steps)._replace(label=name, meta_seed=None)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(f"{name} is {type(optimizer).__name__}; expected an optax optimizer, weights, or a name.")
    return long_runs.Candidate(name, None, lambda setting: optimizer, 0.0)
