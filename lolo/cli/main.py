"""The command line: `lolo COMMAND ...`. Errors that a user can fix are one line on stderr and exit status 2.

Each command's module is imported when it is called: help and errors in names come at once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from collections.abc import Callable
from typing import NamedTuple

from lolo.files import settings
from lolo.runtime import streams


class Command(NamedTuple):
    """A command: what `lolo --help` says of it, and the module whose function NAME_command runs it."""

    usage: str
    about: str
    module: str


COMMANDS: dict[str, Command] = {
    "reproduce": Command(
        "quick", "meta-train three methods on real data and compare them, within ten minutes", "lolo.cli.compare"
    ),
    "train": Command(
        "RECIPE [--field VALUE]",
        "meta-train by a recipe; `lolo train lolo --help` lists every field;\nwith --dry-run: what it would need",
        "lolo.cli.train",
    ),
    "resume": Command("RUN", "resume a stopped run", "lolo.cli.train"),
    "sweep": Command("FILE", "a grid of recipes as independent runs, and one table", "lolo.cli.train"),
    "eval": Command(
        "OPTIMIZER... --task T", "long runs from the same inits and batches: table, rows, curves", "lolo.cli.compare"
    ),
    "race": Command(
        "[--optimizer MINE]", "an optimizer against those that people use, on ten workloads", "lolo.cli.compare"
    ),
    "report": Command("FOLDER...", "runs, evaluations and studies as one HTML page", "lolo.cli.show"),
    "doctor": Command(
        "RUN", "whether a run is healthy, and its φ better than its start; status 0, 7 or 8", "lolo.cli.show"
    ),
    "bench": Command("", "speed on this machine, as ratios within one run", "lolo.cli.compare"),
    "data": Command(
        "prepare NAME --to DIR", "read a data set once: ImageNet-32, FineWeb, IDX, text, ...", "lolo.cli.data"
    ),
    "recipes": Command("", "the recipes, and how each differs from LoLO", "lolo.cli.show"),
    "tasks": Command("", "the tasks", "lolo.cli.show"),
    "weights": Command("", "the weights inside the package", "lolo.cli.show"),
}
WIDTH = 35  # of a command and its arguments in the help


def help_text() -> str:
    """What `lolo --help` prints."""
    lines = []
    for name, command in COMMANDS.items():
        usage = f"  lolo {name} {command.usage}".rstrip()
        lines.append(f"{usage:<{WIDTH}}  " + command.about.replace("\n", "\n" + " " * (WIDTH + 2)))
    return "\n".join(
        [
            "lolo: learned optimizers that keep working past the unroll they were meta-trained on",
            "",
            *lines,
            "",
            "Each command explains itself with --help; `lolo --version` says which lolo this is.",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 2 bad input, 3 stopped on request, 4 numbers gone bad,
    5 the disk, 6 a process of several lost, 7 a run that is not healthy, 8 one of which that can't be said,
    130 interrupted, 141 the reader of the output has left."""
    streams.set_up()
    argv = sys.argv[1:] if argv is None else argv
    try:
        return printed(lambda: run(argv))
    except ValueError as error:  # ours: RecipeError, TaskError, FileError, RunError
        streams.log(" ".join(str(error).split()))
        return 2
    except OSError as error:  # a full disk, a folder without permission: whatever was written before is complete
        if isinstance(error, BrokenPipeError) and streams.is_unread(sys.stdout):  # `lolo recipes | head -1`
            streams.abandon(sys.stdout)
            return streams.BROKEN_PIPE
        try:
            sys.stdout.flush()
        except OSError:
            streams.abandon(sys.stdout)  # else Python fails at exit, with a status of its own
        name = error.filename or "the output"
        streams.log(f"{name} can't be written or read: {error.strerror}. Fix that and try again.")
        return 5
    except KeyboardInterrupt:
        streams.log("interrupted.")
        return 130
    except RuntimeError as error:  # DivergedError, ProcessGroupError, Interrupted say what their status is
        status = getattr(error, "exit_status", None)
        if status is None:
            raise
        streams.log(str(error))
        return int(status)


def run(argv: list[str]) -> int:
    """Run the command that the words name, or print the help."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"lolo {importlib.metadata.version('lolo')}")
        return 0
    command: Command = settings.pick(COMMANDS, "command", argv[0])
    return command_of(argv[0], command.module)(argv[1:])


def command_of(name: str, module: str) -> Callable[[list[str]], int]:
    """The function that runs a command. Raises ValueError where a library is missing that it needs."""
    try:
        return getattr(importlib.import_module(module), f"{name}_command")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "lolo":
            raise
        raise ValueError(
            f"`lolo {name}` needs {error.name}, which is not installed: pip install 'lolo[train]'."
        ) from error


def printed(work: Callable[[], int]) -> int:
    """The exit status of `work`, once all that it printed is written: at exit Python would fail in its own words."""
    try:
        status = work()
    except SystemExit:  # help was asked for
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status
