"""Reader of ImageNet at 32×32 in the four formats in which it is distributed; images are uint8 [N, 32, 32, 3].

Prepared images are RGB: height, width, colour. On the device, `(images / 255 - MEAN) / STD`. The published
validation set is the test split here; of each training file every 20th example, from its first, is validation.

Reference: Chrabaszcz, Loshchilov, Hutter, "A Downsampled Variant of ImageNet as an Alternative to the CIFAR
datasets", 2017.
"""

from __future__ import annotations

import functools
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lolo.data import batch_pickle, encoded, npy, rgb32, sandbox
from lolo.data.errors import DataError
from lolo.data.read_plan import (
    ReadPart,
    ReadPlan,
    SplitRows,
    check_labels,
    existing,
    files_of,
    grouped,
    split_examples,
    untrusted,
)

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CLASSES = rgb32.CLASSES

OFFICIAL_TRAIN, OFFICIAL_VALIDATION, _ = encoded.OFFICIAL_HDF5
OFFICIAL_BATCHES = {**dict.fromkeys(range(1, 10), 128_116), 10: 128_123, 0: OFFICIAL_VALIDATION}
"""Examples of train_data_batch_1..10 and, under 0, of val_data."""

MAX_ROWS = 2_000_000
CHILD_ROWS = 10_000
"""Images that one child process decodes."""

DEVKIT_ORDER = "ILSVRC2012 development kit (map_clsloc.txt), label - 1"
CURE = "fetch the file again"


def plan(source: Path | None) -> ReadPlan:
    """A folder with ImageNet-32 as npz archives, else batch pickles, one HDF5 file or parquet; or one such file.

    Arrays: images uint8 [N, 32, 32, 3], labels uint16 [N] in 0..999.
    """
    place = existing(source, "imagenet32")
    paths = files_of(place)
    for pattern, plan_form in FORMS.items():
        matching = [path for path in paths if re.fullmatch(pattern, path.name)]
        if matching:
            parts, info = plan_form(matching)
            return ReadPlan(parts, {"kind": "images", "classes": CLASSES, **info})
    expected = "train_data_batch_1.npz … _10.npz and val_data.npz, the same without .npz, one .hdf5, or .parquet files"
    raise DataError.at(place, "no form of ImageNet-32 is here", f"give a folder that holds {expected}")


# The archives, and the pickles of the same layout


def _plan_batches(form: str, paths: list[Path]) -> ReadPlan:
    """train_data_batch_k and val_data: `data` uint8 [N, 3072] in planes of red, green, blue; `labels` 1..1000."""
    numbered = {}
    for path in paths:
        match = re.search(r"batch_(\d+)", path.name)
        numbered[int(match[1]) if match else 0] = path
    if not any(numbered):
        raise DataError.at(paths[0].parent, "val_data without any train_data_batch", "fetch the training batches too")
    missing = [f"train_data_batch_{k}" if k else "val_data" for k in OFFICIAL_BATCHES if k not in numbered]
    notes = [f"not all of ImageNet-32: {', '.join(missing)} not there"] if missing else []
    parts = []
    for k in sorted(numbered, key=lambda k: (k == 0, k)):
        path = numbered[k]
        if form == "npz":
            n = npz_headers(path)["data"].shape[0]
            if n != OFFICIAL_BATCHES.get(k):
                notes.append(f"{path.name} has {n:,} examples, the published file {OFFICIAL_BATCHES.get(k, 0):,}")
        rows = functools.partial(_npz_rows if form == "npz" else _pickle_rows, path, k != 0)
        parts.append(ReadPart(path.name, path.stat().st_size, rows))
    return ReadPlan(parts, {"format": form, "label_order": DEVKIT_ORDER, "notes": notes})


