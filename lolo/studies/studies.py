"""The studies behind `lolo reproduce`: what is meta-trained, and what it is compared with.

A study's folder holds `runs/` (one folder per meta-training) and, for each task, what `comparisons` writes.
Every study resumes where it was stopped when it is started again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lolo.files import settings
from lolo.files.settings import RecipeError
from lolo.optimizers import weights_file
from lolo.runtime import environment, interrupt
from lolo.studies import candidates, comparison_report, comparisons, definitions, plots, style, time_spent
from lolo.studies.rows import command_of, file_name, slug
from lolo.tasks import by_name
from lolo.training import loop, recipes, run_folder, run_log
from lolo.training.how import How
from lolo.training.recipes import Recipe
from lolo.training.run_folder import RunError


def recipe_of(study: definitions.Study, method: str, task: str, seed: int) -> Recipe:
    """The recipe of one meta-training of a study."""
    recipe, own = recipes.variant(method), [word.partition("=")[0] for word in method.split()]
    for field, value in (*(change for change in study.changes if change[0] not in own), *study.fixed):
        recipe = settings.with_field(recipe, field, value)
    return dataclasses.replace(recipe, tasks=tuple(task.split("+")), seed=seed)


def described(recipe: Recipe, method: str) -> str:
    """One meta-training in words."""
    return f"{method} on {'+'.join(recipe.tasks)}, T = {recipe.outer.steps}, meta-seed {recipe.seed}"


def meta_train(
    recipe: Recipe,
    method: str,
    runs: Path,
    stop: interrupt.Stop,
    on_progress: interrupt.OnProgress,
    log: Callable[[str], None],
) -> Path:
    """Weights of one meta-training: found, resumed or made."""
    task, seed, total = "+".join(recipe.tasks), recipe.seed, recipe.outer.steps
    run = runs / f"{slug(task)}-{slug(method)}-T{total}-seed{seed}"
    what = described(recipe, method)

    def progress(p: loop.Progress) -> None:
        on_progress(what, p.step, p.total, f"loss {p.task_loss:.3f} α {p.alpha:.2f} K {p.start_step:.0f}")

    if there := run_folder.recipe_in(run):
        changed = settings.diff(there, recipe)
        if changed:
            raise RunError(f"{run} holds another recipe ({', '.join(changed)} differ); give another --out.")
        if finished(run, recipe):
            return run / "last.safetensors"
    with time_spent.timed(runs.parent, what):
        if (run / "recipe.json").is_file():
            result = loop.resume(run, How(stop=stop, on_progress=progress, log=log))
        else:
            result = loop.train(recipe, run, How(stop=stop, on_progress=progress, log=log))
    environment.forget_programs()
    if not result.finished:
        raise interrupt.Interrupted(interrupt.stopped_message(runs.parent))
    return run / "last.safetensors"


def finished(run: Path, recipe: Recipe) -> bool:
    """Whether a run's last weights are those of its last outer step. Nothing else of it need be there by then."""
    path = run / "last.safetensors"
    return path.is_file() and weights_file.read_weights(path).card.get("outer_step") == recipe.outer.steps


