"""Sandbox: runs a function in a child process with limits on memory and time, for parsers that are written in C.

HDF5, parquet and image files are read by large C libraries; a hostile or damaged file may make them crash, hang or
request all memory. In a child process only the child is lost: the parent raises `DataError`.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lolo.data.errors import DataError

try:
    import resource
except ImportError:  # Windows, which has no such limits
    resource = None  # type: ignore[assignment]

MEMORY_BYTES = 4 << 30  # of address space
SECONDS = 900  # of processor time; three times that on the clock
OUTPUT_BYTES = 2 << 30  # per file written
RESULT_BYTES = 64 << 20
RESULT_FILE = "result.json"
LOG_FILE = "log.txt"

IMPORT_FROM = [str(Path(__file__).resolve().parents[2])]
"""Folders from which the child imports, besides the installed packages."""

ENVIRONMENT = {
    # One thread each: their stacks and arenas would count against the limit of address space.
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "PATH": os.defpath,
}


def run(
    function: Callable[..., Any],
    file: Path | str,
    scratch: Path,
    *arguments: Any,
    memory_bytes: int | None = None,
    seconds: int | None = None,
) -> Any:
    """`function(file, scratch, *arguments)` in a child process; what it returns, passed through JSON.

    Args:
        function: a function at the top level of a module; arguments and result must fit into JSON.
        file: what it reads; a str in the child.
        scratch: an existing folder, where it may write its arrays; a str in the child.
        memory_bytes: limit of the child's address space, `MEMORY_BYTES` if not given (not enforced by macOS).
        seconds: limit of its processor time, `SECONDS` if not given; of its time on the clock three times as much.
    Raises:
        DataError: the function raised one; or the child failed, died or reached a limit.
    """
    if resource is None:
        raise DataError.at(file, "this system can't limit what its reader does", "prepare the data on Linux or macOS")
    memory_bytes = MEMORY_BYTES if memory_bytes is None else memory_bytes
    seconds = SECONDS if seconds is None else seconds
    result_file, log_file = scratch / RESULT_FILE, scratch / LOG_FILE
    result_file.unlink(missing_ok=True)
    code = f"import sys; sys.path[:0] = {IMPORT_FROM!r}; from lolo.data import sandbox; sandbox.main()"
    call = {
        "module": function.__module__,
        "function": function.__qualname__,
        "arguments": [str(file), str(scratch), *arguments],
        "memory_bytes": memory_bytes,
        "seconds": seconds,
        "output_bytes": OUTPUT_BYTES,
    }
    limits = f"{memory_bytes / 2**30:.2g} GiB and {seconds} s"
    with log_file.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", code, json.dumps(call)],
            stdin=subprocess.PIPE,  # stays open: the child ends when it closes
            stdout=log,
            stderr=log,
            env=ENVIRONMENT,
            cwd=scratch,
        )
        try:
            status = child.wait(timeout=3 * seconds)
        except subprocess.TimeoutExpired:
            cure = "make smaller files of it, or fetch it again"
            raise DataError.at(file, f"reading it took more than {3 * seconds} s", cure) from None
        finally:
            child.kill()
            child.wait()
            if child.stdin is not None:
                child.stdin.close()
    if status != 0 or not result_file.exists() or result_file.stat().st_size > RESULT_BYTES:
        last_lines = log_file.read_bytes()[-300:].decode("utf-8", "replace").strip().splitlines()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        problem = f"its reader died ({how}; limits {limits}{': ' + last_lines[-1] if last_lines else ''})"
        raise DataError.at(file, problem, "fetch the file again, or make smaller files of it")
    result = json.loads(result_file.read_bytes())
    if "error" in result:
        raise DataError(result["error"])
    return result["value"]


def main() -> None:
    """Entry point of the child process."""
    call = json.loads(sys.argv[1])
    for limit, value in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, call["seconds"]),
        (resource.RLIMIT_FSIZE, call["output_bytes"]),
        (resource.RLIMIT_AS, call["memory_bytes"]),
    ):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    file, scratch = call["arguments"][:2]
    try:
        function = getattr(importlib.import_module(call["module"]), call["function"])
        result = {"value": function(*call["arguments"])}
    except DataError as error:
        result = {"error": str(error)}
    except MemoryError:
        problem = f"reading it needs more than {call['memory_bytes'] / 2**30:.2g} GiB of memory"
        result = {"error": str(DataError.at(file, problem, "fetch the file again, or make smaller files of it"))}
    except Exception as error:
        problem = f"can't be read ({type(error).__name__}: {error})"[:500]
        result = {"error": str(DataError.at(file, problem, "fetch or make the file again"))}
    Path(scratch, RESULT_FILE).write_text(json.dumps(result), encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # skips the libraries' clean-up, where a damaged file may do its harm


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)
