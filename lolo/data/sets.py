"""Prepared data sets by name: their arrays, from `$LOLO_DATA/NAME` or `data/NAME` in the current folder."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from lolo.data.errors import DataError
from lolo.data.prepare import MANIFEST, open_prepared, read_manifest
from lolo.data.stream import Outline

NO_SOURCE = ("textures", "books")
"""Data sets that `lolo data prepare` writes without `--from`."""


def root() -> Path:
    """The folder of all prepared data sets."""
    return Path(os.environ.get("LOLO_DATA") or "data")


def prepared(folder: Path, name: str) -> dict[str, dict[str, np.memmap]]:
    """The arrays of a prepared set, split -> name -> array, mapped and read-only.

    Raises:
        DataError: it is not in `folder`/`name`; the message has the command that makes it.
    """
    target = folder / name
    if not (target / MANIFEST).is_file():
        source = "" if name in NO_SOURCE else " --from FOLDER_WITH_THE_FILES"
        make = f"lolo data prepare {name}{source} --to {target}"
        elsewhere = f", or set LOLO_DATA to the folder that holds a prepared {name!r}"
        raise DataError(f"{target}: no prepared data are here; make them with: {make}{elsewhere}.")
    actual = read_manifest(target)["name"]
    if actual != name:
        raise DataError.at(target, f"holds {actual!r}, expected {name!r}", "prepare each set in a folder of its name")
    return open_prepared(target)


def _images(train: int, validation: int, test: int) -> dict[str, dict[str, Outline]]:
    counts = {"train": train, "validation": validation, "test": test}
    u1, u2 = np.dtype("u1"), np.dtype("<u2")
    return {split: {"images": Outline((n, 32, 32, 3), u1), "labels": Outline((n,), u2)} for split, n in counts.items()}


def _tokens(train: int, validation: int, test: int) -> dict[str, dict[str, Outline]]:
    counts = {"train": train, "validation": validation, "test": test}
    return {split: {"tokens": Outline((n,), np.dtype("<u2"))} for split, n in counts.items()}


PUBLISHED = {
    "imagenet32": _images(1_217_106, 64_061, 50_000),
    "fineweb": _tokens(9_785_000_000, 515_000_000, 100_000_000),  # 103 train shards and one for validation
    "textures": _images(44_663, 4_996, 18_407),
    "books": _tokens(2_775_420, 145_715, 140_272),
}
"""Shapes of the complete data sets of the named tasks, so that a plan needs no data."""
