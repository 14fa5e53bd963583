"""The shared library of kernels: where it is, which forms of it run here, and which one is to run.

Nothing is compiled here. `hatch_build.py` does that when the package is installed.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

LIBRARY = Path(__file__).with_name("_norm_fc.so")
VERSION = 1  # of the library's functions and structs; one of another version is not used
FORMS = ("portable", "avx2", "avx512")  # as the library numbers them, the narrowest first
VARIABLE = "LOLO_KERNEL"
OFF = ("0", "plain")
CHOICES = ("auto", "plain")  # of the argument `kernel`


class KernelError(ValueError):
    """A kernel was requested that this machine or installation does not have."""


@functools.cache
def load() -> ctypes.CDLL | None:
    """The library; None where the installation has none that fits."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
        version = library.lolo_kernel_version()
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
