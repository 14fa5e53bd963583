"""Process groups: several processes that run one program together join, agree, and notice when one is lost.

They join through `jax.distributed`. Arrays travel between devices inside the compiled step (`parallel`); here only
JSON travels, through the key-value store of JAX's coordinator: what must be equal at the start, what one process
decides for all, hashes of a checkpoint's parts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax._src import distributed  # its key-value store: nothing public lets processes compare versions before XLA runs

AGREE_SECONDS = 600  # within which the slowest process must reach a point that all must reach
LOST = re.compile(r"gloo|nccl|connection (closed|reset)|unavailable|deadline_exceeded|aborted|heartbeat", re.IGNORECASE)


class ProcessGroupError(RuntimeError):
    """The processes could not join, or one of them was lost."""

    exit_status = 6  # of `lolo`


class DifferError(ValueError):
    """The processes were started differently, or one of them refused for all; the message says what differs, or why."""


@dataclasses.dataclass(frozen=True)
class ProcessGroup:
    """The processes that run one program, seen from one of them."""

    processes: int = 1
    index: int = 0
    turns: Iterator[int] = dataclasses.field(default_factory=itertools.count, repr=False)  # numbers the agreements

    @property
    def leads(self) -> bool:
        """Whether this is process 0: the one that logs, prints and decides."""
        return self.index == 0

    def agree(self, mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Process 0 decides on what every process gave as `mine`; all get its answer, or its error.

        Args:
          mine: what this process contributes, as JSON data.
          decide: called on process 0 alone, with a list in the order of processes; its answer must be JSON data.

        Raises: what `decide` raises, on process 0; elsewhere DifferError or OSError with the same message.
          ProcessGroupError where a process does not arrive.
        """
        if self.processes == 1:
            return decide([mine])
        client: Any = distributed.global_state.client
        turn, error = next(self.turns), None
        given, answered = f"lolo/{turn}/given/", f"lolo/{turn}/answer"
        with self.watching("waiting for the other processes"):
            client.key_value_set(f"{given}{self.index:08d}", json.dumps(mine))
            client.wait_at_barrier(f"lolo/{turn}", AGREE_SECONDS * 1000)
            if self.leads:
                answer = {}
                try:
                    everyone = [json.loads(text) for _, text in sorted(client.key_value_dir_get(given))]
                    answer = {"answer": decide(everyone)}
                except (ValueError, OSError) as failure:
                    error = failure
                    answer = {"error": str(failure), "disk": isinstance(failure, OSError)}
                client.key_value_set(answered, json.dumps(answer))
                if turn > 0:  # everyone has read the answer before: all are here
                    client.key_value_delete(f"lolo/{turn - 1}/")
            else:
                answer = json.loads(client.blocking_key_value_get(answered, AGREE_SECONDS * 1000))
        if "error" in answer:
            self.leave()
            if error is not None:
                raise error
            raise OSError(0, answer["error"], "the output") if answer["disk"] else DifferError(answer["error"])
        return answer["answer"]

    def require_equal(self, facts: dict[str, Any], cure: str) -> None:
        """Raise DifferError, on every process, unless all give the same facts (JSON data by name)."""

        def decide(given: list[dict[str, Any]]) -> None:
            lead = given[0]
            for index, other in enumerate(given):
                for name in lead["facts"] | other["facts"]:
                    ours, theirs = lead["facts"].get(name), other["facts"].get(name)
                    if ours != theirs:
                        raise DifferError(
                            f"{name} is {theirs!r} in process {index} (on {other['host']}) and {ours!r} in process 0 "
                            f"(on {lead['host']}). {cure}"
                        )

        self.agree({"host": platform.node(), "facts": facts}, decide)

    @contextmanager
    def watching(self, doing: str) -> Iterator[None]:
        """Turn what JAX raises when another process is gone into a ProcessGroupError. Does nothing when alone."""
        try:
            yield
        except (ValueError, jax.errors.JaxRuntimeError) as error:  # Gloo's errors arrive as ValueError
            words = " ".join(str(error).split())
            ours = isinstance(error, ValueError) and type(error) is not ValueError
            if self.processes == 1 or ours or not LOST.search(words):
                raise
            raise ProcessGroupError(
                f"process {self.index} of {self.processes} lost another process while {doing} ({words[:200]})."
            ) from error

    def leave(self) -> None:
        """Barrier, then leave `jax.distributed`. The process may exit afterwards."""
        if self.processes > 1:
            jax.distributed.shutdown()


