"""Data sets: those that lolo carries (`lolo.data.embedded`), and readers for larger ones (`lolo.data.prepare`)."""

__all__ = ["DataError"]
