"""Safetensors: named arrays as bytes, every size checked before use; nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from lolo.files.disk import FileError

MAX_HEADER_BYTES = 16 << 20

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
    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48

    if not isinstance(entry, dict):
        raise FileError(f"{source}: tensor {name!r} has no description in the header.")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if dtype not in _DTYPES:
        raise FileError(f"{source}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(_DTYPES)}.")
    if not isinstance(shape, list) or len(shape) > 32 or not all(is_size(extent) for extent in shape):
        raise FileError(f"{source}: tensor {name!r} has shape {shape!r}; expected whole numbers.")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(offset) for offset in offsets):
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
