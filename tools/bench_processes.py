"""Throughput of 2 processes against 1, each pinned to one core, and what travels between them.

  python tools/bench_processes.py --steps 100

The two process groups are alive together and take turns, so that what disturbs the machine disturbs both. Prints
medians of the outer steps' times, their ratio, whether φ has the same bytes, and the loopback interface's counters
beside the model of `tools/scale_model.py`.
"""

import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import scale_model
import tyro

from lolo.runtime import environment, launch, parallel, process_group
from lolo.training.how import How
from lolo.training.run import prepare

TURN = 10  # outer steps of one group before the other's turn


def worker(core: int, place: dict, task: str, pairs: int) -> None:
    """One process: as many outer steps as each line of stdin says, their times as JSON on stdout."""
    os.sched_setaffinity(0, [core])
    environment.set_up(1)
    here = process_group.ALONE
    if place["processes"] > 1:
        here = process_group.join(**place, join_seconds=120, heartbeat_seconds=60)
    recipe = scale_model.of_task(task, pairs)
    run = prepare(recipe, How(devices=1, group=here))
    any_process = parallel.any_process(run.mesh)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            began = time.perf_counter()
            any_process(False, False)
            run.state, metrics = run.step(run.train_tasks(), run.state)
            jax.device_get(metrics)
            times.append(time.perf_counter() - began)
        phi = hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(run.state.meta_params)))
        print(json.dumps({"times": times, "phi": phi.hexdigest()}), flush=True)
    here.leave()


class Pinned:
    """A process group, one process for each core."""

    def __init__(self, cores: list[int], task: str, pairs: int) -> None:
        address = f"127.0.0.1:{launch.free_port()}"
        self.times: list[float] = []
        self.bytes = 0
        self.phi = ""
        self.workers = []
        for index, core in enumerate(cores):
            place = {"coordinator": address, "process_id": index, "processes": len(cores)}
            program = [sys.executable, __file__, "--worker", json.dumps([core, place, task, pairs])]
            self.workers.append(
                subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
            )

    def take_turn(self, steps: int, counts: bool = True) -> None:
        """Run `steps` outer steps; process 0's times are kept."""
        before = loopback_bytes()
        for process in self.workers:
            process.stdin.write(f"{steps}\n")
        answers = [self.answer(process) for process in self.workers]
        if counts:
            self.times += answers[0]["times"]
            self.bytes += loopback_bytes() - before
        (self.phi,) = {answer["phi"] for answer in answers}  # all processes agree

    def answer(self, process: subprocess.Popen) -> dict:
        for line in process.stdout:
            if line.startswith("{"):  # Gloo prints on stdout too
                return json.loads(line)
        raise RuntimeError(f"a worker ended with status {process.wait()}")

    def end(self) -> None:
        for process in self.workers:
            process.stdin.close()
        for process in self.workers:
            process.wait()


def loopback_bytes() -> int:
    """What the loopback interface received since the machine started. Others' traffic is in it."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[0])
    return 0


def main(steps: int = 100, task: str = "fashion-mlp", pairs: int = 8, out: Path | None = None) -> None:
    """Interleave one process on one core with two processes on two.

    Args:
      steps: outer steps of each, after one turn to compile and warm up.
      task: a name of `lolo tasks`.
      pairs: antithetic pairs.
      out: JSON file for the numbers.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    groups = {1: Pinned(cores[:1], task, pairs), 2: Pinned(cores, task, pairs)}
    for some in groups.values():
        some.take_turn(TURN, counts=False)
    for _ in range(-(-steps // TURN)):
        for some in groups.values():
            some.take_turn(TURN)
    count = scale_model.counts(scale_model.of_task(task, pairs))
    medians = {n: statistics.median(some.times) for n, some in groups.items()}
    payload = 2 * (count.received_bytes(2) + scale_model.FLAGS * scale_model.WORD)
    result = {
        "task": task,
        "pairs": pairs,
        "outer_steps": len(groups[1].times),
        "median_ms": {n: round(1e3 * value, 2) for n, value in medians.items()},
        "quartiles_ms": {
            n: [round(1e3 * q, 2) for q in statistics.quantiles(some.times, n=4)] for n, some in groups.items()
        },
        "throughput_of_2_over_1": round(medians[1] / medians[2], 3),
        "same_phi": groups[1].phi == groups[2].phi,
        "model_bytes_per_outer_step": payload,
        "loopback_bytes_per_outer_step": groups[2].bytes / len(groups[2].times),
    }
    for some in groups.values():
        some.end()
    print(json.dumps(result, indent=2))
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    else:
        tyro.cli(main)