ALONE = ProcessGroup()


def address(coordinator: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT". Raises ValueError."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"--coordinator {coordinator!r} must be HOST:PORT, the address of process 0.")
    return host.strip("[]"), int(port)


def await_coordinator(coordinator: str, seconds: float) -> None:
    """Wait until something listens at an address. Raises ProcessGroupError: JAX would abort the process."""
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address(coordinator), timeout=max(until - time.monotonic(), 0.1)).close()
            return
        except OSError as error:
            if time.monotonic() >= until:
                raise ProcessGroupError(
                    f"nothing answers at {coordinator} ({error.strerror or error}), after {seconds:g} s. Is that the "
                    "address of process 0, is it running, and does the network let this host through?"
                ) from error
        time.sleep(0.2)


def require_free(coordinator: str, seconds: float) -> None:
    """Raise ProcessGroupError unless this host can listen at an address: JAX would abort or share the port silently.

    A name that can't be resolved is tried again for `seconds`: the name of a pod appears a moment after the pod.
    """
    host, port = address(coordinator)
    until = time.monotonic() + seconds
    try:
        while True:
            try:
                family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
                break
            except socket.gaierror:
                if time.monotonic() >= until:
                    raise
                time.sleep(0.5)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        raise ProcessGroupError(
            f"process 0 can't listen at {coordinator} ({error.strerror or error}). Give an address of this host and a "
            "free port; no other process may have --process-id 0."
        ) from error


def join(
    coordinator: str | None, process_id: int | None, processes: int | None, *, join_seconds: int, heartbeat_seconds: int
) -> ProcessGroup:
    """Join the other processes. Call it after `parallel.use_cores` and before anything runs in JAX.

    Args:
      coordinator: HOST:PORT, where process 0 listens, there and on no other interface. With None for this and the
        other two, JAX finds them: under SLURM, Open MPI, or in a Kubernetes Job.
      join_seconds: all must have joined within this time.
      heartbeat_seconds: a process that is silent for this long is lost, and the others end.

    Raises ProcessGroupError; ValueError where JAX finds nothing. Where JAX itself gives up, it aborts the process: see
    `launch`.
    """
    # It would catch SIGTERM before we do.
    jax.config.update("jax_enable_preemption_service", False)
    began = time.monotonic()
    if coordinator is not None:
        if process_id == 0:
            require_free(coordinator, join_seconds)
        else:
            await_coordinator(coordinator, join_seconds)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=max(round(join_seconds - (time.monotonic() - began)), 5),
            heartbeat_timeout_seconds=heartbeat_seconds,
            coordinator_bind_address=coordinator,
        )
    except (ValueError, RuntimeError) as error:
        if coordinator is None and isinstance(error, ValueError):  # trying again would not change it
            raise ValueError(
                f"--hosts auto: JAX sees no SLURM step, Open MPI or Kubernetes Job (jax[k8s] installed?) around this "
                f"process ({error}) Start it in one, or give --coordinator, --process-id and --processes."
            ) from error
        where = f"at {coordinator}" if coordinator else "with --hosts auto"
        raise ProcessGroupError(
            f"the processes could not meet {where} ({' '.join(str(error).split())[:300]})."
        ) from error
    return ProcessGroup(distributed.global_state.num_processes, distributed.global_state.process_id)
