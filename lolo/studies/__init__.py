"""Comparisons and studies: optimizers by name, their rows, tables, pictures and reports."""
