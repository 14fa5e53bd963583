"""`lolo recipes`, `tasks`, `weights`, `doctor` and `report`: what is there, and how runs went."""

from __future__ import annotations

from pathlib import Path

import tyro

from lolo.cli.arguments import call
from lolo.files import settings
from lolo.optimizers import weights_file
from lolo.report import page
from lolo.tasks import by_name
from lolo.training import doctor, recipes


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
