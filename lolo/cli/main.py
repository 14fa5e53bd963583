"""The command line: `lolo COMMAND ...`. Errors that a user can mend are one line on stderr and exit status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import rich.console
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lolo.bench import speed
from lolo.data import prepare
from lolo.files import settings
from lolo.files.settings import RecipeError
from lolo.method.task import Splits
from lolo.optimizers import architecture, weights_file
from lolo.report import page
from lolo.runtime import environment, interrupt, launch, parallel
from lolo.runtime.launch import Processes
from lolo.runtime.process_group import ALONE, ProcessGroup, ProcessGroupError
from lolo.studies import comparison_report, comparisons, definitions, evaluation_folder, studies
from lolo.studies.tables import table
from lolo.tasks import by_name
from lolo.training import build, doctor, loop, plan, recipes, run_folder, sweep
from lolo.training.loop import DivergedError
from lolo.training.recipes import Recipe
from lolo.training.run import logger_openers

T = TypeVar("T")

HELP = """lolo: learned optimizers that keep working past the unroll they were meta-trained on

  lolo reproduce quick              meta-train three methods on real data and compare them, within ten minutes
  lolo train RECIPE [--field VALUE] meta-train by a recipe; `lolo train lolo --help` lists every field;
                                    with --dry-run: what it would need
  lolo resume RUN                   go on with a stopped run
  lolo sweep FILE                   a grid of recipes as independent runs, and one table
  lolo eval OPTIMIZER... --task T   long runs from the same inits and batches: table, rows, curves
  lolo report FOLDER...             runs, evaluations and studies as one HTML page
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


Several = Annotated[Processes, tyro.conf.arg(name="")]  # its fields are options without a prefix
SEVERAL = [field.name for field in dataclasses.fields(Processes)]
ONE = Processes()


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Meta-train by a recipe. Every field of the recipe is an option by its dotted name."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path | None = None  # folder of the run; default: runs/RECIPE-TASK-seedSEED
    init: str | None = None  # weights to go on from: a name or a file
    devices: int | None = None  # devices (on CPU: cores) to use at most; does not change the result
    offload: bool = False  # keep replay buffers in the host's memory; does not change the result
    measure_blocks: bool = False  # time every estimator.slots-per-block here, and store the fastest in the recipe
    checkpoint_seconds: float = 20.0  # time between two checkpoints, at least
    log: tuple[str, ...] = ()  # tensorboard, wandb: beside log.jsonl, in the run's folder; both work offline
    dry_run: bool = False  # only say what it would need: memory, arithmetic, time; needs no data
    several: Several = ONE


OF_TRAIN = [field.name for field in dataclasses.fields(TrainArguments) if field.name not in ("recipe", "several")]


def one_line(read: Callable[[], T]) -> T:
    """What `read` makes of the arguments. Where tyro draws a box and exits, a ValueError with the same words."""
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return read()
    except SystemExit as stopped:
        if stopped.code == 0:  # help was asked for, and is printed
            raise
        raise ValueError(re.sub(r"[\u2500-\u257f]|\+?-{3,}\+?", " ", heard.getvalue())) from None


def deferred(command: Callable[..., int]) -> Callable[..., Callable[[], int]]:
    """The command with the same arguments, which are bound: it runs when it is called again."""

    @functools.wraps(command)
    def bind(*args: Any, **kwargs: Any) -> Callable[[], int]:
        return functools.partial(command, *args, **kwargs)

    return bind


def call(command: Callable[..., int], argv: list[str], prog: str) -> int:
    """Run a function with the arguments of the command line. Raises ValueError for those that don't fit it."""
    return one_line(lambda: tyro.cli(deferred(command), args=argv, prog=prog))()


