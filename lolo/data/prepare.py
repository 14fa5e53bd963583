"""Preparation of data sets: each is read once, into plain arrays on disk that are mapped into memory from then on.

A prepared folder holds one .npy file for each array of each split, and `manifest.json`, which says what they are and
what their sha256 is. While `prepare` runs, rows are appended to `*.partial` files, and after each part (such as one
archive) `journal.json` says how far they are valid: a killed run resumes after the last finished part.

    prepare("imagenet32", Path("downloads/imagenet32"), Path("prepared/imagenet32"))
    images = open_prepared(Path("prepared/imagenet32"))["train"]["images"]  # numpy.memmap
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from lolo.data import fineweb, idx, imagenet, npy, text, textures, tokens
from lolo.data.errors import DataError
from lolo.data.read_plan import ReadPart, ReadPlan
from lolo.files import disk
from lolo.files.disk import FileError
from lolo.files.settings import did_you_mean

FORMAT_VERSION = 1
MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.json", "prepare.lock"
DTYPES = ("|u1", "<u2")

OnBytes = Callable[[int, int, str], None]
"""Called with work done, all work (both in bytes of the source) and a line of text."""

PLANS: dict[str, Callable[[Path | None], ReadPlan]] = {
    "imagenet32": imagenet.plan,
    "fineweb": fineweb.plan,
    "idx": idx.plan,
    "text": text.plan_tokens,
    "characters": text.plan_characters,
    "textures": textures.plan,
    "books": tokens.plan_books,
}
"""The data sets that `prepare` reads, by name: each function takes the source and returns the parts."""


class Prepared(NamedTuple):
    """One data set that `list_prepared` returns."""

    folder: Path
    name: str
    counts: dict[str, int]  # of each split: examples, tokens or symbols
    data_bytes: int
    problem: str  # "" where there is none; else what is wrong and what to do


def _silent(done: int, total: int, line: str) -> None:
    del done, total, line


def prepare(name: str, source: Path | None, target: Path, on_progress: OnBytes = _silent) -> dict[str, Any]:
    """Read a data set and write it as arrays, once; after a kill the same call resumes.

    Args:
        name: a key of `PLANS`.
        source: the folder or file that holds it; None for data sets that need none or are installed in a known place.
        target: an empty folder, created if it is missing. If it holds this data set already, nothing is done.
        on_progress: called after each part.
    Returns: the manifest.
    Raises:
        DataError: the source is not what its format says, or the target holds something else.

    >>> Path("book.txt").write_text("It was a dark and stormy night.\\n" * 100)
    3200
    >>> manifest = prepare("characters", Path("book.txt"), Path("prepared/characters"))
    >>> manifest["name"]
    'characters'
    """
    if name not in PLANS:
        raise DataError(f"No data set is called {name!r}; {did_you_mean(name, PLANS)}")
    if target.exists() and not target.is_dir():
        raise DataError.at(target, "is a file", "give a folder")
    target.mkdir(parents=True, exist_ok=True)
    with _locked(target):
        if (target / MANIFEST).exists():
            return _already_there(name, target)
        plan = PLANS[name](source)
        journal = _begin(name, plan, target)
        total = sum(part.weight for part in plan.parts)
        done = sum(part.weight for part in plan.parts[: journal["done"]])
        for note in plan.info.get("notes", []):
            on_progress(done, total, note)
        for part in plan.parts[journal["done"] :]:
            _append_part(part, target, journal)
            done += part.weight
            on_progress(done, total, f"{part.name} ({journal['done']} of {len(plan.parts)})")
        manifest = _finish(name, plan, target, journal, on_progress)
        on_progress(total, total, "done")
    return manifest


def _already_there(name: str, target: Path) -> dict[str, Any]:
    manifest = read_manifest(target)
    if manifest["name"] != name:
        raise DataError.at(target, f"holds {manifest['name']!r} already", "give another folder, or delete this one")
    for _, array in _arrays(manifest):
        _check_array(target, array)
    (target / JOURNAL).unlink(missing_ok=True)  # left by a kill just after the manifest was written
    return manifest


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    with disk.locked(target / LOCK) as free:
        if not free:
            raise DataError.at(target, "another `prepare` is at work here", "wait for it")
        yield


# The journal: {"fingerprint", "done": parts, "arrays": {"train_images": {"split", "array", "row", "dtype", "rows"}}}


def _begin(name: str, plan: ReadPlan, target: Path) -> dict[str, Any]:
    """The journal to continue from, and partial files cut back to the rows that it counts."""
    parts = [[part.name, part.weight] for part in plan.parts]
    fingerprint = hashlib.sha256(json.dumps([FORMAT_VERSION, name, parts]).encode()).hexdigest()
    for path in disk.leftovers(target / JOURNAL) + disk.leftovers(target / MANIFEST):
        path.unlink()
    if not (target / JOURNAL).exists():
        others = [path.name for path in target.iterdir() if path.name != LOCK and not disk.is_litter(path)]
        if others:
            raise DataError.at(target, f"holds other files ({sorted(others)[0]})", "give an empty folder")
        journal: dict[str, Any] = {"fingerprint": fingerprint, "done": 0, "arrays": {}}
        disk.write_json(target / JOURNAL, journal)
    else:
        journal = _read_json(target / JOURNAL)
        if journal.get("fingerprint") != fingerprint:
            problem = f"an unfinished `prepare` of another source or data set than {name!r}"
            raise DataError.at(target, problem, "give the same source, or delete this folder")
    for path in target.glob("*.partial"):
        if path.is_dir():
            shutil.rmtree(path)  # a part's scratch folder, left by a kill
        elif path.stem not in journal["arrays"]:
            path.unlink()
    for key, array in journal["arrays"].items():
        partial = target / f"{key}.partial"
        length = npy.HEADER_BYTES + array["rows"] * _row_bytes(array)
        if partial.exists() and partial.stat().st_size >= length:
            os.truncate(partial, length)
        elif not (target / f"{key}.npy").exists():
            raise DataError.at(partial, "shorter than the journal says", "delete the folder and start again")
    return journal


def _append_part(part: ReadPart, target: Path, journal: dict[str, Any]) -> None:
    """Append the rows of one part, sync them, then count them in the journal."""
    with contextlib.ExitStack() as stack:
        scratch = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="scratch-", suffix=".partial", dir=target))
        )
        files: dict[str, IO[bytes]] = {}
        arrays = {key: dict(array) for key, array in journal["arrays"].items()}
        for split, rows in part.rows(scratch):
            for name, values in rows.items():
                key = f"{split}_{name}"
                dtype = "|u1" if values.dtype == np.uint8 else "<u2"
                row = {"split": split, "array": name, "row": list(values.shape[1:]), "dtype": dtype}
                array = arrays.setdefault(key, {**row, "rows": 0})
                if {**row, "rows": array["rows"]} != array or values.dtype != np.dtype(dtype):
                    problem = f"{name} of type {values.dtype} and shape {values.shape[1:]} after {array}"
                    raise DataError.at(part.name, problem, "give the files of one data set")
                if key not in files:
                    files[key] = stack.enter_context(_opened_for_append(target / f"{key}.partial"))
                files[key].write(np.ascontiguousarray(values, dtype).data)
                array["rows"] += len(values)
        for stream in files.values():
            stream.flush()
            os.fsync(stream.fileno())
    journal["arrays"] = arrays
    journal["done"] += 1
    disk.write_json(target / JOURNAL, journal)


def _opened_for_append(path: Path) -> IO[bytes]:
    stream = path.open("ab")
    if stream.tell() == 0:
        stream.write(bytes(npy.HEADER_BYTES))  # space for the header, which needs the number of rows
    return stream


def _finish(name: str, plan: ReadPlan, target: Path, journal: dict[str, Any], on_progress: OnBytes) -> dict[str, Any]:
    """Headers, hashes, final names, manifest. After a kill, any of these steps may be half done."""
    if not journal["arrays"]:
        raise DataError.at(target, "the source held no examples at all", "check what you gave as source")
    splits: dict[str, dict[str, Any]] = {}
    size = sum(array["rows"] * _row_bytes(array) for array in journal["arrays"].values())
    hashed = 0
    for key, array in sorted(journal["arrays"].items()):
        shape = (array["rows"], *array["row"])
        partial, final = target / f"{key}.partial", target / f"{key}.npy"
        if partial.exists():
            with partial.open("r+b") as stream:
                stream.write(npy.format_header(shape, array["dtype"]))
                stream.flush()
                os.fsync(stream.fileno())
        current = partial if partial.exists() else final
        digest = disk.sha256_of(
            current, functools.partial(_report, on_progress, hashed, size, f"checksum of {final.name}")
        )
        os.replace(current, final)
        entry = {"file": final.name, "shape": list(shape), "dtype": array["dtype"], "sha256": digest}
        split = splits.setdefault(array["split"], {"count": shape[0], "arrays": {}})
        if split["count"] != shape[0]:
            raise DataError.at(target, f"arrays of different length in {array['split']}", "delete it and start again")
        split["arrays"][array["array"]] = entry
        hashed += array["rows"] * _row_bytes(array)
    files = [{"name": part.name, "bytes": part.weight} for part in plan.parts]
    manifest = {"format_version": FORMAT_VERSION, "name": name, **plan.info, "splits": splits, "source": files}
    disk.write_json(target / MANIFEST, manifest)
    (target / JOURNAL).unlink()
    return manifest


def _row_bytes(array: dict[str, Any]) -> int:
    return math.prod(array["row"]) * np.dtype(array["dtype"]).itemsize


def _report(on_progress: OnBytes, done: int, total: int, line: str, more: int) -> None:
    on_progress(min(done + more, total), total, line)


def _read_json(path: Path) -> Any:
    if not path.exists():
        raise DataError.at(path, "not there", "prepare the data first: lolo data prepare")
    cure = "delete the folder and prepare the data again"
    try:
        content = disk.read_json(path)
    except FileError as error:
        raise DataError(f"{str(error).removesuffix('.')}; {cure}.") from error
    if not isinstance(content, dict):
        raise DataError.at(path, "holds no JSON object", cure)
    return content


# Reading what was prepared


def read_manifest(target: Path) -> dict[str, Any]:
    """The manifest of a prepared folder, with every field that `open_prepared` relies on checked.

    Raises:
        DataError: there is none, or it is not one of this format version.
    """
    path = target / MANIFEST
    manifest = _read_json(path)
    cure = "prepare the data again"
    if manifest.get("format_version") != FORMAT_VERSION:
        problem = f"format_version {manifest.get('format_version')!r}, expected {FORMAT_VERSION}"
        raise DataError.at(path, problem, "use the lolo that wrote it, or " + cure)
    try:
        sound = isinstance(manifest["name"], str) and len(manifest["splits"]) > 0
        for split in manifest["splits"].values():
            for array in split["arrays"].values():
                plain = array["file"] == os.path.basename(array["file"]) and array["file"].endswith(".npy")
                whole = all(type(n) is int and 0 < n < 1 << 48 for n in array["shape"]) and len(array["shape"]) <= 5
                typed = array["dtype"] in DTYPES and isinstance(array["sha256"], str)
                sound = sound and plain and whole and typed and array["shape"][0] == split["count"]
    except (KeyError, TypeError, AttributeError, IndexError):
        sound = False
    if not sound:
        raise DataError.at(path, "fields are missing or wrong", cure)
    return manifest


def _arrays(manifest: dict[str, Any]) -> list[tuple[tuple[str, str], dict[str, Any]]]:
    return [
        ((split, name), array)
        for split, content in manifest["splits"].items()
        for name, array in content["arrays"].items()
    ]


def _check_array(target: Path, array: dict[str, Any]) -> Path:
    """The path of one array, after its header and size have been compared with the manifest."""
    path = target / array["file"]
    cure = "prepare the data again in an empty folder"
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header = npy.read_header(stream, path)
    except OSError as error:
        raise DataError.at(path, f"can't be read ({error.strerror})", cure) from None
    if header.shape != tuple(array["shape"]) or header.dtype != np.dtype(array["dtype"]):
        problem = f"{header.dtype} {header.shape}, the manifest says {array['dtype']} {tuple(array['shape'])}"
        raise DataError.at(path, problem, cure)
    if size != header.offset + header.data_bytes:
        raise DataError.at(path, f"{size:,} bytes, expected {header.offset + header.data_bytes:,}", cure)
    return path


def open_prepared(target: Path) -> dict[str, dict[str, np.memmap]]:
    """All arrays of a prepared folder, mapped and read-only: `open_prepared(target)["train"]["images"]`.

    Sizes and types are checked, contents are not: see `verify`.

    Raises:
        DataError: an array is missing, or not what the manifest says.

    >>> manifest = prepare("books", None, Path("prepared/books"))
    >>> open_prepared(Path("prepared/books"))["train"]["tokens"].dtype
    dtype('uint16')
    """
    splits: dict[str, dict[str, np.memmap]] = {}
    for (split, name), array in _arrays(read_manifest(target)):
        path = _check_array(target, array)
        mapped = np.lib.format.open_memmap(path, mode="r")
        splits.setdefault(split, {})[name] = mapped
    return splits


def verify(target: Path, on_progress: OnBytes = _silent) -> dict[str, Any]:
    """Compare every array with its sha256. Returns the manifest.

    Raises:
        DataError: names the first file that is damaged or missing.

    >>> manifest = prepare("books", None, Path("prepared/books"))
    >>> verify(Path("prepared/books")) == manifest
    True
    """
    manifest = read_manifest(target)
    arrays = [array for _, array in _arrays(manifest)]
    total = sum(math.prod(array["shape"]) * np.dtype(array["dtype"]).itemsize for array in arrays)
    done = 0
    for array in arrays:
        path = _check_array(target, array)
        actual = disk.sha256_of(path, functools.partial(_report, on_progress, done, total, path.name))
        if actual != array["sha256"]:
            problem = f"sha256 {actual}, the manifest says {array['sha256']}"
            raise DataError.at(path, problem, "prepare the data again in an empty folder")
        done += path.stat().st_size
    return manifest


def list_prepared(folder: Path) -> list[Prepared]:
    """The prepared data sets in a folder and in those directly below it. Unfinished and damaged ones have a problem.

    Raises:
        DataError: there is no such folder.

    >>> manifest = prepare("books", None, Path("prepared/books"))
    >>> [prepared.name for prepared in list_prepared(Path("prepared")) if not prepared.problem]
    ['books']
    """
    if not folder.is_dir():
        raise DataError.at(folder, "there is no such folder", "give the one that holds prepared data")
    places = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return [_inspect(place) for place in places if (place / MANIFEST).exists() or (place / JOURNAL).exists()]


def _inspect(place: Path) -> Prepared:
    if not (place / MANIFEST).exists():
        return Prepared(place, "?", {}, 0, "unfinished; run the same `lolo data prepare` again")
    try:
        manifest = read_manifest(place)
        paths = [_check_array(place, array) for _, array in _arrays(manifest)]
    except DataError as error:
        return Prepared(place, "?", {}, 0, str(error))
    counts = {split: content["count"] for split, content in manifest["splits"].items()}
    return Prepared(place, manifest["name"], counts, sum(path.stat().st_size for path in paths), "")
