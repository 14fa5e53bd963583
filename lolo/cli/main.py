"""The command line: `lolo COMMAND ...`. Errors that a user can fix are one line on stderr and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

from lolo.cli.compare import bench_command, eval_command, race_command, reproduce_command
from lolo.cli.data import data_command
from lolo.cli.progress import log
from lolo.cli.show import doctor_command, recipes_command, report_command, tasks_command, weights_command
from lolo.cli.train import resume_command, sweep_command, train_command
from lolo.files import settings
from lolo.runtime import environment, launch, streams
from lolo.runtime.interrupt import Interrupted
from lolo.runtime.process_group import ProcessGroupError
from lolo.training.loop import DivergedError


class Command(NamedTuple):
    """A command: what `lolo --help` says of it, and what runs it with the words after its name."""

    usage: str
    about: str
    run: Callable[[list[str]], int]


COMMANDS: dict[str, Command] = {
    "reproduce": Command(
        "quick", "meta-train three methods on real data and compare them, within ten minutes", reproduce_command
    ),
    "train": Command(
        "RECIPE [--field VALUE]",
        "meta-train by a recipe; `lolo train lolo --help` lists every field;\nwith --dry-run: what it would need",
        train_command,
    ),
    "resume": Command("RUN", "resume a stopped run", resume_command),
    "sweep": Command("FILE", "a grid of recipes as independent runs, and one table", sweep_command),
    "eval": Command(
        "OPTIMIZER... --task T", "long runs from the same inits and batches: table, rows, curves", eval_command
    ),
    "race": Command("[--optimizer MINE]", "an optimizer against those that people use, on ten workloads", race_command),
    "report": Command("FOLDER...", "runs, evaluations and studies as one HTML page", report_command),
    "doctor": Command(
        "RUN", "whether a run is healthy, and its φ better than its start; status 0, 7 or 8", doctor_command
    ),
    "bench": Command("", "speed on this machine, as ratios within one run", bench_command),
    "data": Command(
        "prepare NAME --to DIR", "read a data set once: ImageNet-32, FineWeb, IDX, text, ...", data_command
    ),
    "recipes": Command("", "the recipes, and the fields in which they differ", recipes_command),
    "tasks": Command("", "the tasks", tasks_command),
    "weights": Command("", "the weights inside the package", weights_command),
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
        log(" ".join(str(error).split()))
        return 2
    except DivergedError as error:
        log(str(error))
        return 4
    except OSError as error:  # a full disk, a folder without permission: whatever was written before is complete
        if isinstance(error, BrokenPipeError) and streams.is_unread(sys.stdout):  # `lolo recipes | head -1`
            streams.abandon(sys.stdout)
            return streams.BROKEN_PIPE
        log(f"{error.filename or 'the output'} can't be written or read: {error.strerror}. Fix that and try again.")
        return 5
    except ProcessGroupError as error:
        log(str(error))
        return launch.LOST
    except Interrupted as error:
        log(str(error))
        return 3
    except KeyboardInterrupt:
        log("interrupted.")
        return 130


def run(argv: list[str]) -> int:
    """Run the command that the words name, or print the help."""
    if not argv or argv[0] in ("-h", "--help"):
        print(help_text())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"lolo {environment.versions()['lolo']}")
        return 0
    return settings.pick(COMMANDS, "command", argv[0]).run(argv[1:])


def printed(work: Callable[[], int]) -> int:
    """The exit status of `work`, once all that it printed is written: at exit Python would fail in its own words."""
    try:
        status = work()
    except SystemExit:  # help was asked for
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status
