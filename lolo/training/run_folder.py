"""What lies in the folder of a meta-training, and reading it. `run_start` makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lolo.files import disk
from lolo.files.disk import FileError
from lolo.files.settings import RecipeError
from lolo.optimizers import weights_file
from lolo.training import recipes
from lolo.training.recipes import Recipe


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of an outer step lies."""
    return run / "checkpoints" / f"{step:08d}"


def checkpoints(run: Path) -> list[int]:
    """Outer steps that have a checkpoint, oldest first."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and len(name) == 8)


class RunError(ValueError):
    """A run folder that can't be used as asked; says which, and what to do.

    >>> try:
    ...     lolo.resume("nowhere")
    ... except lolo.RunError as error:
    ...     print(error)
    nowhere holds no run: there is no recipe.json. Start one with `lolo train RECIPE --out nowhere`.
    """


def read_recipe(run: Path) -> Recipe:
    """The recipe of a run folder. Raises RunError, FileError, RecipeError."""
    if not (run / "recipe.json").is_file():
        raise RunError(f"{run} holds no run: there is no recipe.json. Start one with `lolo train RECIPE --out {run}`.")
    try:
        return recipes.from_dict(disk.read_json(run / "recipe.json"))
    except RecipeError as error:
        raise RecipeError(f"{run}/recipe.json: {error}") from error


def recipe_in(run: Path) -> Recipe | None:
    """The recipe of a meta-training: of its folder, or of its last weights where nothing else was kept; or None."""
    file = told_by(run)
    if file is None:
        return None
    if file.name == "recipe.json":
        return read_recipe(run)
    kept = weights_file.read_weights(file).recipe
    return recipes.from_dict(kept) if kept else None


def told_by(run: Path) -> Path | None:
    """The file that holds a meta-training's recipe; None in another folder."""
    return next((run / name for name in ("recipe.json", "last.safetensors") if (run / name).is_file()), None)


def read_about(run: Path) -> dict[str, Any]:
    """What run.json says of a run: versions, commit, machine, command; {} without one. Raises FileError."""
    about = disk.read_json(run / "run.json") if (run / "run.json").is_file() else {}
    if not isinstance(about, dict):
        raise FileError(f"{run}/run.json: expected a JSON object.")
    return about


def logged_to(run: Path) -> list[str]:
    """The loggers that a run was started with. Raises FileError."""
    names = read_about(run).get("log", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileError(f"{run}/run.json: log is {names!r}; expected a list of names.")
    return names


def task_folders(run: Path) -> list[Path]:
    """Where `path.py` of a run's tasks is looked for: where the run began, here, in its folder, and above it.

    Raises FileError.
    """
    began = read_about(run).get("folder")
    if began is not None and not isinstance(began, str):
        raise FileError(f"{run}/run.json: folder is {began!r}; expected the path of a folder.")
    return [*([Path(began)] if began else []), Path(), run, *run.absolute().parents[:3]]


def untouched(run: Path) -> bool:
    """Whether a run was killed before its first checkpoint, and its recipe alone says where it starts."""
    if checkpoints(run) or (run / "log.jsonl").exists() or (run / "last.safetensors").exists():
        return False
    about = disk.read_json(run / "run.json")
    return isinstance(about, dict) and "init" in about and about["init"] is None
