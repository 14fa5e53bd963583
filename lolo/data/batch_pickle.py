"""Reader of CIFAR-style batch pickles that runs nothing in them.

A pickle is a program. Its opcodes are checked first; the names that it may call are few, and each is answered with
a stand-in from this module, so that not even NumPy is called with what the file says before it has been checked.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lolo.data import rgb32
from lolo.data.errors import DataError
from lolo.data.read_plan import check_labels, untrusted

CURE = "fetch the file again, or use the npz archives"

OPCODES = frozenset(
    # Numbers, strings, containers, the memo; and what rebuilds an array: GLOBAL, REDUCE, BUILD. Nothing that makes
    # objects in another way, no persistent ids, no extension registry, no buffers from outside.
    "PROTO FRAME STOP MARK POP POP_MARK DUP MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD".split()
)


class _Dtype:
    """Stands in for numpy.dtype while a pickle is read: only plain numbers, and nothing of NumPy is called."""

    def __init__(self, code: Any, *flags: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?[uif][1248]", code):
            raise DataError(f"an array of type {code!r}, expected plain numbers")
        self.code = code.lstrip("<>|=")
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise DataError(f"an array of byte order {state[1]!r}")
        self.order = state[1]


class _Array:
    """Stands in for numpy.ndarray while a pickle is read."""

    def __init__(self, shape: tuple[int, ...] = (), dtype: np.dtype | None = None, raw: bytes = b"") -> None:
        self.shape, self.dtype, self.raw = shape, dtype, raw

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.shape, self.dtype, self.raw = _checked_array(shape, dtype, raw, bool(fortran))


def _checked_array(shape: Any, dtype: Any, raw: Any, fortran: bool) -> tuple[tuple[int, ...], np.dtype, bytes]:
    if isinstance(raw, str):  # bytes written by Python 2
        raw = raw.encode("latin-1")
    raw = bytes(raw) if isinstance(raw, bytearray) else raw
    plain = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape) and len(shape) <= 2
    if not plain or not isinstance(dtype, _Dtype) or not isinstance(raw, bytes) or (fortran and len(shape) > 1):
        raise DataError(f"an array that is not plain numbers in C order (shape {str(shape)[:60]})")
    numpy_dtype = np.dtype(dtype.order + dtype.code)
    if int(np.prod(shape, dtype=object)) * numpy_dtype.itemsize != len(raw):
        raise DataError(f"an array of shape {shape} and type {numpy_dtype} with {len(raw):,} bytes")
    return shape, numpy_dtype, raw


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    if kind is not _Array:
        raise DataError("an array of a class of its own")
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array(*_checked_array(shape, dtype, raw, order != "C"))


def _encode(text: Any, encoding: Any) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise DataError("bytes in an unexpected encoding")
    return text.encode("latin-1")


def _empty_bytes() -> bytes:
    return b""


ADMITTED = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
}
"""Every name that a pickle may call, and the stand-in that is called: nothing outside this module ever is."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise DataError(f"calls {module}.{name}, expected NumPy arrays and plain containers only")
        return ADMITTED[module, name]


def unpickle_batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """A batch pickle: `data` uint8 [N, 3072] in planes and `labels` [N] in 1..1000, without running code from it.

    Call it through `sandbox.run(child_rows, ...)`, which bounds memory and time.

    Raises:
        DataError: it holds, or calls, anything but NumPy arrays of numbers and plain containers.
    """
    content = path.read_bytes()
    with untrusted(path, "a batch pickle"):
        _check_opcodes(path, content)
        try:
            batch = _Unpickler(io.BytesIO(content), encoding="latin1").load()
        except DataError as error:
            raise DataError.at(path, str(error), "use the npz archives, which can hold nothing else") from None
        return _checked_batch(path, batch)


def _check_opcodes(path: Path, content: bytes) -> None:
    # Before the C unpickler sees it: a single memo index of 2^32 would make that allocate 32 GiB.
    count = 0
    for opcode, argument, position in pickletools.genops(content):
        count += 1
        if opcode.name not in OPCODES:
            problem = f"the opcode {opcode.name}, expected NumPy arrays and plain containers only"
            raise DataError.at(path, problem, "use the npz archives", f"byte {position}")
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(str(argument)) <= count:
            raise DataError.at(path, f"memo index {argument} after {count} opcodes", CURE, f"byte {position}")


def _checked_batch(path: Path, batch: Any) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    if not isinstance(batch, dict) or not all(isinstance(key, str | bytes) for key in batch):
        raise DataError.at(path, f"holds a {type(batch).__name__}, expected a dict with data and labels", CURE)
    named = {key.decode("latin-1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    data, labels = named.get("data"), named.get("labels")
    if not isinstance(data, _Array) or data.dtype != np.uint8 or data.shape[1:] != (rgb32.PIXELS,) or not data.shape[0]:
        raise DataError.at(path, f"`data` is not a uint8 array [N, {rgb32.PIXELS}]", CURE)
    if isinstance(labels, list) and all(type(label) is int and abs(label) < 1 << 31 for label in labels):
        label_array: NDArray[Any] = np.array(labels, np.int64)
    elif isinstance(labels, _Array) and labels.dtype is not None and labels.dtype.kind in "ui":
        label_array = np.frombuffer(labels.raw, labels.dtype).reshape(labels.shape)
    else:
        raise DataError.at(path, "`labels` is neither a list of whole numbers nor an array of them", CURE)
    if label_array.shape != data.shape[:1]:
        raise DataError.at(path, f"{label_array.shape} labels for {data.shape[0]} images", CURE)
    check_labels(label_array, 1, rgb32.CLASSES, path)
    return np.frombuffer(data.raw, np.uint8).reshape(data.shape), label_array


def child_rows(file: str, scratch: str) -> None:
    """Write all examples of the pickle; for a child process."""
    data, labels = unpickle_batch(Path(file))
    out = rgb32.ChildWriter(scratch)
    for start in range(0, len(data), rgb32.CHUNK_ROWS):
        some = slice(start, start + rgb32.CHUNK_ROWS)
        out.write(rgb32.from_planes(data[some]), labels[some].astype(np.int64) - 1)
    out.close()
