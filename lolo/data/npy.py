"""Headers of NumPy's .npy files, read strictly and written at a fixed length.

NumPy's own reader falls back on a tokenizer and on pickles; this one admits plain arrays of numbers and nothing else.
Reference: numpy.lib.format, version 1.0.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import DTypeLike

from lolo.data.errors import DataError

MAGIC = b"\x93NUMPY"
HEADER_BYTES = 128
"""Length of the headers that we write: enough for any shape of ours, and known before the shape is."""

MAX_HEADER_BYTES = 4096
FIELDS = re.compile(
    r"\{\s*'descr':\s*'([<>|=]?[uifb][1248])',\s*'fortran_order':\s*(True|False),"
    r"\s*'shape':\s*\(((?:\s*\d{1,18}L?\s*,?)*)\),?\s*\}\s*"  # L: written by NumPy on Python 2
)


@runtime_checkable
class ByteStream(Protocol):
    """Anything that bytes are read from: a file, or a member of an archive while it is unpacked."""

    def read(self, n: int, /) -> bytes: ...


class Header(NamedTuple):
    """What an .npy file promises; the data follow at byte `offset`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def data_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: ByteStream, name: Path | str) -> Header:
    """The header at the start of `stream`, which is left where the data begin.

    Raises:
        DataError: not an .npy file of version 1.0 with numbers in C order.
    """
    cure = "write it with numpy.save from a C-ordered array of numbers"
    start = stream.read(10)
    if start[:6] != MAGIC or len(start) < 10:
        raise DataError.at(name, f"starts with {start[:6]!r} where an .npy file has {MAGIC!r}", cure, "byte 0")
    length = int.from_bytes(start[8:10], "little")
    if start[6:8] != b"\x01\x00" or length > MAX_HEADER_BYTES:
        version = f"{start[6]}.{start[7]}"
        problem = f".npy version {version} with a header of {length} bytes, expected 1.0 and ≤ {MAX_HEADER_BYTES}"
        raise DataError.at(name, problem, cure, "byte 6")
    text = stream.read(length)
    match = FIELDS.fullmatch(text.decode("latin-1"))
    if len(text) < length or match is None or match[2] == "True":
        problem = f"an .npy header that says {text[:120]!r}, expected numbers in C order"
        raise DataError.at(name, problem, cure, "byte 10")
    shape = tuple(int(n) for n in re.findall(r"\d+", match[3]))
    try:
        dtype = np.dtype(match[1])
    except TypeError as error:
        raise DataError.at(name, f"an array of unknown type {match[1]!r}", cure, "byte 10") from error
    return Header(shape, dtype, 10 + length)


def format_header(shape: tuple[int, ...], dtype: DTypeLike) -> bytes:
    """An .npy header of exactly `HEADER_BYTES` bytes."""
    fields = f"{{'descr': '{np.dtype(dtype).str}', 'fortran_order': False, 'shape': {tuple(shape)!r}, }}"
    body = fields.encode("ascii").ljust(HEADER_BYTES - 11) + b"\n"
    if len(body) != HEADER_BYTES - 10:
        raise ValueError(f"The shape {shape} does not fit into an .npy header of {HEADER_BYTES} bytes.")
    return MAGIC + b"\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little") + body
