"""Files of ours: weights, recipes, logs, checkpoints. NumPy and safetensors only; nothing is pickled.

Whatever is read is untrusted: sizes, names, dtypes and sums are checked before use, and everything wrong is a
`FileError`. Whatever is written is written whole: to a temporary name, synced, then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from lolo import hub, small_fc_spec

WEIGHTS_FORMAT = "lolo-weights"
WEIGHTS_VERSION = 2  # 1, which is still read, had no sum over learner, recipe and card
ABOUT = ("learner", "recipe", "card")
CHECKPOINT_VERSION = 1
MAX_WEIGHTS_BYTES = 64 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_JSON_BYTES = 64 << 20
MAX_LOG_BYTES = 1 << 30
SHIPPED = Path(__file__).parent / "weights"
DEFAULT_WEIGHTS = "lolo-anytime"  # of SHIPPED, what `lolo.load()` and `lolo.torch.LoLO` take when nothing is said

Arrays = dict[str, NDArray[Any]]

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


class FileError(ValueError):
    """A file that can't be used: names the file, what was expected, and what to do."""


class WeightsFile(NamedTuple):
    """Meta-parameters φ and what is known about them."""

    meta_params: Arrays  # float32
    learner: dict[str, Any]  # the architecture: name, hidden, step_mult, ...
    recipe: dict[str, Any]  # of the meta-training, {} if unknown
    card: dict[str, Any]  # what people should know: data, results, realised steps, ...
    sha256: str  # of the meta-parameters


# --- writing whole files ------------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Wait until a file's, or a folder's, content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Keep a folder to this process; False if another process has it. The lock ends with the process that holds it.

    On file systems that have no locks, as some of networks, everyone is told True.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except OSError as error:
            free = error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
        yield free
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people to read, whole or not at all."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size. Raises FileError."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FileError(f"{path}: {path.stat().st_size} bytes of JSON; at most {MAX_JSON_BYTES} are read.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path}: can't be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{path}: not valid JSON ({error}).") from error


def json_line(row: dict[str, Any]) -> str:
    """One JSON object as a line. A number that JSON can't hold (NaN, inf) is written as a string."""
    return json.dumps(json_safe(row), allow_nan=False)


def append_json_line(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON object to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json_line(row) + "\n")


def json_safe(value: Any) -> Any:
    """The value with strings in place of numbers that JSON can't hold."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def number(value: Any) -> float:
    """A number of a row; NaN and infinities lie there as strings. Raises ValueError."""
    if value in ("nan", "inf", "-inf") or (isinstance(value, int | float) and not isinstance(value, bool)):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError(f"{str(value)[:40]!r} is not a number")


def whole(value: Any) -> int:
    """A whole number of a row, from 0 on. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53:
        return value
    raise ValueError(f"{str(value)[:40]!r} is not a whole number from 0 to 2⁵³")


def text(value: Any) -> str:
    """A word of a row. Raises ValueError."""
    if isinstance(value, str):
        return value
    raise ValueError(f"{str(value)[:40]!r} is not a string")


def flag(value: Any) -> bool:
    """True or false in a row. Raises ValueError."""
    if isinstance(value, bool):
        return value
    raise ValueError(f"{str(value)[:40]!r} is neither true nor false")


def checked(read: Callable[[Any], Any], value: Any, what: str) -> Any:
    """The value as `read` has it. Raises FileError, which names `what`."""
    try:
        return read(value)
    except ValueError as error:
        raise FileError(f"{what}: {error}.") from error


