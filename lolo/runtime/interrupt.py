"""Stopping on request: signals, and progress callbacks that end the work."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OnProgress = Callable[[str, int, int, str], None]
"""Progress: what is under way, units done, units in all, and a short status."""


def no_progress(what: str, done: int, total: int, status: str) -> None:
    """Progress is ignored."""


class Interrupted(RuntimeError):
    """A study or an evaluation was stopped on request."""

    exit_status = 3  # of `lolo`


def stopped_message(out: Path) -> str:
    """Message for the user who stopped it."""
    return f"stopped. Resume with the same command: what is done in {out} is kept."


def interruptible(stop: Stop, on_progress: OnProgress, out: Path) -> OnProgress:
    """`on_progress`, but raising Interrupted once a stop was requested."""

    def report(what: str, done: int, total: int, status: str) -> None:
        on_progress(what, done, total, status)
        if stop.requested is not None:
            raise Interrupted(stopped_message(out))

    return report


class Stop:
    """Asks a running `train` to end after the current outer step."""

    requested: str | None = None  # why


@contextmanager
def stop_on_signals(stop: Stop) -> Iterator[None]:
    """SIGTERM and the first Ctrl-C request a stop; a second Ctrl-C interrupts at once."""

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
