"""The command line: `lolo COMMAND ...`. Errors that a user can mend are one line on stderr and exit status 2."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import rich.console
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lolo import files, health, plan, recipes, studies, training
from lolo import tasks as tasks_
from lolo.recipes import Recipe

HELP = """lolo: learned optimizers that keep working past the unroll they were meta-trained on

  lolo reproduce quick              meta-train three methods on real data and compare them, within ten minutes
  lolo train RECIPE [--field VALUE] meta-train by a recipe; `lolo train lolo --help` lists every field;
                                    with --dry-run: what it would need
  lolo resume RUN                   go on with a stopped run
  lolo eval OPTIMIZER... --task T   long runs from the same inits and batches: table, rows, curves
  lolo doctor RUN                   whether a run is healthy, in plain words
  lolo bench                        speed on this machine, as ratios within one run
  lolo data prepare NAME --to DIR   read a data set once: ImageNet-32, FineWeb, IDX, text, ...
  lolo recipes                      the recipes, and the fields in which they differ
  lolo tasks                        the tasks
  lolo weights                      the weights inside the package

Each command explains itself with --help."""


class Teller:
    """Shows progress: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.bars: dict[str, Any] = {}
        self.tenths: dict[str, int] = {}

    def __call__(self, what: str, done: int, total: int, word: str) -> None:
        if self.progress is None:
            tenth = 10 * done // max(total, 1)
            if self.tenths.get(what) != tenth:
                self.tenths[what] = tenth
                print(f"{what}: {done} of {total} {word}".rstrip(), file=sys.stderr, flush=True)
            return
        if what not in self.bars:
            self.bars[what] = self.progress.add_task(what, total=total, word="")
        self.progress.update(self.bars[what], completed=done, total=total, word=word)