def train_command(argv: list[str]) -> int:
    """lolo train RECIPE [options]"""
    if not argv or argv[0].startswith("-"):
        argv = ["lolo", *argv]
        if "--help" not in argv and "-h" not in argv:
            raise RecipeError(
                f"name a recipe: {', '.join(recipes.RECIPES)}. For instance: lolo train lolo --task fashion-mlp"
            )
    name, *options = argv
    recipe = settings.pick(recipes.RECIPES, "recipe", name)
    arguments = one_line(
        lambda: tyro.cli(
            TrainArguments,
            args=known_options(options, [*OF_TRAIN, *SEVERAL]),
            default=TrainArguments(recipe),
            prog=f"lolo train {name}",
            config=(tyro.conf.FlagConversionOff,),
        )
    )
    recipe = arguments.recipe
    task = "-".join(Path(t.partition(":")[0]).stem for t in recipe.tasks)
    out = arguments.out or Path("runs") / f"{name}-{task}-seed{recipe.seed}"
    build.check(recipe)
    if arguments.dry_run:
        environment.set_up()
        print(plan.report(plan.of_training(recipe, arguments.devices, arguments.offload)))
        return 0

    if arguments.measure_blocks and (arguments.several.asked or arguments.offload):
        raise ValueError(
            "--measure-blocks times one process with its buffers on the device; give --estimator.slots-per-block N in "
            "its place, with the N that a run in one process has stored."
        )

    def run(gang: ProcessGroup, **hooks: Any) -> loop.Result:
        common: dict[str, Any] = {
            "devices": arguments.devices,
            "offload": arguments.offload,
            "checkpoint_seconds": arguments.checkpoint_seconds,
            "log": arguments.log,
            "gang": gang,
        }
        # Before anything starts JAX, which connects the processes' XLA: it must be of one version.
        run_folder.require_alike(gang, run_folder.pinned(recipe), {})
        # What is wrong with these is said before anything else.
        splits = [by_name.resolve(task) for task in recipe.tasks]
        if arguments.init is not None:
            weights_file.read_weights(arguments.init)
        logger_openers(arguments.log)
        parallel.global_mesh(recipe.estimator.pairs // recipe.estimator.slots_per_block, arguments.devices)
        if gang.leads:
            hooks["say"](plan.outlook(recipe, splits))
        # A scheduler that starts processes again gives the same command.
        if arguments.several.asked and run_folder.can_resume(out, recipe, gang):
            return loop.resume(out, **common, **hooks)
        chosen = recipe
        if arguments.measure_blocks:
            run_folder.require_free(out, recipe)
            chosen = with_fastest_block(recipe, dict(zip(recipe.tasks, splits, strict=True)), arguments.devices)
        return loop.train(chosen, out, init=arguments.init, **common, **hooks)

    return in_processes(["train", *argv], name, recipe, arguments.several, arguments.devices, run)


def with_fastest_block(recipe: Recipe, splits: dict[str, Splits], devices: int | None) -> Recipe:
    """The recipe with the `slots_per_block` whose outer step is the fastest here; says all times."""
    times = speed.block_times(recipe, splits, devices)
    fastest = min(times, key=lambda size: times[size])
    words = ", ".join(f"{size}: {1000 * seconds:.1f} ms" for size, seconds in times.items())
    say(f"an outer step by slots-per-block: {words}. Storing {fastest} in the recipe.")
    return settings.with_field(recipe, "estimator.slots_per_block", fastest)


def in_processes(
    argv: list[str],
    what: str,
    recipe: Recipe,
    several: Processes,
    devices: int | None,
    run: Callable[..., loop.Result],
) -> int:
    """`run(gang, stop, told, say)` in this process, or, where several are asked for, `lolo ARGV` in each of them."""
    place = launch.member()
    if place is None and several.asked:
        launch.check(several)
        parallel.check_processes(recipe.estimator.pairs // recipe.estimator.slots_per_block, several.processes or 1)
        return launch.launch(argv, several, say)
    if place is None:
        environment.set_up(devices)
        return supervise(what, ALONE, run)
    environment.set_up(devices or max(parallel.cores() // place["share"], 1))
    gang = launch.join(place)
    with gang.noticing_loss("meta-training"):
        return supervise(what, gang, run)


def known_options(options: list[str], more: list[str]) -> list[str]:
    """Options with `--task` spelled as the field `--tasks`; raises for names that are no field."""
    known = [*settings.fields(recipes.LOLO), *more, "help"]
    spelled = []
    for option in options:
        if option.startswith("--"):
            name, separator, value = option[2:].partition("=")
            name = "tasks" if name == "task" else name.replace("-", "_")
            if name not in known:
                raise settings.unknown("option", f"--{name}", [f"--{field}" for field in known])
            if option in ("--dry-run", "--offload", "--measure-blocks"):
                separator, value = "=", "True"
            option = f"--{name}{separator}{value}"
        spelled.append(option)
    return spelled


def supervise(what: str, gang: ProcessGroup, run: Callable[..., loop.Result]) -> int:
    """Run a meta-training with progress and signals; exit status 0 if finished, 3 if stopped on request."""
    stop = interrupt.Stop()
    if not gang.leads:
        with interrupt.stop_on_signals(stop):
            return 0 if run(gang, stop=stop, told=lambda progress: None, say=lambda text: None).finished else 3
    with telling() as teller, interrupt.stop_on_signals(stop):

        def told(p: loop.Progress) -> None:
            rate = 1 / max(p.seconds, 1e-9)
            teller(
                what, p.step, p.total, f"loss {p.task_loss:.4f}  α {p.alpha:.2f}  K {p.start_step:.0f}  {rate:.1f}/s"
            )

        result = run(gang, stop=stop, told=told, say=say)
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
        log: tuple[str, ...] | None = None,
        several: Several = ONE,
    ) -> int:
        """Go on with a stopped run from its newest whole checkpoint.

        Args:
          run: the run's folder.
          devices: devices (on CPU: cores) to use at most; does not change the result.
          offload: keep replay buffers in the host's memory; does not change the result.
          checkpoint_seconds: time between two checkpoints, at least.
          log: tensorboard, wandb; default: where the run logged before; `--log` alone: nowhere else.
          several: go on in several processes, any number.
        """
        recipe = run_folder.read_recipe(run)
        return in_processes(
            ["resume", *argv],
            str(run),
            recipe,
            several,
            devices,
            lambda gang, **hooks: loop.resume(
                run,
                devices=devices,
                offload=offload,
                checkpoint_seconds=checkpoint_seconds,
                log=log,
                gang=gang,
                **hooks,
            ),
        )

    return call(resume, argv, "lolo resume")


def sweep_command(argv: list[str]) -> int:
    """lolo sweep FILE"""

    def sweep_(
        file: tyro.conf.Positional[Path],
        workers: int | None = None,
        only: int | None = None,
        slurm: bool = False,
        table: bool = False,
    ) -> int:
        """Run every combination of a grid of recipes; goes on where it was stopped, and tries again what failed.

        Args:
          file: TOML with recipe, out, [fields] that all runs share, and [grid] with lists of values.
          workers: runs at a time; default: one for each core.
          only: this run alone, by its number.
          slurm: print an array script, and run nothing.
          table: print the table of what is there, and run nothing.
        """
        grid, stop = sweep.read(file), interrupt.Stop()
        if slurm:
            print(sweep.slurm_script(file, grid), end="")
            return 0
        if not table:
            with interrupt.stop_on_signals(stop):
                sweep.run_all(grid, workers, only, stop, say)
        if only is not None:
            states = [sweep.row(grid.runs[only])["state"]]
        else:
            print(sweep.gather(grid))
            states = [sweep.row(run)["state"] for run in grid.runs]
        if stop.requested is not None:
            say(f"stopped by {stop.requested}. Go on with: {shlex.join(['lolo', 'sweep', *argv])}")
            return 3
        return 4 if "failed" in states else 0

    return call(sweep_, argv, "lolo sweep")


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

        With --out a stopped evaluation goes on with the same command, and the same command with more optimizers
        adds these.

        Args:
          optimizers: weights (a name of `lolo weights`, or files; in use with other settings:
            FILE:clock_limit=10000,weight_decay=0.1,step_scale=2,step_decay=3000 or FILE:schedule=cosine), adamw:1e-3,
            adamw-cosine:1e-3, adamw-rsqrt:1e-3 (over √(1 + t/3000)), adam:1e-3, sgdm:0.1, or adamw:grid (its best
            learning rate, picked on other seeds; adamw:wide-grid tries weight decay 0.1 too).
          task: a name of `lolo tasks`, or path.py:function.
          steps: inner steps of each run.
          seeds: runs per optimizer.
          out: folder for rows, table, curves and report; default: only the table is printed.
          dry_run: only say what it would need: memory, arithmetic, time; needs no data.
        """
        if not optimizers:
            raise ValueError("name at least one optimizer, for instance: lolo eval adamw:1e-3 --task fashion-mlp")
        if seeds < 1:
            raise ValueError(f"--seeds {seeds} must be at least 1.")
        by_name.pin(task)
        environment.set_up()
        if dry_run:
            print(plan.report(plan.of_evaluation(task, architecture.LearnerSettings(), len(optimizers), seeds, steps)))
            return 0
        splits = by_name.resolve(task)  # first: where data are missing, nothing is written
        if out is None:
            with telling() as teller:
                rows, weights = comparisons.evaluate(optimizers, task, steps, seeds, teller, splits=splits)
            print(table(rows))
        else:
            stop = interrupt.Stop()
            with (
                evaluation_folder.evaluation_folder(out, task, optimizers, steps, seeds) as parts,
                telling() as teller,
                interrupt.stop_on_signals(stop),
            ):
                told = interrupt.interruptible(stop, teller, out)
                rows, weights = comparisons.evaluate(optimizers, task, steps, seeds, told, parts, splits=splits)
                command = shlex.join(["lolo", "eval", *argv])
                print(comparison_report.write_report(out, task, rows, weights, command))
        return 0

    return call(evaluate_, argv, "lolo eval")


def reproduce_command(argv: list[str]) -> int:
    """lolo reproduce STUDY"""

    def reproduce(
        study: tyro.conf.Positional[str],
        out: Path | None = None,
        only: tuple[str, ...] = (),
        smoke: bool = False,
    ) -> int:
        """Meta-train, evaluate and report a study; goes on where it was stopped.

        Args:
          study: quick (minutes), books or mini (hours), or study: all parts of the study in docs/results.md (a day).
          out: folder of the study; default: runs/STUDY.
          only: these parts of study alone: figure2, figure2-books, naive-tuned, naive-tuned-books, long, long-books,
            settings, settings-confirmed, outer-steps, transfer.
          smoke: the smallest form, to see that everything runs; in a folder `smoke` inside, so that no rows are lost.
        """
        settings.pick({**definitions.STUDIES, "study": None}, "study", study)
        environment.set_up()
        stop, folder = interrupt.Stop(), out or Path("runs") / study
        folder = folder / "smoke" if smoke else folder
        with telling() as teller, interrupt.stop_on_signals(stop):
            tables = studies.reproduce(study, folder, only=only, smoke=smoke, stop=stop, told=teller, say=say)
        for task, text in tables.items():
            print(f"\n{task}:\n\n{text}")
        print(f"\nReport, rows and pictures: {folder}")
        return 0

    return call(reproduce, argv, "lolo reproduce")


def bench_command(argv: list[str]) -> int:
    """lolo bench"""

    def bench_(parts: tyro.conf.Positional[tuple[str, ...]] = (), out: Path | None = None) -> int:
        """Measure speed on this machine: ratios within one run, medians.

        Args:
          parts: update (our form against the textbook's), methods (LoLO against NAIVE), use (a step in optax), torch (a
            step in PyTorch, if installed), start (first step, cores), blocks (slots_per_block), growth (pairs,
            truncation, tasks, parameters); all if none is named.
          out: JSON file for the numbers; a picture of the growth goes beside it.
        """
        environment.set_up()
        speed.run(parts or tuple(speed.PARTS), out)
        return 0

    return call(bench_, argv, "lolo bench")


def recipes_command(argv: list[str]) -> int:
    """lolo recipes"""

    def list_recipes() -> int:
        """The recipes, and how each differs from LoLO."""
        for name, recipe in recipes.RECIPES.items():
            changed = settings.diff(recipes.LOLO, recipe)
            words = ", ".join(f"{field}={new!r}" for field, (_, new) in changed.items()) or "the paper's method"
            print(f"{name}: {words}")
        return 0

    return call(list_recipes, argv, "lolo recipes")


def tasks_command(argv: list[str]) -> int:
    """lolo tasks"""

    def list_tasks() -> int:
        """The tasks that come with lolo."""
        for name, make in by_name.TASKS.items():
            print(f"{name}: {(make.__doc__ or '').splitlines()[0]}")
        return 0

    return call(list_tasks, argv, "lolo tasks")


def doctor_command(argv: list[str]) -> int:
    """lolo doctor RUN"""

    def doctor_(run: tyro.conf.Positional[Path]) -> int:
        """Whether a meta-training is healthy, in plain words, and what to try when it is not.

        Args:
          run: the run's folder.
        """
        print(doctor.report(doctor.examine(run)))
        return 0

    return call(doctor_, argv, "lolo doctor")


def report_command(argv: list[str]) -> int:
    """lolo report FOLDER..."""

    def report_(folders: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> int:
        """One HTML page about meta-trainings, evaluations and studies. It opens without a network.

        Args:
          folders: of `lolo train`, `lolo eval` or `lolo reproduce`.
          out: the page; default: report.html in the first folder.
        """
        print(page.write(folders, out))
        return 0

    return call(report_, argv, "lolo report")


def data_command(argv: list[str]) -> int:
    """lolo data prepare|list|verify"""

    def prepare_(
        name: tyro.conf.Positional[str], to: Path, source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    ) -> int:
        """Read a data set once and keep it as memory-mapped arrays; goes on where it was stopped.

        Args:
          name: imagenet32, fineweb, idx, text, characters, textures or books.
          to: a folder of its own.
          source: the folder or file that holds the data; not needed for textures and books.
        """
        with telling() as teller:
            manifest = prepare.prepare(
                name, source, to, lambda done, total, line: teller(f"preparing {name}", done, total, line)
            )
        counts = {split: content["count"] for split, content in manifest["splits"].items()}
        print(f"{to}: {name}, {counts}")
        return 0

    def list_(folder: tyro.conf.Positional[Path]) -> int:
        """What was prepared in a folder: in itself and in those directly in it."""
        for found in prepare.list_prepared(folder):
            print(f"{found.folder}: {found.problem or f'{found.name}, {found.counts}, {found.data_bytes:,} bytes'}")
        return 0

    def verify_(folder: tyro.conf.Positional[Path]) -> int:
        """Compare every array of a prepared data set with its sha256."""
        with telling() as teller:
            prepare.verify(folder, lambda done, total, line: teller("verifying", done, total, line))
        print(f"{folder}: every file is as it was written.")
        return 0

    commands = {"prepare": deferred(prepare_), "list": deferred(list_), "verify": deferred(verify_)}
    return one_line(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="lolo data"))()


def weights_command(argv: list[str]) -> int:
    """lolo weights"""

    def list_weights() -> int:
        """The weights inside the package."""
        for name in weights_file.shipped_weights():
            card = weights_file.read_weights(name).card
            default = " (the default)" if name == weights_file.DEFAULT_WEIGHTS else ""
            print(f"{name}{default}: {card.get('summary', '')}")
        return 0

    return call(list_weights, argv, "lolo weights")


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train_command,
    "resume": resume_command,
    "sweep": sweep_command,
    "eval": eval_command,
    "reproduce": reproduce_command,
    "report": report_command,
    "doctor": doctor_command,
    "data": data_command,
    "bench": bench_command,
    "recipes": recipes_command,
    "tasks": tasks_command,
    "weights": weights_command,
}


def main(argv: list[str] | None = None) -> int:
    """Entry point. Returns the exit status: 0 done, 2 bad input, 3 stopped on request, 4 numbers gone bad,
    5 the disk, 6 a process of several lost."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return 0 if argv else 2
    try:
        command = settings.pick(COMMANDS, "command", argv[0])
        return command(argv[1:])
    except ValueError as error:  # ours: RecipeError, TaskError, FileError, RunError
        say(" ".join(str(error).split()))
        return 2
    except DivergedError as error:
        say(str(error))
        return 4
    except OSError as error:  # a full disk, a folder without permission: whatever was written before is whole
        say(f"{error.filename or 'the output'} can't be written or read: {error.strerror}. Mend that and try again.")
        return 5
    except ProcessGroupError as error:
        say(str(error))
        return launch.LOST
    except interrupt.Interrupted as error:
        say(str(error))
        return 3
    except KeyboardInterrupt:
        say("interrupted.")
        return 130
