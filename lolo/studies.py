"""The studies behind `lolo reproduce`: what is meta-trained, and what it is compared with.

A study's folder holds `runs/` (one folder per meta-training) and, for each task, what `comparisons` writes.
Every study goes on where it was stopped when it is started again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lolo import comparisons, plots
from lolo.files import settings
from lolo.files.settings import RecipeError
from lolo.optimizers import weights_file
from lolo.runtime import interrupt
from lolo.tasks import by_name
from lolo.training import loop, recipes, run_folder, run_log
from lolo.training.recipes import Recipe
from lolo.training.run_folder import RunError


@dataclasses.dataclass(frozen=True)
class Study:
    """Methods meta-trained on tasks with several seeds, and evaluated past their unroll."""

    about: str
    tasks: tuple[str, ...]  # meta-trained one by one; "a+b" is one meta-training on both
    methods: tuple[str, ...] = ("naive", "bc-only", "lolo")  # as `recipes.variant` reads them
    meta_seeds: int = 1
    eval_tasks: tuple[str, ...] = ()  # where the weights are evaluated; the meta-training's own task, if none is named
    eval_steps: int = 10_000
    eval_seeds: int = 5
    baselines: tuple[str, ...] = ("adamw:1e-3", "adamw:grid")
    uses: tuple[tuple[str, str], ...] = ()  # (method, settings of weights in use): further rows
    changes: tuple[tuple[str, Any], ...] = ()  # recipe fields of every method that does not set them itself
    fixed: tuple[tuple[str, Any], ...] = ()  # recipe fields, whatever a method says


SMOKE = (
    ("outer.steps", 4),
    ("unroll.length", 100),
    ("unroll.truncation", 50),
    ("unroll.truncations_per_update", 1),
    ("estimator.pairs", 2),
    ("validation.every", 0),
)

STUDIES: dict[str, Study] = {
    "quick": Study(
        about="one meta-seed, shortened meta-training: what a fresh machine shows within ten minutes",
        tasks=("fashion-mlp",),
        changes=(("outer.steps", 1000), ("validation.every", 0)),
    ),
    "books": Study(
        about="next character of English books, three meta-seeds",
        tasks=("books-mlp",),
        meta_seeds=3,
        changes=(("outer.steps", 2000),),
    ),
    "mini": Study(
        about="both embedded tasks at the paper's number of outer steps, three meta-seeds",
        tasks=("fashion-mlp", "books-mlp"),
        meta_seeds=3,
    ),
}

BASELINES = (
    "adamw:1e-3",
    "adamw:wide-grid",
    "adamw-cosine:wide-grid",
    "adamw-rsqrt:wide-grid",
    "adam:1e-3",
    "sgdm:grid",
)
FIGURE2 = ("naive", "replay-only", "bc-only", "lolo")
MENDS = "clock_limit=10000,weight_decay=0.1"
# Larger steps at first, smaller ones later; chosen on validation, with a weight decay that kept two of two φ stable for
# 100,000 steps. (`lolo-anytime` has half of it, which its own φ bears.)
ANYTIME = "clock_limit=10000,weight_decay=0.1,step_scale=2,step_decay=3000"
COSINE = "step_scale=2,schedule=cosine"
IN_USE = tuple(("lolo", use) for use in ("schedule=cosine", COSINE, ANYTIME))
SHORT = (("outer.steps", 1000), ("validation.every", 0))
TUNED = Study(
    about="LoLO against naive-LO at the best outer learning rate that `settings` found so far",
    tasks=(),
    methods=("naive outer.lr=0.001", "lolo"),
    meta_seeds=3,
    baselines=("adamw:1e-3",),
    changes=(("outer.steps", 2000),),
)
LONG_USES = (MENDS, ANYTIME, f"clock_limit=10000,weight_decay=0.02,{COSINE}")
LONG = Study(
    about="ten times past the evaluation: 100 times the unroll, with and without mends",
    tasks=(),
    methods=("naive", "bc-only", "lolo"),
    meta_seeds=3,
    eval_steps=100_000,
    eval_seeds=2,
    baselines=(
        "adamw:1e-3",
        "adamw:3e-3",
        "adamw-cosine:3e-3",
        "adamw-cosine:1e-2",
        "adamw-rsqrt:3e-3",
        "adamw-rsqrt:1e-2",
    ),
    uses=(("naive", MENDS), *(("lolo", use) for use in LONG_USES)),
    changes=(("outer.steps", 2000),),
)

STUDY: dict[str, Study] = {
    "figure2": Study(
        about="the paper's ablation on Fashion-MNIST 8×8: imitation and replay, each alone and together",
        tasks=("fashion-mlp",),
        methods=FIGURE2,
        meta_seeds=5,
        baselines=BASELINES,
        uses=IN_USE,
        changes=(("outer.steps", 2000), ("validation.every", 0)),
    ),
    "figure2-books": Study(
        about="the paper's ablation on the next character of English books",
        tasks=("books-mlp",),
        methods=FIGURE2,
        meta_seeds=3,
        baselines=BASELINES,
        uses=IN_USE,
        changes=(("outer.steps", 2000),),
    ),
    "naive-tuned": dataclasses.replace(
        TUNED, tasks=("fashion-mlp",), meta_seeds=5, changes=(*TUNED.changes, ("validation.every", 0))
    ),
    "naive-tuned-books": dataclasses.replace(TUNED, tasks=("books-mlp",)),
    "long": dataclasses.replace(LONG, tasks=("fashion-mlp",), changes=(*LONG.changes, ("validation.every", 0))),
    "long-books": dataclasses.replace(
        LONG,
        tasks=("books-mlp",),
        methods=("naive", "lolo"),
        uses=tuple(("lolo", use) for use in LONG_USES),
    ),
    "settings": Study(
        about="what matters: one setting of LoLO changed at a time, short meta-trainings, one meta-seed",
        tasks=("fashion-mlp",),
        methods=(
            "lolo",
            *(f"lolo replay.threshold={share}" for share in (0.05, 0.2, 0.5)),
            "bc-only",
            *(f"lolo replay.capacity={states}" for states in (1, 2, 8)),
            *(f"lolo replay.read={rule}" for rule in ("uniform", "newest", "pop")),
            *(f"lolo imitation.normalize={scope}" for scope in ("joint", "none")),
            "lolo imitation.alpha_loss=zero",
            "lolo imitation.alpha_loss=one",
            "lolo imitation.alpha_mix=one",
            "lolo imitation.alpha_mix=one imitation.alpha_loss=zero",
            *(f"lolo imitation.lr={lr}" for lr in (0.0003, 0.003)),
            "lolo imitation.lr=0.003 replay.threshold=0.2",
            "lolo outer.lr=0.001",
            "lolo unroll.stagger=True",
            *(f"lolo unroll.schedule={schedule}" for schedule in ("log-uniform", "uniform", "curriculum")),
            "lolo unroll.truncations_per_update=20 outer.steps=50",  # as many inner steps
            "naive",
            "naive outer.lr=0.0003 outer.final_lr=0.0001",
            *(f"naive outer.lr={lr}" for lr in (0.001, 0.01)),
            "naive unroll.schedule=log-uniform",
        ),
        baselines=("adamw:1e-3", "adamw:grid"),
        changes=SHORT,
    ),
    "settings-confirmed": Study(
        about="the three best of `settings`, with three meta-seeds",
        tasks=("fashion-mlp",),
        methods=("lolo", "lolo imitation.alpha_mix=one", "lolo imitation.lr=0.003", "lolo replay.capacity=8"),
        meta_seeds=3,
        baselines=("adamw:1e-3", "adamw:grid"),
        changes=SHORT,
    ),
    "outer-steps": Study(
        about="2,000 outer steps or 5,000",
        tasks=("fashion-mlp",),
        methods=("lolo", "lolo outer.steps=5000"),
        meta_seeds=3,
        baselines=("adamw:1e-3", "adamw:grid"),
        changes=(("outer.steps", 2000), ("validation.every", 0)),
    ),
    "transfer": Study(
        about="meta-trained on two small tasks at once, used unchanged on models that were never seen",
        tasks=("fashion-mlp+books-mlp",),
        eval_tasks=("fashion-mlp:widths=128-128-128", "textures-mlp:batch=128,width=64,depth=2,score_examples=4096"),
        eval_seeds=3,
        baselines=(
            "adamw:3e-4",
            "adamw:1e-3",
            "adamw:3e-3",
            "adamw-cosine:3e-3",
            "adamw-rsqrt:3e-3",
            "adamw-rsqrt:1e-2",
        ),
        uses=(("lolo", COSINE), ("lolo", ANYTIME)),
        changes=(("outer.steps", 2000),),
    ),
}
"""The parts of `lolo reproduce study`. They share the meta-trainings that they have in common."""


def recipe_of(study: Study, method: str, task: str, seed: int) -> Recipe:
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
    told: interrupt.OnProgress,
    say: Callable[[str], None],
) -> Path:
    """Weights of one meta-training: found, resumed or made."""
    task, seed, total = "+".join(recipe.tasks), recipe.seed, recipe.outer.steps
    run = runs / f"{comparisons.slug(task)}-{comparisons.slug(method)}-T{total}-seed{seed}"
    what = described(recipe, method)

    def progress(p: loop.Progress) -> None:
        told(what, p.step, p.total, f"loss {p.task_loss:.3f} α {p.alpha:.2f} K {p.start_step:.0f}")

    if (run / "recipe.json").is_file():
        changed = settings.diff(run_folder.read_recipe(run), recipe)
        if changed:
            raise RunError(f"{run} holds another recipe ({', '.join(changed)} differ); give another --out.")
        if finished(run, recipe):
            return run / "last.safetensors"
    with comparisons.timed(runs.parent, what):
        if (run / "recipe.json").is_file():
            result = loop.resume(run, stop=stop, told=progress, say=say)
        else:
            result = loop.train(recipe, run, stop=stop, told=progress, say=say)
    if not result.finished:
        raise interrupt.Interrupted(interrupt.stopped_message(runs.parent))
    return run / "last.safetensors"


def finished(run: Path, recipe: Recipe) -> bool:
    """Whether a run's last weights are those of its last outer step. Its checkpoints and log may be gone by then."""
    path = run / "last.safetensors"
    return path.is_file() and weights_file.read_weights(path).card.get("outer_step") == recipe.outer.steps


