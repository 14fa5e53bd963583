"""Tables of rows: one line per optimizer, and meta-seed by meta-seed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

from lolo.evaluation import statistics
from lolo.evaluation.statistics import Row


def format_interval(i: statistics.Interval, signed: bool = False) -> str:
    """An interval in a cell of a table."""
    mean = f"{i.mean:+.4f}" if signed else f"{i.mean:.4f}"
    half = f" ± {i.half:.4f}" if math.isfinite(i.half) else ""
    return f"{mean}{half} (n={i.n} {i.unit})" if i.n > 1 else f"{mean} (single run)"


def meta_seed_tables(rows: Sequence[Row]) -> str:
    """Markdown: each φ by itself, and paired differences within each meta-seed; "" without several meta-seeds."""
    seeds = sorted({row.meta_seed for row in rows if row.meta_seed is not None})
    learned = list(dict.fromkeys(row.optimizer for row in rows if row.meta_seed is not None))
    if len(seeds) < 2:
        return ""
    heads = [f"meta-seed {seed}" for seed in seeds]

    def lines(what: str, cells: dict[str, list[str]]) -> list[str]:
        body = [f"| {name} | {' | '.join(values)} |" for name, values in cells.items()]
        return [f"| {what} | {' | '.join(heads)} |", "| --- |" + " --- |" * len(seeds), *body]

    def only(seed: int) -> list[Row]:
        return [row for row in rows if row.meta_seed == seed]

    def in_each(cell: Callable[[list[Row]], str]) -> list[str]:
        return [cell(only(seed)) for seed in seeds]

    def losses(label: str, mine: list[Row]) -> str:
        end, lowest = (statistics.summary(mine, label, field).mean for field in ("train_loss", "train_minimum"))
        return f"{end:.4f} ({end - lowest:+.4f})"

    def gap(a: str, b: str, mine: list[Row]) -> str:
        return format_interval(statistics.paired_difference(mine, a, b), signed=True)

    def have(labels: Sequence[str]) -> bool:
        return all(any(row.optimizer == label for row in only(seed)) for label in labels for seed in seeds)

    each = {label: in_each(partial(losses, label)) for label in learned if have([label])}
    pairs = {f"{a} − {b}": in_each(partial(gap, a, b)) for a, b in itertools.combinations(learned, 2) if have([a, b])}
    first = lines("train loss (above its own lowest mean of 100 steps)", each)
    return "\n".join([*first, "", *lines("difference in train loss, within a meta-seed", pairs)] if pairs else first)


def cells(rows: Sequence[Row], reference: str | None = None) -> list[list[str]]:
    """Header and one row per optimizer: means with 95 % intervals, and paired differences with `reference`."""
    labels = list(dict.fromkeys(row.optimizer for row in rows))
    reference = reference or labels[0]
    differences = [f"{reference} − it, train", f"{reference} − it, held-out"]
    found = [["optimizer", "train loss", "held-out loss", *differences, "diverged"]]

    def difference(label: str, field: str) -> str:
        if label == reference:
            return ""
        try:
            return format_interval(statistics.paired_difference(rows, reference, label, field), signed=True)
        except ValueError:  # several meta-seeds on either side, and none in common
            return "no pairs"

    for label in sorted(labels, key=lambda name: statistics.summary(rows, name).mean):
        mine = [row for row in rows if row.optimizer == label]
        line = [
            label,
            format_interval(statistics.summary(rows, label)),
            format_interval(statistics.summary(rows, label, "held_loss")),
        ]
        line += [difference(label, field) for field in ("train_loss", "held_loss")]
        found.append([*line, f"{sum(row.diverged for row in mine)} of {len(mine)}"])
    return found


def reference_of(rows: Sequence[Row]) -> str:
    """The optimizer that the others are compared with: lolo, else the first."""
    labels = [row.optimizer for row in rows]
    return "lolo" if "lolo" in labels else labels[0]


def table(rows: Sequence[Row]) -> str:
    """`cells` as Markdown, compared with LoLO, or with the first optimizer."""
    return markdown(cells(rows, reference_of(rows)))


def markdown(table: Sequence[Sequence[str]]) -> str:
    """A header and lines as Markdown."""
    header, *lines = table
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])