def listed(item: Callable[[Any], Any], least: int = 0) -> Callable[[Any], list[Any]]:
    """A list in a row of at least so many elements, each read by `item`."""

    def read(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise ValueError(f"{str(value)[:40]!r} is not a list{f' of at least {least}' if least else ''}")
        return [item(element) for element in value]

    return read


def named(item: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """An object in a row, each of its values read by `item`."""

    def read(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{str(value)[:40]!r} is not an object")
        return {key: item(element) for key, element in value.items()}

    return read


def fields(**readers: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    """A row that must have these fields, each read by its reader; others are left as they are."""

    def read(row: Any) -> dict[str, Any]:
        if not isinstance(row, dict):
            raise ValueError("is not a JSON object")
        for name, reader in readers.items():
            if name not in row:
                raise ValueError(f"field {name!r} is missing")
            try:
                row[name] = reader(row[name])
            except ValueError as error:
                raise ValueError(f"field {name!r}: {error}") from error
        return row

    return read


def read_json_lines(path: Path, read: Callable[[Any], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a log, each checked by `read`, which raises ValueError (see `fields`). Raises FileError.

    A half-written last line, as a killed run leaves it, is skipped.
    """
    try:
        if path.stat().st_size > MAX_LOG_BYTES:
            raise FileError(f"{path}: {path.stat().st_size} bytes; at most {MAX_LOG_BYTES} are read.")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise FileError(f"{path}: can't be read ({error.strerror}).") from error
    for count, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if count == len(lines):
                return
            raise FileError(f"{path}, line {count}: not valid JSON ({error}).") from error
        try:
            checked = read(row)
        except ValueError as error:
            raise FileError(f"{path}, line {count}: {error}.") from error
        yield checked


# --- safetensors --------------------------------------------------------------------------------------------------


def contiguous(array: NDArray[Any]) -> NDArray[Any]:
    """The array in C order, its shape kept: `np.ascontiguousarray` alone makes [] into [1]."""
    return np.ascontiguousarray(array).reshape(np.shape(array))


def pack(arrays: Arrays, metadata: dict[str, str] | None = None) -> bytes:
    """Arrays as safetensors. Made contiguous first: the writer stores wrong numbers for strided arrays."""
    return safetensors.numpy.save({name: contiguous(x) for name, x in arrays.items()}, metadata)


def unpack(content: bytes, source: str) -> tuple[Arrays, dict[str, str]]:
    """Arrays and metadata of safetensors bytes, every size checked before use. Raises FileError."""
    if len(content) < 8:
        raise FileError(f"{source}: {len(content)} bytes; a safetensors file has at least 8. Is it truncated?")
    (length,) = struct.unpack("<Q", content[:8])
    if length > min(len(content) - 8, MAX_HEADER_BYTES):
        raise FileError(f"{source}: its header claims {length} bytes of {len(content)}: not safetensors, or truncated.")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source}: the header at offset 8 is not JSON: not safetensors, or damaged.") from error
    if not isinstance(header, dict):
        raise FileError(f"{source}: the header at offset 8 is not a JSON object.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(f"{source}: __metadata__ must map names to strings.")
    data = memoryview(content)[8 + length :]
    return {name: _tensor(name, entry, data, source) for name, entry in header.items()}, metadata


def _tensor(name: str, entry: Any, data: memoryview, source: str) -> NDArray[Any]:
    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48

    if not isinstance(entry, dict):
        raise FileError(f"{source}: tensor {name!r} has no description in the header.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _DTYPES:
        raise FileError(f"{source}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(_DTYPES)}.")
    if not isinstance(shape, list) or len(shape) > 32 or not all(whole(extent) for extent in shape):
        raise FileError(f"{source}: tensor {name!r} has shape {shape!r}; expected whole numbers.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(whole(offset) for offset in offsets):
        raise FileError(f"{source}: tensor {name!r} has data_offsets {offsets!r}; expected two whole numbers.")
    start, end = offsets
    size = np.dtype(_DTYPES[dtype]).itemsize
    for extent in shape:
        size *= extent
    if not start <= end <= len(data) or end - start != size:
        raise FileError(
            f"{source}: tensor {name!r} needs {size} bytes and lies at {start} to {end} of {len(data)}: truncated?"
        )
    return np.frombuffer(data[start:end], _DTYPES[dtype]).reshape(shape).copy()


def digest(arrays: Arrays) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names."""
    hasher = hashlib.sha256()
    for name in sorted(arrays):
        array = contiguous(arrays[name])
        hasher.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


# --- weights ------------------------------------------------------------------------------------------------------


def write_weights(
    path: Path | str,
    meta_params: Arrays,
    *,
    learner: dict[str, Any],
    recipe: dict[str, Any] | None = None,
    card: dict[str, Any] | None = None,
) -> None:
    """Write meta-parameters with their architecture, recipe and card as one safetensors file."""
    arrays = {name: contiguous(np.asarray(x, np.float32)) for name, x in meta_params.items()}
    about = {"learner": learner, "recipe": recipe or {}, "card": json_safe(card or {})}
    metadata = {
        "format": WEIGHTS_FORMAT,
        "format_version": str(WEIGHTS_VERSION),
        "sha256": digest(arrays),
        **{key: json.dumps(value) for key, value in about.items()},
    }
    write_bytes(Path(path), pack(arrays, metadata | {"about_sha256": about_digest(metadata)}))


def about_digest(metadata: dict[str, str]) -> str:
    """sha256 over what weights say about themselves, so that a flipped bit there is recognised too."""
    return hashlib.sha256("\0".join(metadata.get(key, "") for key in ABOUT).encode(errors="replace")).hexdigest()


def shipped_weights() -> list[str]:
    """Names of the weights inside the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def read_weights(name_or_path: str | Path) -> WeightsFile:
    """Weights by the name of shipped ones, from a file, or from the Hub (`user/repo[@revision][/file.safetensors]`).

    Raises FileError: no such file or name, not to be had from the Hub, not ours, another version, damaged, or shapes
    that don't fit.
    """
    path = _locate(name_or_path)
    size = path.stat().st_size
    if size > MAX_WEIGHTS_BYTES:
        raise FileError(f"{path}: {size} bytes; weights have at most {MAX_WEIGHTS_BYTES}.")
    arrays, metadata = unpack(path.read_bytes(), str(path))
    if metadata.get("format") != WEIGHTS_FORMAT:
        raise FileError(f"{path}: safetensors, but not lolo weights. Weights of other tools: see lolo.interop.")
    version = metadata.get("format_version")
    if version not in ("1", str(WEIGHTS_VERSION)):
        raise FileError(
            f"{path}: weights of format_version {version!r}; this lolo reads 1 to {WEIGHTS_VERSION}. "
            "Read it with the lolo that wrote it, or upgrade lolo."
        )
    if metadata.get("sha256") != digest(arrays):
        raise FileError(f"{path}: the sha256 of its numbers is not the one it states: damaged. Get the file again.")
    if version != "1" and metadata.get("about_sha256") != about_digest(metadata):
        raise FileError(f"{path}: the sha256 of learner, recipe and card is not the one it states: damaged.")
    learner, recipe, card = (_json_object(metadata, key, path) for key in ABOUT)
    check_meta_params(arrays, learner, str(path))
    return WeightsFile(arrays, learner, recipe, card, metadata["sha256"])


def _locate(name_or_path: str | Path) -> Path:
    if str(name_or_path) in shipped_weights():
        return SHIPPED / f"{name_or_path}.safetensors"
    path = Path(name_or_path)
    if path.is_file():
        return path
    wanted = hub.parse(name_or_path) if isinstance(name_or_path, str) else None
    if wanted is None:
        names = ", ".join(shipped_weights()) or "none"
        raise FileError(
            f"{name_or_path}: no such weights file. Give a path, a name that ships with lolo ({names}), or user/repo "
            "of the Hugging Face Hub."
        )
    try:
        return hub.fetch(wanted)
    except hub.HubError as error:
        raise FileError(str(error)) from error


def _json_object(metadata: dict[str, str], key: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: metadata {key!r} is not JSON.") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: metadata {key!r} is not a JSON object.")
    return value


def check_meta_params(arrays: Arrays, learner: dict[str, Any], source: str) -> None:
    """Raise FileError unless the arrays are finite and have the names and shapes of the architecture."""
    if learner.get("name") == "small_fc":
        hidden, decays = learner.get("hidden"), bool(learner.get("learn_decays", False))
        if not isinstance(hidden, int) or isinstance(hidden, bool) or not 1 <= hidden <= 4096:
            raise FileError(f"{source}: hidden={hidden!r}; expected a whole number from 1 to 4096.")
        for name in ("step_mult", "exp_mult", "weight_decay"):
            _check_number(learner, name, source)
        for name in ("clock_limit", "step_decay"):
            if learner.get(name) is not None:
                _check_number(learner, name, source)
        if learner.get("step_decay") is not None and not learner["step_decay"] > 0:
            raise FileError(f"{source}: step_decay={learner['step_decay']!r}; expected a positive number of steps.")
        expected = small_fc_spec.weight_shapes(hidden, learn_decays=decays)
    elif learner.get("name") == "sgd":
        expected = {"log_learning_rate": (), "momentum_logit": ()}
    else:
        raise FileError(f"{source}: unknown learned optimizer {learner.get('name')!r}; known: small_fc, sgd.")
    found = {name: tuple(x.shape) for name, x in arrays.items()}
    if found != expected:
        raise FileError(f"{source}: has tensors {found}; a {learner['name']} has {expected}.")
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise FileError(f"{source}: tensor {name!r} is {array.dtype}; expected float32.")
        if not np.isfinite(array).all():
            raise FileError(f"{source}: tensor {name!r} has numbers that are not finite.")


def _check_number(learner: dict[str, Any], name: str, source: str) -> None:
    try:
        finite = math.isfinite(number(learner.get(name)))
    except ValueError:
        finite = False
    if not finite:
        raise FileError(f"{source}: {name}={str(learner.get(name))[:40]!r}; expected a finite number.")


# --- checkpoints --------------------------------------------------------------------------------------------------


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of an outer step lies."""
    return run / "checkpoints" / f"{step:08d}"


Settle = Callable[[Any, Callable[[list[Any]], Any]], Any]
"""(what this process says, decide) -> what process 0 decided on what all said; see `gang.Gang.settle`."""


def alone(mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """The `Settle` of a single process."""
    return decide([mine])


def write_checkpoint(
    run: Path,
    step: int,
    arrays: Arrays,
    about: dict[str, Any],
    keep: int = 3,
    *,
    own: Arrays | None = None,
    rows: tuple[int, int] = (0, 0),
    settle: Settle = alone,
) -> Path:
    """Write a checkpoint whole or not at all, and drop all but the newest `keep`.

    Args:
      arrays: what every process holds alike; process 0 writes it.
      own: what this process alone holds: the given rows of arrays whose first axis is spread over processes.
      settle: how processes agree. All must call this, with one `run` on a file system that all see.

    Raises: FileError if processes hold different `arrays`; OSError.
    """
    draft = Path(settle(None, lambda _: str(_draft(run, step))))
    mine = {"arrays": digest(arrays), "files": {}}
    try:
        if own:
            name = f"slots-{rows[0]:08d}.safetensors"
            mine["files"] = {name: {**_write_synced(draft / name, pack(own)), "rows": list(rows)}}
        return Path(settle(mine, lambda said: str(_finish(run, step, draft, arrays, said, about, keep))))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft(run: Path, step: int) -> Path:
    final = checkpoint_folder(run, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(".*.tmp"):  # by processes that were killed while they wrote
        shutil.rmtree(left, ignore_errors=True)
    draft = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    draft.mkdir()
    return draft


def _write_synced(path: Path, content: bytes) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _finish(
    run: Path, step: int, draft: Path, arrays: Arrays, said: list[Any], about: dict[str, Any], keep: int
) -> Path:
    odd = [index for index, other in enumerate(said) if other["arrays"] != said[0]["arrays"]]
    if odd:
        raise FileError(
            f"at outer step {step} process {odd[0]} holds other numbers than process 0 where both must be equal: these "
            "hosts do not compute the same bits. Use hosts of one kind, with the same XLA_FLAGS. Nothing was written."
        )
    parts = {"state.safetensors": _write_synced(draft / "state.safetensors", pack(arrays))}
    for other in said:
        parts |= other["files"]
    manifest = {"format_version": CHECKPOINT_VERSION, "outer_step": step, "files": parts, **about}
    write_json(draft / "manifest.json", manifest)
    final = checkpoint_folder(run, step)
    if final.exists():  # written before by a run that ended later than this one resumed from
        shutil.rmtree(final)
    os.rename(draft, final)
    sync(final.parent)
    for step_ in checkpoints(run)[:-keep]:
        shutil.rmtree(checkpoint_folder(run, step_), ignore_errors=True)
    return final


def checkpoints(run: Path) -> list[int]:
    """Outer steps that have a checkpoint, oldest first."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit() and len(name) == 8)


def read_checkpoint(run: Path, step: int, rows: tuple[int, int] | None = None) -> tuple[Arrays, dict[str, Any]]:
    """Arrays and manifest of one checkpoint, verified. Raises FileError.

    Args:
      rows: of the arrays that processes wrote in parts, only these rows; all, if None. The parts need not be those of
        as many processes.
    """
    folder, manifest, parts = _described(run, step)
    arrays, _ = unpack(_read_verified(folder / "state.safetensors", manifest), str(folder / "state.safetensors"))
    stop = parts[-1].stop if parts else 0
    first, end = rows or (0, stop)
    if parts and end > stop:
        raise FileError(f"{folder}/manifest.json: has {stop} rows, and rows up to {end} are asked for.")
    pieces: list[Arrays] = []
    for part in parts:
        if part.start < end and part.stop > first:
            content, _ = unpack(_read_verified(folder / part.name, manifest), str(folder / part.name))
            if any(x.ndim == 0 or len(x) != part.stop - part.start for x in content.values()):
                raise FileError(f"{folder / part.name}: does not have the rows that manifest.json states.")
            cut = slice(max(first - part.start, 0), end - part.start)
            pieces.append({name: x[cut] for name, x in content.items()})
    kinds = [{name: (x.dtype, x.shape[1:]) for name, x in piece.items()} for piece in pieces]
    if any(kind != kinds[0] or set(kind) & set(arrays) for kind in kinds):
        names = ", ".join(part.name for part in parts)
        raise FileError(f"{folder}: {names} must hold the same tensors, and none of state.safetensors.")
    for name in pieces[0] if pieces else ():
        arrays[name] = np.concatenate([piece[name] for piece in pieces])
    return arrays, manifest


class _Part(NamedTuple):
    start: int
    stop: int
    name: str


def _described(run: Path, step: int) -> tuple[Path, dict[str, Any], list[_Part]]:
    """Folder, manifest and parts in the order of their rows. Raises FileError."""
    folder = checkpoint_folder(run, step)
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format_version") != CHECKPOINT_VERSION:
        raise FileError(f"{folder}/manifest.json: not a checkpoint of format_version {CHECKPOINT_VERSION}.")
    if manifest.get("outer_step") != step:
        raise FileError(f"{folder}/manifest.json: is of outer step {manifest.get('outer_step')!r}, not {step}.")
    described = manifest.get("files")
    if not isinstance(described, dict) or "state.safetensors" not in described:
        raise FileError(f"{folder}/manifest.json: does not describe state.safetensors.")
    parts = []
    for name, entry in described.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "sha256" not in entry:
            raise FileError(f"{folder}/manifest.json: does not describe {name!r}.")
        if name == "state.safetensors":
            continue
        bounds = entry.get("rows")
        if not (isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(bound, int) for bound in bounds)):
            raise FileError(f"{folder}/manifest.json: {name!r} has no rows.")
        if name != f"slots-{bounds[0]:08d}.safetensors":  # also keeps every path inside the folder
            raise FileError(f"{folder}/manifest.json: {name!r} is no name of rows {bounds}.")
        parts.append(_Part(bounds[0], bounds[1], name))
    parts.sort()
    ends = [0, *(part.stop for part in parts)]
    if any(part.start != end or part.stop <= part.start for part, end in zip(parts, ends, strict=False)):
        raise FileError(f"{folder}/manifest.json: its parts do not hold all rows once.")
    return folder, manifest, parts


def _read_verified(path: Path, manifest: dict[str, Any]) -> bytes:
    expected = manifest["files"][path.name]
    try:
        if path.stat().st_size != expected["bytes"]:
            raise FileError(f"{path}: {path.stat().st_size} bytes, manifest.json says {expected['bytes']}: truncated.")
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: can't be read ({error.strerror}).") from error
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise FileError(f"{path}: its sha256 is not that of manifest.json: damaged.")
    return content


def newest_whole(run: Path, warn: Callable[[str], None]) -> int | None:
    """Outer step of the newest checkpoint that is whole; `warn` is told of each that is not. None if there is none."""
    for step in reversed(checkpoints(run)):
        try:
            folder, manifest, parts = _described(run, step)
            for name in ("state.safetensors", *(part.name for part in parts)):
                _read_verified(folder / name, manifest)
            return step
        except FileError as error:
            warn(f"{error} Using the checkpoint before it.")
    return None


def newest_checkpoint(
    run: Path,
    warn: Callable[[str], None],
    rows: tuple[int, int] | None = None,
    settle: Settle = alone,
) -> tuple[Arrays, dict[str, Any]] | None:
    """The newest checkpoint that is whole; `warn` is told of each that is not. None if there is none."""
    step = settle(None, lambda _: newest_whole(run, warn))
    return None if step is None else read_checkpoint(run, step, rows)
