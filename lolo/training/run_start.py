"""Before a meta-training begins or goes on: its tasks' names, its folder, and processes that agree on both."""

from __future__ import annotations

import dataclasses
import platform
import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from lolo.files import disk
from lolo.files.settings import diff, differences, fields
from lolo.optimizers import architecture
from lolo.runtime import environment
from lolo.runtime.process_group import ProcessGroup
from lolo.tasks.by_name import pin
from lolo.training import own_parts, recipes, run_folder
from lolo.training.recipes import Recipe
from lolo.training.run_folder import RunError


def require_free(run: Path, recipe: Recipe) -> None:
    """Raise RunError unless a folder is empty, new, or holds this run and it never came to a checkpoint."""
    holding = (run / "recipe.json").is_file()
    changed = diff(run_folder.read_recipe(run), recipe) if holding else {}
    if changed or (holding and run_folder.checkpoints(run)):
        differs = differences(changed, "there", "requested") or "the same recipe"
        raise RunError(
            f"{run} already holds a run ({differs}). Resume it with `lolo resume {run}`, or give another --out."
        )
    # A run killed while it made the folder leaves run.json, or half of a file, and nothing else.
    ours = re.compile(r"run\.json|\.(run|recipe)\.json\.\d+\.tmp")
    foreign = run.is_dir() and any(not (ours.fullmatch(path.name) or disk.is_litter(path)) for path in run.iterdir())
    if not holding and run.exists() and (not run.is_dir() or foreign):
        raise RunError(f"{run} exists and is not an empty folder; give another --out.")


def create(run: Path, recipe: Recipe, about: dict[str, Any], group: ProcessGroup) -> None:
    """Process 0 makes a folder for a run, as `require_free` allows.

    Raises RunError where it can't, and unless every process sees the folder then.
    """

    def write(_: list[Any]) -> None:
        require_free(run, recipe)
        try:
            run.mkdir(parents=True, exist_ok=True)
            disk.write_json(run / "run.json", about)
            disk.write_json(run / "recipe.json", recipes.to_dict(recipe))
        except OSError as error:
            raise RunError(f"{run} can't be written ({error.strerror}); give another --out.") from error

    group.agree(None, write)
    require_shared(group, run)


def can_resume(run: Path, recipe: Recipe, group: ProcessGroup) -> bool:
    """Whether a folder holds a run of this recipe that has a checkpoint, as process 0 sees it.

    Raises RunError: it holds a run of another recipe, or not every process sees it.
    """

    def look(_: list[Any]) -> bool:
        if not (run / "recipe.json").is_file():
            return False
        changed = diff(run_folder.read_recipe(run), pinned(recipe))
        if changed:
            differs = differences(changed, "there", "requested")
            raise RunError(f"{run} already holds another run ({differs}); give another --out.")
        return bool(run_folder.checkpoints(run))

    resumable = group.agree(None, look)
    if resumable:
        require_shared(group, run)
    return resumable


def pinned(recipe: Recipe, given: Collection[str] = ()) -> Recipe:
    """The recipe with tasks and own parts named as they are stored; tasks `given` as splits keep their names."""

    def stored(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name if name in given else pin(name) for name in names)

    recipe = own_parts.load(recipe)
    validation = dataclasses.replace(recipe.validation, tasks=stored(recipe.validation.tasks))
    return dataclasses.replace(recipe, tasks=stored(recipe.tasks), validation=validation)


def meta_training_tasks(recipe: Recipe, given: Collection[str]) -> tuple[str, ...]:
    """The names of given splits that are meta-trained on: all but the recipe's validation tasks."""
    return tuple(name for name in given if name not in recipe.validation.tasks)


def require_alike(group: ProcessGroup, recipe: Recipe, more: dict[str, Any]) -> None:
    """Raise DifferError unless all processes have the same recipe, versions and kind of device. Starts JAX."""
    if group.processes == 1:
        return
    cure = "Start every process with the same versions, command and files."
    facts = {f"{name}'s version": version for name, version in environment.versions().items()}
    group.require_equal(facts | {"the machine": platform.machine()} | fields(recipe) | more, cure)
    device = jax.local_devices()[0]  # only now: it connects the processes' XLA, which must be of one version
    path = architecture.path_of(recipe.learner)
    facts = {"the device": f"{device.platform}: {device.device_kind}", "the path of the learner's update": path}
    group.require_equal(facts, cure)


@contextmanager
def exclusive(folder: Path | None, group: ProcessGroup) -> Iterator[None]:
    """Raise RunError, on every process, where other processes write into this run's folder."""
    with ExitStack() as held:
        free = folder is None or not group.leads or held.enter_context(disk.locked(folder))

        def decide(seen: list[bool]) -> None:
            if not all(seen):
                raise RunError(f"another process is at work on {folder}; wait for it, stop it, or give another folder.")

        group.agree(free, decide)
        yield


def require_shared(group: ProcessGroup, out: Path) -> None:
    """Raise RunError unless every process sees the run in this folder."""

    def decide(seen: list[Any]) -> None:
        if not all(seen):
            raise RunError(
                f"process {seen.index(False)} does not see {out}: --out must be a folder that all hosts share."
            )

    group.agree((out / "recipe.json").is_file(), decide)
