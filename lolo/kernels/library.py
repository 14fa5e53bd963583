"""The shared library of kernels: where it is, which forms of it run here, and which one is to run.

Nothing is compiled here. `hatch_build.py` does that when the package is installed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

LIBRARY = Path(__file__).with_name("_norm_fc.so")
VERSION = 4  # of the library's functions and structs; one of another version is not used
FORMS = ("portable", "avx2", "avx512")  # as the library numbers them, the narrowest first
VARIABLE = "LOLO_KERNEL"
OFF = ("0", "plain")
CHOICES = ("auto", "plain")  # of the argument `kernel`


ADAM, VECTOR, FACTORED = range(3)  # kinds of tensors; VECTOR: through the network, below two axes


class Tensor(ctypes.Structure):
    """One tensor, as norm_fc.cc has it: addresses of float32 arrays, extents and settings."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("grad", "param", "momentum", "rms", "row", "column")],
        *[(name, ctypes.c_void_p) for name in ("new_momentum", "new_rms", "new_row", "new_column", "step", "out")],
        *[(name, ctypes.c_int64) for name in ("kind", "outer", "a", "inner", "b", "size")],
        *[
            (name, ctypes.c_int64)
            for name in ("last_is_largest", "baseline", "unfinished", "in_place", "adam_sized", "count")
        ],
        ("decay", ctypes.c_float),
    ]


class Phi(ctypes.Structure):
    """Addresses of φ's arrays."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("w0", "b0", "w1", "b1", "w2", "b2")],
        ("hidden", ctypes.c_int64),
    ]


class Settings(ctypes.Structure):
    """Numbers of a step."""

    _fields_ = [(name, ctypes.c_float) for name in ("rate", "adam_scale", "adam_gain")]  # adam_gain: 1 − adam_beta2


class KernelError(ValueError):
    """A kernel was requested that this machine or installation does not have."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library; None where the installation has none that fits."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = library.lolo_kernel_version()
        library.lolo_norm_fc_widest.restype = library.lolo_norm_fc_step.restype = ctypes.c_int64
        library.lolo_norm_fc_finish.restype = None
    except (OSError, AttributeError):
        return None
    return library if version == VERSION else None


@functools.cache
def forms() -> tuple[str, ...]:
    """The forms that this machine runs, the narrowest first."""
    library = load()
    return () if library is None else FORMS[: library.lolo_norm_fc_widest() + 1]


def form(kernel: str = "auto") -> str | None:
    """The form to run; None: the plain path. kernel: "auto", or "plain".

    $LOLO_KERNEL decides what "auto" means: 0 the plain path, the name of a form that form, nothing the widest one.
    Raises KernelError for a form that does not run here.
    """
    requested, here = os.environ.get(VARIABLE, ""), forms()
    if kernel not in CHOICES:
        raise KernelError(f"kernel={kernel!r} must be one of {', '.join(map(repr, CHOICES))}.")
    if kernel == "plain" or requested in OFF:
        return None
    if not requested:
        return here[-1] if here else None
    if requested not in here:
        raise KernelError(f"{VARIABLE}={requested} does not run here; use one of {', '.join((OFF[0], *here))}.")
    return requested


def path(kernel: str = "auto") -> str:
    """What runs, as run folders and the benchmark name it: "plain", or "kernel " and its form."""
    chosen = form(kernel)
    return "plain" if chosen is None else f"kernel {chosen}"


def step(form: str, tensors: list[Tensor], phi: Phi, settings: Settings, steps: int = 0, threads: int = 1) -> None:
    """Moments of all tensors, and their new parameters, updates, or unfinished steps. Raises MemoryError.

    steps: the address of as many floats as the `threads` largest of the tensors whose `step` is null have entries.
    threads: how many share the tensors, at most; results do not depend on it.
    """
    library = load()
    assert library is not None
    array = (Tensor * len(tensors))(*tensors)
    number, count = ctypes.c_int64(FORMS.index(form)), ctypes.c_int64(len(tensors))
    others = ctypes.byref(phi), ctypes.byref(settings), ctypes.c_void_p(steps), ctypes.c_int64(threads)
    if library.lolo_norm_fc_step(number, array, count, *others):
        raise MemoryError("norm_fc's kernel got no memory.")


def finish(form: str, tensors: list[Tensor], settings: Settings) -> None:
    """What is left of a step after Newton-Schulz."""
    library = load()
    assert library is not None
    array = (Tensor * len(tensors))(*tensors)
    number, count = ctypes.c_int64(FORMS.index(form)), ctypes.c_int64(len(tensors))
    library.lolo_norm_fc_finish(number, array, count, ctypes.byref(settings))