def reproduce(
    name: str,
    out: Path,
    *,
    only: Sequence[str] = (),
    smoke: bool = False,
    stop: interrupt.Stop | None = None,
    on_progress: interrupt.OnProgress = interrupt.no_progress,
    log: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run a study, or what is left of it: one of `STUDIES`, or "study" for all parts of `STUDY`, or `only` some.

    Returns the table of each task. Raises Interrupted, RecipeError for a study or a part that is none.
    """
    settings.pick({**definitions.STUDIES, "study": None}, "study", name)
    smoked = " --smoke" * smoke
    if name in definitions.STUDIES:
        if only:
            raise RecipeError(f"--only {only[0]!r}: {name} is one study; parts are of `lolo reproduce study`.")
        check_data(definitions.STUDIES[name])
        return run_study(
            definitions.STUDIES[name],
            f"lolo reproduce {name}{smoked}",
            out,
            out / "runs",
            smoke,
            stop,
            on_progress,
            log,
        )
    tables: dict[str, str] = {}
    for part in only:
        settings.pick(definitions.STUDY, "--only", part)
    for part in only or definitions.STUDY:
        check_data(definitions.STUDY[part])
    for part in only or definitions.STUDY:
        command = f"lolo reproduce study --only {part}{smoked}"
        found = run_study(definitions.STUDY[part], command, out / part, out / "runs", smoke, stop, on_progress, log)
        tables |= {f"{part}, {task}": table for task, table in found.items()}
    return tables


def check_data(study: definitions.Study) -> None:
    """Raise TaskError or DataError where data are missing: now rather than after hours."""
    for task in (*study.tasks, *study.eval_tasks):
        for one in task.split("+"):
            by_name.resolve(one)


def run_study(
    study: definitions.Study,
    command: str,
    out: Path,
    runs: Path,
    smoke: bool,
    stop: interrupt.Stop | None,
    on_progress: interrupt.OnProgress,
    log: Callable[[str], None],
) -> dict[str, str]:
    """One study, or what is left of it: meta-trainings in `runs`, everything else in `out`."""
    stop = stop or interrupt.Stop()
    if smoke:
        study = dataclasses.replace(
            study, meta_seeds=1, eval_steps=200, eval_seeds=2, fixed=(*study.fixed, *definitions.SMOKE)
        )
    tables: dict[str, str] = {}

    checked = interrupt.interruptible(stop, on_progress, out)
    for where in study.eval_tasks or study.tasks:
        if (command_of(out, where) or "").startswith("lolo eval "):
            raise RunError(f"{out} already holds an evaluation on {where} by `lolo eval`; give another --out.")
    for task in study.tasks:
        wanted = {
            (method, seed): recipe_of(study, method, task, seed)
            for seed in range(study.meta_seeds)
            for method in study.methods
        }
        made = {key: meta_train(recipe, key[0], runs, stop, on_progress, log) for key, recipe in wanted.items()}
        trained = [described(recipe, method) for (method, _), recipe in wanted.items()]
        methods = {str(path): method for (method, _), path in made.items()}
        losses = out / f"meta-loss-{slug(task)}.svg"
        picture_meta_losses(losses, task, {key: path.parent for key, path in made.items()})
        pictures = [f"![loss in meta-training]({losses.name})"] * losses.is_file()
        deployed = [
            f"{made[method, seed]}:{words}" for method, words in study.deployments for seed in range(study.meta_seeds)
        ]
        plain = map(str, made.values()) if study.as_meta_trained else ()
        optimizers = candidates.read([*plain, *deployed, *study.rivals], methods)
        for where in study.eval_tasks or (task,):
            rows, loaded = comparisons.evaluate(
                optimizers, where, study.eval_steps, study.eval_seeds, checked, out / "parts"
            )
            took = [
                f"Meta-training took {time_spent.hours(runs.parent, trained)}",
                f"evaluation {time_spent.hours(out, [f'evaluating {file_name(where)}'])}.",
            ]
            note = f"{study.about[0].upper()}{study.about[1:]}. {', '.join(took)}"
            tables[where] = comparison_report.write_report(out, where, rows, loaded, command, note, pictures)
    return tables


def picture_meta_losses(file: Path, task: str, runs: dict[tuple[str, int], Path]) -> None:
    """Loss in meta-training against wall-clock time, of those runs (method, meta-seed) whose logs are here.

    The time of an outer step is the run's median: one that was stopped, or shared the machine for a while, looks alike.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (method, _), run in runs.items():
        rows = [row for row in run_log.log_rows(run) if "task_loss" in row]
        whole = len(rows) // META_LOSS_WINDOW * META_LOSS_WINDOW
        if not whole:
            continue
        recipe = run_folder.read_recipe(run)
        per_update = recipe.unroll.truncation * recipe.unroll.truncations_per_update
        inner_steps = 2 * recipe.estimator.pairs * len(recipe.tasks) * per_update
        seconds = inner_steps / float(np.median([row["inner_steps_per_second"] for row in rows]))
        ends = np.arange(META_LOSS_WINDOW, whole + 1, META_LOSS_WINDOW)
        losses = np.array([run_log.mean_task_loss(rows[end - META_LOSS_WINDOW : end]) for end in ends])
        found.setdefault(method, []).append((seconds / 3600 * ends, losses))
    if found:
        title = f"meta-training on {task}, means of {META_LOSS_WINDOW} outer steps"
        style.save_figure(plots.meta_losses(found, title), file)


META_LOSS_WINDOW = 100  # outer steps that a point of the picture is the mean of; whole unrolls of slots in phase
