"""`lolo train` on several processes: the parent that starts them, watches them, and starts them again.

Each process of a gang is a child of a `lolo` that does nothing else, on every host. JAX aborts a process that can't
meet or loses the others, with a page of C++ frames; the parent turns that into one line and an exit status, passes
signals on, and with `--restarts` starts the gang again from the run's last checkpoint. If the parent is killed, its
children end too.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax

from lolo.runtime import process_group
from lolo.runtime.process_group import ProcessGroup

WATCHED = "LOLO_WATCHED"  # in the environment of a child that must end with its parent, which holds its stdin
MEMBER = "LOLO_MEMBER"  # in the environment of a child: what it needs to know, as JSON
JOINED = "lolo-joined"  # a child's word to its parent
LOST = 6  # exit status: processes could not meet, or lost one
FINAL = (0, 2, 3, 4, 5, 130)  # exit statuses that starting again would not change


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes for one run."""

    processes: int | None = None  # how many; without --process-id, all are started here
    coordinator: str | None = None  # HOST:PORT of process 0, where it listens
    process_id: int | None = None  # which one this is, from 0; start each on its host
    hosts: str | None = None  # auto: JAX finds the three above (SLURM, Open MPI, Kubernetes)
    restarts: int = 0  # how often to start again from the last checkpoint when a process is lost
    join_timeout: int = 20  # seconds within which all processes must have come
    heartbeat_timeout: int = 10  # seconds of silence after which a process counts as lost

    @property
    def asked(self) -> bool:
        """Whether several processes are asked for."""
        return (self.processes, self.coordinator, self.process_id, self.hosts) != (None,) * 4


def check(asked: Processes) -> None:
    """Raise ValueError for options that don't go together."""
    for name in ("join_timeout", "heartbeat_timeout"):
        if getattr(asked, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(asked, name)} must be at least 1 second.")
    if asked.restarts < 0:
        raise ValueError(f"--restarts {asked.restarts} must be 0 or more.")
    if asked.hosts is not None:
        if asked.hosts != "auto":
            raise ValueError(f"--hosts {asked.hosts!r} must be auto; or give --coordinator, --process-id, --processes.")
        if (asked.processes, asked.coordinator, asked.process_id) != (None, None, None):
            raise ValueError("--hosts auto finds --coordinator, --process-id and --processes by itself: drop them.")
        return
    if asked.processes is None or asked.processes < 1:
        raise ValueError(f"--processes {asked.processes} must be the number of all processes, at least 1.")
    if (asked.coordinator is None) != (asked.process_id is None):
        raise ValueError("give --coordinator and --process-id together, or neither to start all processes here.")
    if asked.process_id is not None and not 0 <= asked.process_id < asked.processes:
        raise ValueError(f"--process-id {asked.process_id} must be from 0 to {asked.processes - 1}.")
    if asked.coordinator is not None:
        process_group.address(asked.coordinator)


def end_with_parent() -> None:
    """End this process once its parent, which holds the other end of its standard input, is gone."""

    def wait() -> None:
        os.read(0, 1)  # returns when the parent is gone
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()


def member() -> dict[str, Any] | None:
    """What this process was told if it is a child of `launch`, once; None in others.

    A child that is to end with its parent does so from here on. One of `launch` takes its own standard output and error
    from the parent's: the ordinary ones go to the parent, for JAX's noise.
    """
    told, watched = os.environ.pop(MEMBER, None), os.environ.pop(WATCHED, None)
    if told or watched:
        end_with_parent()
    if told is None:
        return None
    place = json.loads(told)
    sys.stdout = os.fdopen(place["stdout"], "w", buffering=1)
    if place["speaks"]:
        sys.stderr = os.fdopen(place["stderr"], "w", buffering=1)
    sys.argv[0] = "lolo"
    return place


def join(place: dict[str, Any]) -> ProcessGroup:
    """Meet the others. Raises GangError."""
    joined = process_group.join(
        place["coordinator"],
        place["process_id"],
        place["processes"],
        join_seconds=place["join_timeout"],
        heartbeat_seconds=place["heartbeat_timeout"],
    )
    os.write(2, f"\n{JOINED} {joined.index} {joined.processes}\n".encode())
    return joined