def npz_headers(path: Path) -> dict[str, npy.Header]:
    """Shapes and types of `data`, `labels` and, where it is there, `mean`, checked against each other and the file.

    Raises:
        DataError: not an archive of exactly these arrays.
    """
    with untrusted(path, "an npz archive"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = sorted(member.filename for member in members)
        if names not in (["data.npy", "labels.npy"], ["data.npy", "labels.npy", "mean.npy"]):
            problem = f"holds {names[:5]}, expected data.npy, labels.npy and perhaps mean.npy"
            raise DataError.at(path, problem, CURE)
        headers = {}
        for member in members:
            with archive.open(member) as stream:
                header = npy.read_header(stream, f"{path}/{member.filename}")
            if member.file_size != header.offset + header.data_bytes:
                problem = f"{member.filename} has {member.file_size:,} bytes, its header promises {header.shape}"
                raise DataError.at(path, problem, CURE)
            headers[member.filename.removesuffix(".npy")] = header
    _check_headers(path, **headers)
    return headers


def _check_headers(path: Path, data: npy.Header, labels: npy.Header, mean: npy.Header | None = None) -> None:
    n = data.shape[0] if data.shape else 0
    if data.shape != (n, rgb32.PIXELS) or data.dtype != np.uint8 or not 0 < n <= MAX_ROWS:
        problem = f"data is {data.dtype} {data.shape}, expected uint8 [N, {rgb32.PIXELS}] with N in 1..{MAX_ROWS:,}"
        raise DataError.at(path, problem, CURE)
    if labels.shape != (n,) or labels.dtype.kind not in "ui":
        raise DataError.at(path, f"labels is {labels.dtype} {labels.shape}, expected whole numbers [{n}]", CURE)
    if mean is not None and (mean.shape != (rgb32.PIXELS,) or mean.dtype.kind not in "uif"):
        raise DataError.at(path, f"mean is {mean.dtype} {mean.shape}, expected numbers [{rgb32.PIXELS}]", CURE)


def _npz_rows(path: Path, train: bool, scratch: Path) -> Iterator[SplitRows]:
    headers = npz_headers(path)
    n = headers["data"].shape[0]
    with untrusted(path, "an npz archive"), zipfile.ZipFile(path) as archive:
        # Not used: one mean and deviation serve all forms. But a mean outside 0..255 tells of another file.
        if "mean" in headers:
            mean = _member(archive, "mean", headers["mean"], path)
            if not ((mean >= 0) & (mean <= 255)).all():
                raise DataError.at(path, "mean has values outside 0..255", CURE)
        labels = _member(archive, "labels", headers["labels"], path)
        check_labels(labels, 1, CLASSES, path)
        with archive.open("data.npy") as stream:
            npy.read_header(stream, path)
            for start in range(0, n, rgb32.CHUNK_ROWS):
                some = labels[start : start + rgb32.CHUNK_ROWS].astype(np.int64) - 1
                planes = np.frombuffer(_exactly(stream, len(some) * rgb32.PIXELS, path), np.uint8)
                yield from _split(rgb32.from_planes(planes), some, start, train)
            _end_of_member(stream, path)


def _member(archive: zipfile.ZipFile, name: str, header: npy.Header, path: Path) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as stream:
        npy.read_header(stream, path)
        content = _exactly(stream, header.data_bytes, path)
        _end_of_member(stream, path)
    return np.frombuffer(content, header.dtype).reshape(header.shape)


def _exactly(stream: npy.ByteStream, n: int, path: Path) -> bytes:
    content = stream.read(n)
    if len(content) != n:
        raise DataError.at(path, f"an array ends {n - len(content):,} bytes early", CURE)
    return content


def _end_of_member(stream: npy.ByteStream, path: Path) -> None:
    if stream.read(1):  # and with the last byte zipfile compares the checksum
        raise DataError.at(path, "an array continues after its end", CURE)


def _split(images: NDArray[np.uint8], labels: NDArray[Any], start: int, train: bool) -> Iterator[SplitRows]:
    """labels: [n] in 0..999; start: index of the first example in its file."""
    arrays: dict[str, NDArray[Any]] = {"images": images, "labels": labels.astype(np.uint16)}
    yield from split_examples(arrays, start) if train else [("test", arrays)]


def _pickle_rows(path: Path, train: bool, scratch: Path) -> Iterator[SplitRows]:
    sandbox.run(batch_pickle.child_rows, path, scratch)
    yield from _from_child(path, scratch, 0, train)


def _from_child(path: Path, scratch: Path, start: int, train: bool) -> Iterator[SplitRows]:
    """The rows that a child process wrote to `scratch`, the first of which is example `start` of its file."""
    labels = np.fromfile(scratch / rgb32.LABELS_FILE, "<u2")
    check_labels(labels, 0, CLASSES - 1, path, start)
    if (scratch / rgb32.IMAGES_FILE).stat().st_size != len(labels) * rgb32.PIXELS:
        raise DataError.at(path, "its reader wrote images and labels of different number", CURE)
    with (scratch / rgb32.IMAGES_FILE).open("rb") as stream:
        for first in range(0, len(labels), rgb32.CHUNK_ROWS):
            some = labels[first : first + rgb32.CHUNK_ROWS]
            content = stream.read(len(some) * rgb32.PIXELS)
            images = np.frombuffer(content, np.uint8).reshape(-1, rgb32.SIDE, rgb32.SIDE, 3)
            yield from _split(images, some, start + first, train)


# HDF5 and parquet


def _plan_hdf5(paths: list[Path]) -> ReadPlan:
    """`encoded_images` (one JPEG's bytes each) and `targets` (0..999): train, validation and test, in that order.

    The sizes of the splits are those in Fuel's `split` attribute where the file has it, and the published ones
    otherwise. The published test images are left out: they have no labels.
    """
    if len(paths) > 1:
        raise DataError.at(paths[0].parent, f"{len(paths)} HDF5 files", "give the one that holds ImageNet")
    (path,) = paths
    with tempfile.TemporaryDirectory() as scratch:
        train, validation = sandbox.run(encoded.hdf5_sizes, path, Path(scratch))
    pieces = [
        (first, min(first + CHILD_ROWS, stop), start == 0)
        for start, stop in ((0, train), (train, train + validation))
        for first in range(start, stop, CHILD_ROWS)
    ]
    weight = path.stat().st_size // len(pieces)
    parts = [
        ReadPart(f"{path.name}[{first}:{last}]", weight, functools.partial(_hdf5_rows, path, first, last, is_train))
        for first, last, is_train in pieces
    ]
    notes = []
    if (train, validation) != (OFFICIAL_TRAIN, OFFICIAL_VALIDATION):
        notes = [f"{train:,} + {validation:,} examples, published: {OFFICIAL_TRAIN:,} + {OFFICIAL_VALIDATION:,}"]
    order = "as in the file; Fuel's converter writes that of the ILSVRC2012 development kit"
    return ReadPlan(parts, {"format": "hdf5", "label_order": order, "notes": notes})


def _hdf5_rows(path: Path, start: int, stop: int, train: bool, scratch: Path) -> Iterator[SplitRows]:
    sandbox.run(encoded.hdf5_rows, path, scratch, start, stop)
    yield from _from_child(path, scratch, start, train)


def _plan_parquet(paths: list[Path]) -> ReadPlan:
    """Files named train*, and val* or else test*: `image` as encoded bytes or as uint8 lists, `label` 0..999."""
    train = [path for path in paths if path.name.startswith("train")]
    held_out = [path for path in paths if path.name.startswith("val")]
    held_out = held_out or [path for path in paths if path.name.startswith("test")]
    if not train:
        names = [path.name for path in paths[:5]]
        raise DataError.at(paths[0].parent, f"no train*.parquet among {names}", "give a folder that holds them")
    parts = []
    total = {True: 0, False: 0}
    for path in train + held_out:
        with tempfile.TemporaryDirectory() as scratch:
            groups = sandbox.run(encoded.parquet_groups, path, Path(scratch))
        start = 0
        for piece in grouped(groups, CHILD_ROWS):
            rows = functools.partial(_parquet_rows, path, piece, start, path in train)
            parts.append(ReadPart(f"{path.name}[{piece[0]}:{piece[-1] + 1}]", sum(groups[i][1] for i in piece), rows))
            start += sum(groups[i][0] for i in piece)
        total[path in train] += start
    notes = []
    if (total[True], total[False]) != (OFFICIAL_TRAIN, OFFICIAL_VALIDATION):
        published = f"{OFFICIAL_TRAIN:,} + {OFFICIAL_VALIDATION:,}"
        notes = [f"{total[True]:,} + {total[False]:,} examples, published: {published}"]
    order = "as in the files; usually that of sorted WordNet ids"
    return ReadPlan(parts, {"format": "parquet", "label_order": order, "notes": notes})


def _parquet_rows(path: Path, groups: list[int], start: int, train: bool, scratch: Path) -> Iterator[SplitRows]:
    sandbox.run(encoded.parquet_images, path, scratch, groups, start)
    yield from _from_child(path, scratch, start, train)


FORMS: dict[str, Callable[[list[Path]], ReadPlan]] = {
    r"(train_data_batch_\d{1,2}|val_data)\.npz": functools.partial(_plan_batches, "npz"),
    r"(train_data_batch_\d{1,2}|val_data)": functools.partial(_plan_batches, "pickle"),
    r".*\.(hdf5|h5)": _plan_hdf5,
    r".*\.parquet": _plan_parquet,
}
"""Names of the files of each form, the preferred one first, and what plans it."""
