"""`lolo train` on several processes: a parent starts them, watches them, and restarts them.

Each process of a process group is a child of a `lolo` that does nothing else, on every host. JAX aborts a process that
can't join or loses the others, with a page of C++ frames; the parent turns that into one line and an exit status,
forwards signals, and with `--restarts` starts the group again from the run's last checkpoint. If the parent is killed,
its children end too.
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

from lolo.runtime import process_group, streams
from lolo.runtime.process_group import ProcessGroup, ProcessGroupError

WATCHED = "LOLO_WATCHED"  # in the environment of a child that must end with its parent, which holds its stdin
MEMBER = "LOLO_MEMBER"  # in the environment of a child: its place in the process group, as JSON
JOINED = "lolo-joined"  # starts the line in which a child reports to its parent that it has joined
LOST = ProcessGroupError.exit_status  # processes could not join, or lost one
FINAL = (0, 2, 3, 4, 5, 130, streams.BROKEN_PIPE)  # exit statuses that a restart would not change


@dataclasses.dataclass(frozen=True)
class Processes:
    """Several processes for one run."""

    processes: int | None = None  # their number; without --process-id, all are started here
    coordinator: str | None = None  # HOST:PORT of process 0, where it listens
    process_id: int | None = None  # which one this is, from 0; start each on its host
    hosts: str | None = None  # auto: JAX finds the three above (SLURM, Open MPI, Kubernetes)
    restarts: int = 0  # times to restart from the last checkpoint when a process is lost
    join_timeout: int = 20  # seconds within which all processes must have joined
    heartbeat_timeout: int = 10  # seconds of silence after which a process counts as lost

    @property
    def requested(self) -> bool:
        """Whether several processes are requested."""
        return (self.processes, self.coordinator, self.process_id, self.hosts) != (None,) * 4


def check(requested: Processes) -> None:
    """Raise ValueError for options that contradict each other."""
    for name in ("join_timeout", "heartbeat_timeout"):
        if getattr(requested, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(requested, name)} must be at least 1 second.")
    if requested.restarts < 0:
        raise ValueError(f"--restarts {requested.restarts} must be 0 or more.")
    if requested.hosts is not None:
        if requested.hosts != "auto":
            raise ValueError(
                f"--hosts {requested.hosts!r} must be auto; or give --coordinator, --process-id, --processes."
            )
        if (requested.processes, requested.coordinator, requested.process_id) != (None, None, None):
            raise ValueError("--hosts auto finds --coordinator, --process-id and --processes by itself: drop them.")
        return
    if requested.processes is None or requested.processes < 1:
        raise ValueError(f"--processes {requested.processes} must be the number of all processes, at least 1.")
    if (requested.coordinator is None) != (requested.process_id is None):
        raise ValueError("give --coordinator and --process-id together, or neither to start all processes here.")
    if requested.process_id is not None and not 0 <= requested.process_id < requested.processes:
        raise ValueError(f"--process-id {requested.process_id} must be from 0 to {requested.processes - 1}.")
    if requested.coordinator is not None:
        process_group.address(requested.coordinator)


def end_with_parent() -> None:
    """End this process once its parent, which holds the other end of its standard input, is gone."""

    def wait() -> None:
        os.read(0, 1)  # returns when the parent is gone
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()


def member() -> dict[str, Any] | None:
    """The place of this process in its group if it is a child of `launch`, once; None otherwise.

    A child that must end with its parent does so from here on. A child of `launch` prints to the parent's standard
    output and error: its ordinary ones are read by the parent, for what JAX prints.
    """
    text, watched = os.environ.pop(MEMBER, None), os.environ.pop(WATCHED, None)
    if text or watched:
        end_with_parent()
    if text is None:
        return None
    place = json.loads(text)
    streams.reopen("stdout", place["stdout"])
    if place["prints"]:
        streams.reopen("stderr", place["stderr"])
    sys.argv[0] = "lolo"
    return place


def join(place: dict[str, Any]) -> ProcessGroup:
    """Join the other processes. Raises ProcessGroupError."""
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
    """Run a program and exit; at once if this process is still in its group, as the others won't reach the barrier."""
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
    """One process of the group, started here."""

    def __init__(self, argv: list[str], place: dict[str, Any]) -> None:
        self.place = place
        self.noise: collections.deque[str] = collections.deque(maxlen=200)  # last lines that JAX printed
        out, err = os.dup(1), os.dup(2)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lolo.cli", *argv],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=os.environ | {MEMBER: json.dumps(place | {"stdout": out, "stderr": err})},
                pass_fds=(out, err),
                start_new_session=True,  # Ctrl-C reaches the parent alone
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
        """Keep the child's last lines, and when it has joined."""
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
        """Kill it, even if it was stopped."""
        if self.status() is None:
            self.ended_by_us = True
            self.process.kill()

    def name(self) -> str:
        return "the process" if self.index is None else f"process {self.index} of {self.count}"

    def why(self) -> str:
        """Why it ended, as a sentence; "" if it has printed that itself."""
        self.reader.join(1)
        status, output = self.status(), "\n".join(self.noise)
        if status is None or status >= 0:
            messages = [line.removeprefix("lolo: ") for line in self.noise if line.startswith("lolo: ")]
            if self.place["prints"]:
                return "" if status in (*FINAL, LOST, None) else f"{self.name()} ended with status {status}."
            return f"{self.name()} ended with status {status}: {messages[-1] if messages else output[-1000:]}"
        if status not in (-signal.SIGABRT, -signal.SIGSEGV):
            return f"{self.name()} was killed by {signal.Signals(-status).name}."
        if not self.joined:
            return self.why_not_joined(output)
        silent = re.search(r"unhealthy[^\n]*:\s*\n(\d+(?:\s*\n\d+)*)", output)
        if silent:
            lost = ", ".join(silent[1].split())
            return f"{self.name()} lost process {lost}: no heartbeat for {self.place['heartbeat_timeout']} s."
        if re.search(r"unavailable|socket closed|heartbeat|deadline", output, re.IGNORECASE):
            return f"{self.name()} lost the coordinator, process 0: it is gone or does not answer."
        return f"{self.name()} crashed ({signal.Signals(-status).name}): {' '.join(output.split())[-300:]}"

    def why_not_joined(self, output: str) -> str:
        fatal = output.rpartition("absl::Status:")[
            2
        ]  # before it, process 0 has its coordinator's messages about others
        if "incarnation" in fatal or "ALREADY_EXISTS" in fatal:
            return f"{self.name()}: another process came with the same --process-id {self.index}; each needs its own."
        return (
            f"{self.name()}: not all processes came to {self.place['coordinator'] or 'the coordinator'} within "
            f"{self.place['join_timeout']} s. Start all of them, each with its own --process-id, with the same "
            "--coordinator and --processes; slow to start? raise --join-timeout."
        )


