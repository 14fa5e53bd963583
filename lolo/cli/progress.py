"""Progress and messages on a terminal, and elsewhere."""

from __future__ import annotations

import datetime
import importlib
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lolo.runtime import streams
from lolo.training import how

BAR_WIDTH = 24  # characters
LINE_SECONDS = 0.3  # between changes of a notebook's line


class ProgressDisplay:
    """Shows progress: bars on a terminal, a line now and then elsewhere."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.bars: dict[str, Any] = {}
        self.tenths: dict[str, int] = {}
        self.began: dict[str, tuple[float, int]] = {}  # when each was first reported, and what was done then

    def __call__(self, what: str, done: int, total: int, word: str) -> None:
        if self.progress is None:
            tenth = 10 * done // max(total, 1)
            if self.tenths.get(what) != tenth:
                self.tenths[what] = tenth
                left = time_left(self.began.setdefault(what, (time.monotonic(), done)), done, total)
                streams.log_line(f"{what}: {done} of {total} {word}".rstrip() + left)
            return
        if what not in self.bars:
            self.bars[what] = self.progress.add_task(what, total=total, word="")
        self.progress.update(self.bars[what], completed=done, total=total, word=word)


class NotebookDisplay(ProgressDisplay):
    """Shows progress in a notebook: a line below the cell, which changes."""

    def __init__(self) -> None:
        super().__init__(None)
        self.display = importlib.import_module("IPython.display").display
        self.lines: dict[str, Any] = {}
        self.shown: dict[str, float] = {}  # when each line last changed

    def __call__(self, what: str, done: int, total: int, word: str) -> None:
        now = time.monotonic()
        if what in self.lines and done < total and now - self.shown[what] < LINE_SECONDS:
            return
        self.shown[what] = now
        full = BAR_WIDTH * done // max(total, 1)
        left = time_left(self.began.setdefault(what, (now, done)), done, total)
        line = f"{what} {'█' * full}{'░' * (BAR_WIDTH - full)} {done} of {total} {word}".rstrip() + left
        if what in self.lines:
            self.lines[what].update({"text/plain": line}, raw=True)
        else:
            self.lines[what] = self.display({"text/plain": line}, raw=True, display_id=True)


def time_left(began: tuple[float, int], done: int, total: int) -> str:
    """ "  0:12:34 left", by the pace since it began; "" before there is one, and at the end."""
    seconds, before = time.monotonic() - began[0], began[1]
    if not before < done < total:
        return ""
    return f"  {datetime.timedelta(seconds=round(seconds / (done - before) * (total - done)))} left"


@contextmanager
def progress_display() -> Iterator[ProgressDisplay]:
    """A ProgressDisplay for this terminal, or this notebook."""
    console = rich.console.Console(stderr=True)
    if console.is_jupyter:
        yield NotebookDisplay()
        return
    if not console.is_terminal:
        yield ProgressDisplay(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=BAR_WIDTH),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[word]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield ProgressDisplay(progress)


def in_words(outer_step: how.Progress) -> str:
    """An outer step of meta-training beside the bar."""
    rate = 1 / max(outer_step.seconds, 1e-9)
    return f"loss {outer_step.task_loss:.4f}  α {outer_step.alpha:.2f}  K {outer_step.start_step:.0f}  {rate:.1f}/s"


@contextmanager
def logged_warnings() -> Iterator[None]:
    """Warnings become messages, each of them once."""
    seen = set[str]()

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        if str(message) not in seen:
            streams.log(str(message))
        seen.add(str(message))

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = show
        yield


def print_or_show(text: str) -> None:
    """Print a result that lies in no file; where that fails, for a full disk say, show it beside the messages."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has left
        raise
    except OSError:
        streams.log_line(text)
        raise