def reproduce(
    name: str,
    out: Path,
    *,
    only: Sequence[str] = (),
    smoke: bool = False,
    stop: interrupt.Stop | None = None,
    told: interrupt.OnProgress = interrupt.no_progress,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Run a study, or what is left of it: one of `STUDIES`, or "study" for all parts of `STUDY`, or `only` some.

    Returns the table of each task. Raises Interrupted, RecipeError for a study or a part that is none.
    """
    settings.pick({**STUDIES, "study": None}, "study", name)
    smoked = " --smoke" * smoke
    if name in STUDIES:
        if only:
            raise RecipeError(f"--only {only[0]!r}: {name} is one study; parts are of `lolo reproduce study`.")
        check_data(STUDIES[name])
        return run_study(STUDIES[name], f"lolo reproduce {name}{smoked}", out, out / "runs", smoke, stop, told, say)
    tables: dict[str, str] = {}
    for part in only:
        settings.pick(STUDY, "--only", part)
    for part in only or STUDY:
        check_data(STUDY[part])
    for part in only or STUDY:
        command = f"lolo reproduce study --only {part}{smoked}"
        found = run_study(STUDY[part], command, out / part, out / "runs", smoke, stop, told, say)
        tables |= {f"{part}, {task}": table for task, table in found.items()}
    return tables


def check_data(study: Study) -> None:
    """Raise TaskError or DataError where data are missing: now rather than after hours."""
    for task in (*study.tasks, *study.eval_tasks):
        for one in task.split("+"):
            by_name.resolve(one)


def run_study(
    study: Study,
    command: str,
    out: Path,
    runs: Path,
    smoke: bool,
    stop: interrupt.Stop | None,
    told: interrupt.OnProgress,
    say: Callable[[str], None],
) -> dict[str, str]:
    """One study, or what is left of it: meta-trainings in `runs`, everything else in `out`."""
    stop = stop or interrupt.Stop()
    if smoke:
        study = dataclasses.replace(study, meta_seeds=1, eval_steps=200, eval_seeds=2, fixed=(*study.fixed, *SMOKE))
    tables: dict[str, str] = {}

    heard = interrupt.interruptible(stop, told, out)
    for where in study.eval_tasks or study.tasks:
        if (comparisons.command_of(out, where) or "").startswith("lolo eval "):
            raise RunError(f"{out} already holds an evaluation on {where} by `lolo eval`; give another --out.")
    for task in study.tasks:
        wanted = {
            (method, seed): recipe_of(study, method, task, seed)
            for seed in range(study.meta_seeds)
            for method in study.methods
        }
        made = {key: meta_train(recipe, key[0], runs, stop, told, say) for key, recipe in wanted.items()}
        trained = [described(recipe, method) for (method, _), recipe in wanted.items()]
        methods = {str(path): method for (method, _), path in made.items()}
        losses = out / f"meta-loss-{comparisons.slug(task)}.png"
        picture_meta_losses(losses, task, {key: path.parent for key, path in made.items()})
        pictures = [f"![loss in meta-training]({losses.name})"] * losses.is_file()
        used = [f"{made[method, seed]}:{use}" for method, use in study.uses for seed in range(study.meta_seeds)]
        for where in study.eval_tasks or (task,):
            names = [*map(str, made.values()), *used, *study.baselines]
            rows, loaded = comparisons.evaluate(
                names, where, study.eval_steps, study.eval_seeds, heard, out / "parts", methods
            )
            took = [
                f"Meta-training took {comparisons.hours(runs.parent, trained)}",
                f"evaluation {comparisons.hours(out, [f'evaluating {comparisons.file_name(where)}'])}.",
            ]
            note = f"{study.about[0].upper()}{study.about[1:]}. {', '.join(took)}"
            tables[where] = comparisons.write_report(out, where, rows, loaded, command, note, pictures)
    return tables


def picture_meta_losses(file: Path, task: str, runs: dict[tuple[str, int], Path]) -> None:
    """Loss in meta-training against wall-clock time, of those runs (method, meta-seed) whose logs are here.

    The time of an outer step is the run's median: one that was stopped, or shared the machine for a while, looks alike.
    """
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for (method, _), run in runs.items():
        recipe, rows = run_folder.read_recipe(run), [row for row in run_log.log_rows(run) if "task_loss" in row]
        per_update = recipe.unroll.truncation * recipe.unroll.truncations_per_update
        inner_steps = 2 * recipe.estimator.pairs * len(recipe.tasks) * per_update
        whole = len(rows) // META_LOSS_WINDOW * META_LOSS_WINDOW
        if not whole:
            continue
        seconds = inner_steps / float(np.median([row["inner_steps_per_second"] for row in rows]))
        losses = [float(np.mean(row["task_loss"])) for row in rows[:whole]]
        elapsed = seconds / 3600 * np.arange(META_LOSS_WINDOW, whole + 1, META_LOSS_WINDOW)
        found.setdefault(method, []).append((elapsed, np.reshape(losses, (-1, META_LOSS_WINDOW)).mean(axis=1)))
    if found:
        title = f"meta-training on {task}, means of {META_LOSS_WINDOW} outer steps"
        plots.save_figure(plots.meta_losses(found, title), file)


META_LOSS_WINDOW = 100  # outer steps that a point of the picture is the mean of; whole unrolls of slots in phase
