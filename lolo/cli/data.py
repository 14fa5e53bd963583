"""`lolo data`: prepare, list and verify data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from lolo.cli.arguments import deferred, one_line
from lolo.cli.progress import progress_display
from lolo.data import prepare


def data_command(argv: list[str]) -> int:
    """lolo data prepare|list|verify"""

    def prepare_(
        name: tyro.conf.Positional[str], to: Path, source: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    ) -> int:
        """Read a data set once and keep it as memory-mapped arrays; resumes where it was stopped.

        Args:
          name: imagenet32, fineweb, idx, text, characters, textures or books.
          to: a folder of its own.
          source: the folder or file that holds the data; not needed for textures and books.
        """
        with progress_display() as display:
            manifest = prepare.prepare(
                name, source, to, lambda done, total, line: display(f"preparing {name}", done, total, line)
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
        with progress_display() as display:
            prepare.verify(folder, lambda done, total, line: display("verifying", done, total, line))
        print(f"{folder}: every file is as it was written.")
        return 0

    commands = {"prepare": deferred(prepare_), "list": deferred(list_), "verify": deferred(verify_)}
    return one_line(lambda: tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="lolo data"))()
