"""Reader of textures of a free game where it is installed: real images for machines without ImageNet.

The Debian package openarena-081-textures (`apt-get install openarena-081-textures`) is under the GPL, so nothing
of it is in this repository. A texture is a class: its crops differ by position, and train, validation and test
crops of one texture have no pixel in common.
"""

from __future__ import annotations

import functools
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lolo.data import rgb32, sandbox
from lolo.data.errors import DataError
from lolo.data.read_plan import ReadPart, ReadPlan, SplitRows
from lolo.files import disk

FOLDER = Path("/usr/share/games/openarena/baseoa")
"""Where Debian installs the package."""

CLASSES = 748
THUMBNAIL = 128
MIN_TEXTURE_STD = 10.0
MIN_CROP_STD = 4.0
STRIDE = 8
TRAIN_COLUMNS, TRAIN_ROWS = 84, 96
"""Crops left of this column are train above this row and validation below; those right of it are test."""

MAX_FILES, MAX_FILE_BYTES = 10_000, 64 << 20
THUMBNAILS_FILE = "thumbnails.bin"
INSTALL = "apt-get install openarena-081-textures, or give the folder that holds its pk3 file"


def find(source: Path | None) -> list[Path]:
    """The package's pk3 files, in the given folder, anywhere below it, or where Debian installs them."""
    folder = FOLDER if source is None else source
    found = [folder] if folder.is_file() else sorted(folder.rglob("*.pk3"))
    archives = [path for path in found if path == folder or not disk.is_litter(path)]
    if not archives:
        raise DataError.at(folder, "no textures (*.pk3) are here", INSTALL)
    return archives


def child_thumbnails(file: str, scratch: str) -> int:
    """Write the thumbnails of one pk3 file, uint8 [n, 128, 128, 3]; returns n. For a child process.

    Kept are, in the order of names, opaque colour pictures of at least 128 × 128 pixels under textures/, shrunk by
    averaging, whose thumbnails have a standard deviation above 10 and occur for the first time.
    """
    seen = set()
    with zipfile.ZipFile(file) as archive, Path(scratch, THUMBNAILS_FILE).open("wb") as out:
        members = sorted(archive.infolist(), key=lambda member: member.filename)
        if len(members) > MAX_FILES:
            raise DataError.at(file, f"{len(members):,} files, expected at most {MAX_FILES:,}", INSTALL)
        for member in members:
            name = member.filename.lower()
            if not name.startswith("textures/") or not name.endswith((".jpg", ".tga")) or disk.is_litter(Path(name)):
                continue
            if member.file_size > MAX_FILE_BYTES:
                raise DataError.at(file, f"{member.filename} has {member.file_size:,} bytes", INSTALL)
            image = rgb32.open_image(archive.read(member), f"{file}, {member.filename}")
            if image.mode != "RGB" or min(image.size) < THUMBNAIL:
                continue
            pixels = rgb32.shrink(image, THUMBNAIL)
            content = pixels.tobytes()
            if pixels.std() > MIN_TEXTURE_STD and content not in seen:
                seen.add(content)
                out.write(content)
    return len(seen)


def thumbnails(source: Path | None, scratch: Path) -> NDArray[np.uint8]:
    """All textures as uint8 [n, 128, 128, 3]; `scratch` is a folder for temporary files."""
    pictures = []
    for path in find(source):
        n = sandbox.run(child_thumbnails, path, scratch)
        pixels = np.fromfile(scratch / THUMBNAILS_FILE, np.uint8)
        if pixels.size != n * THUMBNAIL * THUMBNAIL * 3:
            raise DataError.at(path, "its reader wrote an unexpected number of bytes", INSTALL)
        pictures.append(pixels.reshape(n, THUMBNAIL, THUMBNAIL, 3))
    return np.concatenate(pictures)


def positions(stride: int) -> dict[str, list[tuple[int, int]]]:
    """(row, column) of the upper left corner of each split's crops."""
    last = THUMBNAIL - rgb32.SIDE
    train_columns = range(0, TRAIN_COLUMNS - rgb32.SIDE + 1, stride)
    train_rows = range(0, TRAIN_ROWS - rgb32.SIDE + 1, stride)
    return {
        "train": [(row, column) for row in train_rows for column in train_columns],
        "validation": [(TRAIN_ROWS, column) for column in train_columns],
        "test": [
            (row, column) for row in range(0, last + 1, stride) for column in range(TRAIN_COLUMNS, last + 1, stride)
        ],
    }


def crops(pictures: NDArray[np.uint8], places: list[tuple[int, int]]) -> tuple[NDArray[np.uint8], NDArray[np.uint16]]:
    """Crops of 32×32 that are not nearly of one colour (standard deviation above 4), and the picture of each.

    pictures: [n, 128, 128, 3].  Returns: images [N, 32, 32, 3], labels [N], in the order of places.
    """
    images, labels = [], []
    for row, column in places:
        some = pictures[:, row : row + rgb32.SIDE, column : column + rgb32.SIDE]
        kept = np.flatnonzero(some.std(axis=(1, 2, 3)) > MIN_CROP_STD)
        images.append(some[kept])
        labels.append(kept.astype(np.uint16))
    return np.concatenate(images), np.concatenate(labels)


@functools.lru_cache(maxsize=1)
def textures(
    folder: Path | None = None, stride: int = STRIDE
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint16]]]:
    """RGB crops of 32×32 from 748 textures: for each split images uint8 [N, 32, 32, 3] and labels uint16 [N].

    Args:
        folder: where the package's pk3 file is, at any depth; None is where Debian installs it.
        stride: distance between crops in pixels. 8 gives about 46,000 train crops, 4 about four times as many.
    Raises:
        DataError: the textures are not there, or can't be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        pictures = thumbnails(folder, Path(scratch))
    splits = {split: crops(pictures, places) for split, places in positions(stride).items()}
    for arrays in splits.values():
        for array in arrays:
            array.setflags(write=False)
    return splits


def plan(source: Path | None) -> ReadPlan:
    """The same crops, prepared. Arrays: images uint8 [N, 32, 32, 3], labels uint16 [N]."""
    paths = find(source)

    def rows(scratch: Path) -> Iterator[SplitRows]:
        pictures = thumbnails(source, scratch)
        for split, places in positions(STRIDE).items():
            for place in places:
                images, labels = crops(pictures, [place])
                if len(labels):
                    yield split, {"images": images, "labels": labels}

    info = {"kind": "images", "format": "pk3", "classes": CLASSES, "label_order": "names of the textures"}
    return ReadPlan([ReadPart("textures", sum(path.stat().st_size for path in paths), rows)], info)
