"""How long each piece of work took, kept beside its results."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from lolo.files import jsonl
from lolo.runtime import parallel


@contextlib.contextmanager
def timed(out: Path, what: str) -> Iterator[None]:
    """Adds the time that a piece of work took, finished or not, to `spent.jsonl`."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    try:
        yield
    finally:
        row = {"what": what, "seconds": round(time.monotonic() - began, 1), "cores": parallel.cores()}
        jsonl.append_json_line(out / "spent.jsonl", row)


def hours(folder: Path, what: Sequence[str]) -> str:
    """The time that this work took by `spent.jsonl`, in words. What was made elsewhere is not there."""
    file, by_cores = folder / "spent.jsonl", dict[int, float]()
    for row in jsonl.read_json_lines(file, _SPENT_ROW) if file.is_file() else ():
        if row["what"] in what:
            by_cores[row["cores"]] = by_cores.get(row["cores"], 0.0) + row["seconds"] / 3600
    return " and ".join(f"{took:.2f} h on {n} core{'s' * (n > 1)}" for n, took in by_cores.items()) or "no time here"


_SPENT_ROW = jsonl.fields(what=jsonl.string, seconds=jsonl.number, cores=jsonl.whole_number)
