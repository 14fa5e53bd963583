"""`lolo recipes`, `tasks`, `weights`, `doctor` and `report`: what is there, and how runs went."""

from __future__ import annotations

import time
from pathlib import Path

import tyro

from lolo.cli.arguments import call
from lolo.cli.progress import progress_display
from lolo.files import settings
from lolo.optimizers import weights_file
from lolo.report import page
from lolo.runtime import environment
from lolo.runtime.streams import log
from lolo.tasks import by_name
from lolo.training import doctor, findings, recipes, trial
from lolo.training.findings import Finding, Verdict


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


EXIT_STATUS = {Verdict.OK: 0, Verdict.FAIL: 7, Verdict.SHORT: 8, Verdict.LEFT_OUT: 8}
"""Of `lolo doctor`, by what its findings come to."""


def doctor_command(argv: list[str]) -> int:
    """lolo doctor RUN"""

    def doctor_(run: tyro.conf.Positional[Path], evaluate: bool = True, seconds: float = trial.SECONDS) -> int:
        """Whether a meta-training is healthy, in plain words, and what to try when it is not.

        It reads the log and the checkpoints, and trains each of the run's tasks from five inits with the run's φ, with
        the φ it began with, with its expert and with Adam, all on the same batches: for twice the unroll, at most 2,000
        inner steps each. Each line begins with a verdict: ok, fail, too short to say (an interval is too wide, or the
        run too short for one), not measured.

        The run is healthy if nothing failed, it is finished, and on every task φ is better than at its start and gets
        as far as its expert does in a quarter of the steps.

        Exit status: 0 healthy, 7 something failed, 8 it can't be said.

        Args:
          run: the run's folder.
          evaluate: train the tasks too; --no-evaluate only reads the folder, and can't call a run healthy.
          seconds: limit of the time that training the tasks may take; about 35 on one core for fashion-mlp.
        """
        began = time.monotonic()
        if evaluate:
            environment.set_up()
        found = doctor.examine(run)
        if evaluate:
            with progress_display() as display:
                found += trial.examine(run, seconds, lambda task, done, total: display(task, done, total, ""))
        else:
            found.append(Finding(Verdict.LEFT_OUT, "what φ does: left out by --no-evaluate.", decides=True))
        print(findings.report(found))
        log(f"it took {time.monotonic() - began:.0f} seconds.")
        return EXIT_STATUS[findings.overall(found)]

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
