"""Standard input, output and error of a program: closed ones, ones with few characters, ones that nobody reads."""

from __future__ import annotations

import os
import select
import sys
from typing import Any

BROKEN_PIPE = 141  # exit status of a program whose reader left: what a shell reports for SIGPIPE


def set_up() -> None:
    """Let nothing that is printed end a program: not a character that the encoding lacks, not a closed stream."""
    for number in (0, 1, 2):  # else the next file that is opened, or a pipe to a child, would take the free number
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # not a StringIO
            stream.reconfigure(errors="replace")


def reopen(name: str, descriptor: int) -> None:
    """Print to a descriptor from here on, as `set_up` has it."""
    encoding = getattr(getattr(sys, name), "encoding", None)
    setattr(sys, name, os.fdopen(descriptor, "w", buffering=1, encoding=encoding, errors="replace"))


def is_unread(stream: Any) -> bool:
    """Whether a stream is a pipe or socket whose reader has left."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no `poll` on Windows, no `fileno` of a StringIO, closed
        return False


def abandon(stream: Any) -> None:
    """Drop what a stream holds and whatever is printed to it from here on, as Python flushes it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    except (OSError, ValueError):  # no real file
        pass
    finally:
        os.close(nowhere)


def log(text: str) -> None:
    """A message for people."""
    log_line(f"lolo: {text}")


def log_line(text: str) -> None:
    """Print a line on standard error. Where it can't be printed, the work continues without it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        abandon(sys.stderr)
