"""Data sets: those that lolo carries (`lolo.data.embedded`), and readers for larger ones (`lolo.data.prepare`)."""

from lolo.data.errors import DataError

__all__ = ["DataError"]
