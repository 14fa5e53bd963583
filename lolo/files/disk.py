"""Files of ours: weights, recipes, logs, checkpoints. NumPy and safetensors only; nothing is pickled.

Whatever is read is untrusted: sizes, names, dtypes and sums are checked before use, and everything wrong is a
`FileError`. Whatever is written is written whole: to a temporary name, synced, then renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 64 << 20


class FileError(ValueError):
    """A file that can't be used: names the file, what was expected, and what to do."""


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