@contextmanager
def telling() -> Iterator[Teller]:
    """A Teller for the present terminal."""
    console = rich.console.Console(stderr=True)
    if not console.is_terminal:
        yield Teller(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Teller(progress)


def say(text: str) -> None:
    """A message for people."""
    print(f"lolo: {text}", file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Meta-train by a recipe. Every field of the recipe is an option by its dotted name."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path | None = None  # folder of the run; default: runs/RECIPE-TASK-seedSEED
    init: str | None = None  # weights to go on from: a name or a file
    devices: int | None = None  # devices (on CPU: cores) to use at most; does not change the result
    offload: bool = False  # keep replay buffers in the host's memory; does not change the result
    checkpoint_seconds: float = 20.0  # time between two checkpoints, at least
    dry_run: bool = False  # only say what it would need: memory, arithmetic, time; needs no data


def train_command(argv: list[str]) -> int:
    """lolo train RECIPE [options]"""
    if not argv or argv[0].startswith("-"):
        argv = ["lolo", *argv]
        if "--help" not in argv and "-h" not in argv:
            raise recipes.RecipeError(
                f"name a recipe: {', '.join(recipes.RECIPES)}. For instance: lolo train lolo --task fashion-mlp"
            )
    name, *options = argv
    recipe = recipes.pick(recipes.RECIPES, "recipe", name)
    arguments = tyro.cli(
        TrainArguments,
        args=known_options(options, ["out", "init", "devices", "offload", "checkpoint_seconds", "dry_run"]),
        default=TrainArguments(recipe),
        prog=f"lolo train {name}",
        config=(tyro.conf.FlagConversionOff,),
    )
    recipe = arguments.recipe
    task = "-".join(Path(t.partition(":")[0]).stem for t in recipe.tasks)
    out = arguments.out or Path("runs") / f"{name}-{task}-seed{recipe.seed}"
    recipes.check(recipe)
    training.set_up()
    if arguments.dry_run:
        print(plan.report(plan.of_training(recipe, arguments.devices, arguments.offload)))
        return 0
    splits = [tasks_.resolve(task) for task in recipe.tasks]  # what is wrong with them is said before anything else
    if arguments.init is not None:
        files.read_weights(arguments.init)
    say(plan.outlook(recipe, splits))
    return supervise(
        name,
        lambda **hooks: training.train(
            recipe,
            out,
            init=arguments.init,
            devices=arguments.devices,
            offload=arguments.offload,
            checkpoint_seconds=arguments.checkpoint_seconds,
            **hooks,
        ),
    )


def known_options(options: list[str], more: list[str]) -> list[str]:
    """Options with `--task` spelled as the field `--tasks`; raises for names that are no field."""
    known = [*recipes.fields(), *more, "help"]
    spelled = []
    for option in options:
        if option.startswith("--"):
            name, separator, value = option[2:].partition("=")
            name = "tasks" if name == "task" else name.replace("-", "_")
            if name not in known:
                raise recipes.unknown("option", f"--{name}", [f"--{field}" for field in known])
            if option in ("--dry-run", "--offload"):
                separator, value = "=", "True"
            option = f"--{name}{separator}{value}"
        spelled.append(option)
    return spelled


def supervise(what: str, run: Callable[..., training.Result]) -> int:
    """Run a meta-training with progress and signals; exit status 0 if finished, 3 if stopped on request."""
    stop = training.Stop()
    with telling() as teller, training.stop_on_signals(stop):

        def told(p: training.Progress) -> None:
            rate = 1 / max(p.seconds, 1e-9)
            teller(
                what, p.step, p.total, f"loss {p.task_loss:.4f}  α {p.alpha:.2f}  K {p.start_step:.0f}  {rate:.1f}/s"
            )

        result = run(stop=stop, told=told, say=say)
    if result.finished:
        print(f"{result.out}/last.safetensors")
    return 0 if result.finished else 3


def resume_command(argv: list[str]) -> int:
    """lolo resume RUN"""

    def resume(
        run: tyro.conf.Positional[Path],
        devices: int | None = None,
        offload: bool = False,
        checkpoint_seconds: float = 20.0,
    ) -> int:
        """Go on with a stopped run from its newest whole checkpoint.

        Args:
          run: the run's folder.
          devices: devices (on CPU: cores) to use at most; does not change the result.
          offload: keep replay buffers in the host's memory; does not change the result.
          checkpoint_seconds: time between two checkpoints, at least.
        """
        training.read_recipe(run)
        training.set_up()
        return supervise(
            str(run),
            lambda **hooks: training.resume(
                run, devices=devices, offload=offload, checkpoint_seconds=checkpoint_seconds, **hooks
            ),
        )

    return tyro.cli(resume, args=argv, prog="lolo resume")


def eval_command(argv: list[str]) -> int:
    """lolo eval OPTIMIZER..."""

    def evaluate_(
        optimizers: tyro.conf.Positional[tuple[str, ...]],
        task: str = "fashion-mlp",
        steps: int = 10_000,
        seeds: int = 5,
        out: Path | None = None,
        dry_run: bool = False,
    ) -> int:
        """Train a task with each optimizer, from the same inits and batches, and compare.

        Args:
          optimizers: weights (a name of `lolo weights`, or files), adamw:1e-3, adam:1e-3, sgdm:0.1, or
            adamw:grid (its best learning rate, picked on other seeds).
          task: a name of `lolo tasks`, or path.py:function.
          steps: inner steps of each run.
          seeds: runs per optimizer.
          out: folder for rows, table, curves and report; default: only the table is printed.
          dry_run: only say what it would need: memory, arithmetic, time; needs no data.
        """
        from lolo import evaluation

        if not optimizers:
            raise ValueError("name at least one optimizer, for instance: lolo eval adamw:1e-3 --task fashion-mlp")
        if seeds < 1:
            raise ValueError(f"--seeds {seeds} must be at least 1.")
        tasks_.pin(task)
        training.set_up()
        if dry_run:
            print(plan.report(plan.of_evaluation(task, recipes.Learner(), len(optimizers), seeds, steps)))
            return 0
        splits, total, done = tasks_.resolve(task), studies.eval_units(optimizers, seeds, steps), 0
        with telling() as teller:

            def advanced(count: int) -> None:
                nonlocal done
                done += count
                teller(f"inner steps on {task}", done, total, "")

            entries, weights = studies.contestants(optimizers, splits, steps, advanced)
            rows = evaluation.compare(task, splits, entries, range(seeds), steps, advanced=advanced)
        command = shlex.join(["lolo", "eval", *argv])
        if out is None:
            print(studies.table(rows))
        else:
            name = task.partition(":")[0].rpartition("/")[2]
            print(studies.write_report(out, name, rows, weights, command))
        return 0

    return tyro.cli(evaluate_, args=argv, prog="lolo eval")


def reproduce_command(argv: list[str]) -> int:
    """lolo reproduce STUDY"""

    def reproduce(study: tyro.conf.Positional[str], out: Path | None = None, smoke: bool = False) -> int:
        """Meta-train, evaluate and report a study; goes on where it was stopped.

        Args:
          study: quick (minutes), books or mini (hours).
          out: folder of the study; default: runs/STUDY.
          smoke: the smallest form, to see that everything runs.
        """
        recipes.pick(studies.STUDIES, "study", study)
        training.set_up()
        stop, folder = training.Stop(), out or Path("runs") / study
        with telling() as teller, training.stop_on_signals(stop):
            tables = studies.reproduce(study, folder, smoke=smoke, stop=stop, told=teller, say=say)
        for task, text in tables.items():
            print(f"\n{task}:\n\n{text}")
        print(f"\nReport, rows and pictures: {folder}")
        return 0

    return tyro.cli(reproduce, args=argv, prog="lolo reproduce")


def bench_command(argv: list[str]) -> int:
    """lolo bench"""

    def bench_(parts: tyro.conf.Positional[tuple[str, ...]] = (), out: Path | None = None) -> int:
        """Measure speed on this machine: ratios within one run, medians.

        Args:
          parts: update (our form against the textbook's), methods (LoLO against NAIVE), use (a step in optax), start
            (first step, cores); all if none is named.
          out: JSON file for the numbers.
        """
        from lolo import bench

        training.set_up()
        bench.run(parts or tuple(bench.PARTS), out)
        return 0

    return tyro.cli(bench_, args=argv, prog="lolo bench")


def recipes_command(argv: list[str]) -> int:
    """lolo recipes"""

    def list_recipes() -> int:
        """The recipes, and how each differs from LoLO."""
        for name, recipe in recipes.RECIPES.items():
            changed = recipes.diff(recipes.LOLO, recipe)
            words = ", ".join(f"{field}={new!r}" for field, (_, new) in changed.items()) or "the paper's method"
            print(f"{name}: {words}")
        return 0

    return tyro.cli(list_recipes, args=argv, prog="lolo recipes")


def tasks_command(argv: list[str]) -> int:
    """lolo tasks"""

    def list_tasks() -> int:
        """The tasks that come with lolo."""
        for name, make in tasks_.TASKS.items():
            print(f"{name}: {(make.__doc__ or '').splitlines()[0]}")
        return 0

    return tyro.cli(list_tasks, args=argv, prog="lolo tasks")


def doctor_command(argv: list[str]) -> int:
    """lolo doctor RUN"""

    def doctor(run: tyro.conf.Positional[Path]) -> int:
        """Whether a meta-training is healthy, in plain words, and what to try when it is not.

        Args:
          run: the run's folder.
        """
        print(health.report(health.examine(run)))
        return 0

    return tyro.cli(doctor, args=argv, prog="lolo doctor")


def data_command(argv: list[str]) -> int:
    """lolo data prepare|list|verify"""
    from lolo.data import prepare as preparation

    def prepare(
        name: tyro.conf.Positional[str], to: Path, source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    ) -> int:
        """Read a data set once and keep it as memory-mapped arrays; goes on where it was stopped.

        Args:
          name: imagenet32, fineweb, idx, text, characters, textures or books.
          to: a folder of its own.
          source: the folder or file that holds the data; not needed for textures and books.
        """
        with telling() as teller:
            manifest = preparation.prepare(
                name, source, to, lambda done, total, line: teller(f"preparing {name}", done, total, line)
            )
        counts = {split: content["count"] for split, content in manifest["splits"].items()}
        print(f"{to}: {name}, {counts}")
        return 0

    def list_(folder: tyro.conf.Positional[Path]) -> int:
        """What was prepared in a folder: in itself and in those directly in it."""
        for found in preparation.list_prepared(folder):
            print(f"{found.folder}: {found.problem or f'{found.name}, {found.counts}, {found.data_bytes:,} bytes'}")
        return 0

    def verify(folder: tyro.conf.Positional[Path]) -> int:
        """Compare every array of a prepared data set with its sha256."""
        with telling() as teller:
            preparation.verify(folder, lambda done, total, line: teller("verifying", done, total, line))
        print(f"{folder}: every file is as it was written.")
        return 0

    commands: dict[str, Callable[..., Any]] = {"prepare": prepare, "list": list_, "verify": verify}
    return tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="lolo data")


def weights_command(argv: list[str]) -> int:
    """lolo weights"""

    def list_weights() -> int:
        """The weights inside the package."""
        for name in files.shipped_weights():
            card = files.read_weights(name).card
            print(f"{name}: {card.get('summary', '')}")
        return 0

    return tyro.cli(list_weights, args=argv, prog="lolo weights")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "resume": resume_command,
    "eval": eval_command,
    "reproduce": reproduce_command,
    "doctor": doctor_command,
    "data": data_command,
    "bench": bench_command,
    "recipes": recipes_command,
    "tasks": tasks_command,
    "weights": weights_command,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 2 bad input, 3 stopped on request, 4 numbers gone bad,
    5 the disk."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    try:
        command = recipes.pick(COMMANDS, "command", argv[0])
        return command(argv[1:])
    except ValueError as error:  # ours: RecipeError, TaskError, FileError, RunError
        say(" ".join(str(error).split()))
        return 2
    except training.DivergedError as error:
        say(str(error))
        return 4
    except OSError as error:  # a full disk, a folder without permission: whatever was written before is whole
        say(f"{error.filename or 'the output'} can't be written or read: {error.strerror}. Mend that and try again.")
        return 5
    except studies.Interrupted as error:
        say(str(error))
        return 3
    except KeyboardInterrupt:
        say("interrupted.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
