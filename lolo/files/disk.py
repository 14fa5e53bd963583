"""Files on disk: atomic writes, locks, hashes and JSON.

Whatever is read is untrusted: its size is checked before use, and everything wrong is a `FileError`. Whatever is
written is complete or absent: it goes to a temporary name, is synced, then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: `locked` grants every lock, `sync` leaves folders to the system
    fcntl = None  # type: ignore[assignment]

MAX_JSON_BYTES = 64 << 20
HASH_CHUNK_BYTES = 16 << 20


class FileError(ValueError):
    """A file that can't be used: names the file, what was expected, and what to do.

    >>> try:
    ...     lolo.load("missing.safetensors")
    ... except lolo.FileError as error:
    ...     print(str(error)[:45])
    missing.safetensors: no such weights file. Gi
    """


def sync(folder: Path) -> None:
    """Wait until the names in a folder are on the disk. Does nothing on Windows, which can't open folders."""
    if fcntl is None:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Lock a folder, or a file that is created for it; False if another process has the lock.

    The lock ends with the process that holds it. Where the system or the file system has no locks (Windows, some
    network file systems), every process gets True.
    """
    if fcntl is None:
        yield True
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
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
    """Write a file completely or not at all."""
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


def is_litter(path: Path) -> bool:
    """Whether a file was left by a file manager (.DS_Store, ._x, Thumbs.db): no one's data, wherever it lies."""
    return path.name.startswith("._") or path.name.lower() in (".ds_store", "thumbs.db", "desktop.ini")


def leftovers(path: Path) -> list[Path]:
    """Temporary files that killed calls of `write_bytes` on this path have left."""
    return list(path.parent.glob(f".{path.name}.*.tmp"))


def write_json(path: Path, data: Any) -> None:
    """Write JSON for people to read, completely or not at all."""
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


def sha256_of(path: Path, on_progress: Callable[[int], None] = lambda done: None) -> str:
    """sha256 of a file, read in pieces; `on_progress` gets the number of bytes read so far. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while content := stream.read(HASH_CHUNK_BYTES):
            digest.update(content)
            on_progress(stream.tell())
    return digest.hexdigest()


def json_safe(value: Any) -> Any:
    """The value with strings instead of numbers that JSON can't hold."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