def run(main: Callable[[], int]) -> None:
    """Run a program and exit, if it is a child that did not part from the others in peace, at once: they won't come."""
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class Child:
    """One process of the gang."""

    def __init__(self, argv: list[str], place: dict[str, Any]) -> None:
        self.place = place
        self.noise: collections.deque[str] = collections.deque(maxlen=200)  # last lines of JAX
        out, err = os.dup(1), os.dup(2)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lolo.cli", *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {MEMBER: json.dumps(place | {"stdout": out, "stderr": err})},
                pass_fds=(out, err),
                start_new_session=True,  # Ctrl-C comes to the parent alone
            )
        finally:
            os.close(out)
            os.close(err)
        self.index, self.count = place["process_id"], place["processes"]
        self.joined = False
        self.ended_by_us = False
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self) -> None:
        """Keep what the child says."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip()
            if text.startswith(JOINED):
                _, index, count = text.split()
                self.index, self.count, self.joined = int(index), int(count), True
            else:
                self.noise.append(text)

    def status(self) -> int | None:
        """Exit status; negative for a signal; None while it runs."""
        return self.process.poll()

    def end(self) -> None:
        """End it now, whatever it does, even if it was stopped."""
        if self.status() is None:
            self.ended_by_us = True
            self.process.kill()

    def name(self) -> str:
        return "the process" if self.index is None else f"process {self.index} of {self.count}"

    def why(self) -> str:
        """Why it ended, in words for people; "" if it said so itself."""
        self.reader.join(1)
        status, said = self.status(), "\n".join(self.noise)
        if status is None or status >= 0:
            own = [line.removeprefix("lolo: ") for line in self.noise if line.startswith("lolo: ")]
            if self.place["speaks"]:
                return "" if status in (*FINAL, LOST, None) else f"{self.name()} ended with status {status}."
            return f"{self.name()} ended with status {status}: {own[-1] if own else said[-1000:]}"
        if status not in (-signal.SIGABRT, -signal.SIGSEGV):
            return f"{self.name()} was killed by {signal.Signals(-status).name}."
        if not self.joined:
            return self.why_not_joined(said)
        silent = re.search(r"unhealthy[^\n]*:\s*\n(\d+(?:\s*\n\d+)*)", said)
        if silent:
            lost = ", ".join(silent[1].split())
            return f"{self.name()} lost process {lost}: no heartbeat for {self.place['heartbeat_timeout']} s."
        if re.search(r"unavailable|socket closed|heartbeat|deadline", said, re.IGNORECASE):
            return f"{self.name()} lost the coordinator, process 0: it is gone or does not answer."
        return f"{self.name()} crashed ({signal.Signals(-status).name}): {' '.join(said.split())[-300:]}"

    def why_not_joined(self, said: str) -> str:
        fatal = said.rpartition("absl::Status:")[2]  # before it, process 0 has what its coordinator says of others
        if "incarnation" in fatal or "ALREADY_EXISTS" in fatal:
            return f"{self.name()}: another process came with the same --process-id {self.index}; each needs its own."
        return (
            f"{self.name()}: not all processes came to {self.place['coordinator'] or 'the coordinator'} within "
            f"{self.place['join_timeout']} s. Start all of them, each with its own --process-id, with the same "
            "--coordinator and --processes; slow to start? raise --join-timeout."
        )


class Signals:
    """What the user wants: SIGTERM and the first Ctrl-C stop, the second Ctrl-C kills."""

    def __init__(self) -> None:
        self.stop: int | None = None
        self.kill = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.take)

    def take(self, number: int, frame: Any) -> None:
        self.kill = self.stop is not None and number == signal.SIGINT
        self.stop = number


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def places(asked: Processes) -> list[dict[str, Any]]:
    """What each child that is started here must know."""
    common = {"join_timeout": asked.join_timeout, "heartbeat_timeout": asked.heartbeat_timeout}
    here = asked.process_id is not None or asked.hosts is not None
    count = 1 if here else asked.processes or 1
    coordinator = asked.coordinator if here else f"127.0.0.1:{free_port()}"
    ids = [asked.process_id] if here else list(range(count))
    return [
        common
        | {
            "coordinator": coordinator,
            "process_id": i,
            "processes": asked.processes,
            "share": count,
            "speaks": here or i == 0,  # one process for each parent
        }
        for i in ids
    ]


def watch(children: list[Child], signals: Signals, patience: float = 30.0) -> tuple[int, str]:
    """Wait for the children; once one fails, end the others. Returns the exit status and why."""
    told = False
    failed_at: float | None = None
    while any(child.status() is None for child in children):
        time.sleep(0.05)
        if signals.stop is not None and not told:
            told = True
            for child in children:
                child.process.send_signal(signal.SIGTERM)
        failed = [status for child in children if (status := child.status())]
        if failed and failed_at is None:
            failed_at = time.monotonic()
        # Children that end by the same rule need a moment; what lost one of its own can't go on.
        wait = patience if failed and failed[0] in FINAL else 0.3
        if signals.kill or (failed_at is not None and time.monotonic() - failed_at > wait):
            for child in children:
                child.end()
    ends = [(child.status() or 0, child) for child in children if not child.ended_by_us]
    if signals.kill:
        return 130, "interrupted."
    if told and any(status == -signal.SIGTERM for status, _ in ends):
        return 3, "stopped before the run had begun."
    final = next(((status, child) for status, child in ends if status in FINAL and status != 0), None)
    bad = [(status, child) for status, child in ends if status not in FINAL]
    if final is not None:
        return final[0], final[1].why()
    if not bad:
        return 0, ""
    reasons = {status: child.why() for status, child in reversed(bad)}
    # Which ended first is a race; a signal from outside is the cause, JAX's own abort the effect.
    outside = [why for status, why in reasons.items() if status < 0 and status != -signal.SIGABRT]
    unexpected = next((status for status, _ in bad if 0 < status != LOST), None)
    return unexpected or LOST, next(iter(outside), "") or next(filter(None, reasons.values()), "")


def launch(argv: list[str], asked: Processes, say: Callable[[str], None]) -> int:
    """Run `lolo ARGV` in the processes asked for. Returns the exit status: the children's, or LOST.

    Raises ValueError for options that don't go together.
    """
    check(asked)
    signals = Signals()
    for attempt in range(asked.restarts + 1):
        children = [Child(argv, place) for place in places(asked)]
        status, why = watch(children, signals)
        if why:
            say(why)
        if status != LOST or attempt == asked.restarts or signals.stop is not None:
            break
        say(f"starting again from the last checkpoint (restart {attempt + 1} of {asked.restarts}).")
        if len(children) < (asked.processes or 2):
            # The others are on their hosts, and may need as long to notice.
            time.sleep(asked.heartbeat_timeout + 1)
    if status == LOST:
        say("the run can go on from its last checkpoint: give the same command again.")
    return status
