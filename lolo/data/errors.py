"""DataError, the exception of the readers."""

from __future__ import annotations

from pathlib import Path


class DataError(ValueError):
    """A data file or folder is not what its format says, or can't be read within the limits.

    Files are treated as untrusted: whatever is wrong with one, readers raise this and nothing else. The message
    names the file, the byte or row where that applies, what was expected, and what to do.

    >>> from lolo.data import DataError
    >>> from lolo.data.prepare import open_prepared
    >>> try:
    ...     open_prepared(Path("nothing"))
    ... except DataError as error:
    ...     print("prepare it first")
    prepare it first
    """

    @classmethod
    def at(cls, file: Path | str, problem: str, cure: str, where: str = "") -> DataError:
        """The error for one file. `where` is a place in it, such as "byte 1024" or "row 7"."""
        place = f"{file}, {where}" if where else str(file)
        return cls(f"{place}: {problem}; {cure}.")


def library_missing(library: str, use: str) -> DataError:
    return DataError(f"{use} needs the Python package {library}; run: pip install 'lolo[data]'.")
