"""`lolo eval`, `race`, `reproduce` and `bench`: optimizers side by side, studies, speed."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro

from lolo.bench import speed
from lolo.cli.arguments import call
from lolo.cli.progress import logged_warnings, print_or_show, progress_display
from lolo.files import settings as files_settings
from lolo.race import entrants, stages, tuning, workloads
from lolo.race import report as race_report
from lolo.race import search as race_search
from lolo.runtime import environment, interrupt
from lolo.runtime.streams import log
from lolo.studies import candidates, comparison_report, comparisons, definitions, evaluation_folder, studies
from lolo.studies.tables import table
from lolo.tasks import by_name
from lolo.training import plan, recipes


def eval_command(argv: list[str]) -> int:
    """lolo eval OPTIMIZER..."""

    def evaluate_(
        optimizers: tyro.conf.Positional[tuple[str, ...]],
        task: str = "fashion-mlp",
        steps: int = 10_000,
        seeds: int = 5,
        out: Path | None = None,
        code: tuple[Path, ...] = (),
        dry_run: bool = False,
    ) -> int:
        """Train a task with each optimizer, from the same inits and batches, and compare.

        With --out a stopped evaluation resumes with the same command, in the middle of a long run too, and the same
        command with more optimizers adds these.

        Args:
          optimizers: weights, rivals, or your own. Weights are a name of `lolo weights` or a file; settings follow a
            colon: FILE:step_scale=2,step_decay=3000,weight_decay=0.1,clock_limit=10000, of norm_fc
            FILE:learning_rate=1e-2,step_rms=adam,adam_scale=1. FILE:freeze_unseen=true does
            not move entries that never had a gradient; FILE:untrained=true is φ before meta-training. Rivals are adamw,
            adam, nadamw, sgdm, nesterov, lion, muon, muon-matched (its steps are as large as AdamW's, so that AdamW's
            rates suit it), schedule-free and prodigy. adamw:1e-3 has one learning rate; adamw:grid has the best of
            several, picked on other seeds; adamw:wide-grid tries weight decay 0.1 too. All take a schedule:
            adamw:1e-3,schedule=cosine (or adamw-cosine:1e-3), FILE:schedule=cosine. Others are rsqrt (over √(1 +
            t/3000)), warmup, warmup-cosine and wsd (warm-up, constant, down to 0 in the last fifth). A warm-up takes 2
            % of the steps, unless it is set: muon:1e-3,schedule=warmup-cosine,warmup=0.05. Your own is path.py:function
            or path.py:function:lr=0.01, a function that returns an optax optimizer. An argument named steps gets the
            number of steps.
          task: a name of `lolo tasks`, or path.py:function.
          steps: inner steps of each run.
          seeds: runs per optimizer.
          out: folder for rows, table, curves and report; default: only the table is printed.
          code: your own files that may be run, of weights whose architecture is a function of one.
          dry_run: only say what it would need: memory, arithmetic, time; needs no data.
        """
        if not optimizers:
            raise ValueError("name at least one optimizer, for instance: lolo eval adamw:1e-3 --task fashion-mlp")
        if seeds < 1:
            raise ValueError(f"--seeds {seeds} must be at least 1.")
        by_name.pin(task)
        environment.set_up()
        if dry_run:
            print(plan.report(plan.of_evaluation(task, recipes.LOLO.learner, len(optimizers), seeds, steps)))
            return 0
        splits = by_name.resolve(task)  # first: where data are missing, nothing is written
        with logged_warnings():
            named = candidates.read(optimizers, code=code)
        if out is None:
            with progress_display() as display:
                rows, weights = comparisons.evaluate(named, task, steps, seeds, display, splits=splits)
            print_or_show(table(rows))
        else:
            stop = interrupt.Stop()
            with (
                evaluation_folder.evaluation_folder(out, task, named, steps, seeds) as parts,
                progress_display() as display,
                interrupt.stop_on_signals(stop),
            ):
                on_progress = interrupt.interruptible(stop, display, out)
                rows, weights = comparisons.evaluate(named, task, steps, seeds, on_progress, parts, splits=splits)
                command = shlex.join(["lolo", "eval", *argv])
                print(comparison_report.write_report(out, task, rows, weights, command))
        return 0

    return call(evaluate_, argv, "lolo eval")


def check_no_race(argv: Sequence[str], no_race: Mapping[str, tuple[str, ...]], of_a_race: Mapping[str, object]) -> None:
    """Raise ValueError for an option that is no race but has no optimizer, or another option that does not fit it.

    no_race, of_a_race: the options' values by name.
    """
    for option, optimizers in no_race.items():
        if option in argv and not optimizers:
            raise ValueError(f"{option} needs at least one optimizer, for instance {option} lolo-norm.")
    given, *others = [option for option, value in {**no_race, **of_a_race}.items() if value] or [""]
    if given in no_race and others:
        raise ValueError(f"{given} is no race: leave out {others[0]}.")


def race_command(argv: list[str]) -> int:
    """lolo race"""

    def race_(
        optimizer: str = "",
        settings: tuple[str, ...] = (),
        search: bool = False,
        name: str = "",
        only: tuple[str, ...] = (),
        seeds: int = entrants.SEEDS,
        out: Path = Path("runs/race"),
        from_scratch: bool = False,
        time_steps: bool = False,
        transfer: tuple[str, ...] = (),
        validate: tuple[str, ...] = (),
        code: tuple[Path, ...] = (),
        dry_run: bool = False,
    ) -> int:
        """Race an optimizer against those that people use, on ten small workloads: the rules are in docs/race.md.

        Without an optimizer the published race is reported. A stopped race resumes with the same command.

        Args:
          optimizer: who is added, as `lolo eval` names it: weights, or path.py:function, a function that returns an
            optax optimizer. Of its arguments, steps gets the number of steps, and is_matrix a function (path,
            parameter) that is false for embeddings and output layers.
          settings: of the optimizer, up to five, as they stand after its name: lr=0.01 lr=0.03. All workloads get the
            same; the first is the one of the self-tuning rules.
          search: find five settings of the optimizer, weights or a kind of rival, as those of the rivals were found:
            twenty trials on every workload, on validation data.
          name: what the optimizer is called in tables and pictures; default: as --optimizer has it. The names of other
            published entrants are refused.
          only: these workloads: mlp, convolution, resnet, vit, transformer, gru, autoencoder, words, finetuning,
            small-batch.
          seeds: runs of each setting on each workload.
          out: folder for rows and report.
          from_scratch: search the rivals' settings, set the targets and race the rivals here too: some hours.
          time_steps: measure the time of a training step again, of all whose weights are at hand: minutes. Without it
            the optimizer alone is measured, beside AdamW, and its time counted in AdamW's published one.
          transfer: no race: how far the best learning rate of these optimizers moves with the width and the depth of a
            transformer, as a picture. Each is a rival's kind or weights: adamw muon mine.safetensors.
          validate: no race: the validation loss of these optimizers, on seeds that no race has, after as many steps as
            a trial of the search; a table. For choosing weights or settings before they are raced:
            FILE:schedule=warmup-cosine,learning_rate=2e-3 FILE:schedule=warmup-cosine,learning_rate=4e-3.
          code: your own files that may be run, of weights whose architecture is a function of one.
          dry_run: only say what would run.
        """
        for workload in only:
            files_settings.pick(workloads.WORKLOADS, "workload", workload)
        if seeds < 1:
            raise ValueError(f"--seeds {seeds} must be at least 1.")
        if (settings or search or name) and not optimizer:
            raise ValueError("--settings, --search and --name are of --optimizer: give one.")
        if sum(word.partition("=")[0] == "--settings" for word in argv) > 1:
            raise ValueError("--settings is given twice: give all settings after one, --settings lr=0.01 lr=0.03.")
        if optimizer:
            stages.check_name(optimizer, name, search)
        if settings and search:
            raise ValueError("--search finds the settings: leave out --settings.")
        of_a_race = {
            "--optimizer": optimizer,
            "--from-scratch": from_scratch,
            "--time-steps": time_steps,
            "--dry-run": dry_run,
        }
        check_no_race(argv, {"--transfer": transfer, "--validate": validate}, of_a_race)
        if transfer and (only or code):
            raise ValueError(f"--transfer has models of its own: leave out {'--only' if only else '--code'}.")
        environment.set_up()
        with logged_warnings():
            mine = [entrants.entrant(optimizer, settings, name, code)] if optimizer and not search else []
            searched = [tuning.searched(optimizer, name, code)] if search else []
        if from_scratch:
            searched += [tuning.rival(kind) for kind in race_search.SPACES if kind not in [of.name for of in searched]]
        if dry_run:
            count = race_search.FIVE if search else sum(len(one.optimizers) for one in mine)
            print(stages.outlook(count, len(searched), seeds, only, out, from_scratch))
            return 0
        stop = interrupt.Stop()
        if transfer or validate:
            with progress_display() as display, interrupt.stop_on_signals(stop), logged_warnings():
                on_progress = interrupt.interruptible(stop, display, out)
                if transfer:
                    said = str(stages.transfer_rates(out, transfer, on_progress))
                else:
                    said = stages.validate(out, validate, seeds, only, code, on_progress)
            print(said)
            return 0
        held = stages.held(out) if optimizer or from_scratch or time_steps else contextlib.nullcontext()
        with held, progress_display() as display, interrupt.stop_on_signals(stop), logged_warnings():
            on_progress = interrupt.interruptible(stop, display, out)
            found = stages.search_all(out, searched, only, on_progress) if searched else []
            if search:
                mine = [entrants.searched(searched[0], found)]
            if from_scratch:
                stages.set_targets(out, only, on_progress)
            field = [*(stages.rivals(stages.read(out).trials) if from_scratch else ()), *mine]
            if field:
                stages.check_known(out, only, field)
                stages.race(out, field, seeds, only, on_progress)
            others = stages.published(stages.read(out).rows, but=mine)
            timed = [*(others if time_steps else ()), *mine]
            if timed:
                stages.time_steps(out, timed, only, on_progress)
        words, own = shlex.join(["lolo", "race", *argv]), [one.name for one in mine]
        print(race_report.write(stages.read(out, only), out, [*others, *mine], own, words))
        print(f"\nReport, rows and pictures: {out}")
        return 0

    return call(race_, argv, "lolo race")


def reproduce_command(argv: list[str]) -> int:
    """lolo reproduce STUDY"""

    def reproduce(
        study: tyro.conf.Positional[str],
        out: Path | None = None,
        only: tuple[str, ...] = (),
        smoke: bool = False,
    ) -> int:
        """Meta-train, evaluate and report a study; resumes where it was stopped.

        Args:
          study: quick (minutes), books or mini (hours), or study: all parts of the study in docs/results.md (a day).
          out: folder of the study; default: runs/STUDY.
          only: these parts of study alone: figure2, figure2-books, naive-tuned, naive-tuned-books, long, long-books,
            settings, settings-confirmed, outer-steps, restarts, transfer, norm-fc, norm-fc-long,
            default, default-long.
          smoke: the smallest form, to see that everything runs; in a folder `smoke` inside, so that no rows are lost.
        """
        files_settings.pick({**definitions.STUDIES, "study": None}, "study", study)
        environment.set_up()
        stop, folder = interrupt.Stop(), out or Path("runs") / study
        folder = folder / "smoke" if smoke else folder
        with progress_display() as display, interrupt.stop_on_signals(stop):
            tables = studies.reproduce(study, folder, only=only, smoke=smoke, stop=stop, on_progress=display, log=log)
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
          parts: update (our form against the textbook's), methods (LoLO against NAIVE), architectures (inner steps of
            meta-training by architecture), use (a step in optax), batches (share of a training step, by batch size),
            kernel (norm_fc's CPU kernel), torch (a step in PyTorch, if installed), start (first step, cores), blocks
            (slots_per_block), growth (pairs, truncation, tasks, parameters); all if none is named.
          out: JSON file for the numbers; a picture of the growth goes beside it.
        """
        environment.set_up()
        speed.run(parts or tuple(speed.PARTS), out)
        return 0

    return call(bench_, argv, "lolo bench")
