"""Where a log can be looked at beside its JSON lines: TensorBoard and Weights & Biases, both without a network.

`log.jsonl` is the truth. A logger is rebuilt from it whenever a run starts or resumes, so that no step is there
twice and none is missing, whatever happened to the process before.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lolo.files import settings


class LoggerError(ValueError):
    """A logger that can't be opened; says what to do."""


class Logger(NamedTuple):
    """A place that takes a log's rows."""

    add: Callable[[dict[str, float], int], None]  # numbers of one row by name, and the outer step
    close: Callable[[], None]


Open = Callable[[Path, dict[str, Any]], Logger]  # (run folder, recipe by dotted names) -> an empty logger


def tensorboard(run: Path, recipe: dict[str, Any]) -> Logger:
    """Event files in RUN/tensorboard, for `tensorboard --logdir RUN`."""
    from tensorboardX import SummaryWriter

    folder = run / "tensorboard"
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    # purge_step: a TensorBoard that is open now drops what it read from the files before.
    writer = SummaryWriter(str(folder), flush_secs=20, purge_step=0)
    writer.add_text("recipe", "\n".join(f"    {name}: {value!r}" for name, value in recipe.items()))

    def add(scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return Logger(add, writer.close)


def wandb(run: Path, recipe: dict[str, Any]) -> Logger:
    """A wandb run in RUN/wandb, offline unless WANDB_MODE says otherwise; `wandb sync` uploads it later."""
    import wandb

    for old in (run / "wandb").glob("offline-run-*"):
        shutil.rmtree(old)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    quiet = wandb.Settings(silent=True, console="off")
    session = wandb.init(project="lolo", name=run.name, dir=run, config=recipe, mode=mode, settings=quiet)
    return Logger(lambda scalars, step: session.log(scalars, step=step), session.finish)


class Kind(NamedTuple):
    """A kind of logger. The extra that it needs has its name."""

    package: str  # what the extra installs, to import
    open: Open


LOGGERS = {"tensorboard": Kind("tensorboardX", tensorboard), "wandb": Kind("wandb", wandb)}


def openers(names: Sequence[str]) -> dict[str, Open]:
    """How to open loggers, by name. Raises RecipeError for an unknown one, LoggerError for a missing extra."""
    found = {}
    for name in names:
        kind: Kind = settings.pick(LOGGERS, "log", name)
        if importlib.util.find_spec(kind.package) is None:
            raise LoggerError(f"--log {name} needs {kind.package}; install the extra: pip install 'lolo[{name}]'.")
        found[name] = kind.open
    return found


def scalars(row: dict[str, Any], tasks: Sequence[str]) -> dict[str, float]:
    """The numbers of a log's row by name. One number per task is NAME/TASK; start and reached steps are means."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if name in ("step", "first_bad"):
            continue
        if name in ("starts", "reached"):
            if value:
                found[f"{name}/mean"] = sum(value) / len(value)
        elif isinstance(value, dict):
            found |= {f"{name}/{key}": float(item) for key, item in value.items()}
        elif isinstance(value, list):
            found |= {f"{name}/{task}": float(item) for task, item in zip(tasks, value, strict=True)}
        else:
            found[name] = float(value)  # what JSON can't hold is there as a string: "nan", "inf"
    return found
