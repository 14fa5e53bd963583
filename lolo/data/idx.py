"""Reader of IDX files, the format of MNIST and its relatives: a folder of images and labels, plain or in gzip."""

from __future__ import annotations

import contextlib
import gzip
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lolo.data.errors import DataError
from lolo.data.npy import ByteStream
from lolo.data.read_plan import ReadPart, ReadPlan, SplitRows, existing, files_of, split_examples, untrusted

UNSIGNED_BYTES = b"\x00\x00\x08"
MAX_AXES = 4
DEFLATE_RATIO = 1040
"""Deflate makes at most 1032 bytes of one; a packed file that promises more is damaged."""

CHUNK_BYTES = 16 << 20
NAME = re.compile(r"(.*?)[-.]?(images?|labels?)[-.]idx\d-ubyte(?:\.gz)?", re.IGNORECASE)
CURE = "fetch the file again; IDX files of unsigned bytes are read"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[ByteStream]:
    """The bytes of an IDX file; of a name that ends in .gz, unpacked."""
    with path.open("rb") as raw:
        if path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream
        else:
            yield raw


def read_shape(path: Path) -> tuple[int, ...]:
    """The shape that the header promises, checked against the size of the file."""
    with untrusted(path, "an IDX file"), opened(path) as stream:
        shape = _header(stream, path)
    promised = 4 + 4 * len(shape) + int(np.prod(shape, dtype=object))
    size = path.stat().st_size
    packed = path.suffix == ".gz"
    if promised > size * DEFLATE_RATIO if packed else promised != size:
        problem = f"the header promises {shape}, {promised:,} bytes in all, and the file has {size:,}"
        raise DataError.at(path, problem, CURE, "byte 4")
    return shape


def read_rows(path: Path) -> Iterator[NDArray[np.uint8]]:
    """The array in pieces along its first axis: uint8 [n, ...].

    Raises:
        DataError: not an IDX file of unsigned bytes, or shorter or longer than its header says.
    """
    shape = read_shape(path)
    row_bytes = int(np.prod(shape[1:], dtype=object))
    step = max(1, CHUNK_BYTES // row_bytes)
    with untrusted(path, "an IDX file"), opened(path) as stream:
        _header(stream, path)
        for start in range(0, shape[0], step):
            n = min(step, shape[0] - start)
            content = stream.read(n * row_bytes)
            if len(content) != n * row_bytes:
                offset = 4 + 4 * len(shape) + start * row_bytes + len(content)
                raise DataError.at(path, f"ends inside the data; the header promises {shape}", CURE, f"byte {offset}")
            yield np.frombuffer(content, np.uint8).reshape(n, *shape[1:])
        if stream.read(1):
            raise DataError.at(path, f"continues after the data; the header promises {shape}", CURE)


def _header(stream: ByteStream, path: Path) -> tuple[int, ...]:
    start = stream.read(4)
    if len(start) < 4 or start[:3] != UNSIGNED_BYTES or not 1 <= start[3] <= MAX_AXES:
        problem = f"starts with {start.hex(' ')!r}, expected 00 00 08 and the number of axes, 1 to {MAX_AXES}"
        raise DataError.at(path, problem, CURE, "byte 0")
    sizes = stream.read(4 * start[3])
    if len(sizes) < 4 * start[3]:
        raise DataError.at(path, "ends inside the header", CURE, f"byte {4 + len(sizes)}")
    shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
    if 0 in shape[1:] or int(np.prod(shape[1:], dtype=object)) > CHUNK_BYTES:
        raise DataError.at(path, f"rows of shape {shape[1:]}, expected 1 to {CHUNK_BYTES:,} bytes each", CURE, "byte 4")
    return shape


def plan(source: Path | None) -> ReadPlan:
    """Any folder with one set of IDX files: images and labels, named as MNIST's are.

    A name with "train" in it is the published training set, of which every 20th example, from the first, is
    validation; one with "t10k" or "test" is the test set. Arrays: images uint8 [N, H, W], labels uint8 [N].
    """
    folder = existing(source, "IDX files")
    pairs: dict[str, dict[str, Path]] = {}
    for path in files_of(folder) if folder.is_dir() else []:
        match = NAME.fullmatch(path.name)
        if match is not None:
            kind = "labels" if match[2].lower().startswith("label") else "images"
            other = pairs.setdefault(match[1], {})
            if kind not in other or path.suffix != ".gz":  # the plain file, where both are there
                other[kind] = path
    by_split: dict[str, dict[str, Path]] = {}
    for prefix, pair in pairs.items():
        split = "train" if "train" in prefix.lower() else "test"
        if len(pair) < 2 or split in by_split:
            problem = (
                f"{prefix!r} has no pair of images and labels of its own" if len(pair) < 2 else f"two {split} sets"
            )
            raise DataError.at(folder, problem, "give a folder with the files of one data set")
        by_split[split] = pair
    if "train" not in by_split:
        expected = "train-images-idx3-ubyte and train-labels-idx1-ubyte, or the same with .gz"
        raise DataError.at(folder, "no IDX files of a training set", f"give a folder that holds {expected}")
    parts = [_part(split, pair) for split, pair in sorted(by_split.items(), reverse=True)]
    return ReadPlan(parts, {"kind": "images", "format": "idx", "label_order": "as in the files"})


def _part(split: str, pair: dict[str, Path]) -> ReadPart:
    images, labels = read_shape(pair["images"]), read_shape(pair["labels"])
    if len(images) < 2 or labels != images[:1]:
        problem = f"labels of shape {labels} for images of shape {images}"
        raise DataError.at(pair["labels"], problem, "give the files that belong together")

    def rows(scratch: Path) -> Iterator[SplitRows]:
        all_labels = np.concatenate([np.zeros(0, np.uint8), *read_rows(pair["labels"])])
        start = 0
        for piece in read_rows(pair["images"]):
            arrays = {"images": piece, "labels": all_labels[start : start + len(piece)]}
            yield from split_examples(arrays, start) if split == "train" else [(split, arrays)]
            start += len(piece)

    return ReadPart(pair["images"].name, pair["images"].stat().st_size, rows)
