"""What rows say in one sentence, and which few optimizers a picture of them shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lolo.evaluation import statistics
from lolo.evaluation.statistics import Row
from lolo.studies import names

FEW = 6  # lines that an eye can follow; the table has the rest


def _mean(rows: Sequence[Row], label: str, field: str) -> float:
    """Of a label's runs; infinite where one is not finite."""
    mean = float(np.mean([getattr(row, field) for row in rows if row.optimizer == label]))
    return mean if math.isfinite(mean) else math.inf


def few(rows: Sequence[Row], most: int = FEW) -> list[str]:
    """At most so many labels: ours, two rivals, three ablations, the best other setting of ours, then all others.

    Of a method other than ours it is the setting with the lowest mean train loss in these rows.
    """
    labels = list(dict.fromkeys(row.optimizer for row in rows))
    ours = names.reference(labels)
    best: dict[str, str] = {}  # of each method, the best method first
    further: list[str] = []
    for label in sorted(labels, key=lambda label: _mean(rows, label, "train_loss")):
        method = names.method_of(label)
        if method == names.method_of(ours):
            further.append(label)
        else:
            best.setdefault(method, label)
    ablations = [best.pop(method) for method in names.LEARNED if method in best]
    others, further = list(best.values()), [label for label in further if label != ours]
    order = [ours, *others[:2], *ablations[:3], *further[:1], *ablations[3:], *others[2:]]
    return order[:most]


def rival_of(rows: Sequence[Row], ours: str, labels: Sequence[str], field: str) -> str | None:
    """What ours is measured against: the best optimizer that is no learned one, else the best other method."""
    others = [label for label in labels if names.method_of(label) != names.method_of(ours)]
    known = [label for label in others if names.method_of(label) not in names.LEARNED] or others
    return min(known, key=lambda label: _mean(rows, label, field), default=None)


def sentence(rows: Sequence[Row], labels: Sequence[str] | None = None, field: str = "train_loss") -> str:
    """How ours ends beside the best rival among `labels`: lower, higher, or not to be told apart; never more.

    The interval is that of the paired differences. A single pair has none, and is called a single run.
    """
    labels = few(rows) if labels is None else labels
    ours = names.reference(labels)
    other = rival_of(rows, ours, labels, field)
    words, _ = names.together(labels, rate=False)
    name = words[ours]
    if lost := _diverged(rows, ours):
        return lost
    if other is None:
        return f"{name} ends at {_mean(rows, ours, field):.3f}"
    theirs = words[other]
    if lost := _diverged(rows, other):
        return f"{name} ends at {_mean(rows, ours, field):.3f}; {lost}"
    try:
        mean, half, n, _ = statistics.paired_difference(rows, ours, other, field)
    except ValueError:  # no seed in common
        ends = [f"{one} at {_mean(rows, label, field):.3f}" for one, label in ((name, ours), (theirs, other))]
        return f"Without a seed in common: {ends[0]}, {ends[1]}"
    if n == 1 or not math.isfinite(half):
        where = "below" if mean < 0 else "above"
        return f"{name} ends {abs(mean):.3f} {where} {theirs} (single run)"
    return compared(name, theirs, mean - half, mean + half)


def compared(name: str, theirs: str, low: float, high: float) -> str:
    """The sentence of a difference `name` − `theirs` whose 95 % interval reaches from `low` to `high`.

    >>> compared("LoLO", "AdamW", -0.0301, -0.0099)
    'LoLO ends 0.02 below AdamW (95 % CI 0.01 to 0.03)'
    >>> compared("LoLO", "AdamW", 0.0099, 0.0301)
    'LoLO ends 0.02 above AdamW (95 % CI 0.01 to 0.03)'
    >>> compared("LoLO", "AdamW", 0.0035, 0.0271)
    'LoLO ends 0.015 above AdamW (95 % CI 0.004 to 0.027)'
    >>> compared("LoLO", "AdamW", -0.01, 0.02)
    "LoLO and AdamW can't be told apart (difference 0.005, 95 % CI −0.010 to 0.020)"
    """
    mean, half = (low + high) / 2, (high - low) / 2
    digits = min(max(-math.floor(math.log10(half)), 2), 8) if half > 0 else 3

    def number(value: float, more: int = 0) -> str:
        return f"{value:.{digits + more}f}".replace("-", "−")

    if low <= 0 <= high:
        interval = f"{number(mean, 1)}, 95 % CI {number(low, 1)} to {number(high, 1)}"
        return f"{name} and {theirs} can't be told apart (difference {interval})"
    nearest, farthest = sorted((abs(low), abs(high)))
    while digits < 8 and float(number(nearest)) == 0:  # an end that is not 0 isn't shown as 0
        digits += 1
    where = "below" if high < 0 else "above"
    return f"{name} ends {number(abs(mean))} {where} {theirs} (95 % CI {number(nearest)} to {number(farthest)})"


def _diverged(rows: Sequence[Row], label: str) -> str:
    mine = [row for row in rows if row.optimizer == label]
    lost = sum(row.diverged for row in mine)
    return f"{names.in_words(label, rate=False)} diverged in {lost} of {len(mine)} runs" if lost else ""


def loss_in_words(rows: Sequence[Row]) -> str:
    """The loss with its unit: a task that scores accuracy is a classifier, whose loss is cross entropy."""
    return "cross entropy (nats)" if "accuracy" in rows[0].held else "loss"