class Signals:
    """Signals from the user: SIGTERM and the first Ctrl-C stop, the second Ctrl-C kills."""

    def __init__(self) -> None:
        self.stop: int | None = None
        self.kill = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.take)

    def take(self, number: int, frame: Any) -> None:
        self.kill = self.stop is not None and number == signal.SIGINT
        self.stop = number


def free_port() -> int:
    """An unused port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def places(requested: Processes) -> list[dict[str, Any]]:
    """The place of each child that is started here."""
    common = {"join_timeout": requested.join_timeout, "heartbeat_timeout": requested.heartbeat_timeout}
    here = requested.process_id is not None or requested.hosts is not None
    count = 1 if here else requested.processes or 1
    coordinator = requested.coordinator if here else f"127.0.0.1:{free_port()}"
    ids = [requested.process_id] if here else list(range(count))
    return [
        common
        | {
            "coordinator": coordinator,
            "process_id": i,
            "processes": requested.processes,
            "share": count,
            "prints": here or i == 0,  # one process of each parent
        }
        for i in ids
    ]


def watch(children: list[Child], signals: Signals, patience: float = 30.0) -> tuple[int, str]:
    """Wait for the children; once one fails, end the others. Returns the exit status and why."""
    forwarded = False
    failed_at: float | None = None
    while any(child.status() is None for child in children):
        time.sleep(0.05)
        if signals.stop is not None and not forwarded:
            forwarded = True
            for child in children:
                child.process.send_signal(signal.SIGTERM)
        failed = [status for child in children if (status := child.status())]
        if failed and failed_at is None:
            failed_at = time.monotonic()
        # Children that end for the same reason need a moment; a group that has lost one can't continue.
        wait = patience if failed and failed[0] in FINAL else 0.3
        if signals.kill or (failed_at is not None and time.monotonic() - failed_at > wait):
            for child in children:
                child.end()
    ends = [(child.status() or 0, child) for child in children if not child.ended_by_us]
    if signals.kill:
        return 130, "interrupted."
    if forwarded and any(status == -signal.SIGTERM for status, _ in ends):
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


def launch(argv: list[str], requested: Processes, log: Callable[[str], None]) -> int:
    """Run `lolo ARGV` in the requested processes. Returns the exit status: the children's, or LOST.

    Raises ValueError for options that contradict each other.
    """
    check(requested)
    signals = Signals()
    for attempt in range(requested.restarts + 1):
        children = [Child(argv, place) for place in places(requested)]
        status, why = watch(children, signals)
        if why:
            log(why)
        if status != LOST or attempt == requested.restarts or signals.stop is not None:
            break
        log(f"starting again from the last checkpoint (restart {attempt + 1} of {requested.restarts}).")
        if len(children) < (requested.processes or 2):
            # The others are on their hosts, and may need as long to notice.
            time.sleep(requested.heartbeat_timeout + 1)
    if status == LOST:
        log("the run can resume from its last checkpoint: give the same command again.")
    return status
