"""Versions, commit and machine of a result; the settings of JAX that programs use."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lolo.runtime import parallel

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def versions() -> dict[str, str]:
    """Versions that decide the bytes of a result."""
    return {name: metadata.version(name) for name in ("lolo", "jax", "jaxlib", "optax", "numpy")}


def in_words(of: Mapping[str, str]) -> str:
    """Versions as a list in a sentence.

    >>> in_words({"lolo": "0.2.0", "jax": "0.10.2"})
    'lolo 0.2.0, jax 0.10.2'
    """
    return ", ".join(f"{name} {version}" for name, version in of.items())


def stated(command: str, about: Mapping[str, Any]) -> str:
    """How a result was made, for the end of its report. about: as `provenance` gives it."""
    return f"Command: `{command}`. Versions: {in_words(about['versions'])}. Commit: {about['commit']}."


def provenance() -> dict[str, Any]:
    """Versions, commit (if run from a checkout) and machine."""
    package = Path(__file__).parents[1]
    commit = None
    if (package.parent / ".git").exists():
        head = subprocess.run(["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, check=False)
        commit = head.stdout.decode("ascii", "replace").strip() or None
    device = jax.local_devices()[0]
    return {
        "versions": versions(),
        "commit": commit,
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
            "device": f"{device.platform}: {device.device_kind}",
            "devices": len(jax.local_devices()),
            "cores": parallel.cores(),
        },
    }


def peak_memory_mb() -> int:
    """The most memory that this process has had so far, in MiB; 0 where the system does not say (Windows)."""
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def user_cache() -> Path:
    """Folder for compiled programs: $LOLO_CACHE, or lolo in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("LOLO_CACHE") or os.path.join(base, "lolo"))


def forget_programs() -> None:
    """Drop all that JAX has compiled in this process, when nothing of it will be needed again.

    Linux allows a process 65,530 mappings of memory by default, and a compiled program of ours takes hundreds on a CPU:
    a command that compiles program after program ends in "LLVM compilation error: Cannot allocate memory" otherwise.
    """
    jax.clear_caches()


def set_up(devices: int | None = None) -> None:
    """Set JAX up for a program: one CPU device per core, compiled programs cached in the user's cache folder."""
    parallel.use_cores(devices)
    jax.config.update("jax_compilation_cache_dir", str(user_cache() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
