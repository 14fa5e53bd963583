"""What an optimizer is called in a picture, and which method it belongs to, from what its rows call it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lolo.evaluation import rivals

OURS = "lolo"
LEARNED = {
    "lolo": "LoLO",
    "naive": "naive-LO",
    "bc-only": "BC-only",
    "untrained": "untrained",
    "replay-only": "replay-only",
}
"""Learned optimizers: ours, its ablations, and the φ that meta-training began with."""

RIVALS = {
    "adamw": "AdamW",
    "adam": "Adam",
    "sgdm": "SGD with momentum",
    "nadamw": "NAdamW",
    "nesterov": "Nesterov SGD",
    "lion": "Lion",
    "muon": "Muon",
    "muon-matched": "matched Muon",
    "schedule-free": "Schedule-Free",
    "prodigy": "Prodigy",
}
METHODS = LEARNED | RIVALS

SCHEDULES = {
    "constant": "",
    "cosine": "cosine",
    "rsqrt": "1/√t",
    "warmup": "warm-up",
    "warmup-cosine": "warm-up cosine",
    "wsd": "warm-up and decay",
}


def _number(text: str) -> str:
    try:
        return f"{float(text):,.6g}"
    except ValueError:
        return text


SETTINGS: dict[str, Callable[[str], str]] = {
    "step_scale": lambda value: f"step × {_number(value)}",
    "step_decay": lambda value: "" if value == "inf" else f"1/√t after {_number(value)}",
    "wd": lambda value: f"decay {_number(value)}",
    "weight_decay": lambda value: f"decay {_number(value)}",
    "clock_limit": lambda value: f"clock to {_number(value)}",
    "learning_rate": lambda value: f"rate {_number(value)}",
    "learner.baseline": lambda value: f"baseline {value}",
    "untrained": lambda value: "",
}
"""Deployment settings in words; of another field, its last name and its value."""


def _tokens(label: str) -> list[str]:
    """Name and settings, of "lolo schedule=cosine" as of "lolo-norm:schedule=cosine,step_scale=2"."""
    first, separator, settings = label.removeprefix("best ").partition(":")
    if separator and ".py" not in first and "=" in settings:
        return [*first.split(), *settings.split(",")]
    return label.removeprefix("best ").split() or [""]


def method_of(label: str) -> str:
    """A name in METHODS; a label that is of none of them is a method of its own.

    >>> [method_of(label) for label in ("lolo schedule=cosine", "best adamw-cosine 0.01", "norm-fc-naive", "mine")]
    ['lolo', 'adamw', 'naive', 'mine']
    """
    words = _tokens(label)
    first = words[0].lower().rstrip(",")
    if "untrained=true" in words:
        return "untrained"
    if first in rivals.NAMES:
        return rivals.NAMES[first][0]
    if first.startswith("norm-fc"):
        first = first.removeprefix("norm-fc").removeprefix("-") or OURS
    if first.startswith("lolo-"):
        first = OURS
    by_name = {name.lower(): method for method, name in METHODS.items()}
    return first if first in METHODS else by_name.get(first, label)


def in_words(label: str, rate: bool = True) -> str:
    """A label in English; of a rival with its learning rate, or without.

    >>> in_words("lolo step_scale=2.0 schedule=cosine"), in_words("best adamw-cosine 0.01"), in_words("norm-fc-bc-only")
    ('LoLO + cosine, step × 2', 'AdamW 0.01 + cosine', 'BC-only norm_fc')
    >>> in_words("lolo-norm-2-as-shipped")
    'lolo-norm-2 as shipped'
    """
    method, (first, *words) = method_of(label), _tokens(label)
    if Path(first).suffix == ".safetensors":  # weights whose recipe is that of others too
        name, schedule = "/".join(Path(first).parts[-2:-1]) or first, "constant"
    elif method in RIVALS and first.lower() in rivals.NAMES:
        of_label = words.pop(0) if words and re.fullmatch(r"[\d.e+-]+", words[0]) else ""
        name, schedule = " ".join(filter(None, [METHODS[method], of_label * rate])), rivals.NAMES[first.lower()][1]
        words = [f"{key}={value}" for key, value in zip(words[::2], words[1::2], strict=False)]  # wd 0.1 warmup 0.05
    elif first.startswith("lolo-"):  # weights that come with the package
        name, schedule = first.replace("-as-shipped", " as shipped"), "constant"
    elif method in LEARNED and first.lower() in LEARNED | {"norm-fc": 0} or first.startswith("norm-fc-"):
        name = " ".join([METHODS[method], *["norm_fc"] * first.startswith("norm-fc")])
        schedule = "constant"
    else:
        return label
    given = [word.removeprefix("schedule=") for word in words if word.startswith("schedule=")]
    schedule = SCHEDULES.get((given or [schedule])[0], schedule)
    more = [_setting(word) for word in words if not word.startswith("schedule=")]
    return ", ".join(filter(None, [f"{name} + {schedule}" if schedule else name, *more]))


def _setting(word: str) -> str:
    field, _, value = word.partition("=")
    return SETTINGS[field](value) if field in SETTINGS else f"{field.rpartition('.')[2]} {_number(value)}".strip()


def short(labels: Sequence[str], rate: bool = True) -> dict[str, str]:
    """Labels in English, without the settings that all of them have, or all learned optimizers, if there are several.

    >>> list(short(["lolo step_scale=2.0 wd=0.1", "naive step_scale=2.0", "adamw 0.01"]).values())
    ['LoLO, decay 0.1', 'naive-LO', 'AdamW 0.01']
    """
    parts = {label: in_words(label, rate).split(", ") for label in labels}
    for group in (parts, [label for label in labels if method_of(label) in LEARNED]):
        if len(group) > 1:
            shared = set.intersection(*(set(parts[label][1:]) for label in group))
            parts |= {label: [part for part in parts[label] if part not in shared] for label in group}
    return {label: ", ".join(mine) for label, mine in parts.items()}


def together(labels: Sequence[str], rate: bool = True) -> tuple[dict[str, str], str]:
    """Labels as `short` has them, without the schedule that all have in common; and that schedule, or "".

    A single label keeps its schedule.

    >>> together(["lolo schedule=cosine warmup=0.1", "adamw-cosine 0.01 warmup 0.1"])
    ({'lolo schedule=cosine warmup=0.1': 'LoLO', 'adamw-cosine 0.01 warmup 0.1': 'AdamW 0.01'}, 'cosine')
    """
    words = short(labels, rate)
    for schedule in filter(None, SCHEDULES.values()):
        if len(words) > 1 and all(re.search(f"\\+ {re.escape(schedule)}(?=$|,)", text) for text in words.values()):
            return {label: text.replace(f" + {schedule}", "", 1) for label, text in words.items()}, schedule
    return words, ""


def reference(labels: Sequence[str]) -> str:
    """The one that pictures and findings are about: the first of ours, else the first."""
    return next((label for label in labels if method_of(label) == OURS), labels[0])
