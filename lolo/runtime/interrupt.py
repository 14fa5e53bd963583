"""Stopping on request: signals, and work that reports its progress."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OnProgress = Callable[[str, int, int, str], None]
"""Progress: what is under way, units done, units in all, and a word on how it goes."""


def no_progress(what: str, done: int, total: int, word: str) -> None:
    """Tells nobody."""


class Interrupted(RuntimeError):
    """A study or an evaluation was asked to stop."""


def stopped_message(out: Path) -> str:
    """What to tell who stopped it."""
    return f"stopped. Go on with the same command: what is done in {out} is kept."


def interruptible(stop: Stop, told: OnProgress, out: Path) -> OnProgress:
    """`told`, which raises Interrupted once a stop was asked for."""

    def heard(what: str, done: int, total: int, word: str) -> None:
        told(what, done, total, word)
        if stop.requested is not None:
            raise Interrupted(stopped_message(out))

    return heard


class Stop:
    """Asks a running `train` to end after the current outer step."""

    requested: str | None = None  # why


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C ask to stop; a second Ctrl-C interrupts at once."""

    def handler(number: int, frame: Any) -> None:
        if stop.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = signal.Signals(number).name

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
