"""`lolo train`, `resume` and `sweep`: meta-training."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import tyro

from lolo.bench import speed
from lolo.cli.arguments import as_flags, call, one_line
from lolo.cli.progress import in_words, progress_display
from lolo.files import settings
from lolo.files.settings import RecipeError
from lolo.runtime import environment, launch, parallel
from lolo.runtime.interrupt import Stop, stop_on_signals
from lolo.runtime.launch import Processes
from lolo.runtime.process_group import ALONE
from lolo.runtime.streams import log
from lolo.training import build, loop, own_parts, plan, recipes, run_folder, run_start, sweep
from lolo.training.how import How
from lolo.training.recipes import Recipe
from lolo.training.run import Run

Several = Annotated[Processes, tyro.conf.arg(name="")]  # its fields are options without a prefix
ONE = Processes()


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """Meta-train by a recipe. Every field of the recipe is an option by its dotted name."""

    # Its booleans take a word, as its other fields do; those below are flags, as in all commands.
    recipe: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
    out: Path | None = None  # folder of the run; default: runs/RECIPE-TASK-seedSEED
    init: str | None = None  # weights to start from: a name or a file
    devices: int | None = None  # devices (on CPU: cores) to use at most; does not change the result
    offload: bool = False  # keep replay buffers in the host's memory; does not change the result
    measure_blocks: bool = False  # time every estimator.slots-per-block here, and store the fastest in the recipe
    checkpoint_seconds: float = 20.0  # time between two checkpoints, at least
    log: tuple[str, ...] = ()  # tensorboard, wandb: beside log.jsonl, in the run's folder; both work offline
    dry_run: bool = False  # only say what it would need: memory, arithmetic, time; needs no data
    several: Several = ONE

    def how(self) -> How:
        """How to run, as far as the command line says it."""
        return How(
            devices=self.devices,
            offload=self.offload,
            checkpoint_seconds=self.checkpoint_seconds,
            loggers=self.log,
        )


OPTIONS = [field.name for field in dataclasses.fields(TrainArguments) if field.name not in ("recipe", "several")]
OPTIONS += [field.name for field in dataclasses.fields(Processes)]
FLAGS = [field.name for field in dataclasses.fields(TrainArguments) if field.default in (True, False)]


def train_command(argv: list[str]) -> int:
    """lolo train RECIPE [options]"""
    if not argv or argv[0].startswith("-"):
        argv = ["lolo", *argv]
        if "--help" not in argv and "-h" not in argv:
            raise RecipeError(
                f"name a recipe: {', '.join(recipes.RECIPES)}. For instance: lolo train lolo --task fashion-mlp"
            )
    name, *options = argv
    recipe = with_alternatives(settings.pick(recipes.RECIPES, "recipe", name), options)
    arguments = one_line(
        lambda: tyro.cli(
            TrainArguments,
            args=known_options(options, recipe, OPTIONS),
            default=TrainArguments(recipe),
            prog=f"lolo train {name}",
        )
    )
    recipe = arguments.recipe
    task = "-".join(Path(t.partition(":")[0]).stem for t in recipe.tasks)
    out = arguments.out or Path("runs") / f"{name}-{task}-seed{recipe.seed}"
    recipe = own_parts.load(recipe)
    build.check(recipe)
    if arguments.dry_run:
        environment.set_up()
        print(plan.report(plan.of_training(recipe, arguments.devices, arguments.offload)))
        return 0
    if arguments.measure_blocks and (arguments.several.requested or arguments.offload):
        raise ValueError(
            "--measure-blocks times one process with its buffers on the device; give --estimator.slots-per-block N "
            "instead, with the N that a run in one process has stored."
        )

    def work(how: How) -> loop.Result:
        # A scheduler that starts processes again gives the same command.
        if arguments.several.requested and run_start.can_resume(out, recipe, how.group):
            return loop.resume(out, how)
        if arguments.measure_blocks:
            run_start.require_free(out, recipe)
            return loop.train(with_fastest_block(recipe, how.devices), out, how, init=arguments.init)
        return loop.train(recipe, out, how, init=arguments.init)

    return run_here_or_in_processes(["train", *argv], name, recipe, arguments.several, arguments.how(), work)


def with_fastest_block(recipe: Recipe, devices: int | None) -> Recipe:
    """The recipe with the `slots_per_block` whose outer step is the fastest here; logs all times."""
    times = speed.block_times(recipe, None, devices)
    fastest = min(times, key=lambda size: times[size])
    words = ", ".join(f"{size}: {1000 * seconds:.1f} ms" for size, seconds in times.items())
    log(f"an outer step by slots-per-block: {words}. Storing {fastest} in the recipe.")
    return settings.with_field(recipe, "estimator.slots_per_block", fastest)


def run_here_or_in_processes(
    argv: list[str], what: str, recipe: Recipe, several: Processes, how: How, work: Callable[[How], loop.Result]
) -> int:
    """`work` with progress and signals, or, where several processes are requested, `lolo ARGV` in each of them.

    Returns the exit status: 0 if finished, 3 if stopped on request.
    """
    place = launch.member()
    if place is None and several.requested:
        launch.check(several)
        parallel.check_processes(recipe.estimator.pairs // recipe.estimator.slots_per_block, several.processes or 1)
        return launch.launch(argv, several, log)
    share = None if place is None else max(parallel.cores() // place["share"], 1)
    environment.set_up(how.devices or share)
    group = ALONE if place is None else launch.join(place)
    stop = Stop()
    how = dataclasses.replace(how, group=group, stop=stop)
    with group.watching("meta-training"), stop_on_signals(stop):
        if not group.leads:
            return 0 if work(dataclasses.replace(how, log=lambda text: None)).finished else 3
        with progress_display() as display:
            result = work(
                dataclasses.replace(
                    how,
                    on_start=lambda run: log(outlook(run)),
                    on_progress=lambda p: display(what, p.step, p.total, in_words(p)),
                    log=log,
                )
            )
    if result.finished:
        print(f"{result.out}/last.safetensors")
    return 0 if result.finished else 3


def outlook(run: Run) -> str:
    """What a run that is about to start needs, in one line."""
    return plan.outlook(run.recipe, run.setup, list(run.tasks.values()), list(run.validation_tasks.values()))


def with_alternatives(recipe: Recipe, options: list[str]) -> Recipe:
    """The recipe with the learner that --learner.name names: its fields are the options then."""
    for option, following in zip(options, [*options[1:], ""], strict=True):
        name, separator, value = option.partition("=")
        if name.startswith("--") and name[2:] in settings.fields(recipe) and name.endswith(".name"):
            recipe = settings.with_field(recipe, name[2:], value if separator else following)
    return recipe


def known_options(options: list[str], recipe: Recipe, more: list[str]) -> list[str]:
    """Options with `--task` spelled as the field `--tasks` and flags as `as_flags` has them.

    A boolean of the recipe without a word is True. Raises for names that are no field of the recipe.
    """
    fields = settings.fields(recipe)
    known = [*fields, *more, *(f"no_{flag}" for flag in FLAGS), "help"]
    spelled = []
    for option, following in zip(options, [*options[1:], "--"], strict=True):
        if option.startswith("--"):
            name, separator, value = option[2:].partition("=")
            name = "tasks" if name == "task" else name.replace("-", "_")
            if name not in known:
                another = settings.field_of_another(recipe, name)
                raise another or settings.unknown("option", f"--{name}", [f"--{field}" for field in known])
            if isinstance(fields.get(name), bool) and not separator and following.startswith("--"):
                separator, value = "=", "True"
            option = f"--{name}{separator}{value}"
        spelled.append(option)
    return as_flags(spelled, FLAGS)


def resume_command(argv: list[str]) -> int:
    """lolo resume RUN"""

    def resume(
        run: tyro.conf.Positional[Path],
        devices: int | None = None,
        offload: bool = False,
        checkpoint_seconds: float = 20.0,
        log: tuple[str, ...] | None = None,
        other_path: bool = False,
        several: Several = ONE,
    ) -> int:
        """Resume a stopped run from its newest complete checkpoint.

        Args:
          run: the run's folder.
          devices: devices (on CPU: cores) to use at most; does not change the result.
          offload: keep replay buffers in the host's memory; does not change the result.
          checkpoint_seconds: time between two checkpoints, at least.
          log: tensorboard, wandb; default: where the run logged before; `--log` alone: nowhere else.
          other_path: resume also where the learner's update runs on another path (plain, or a form of the CPU kernel)
            than in the checkpoint; last bits will differ.
          several: resume in several processes, any number.
        """
        how = How(
            devices=devices,
            offload=offload,
            checkpoint_seconds=checkpoint_seconds,
            loggers=log,
            other_path=other_path,
        )
        recipe = run_folder.read_recipe(run)
        words = ["resume", *argv]
        return run_here_or_in_processes(words, str(run), recipe, several, how, lambda how: loop.resume(run, how))

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
        """Run changes of a recipe, one at a time or as a grid; resumes what was stopped, and tries again what failed.

        Args:
          file: TOML with recipe, out, [fields] that all runs share, [[runs]] with fields that are changed table by
            table, and [grid] with lists of values, of which every combination is run with each of the tables.
          workers: runs at a time; default: one for each core.
          only: this run alone, by its number.
          slurm: print an array script, and run nothing.
          table: print the table of what is there, and run nothing.
        """
        grid, stop = sweep.read(file), Stop()
        if slurm:
            print(sweep.slurm_script(file, grid), end="")
            return 0
        if not table:
            with stop_on_signals(stop):
                sweep.run_all(grid, workers, only, stop, log)
        if only is not None:
            states = [sweep.row(grid.runs[only])["state"]]
        else:
            print(sweep.gather(grid))
            states = [sweep.row(run)["state"] for run in grid.runs]
        if stop.requested is not None:
            log(f"stopped by {stop.requested}. Resume with: {shlex.join(['lolo', 'sweep', *argv])}")
            return 3
        return 4 if "failed" in states else 0

    return call(sweep_, argv, "lolo sweep")
