"""One run in several processes over loopback: the bytes of one process, clear refusals, no hang when one is lost."""

import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from helpers import SUCCESSOR

from lolo.cli import main as cli
from lolo.files import settings, tensors
from lolo.files.disk import FileError
from lolo.kernels import library
from lolo.optimizers import pretrained
from lolo.runtime import launch, parallel, process_group
from lolo.runtime.process_group import DifferError, ProcessGroupError
from lolo.training import checkpoints, loop, recipes, run_folder, run_log, run_start
from lolo.training.how import How
from lolo.training.run_folder import RunError

SIZES = "--task quadratic --learner.name sgd --imitation.lr 0.01 --unroll.length 20 --unroll.truncation 5"
OPTIONS = [*SIZES.split(), "--estimator.pairs", "4", "--validation.every", "0"]
LONG = [*OPTIONS, "--outer.steps", "100000", "--checkpoint-seconds", "0.2"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def lolo(cache, tmp_path):
    """Starts `lolo ARGV` in the background, its words in a file; ends what the test leaves running."""
    started = []
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "LOLO_CACHE": str(cache)}

    def start(*argv, program=("-m", "lolo.cli"), more=None):
        log = tmp_path / f"log{len(started)}.txt"
        with open(log, "w") as output:
            process = subprocess.Popen(
                [sys.executable, *program, *map(str, argv)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment | (more or {}),
                start_new_session=True,
            )
        process.log = log
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()  # its children end with it
        process.wait()
        process.stdin.close()


def ends(process, seconds=240):
    """Exit status and words of a `lolo`."""
    try:
        return process.wait(seconds), process.log.read_text()
    except subprocess.TimeoutExpired:
        pytest.fail(f"still runs after {seconds} s: {process.log.read_text()}")


def digest(run):
    return tensors.digest(
        {name: np.asarray(x) for name, x in pretrained.load(run / "last.safetensors").meta_params.items()}
    )


def free_address():
    return f"127.0.0.1:{launch.free_port()}"


def members(process):
    """Process ids of the children of a `lolo`, in the order of their start."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


def wait_for(condition, *processes, seconds=240):
    until = time.monotonic() + seconds
    while not condition():
        words = [process.log.read_text() for process in processes]
        assert all(process.poll() is None for process in processes) and time.monotonic() < until, words
        time.sleep(0.02)


def at_checkpoint(run, step, *processes):
    wait_for(lambda: (run_folder.checkpoints(run) or [-1])[-1] >= step, *processes)


def one_by_one(lolo, run, *options, count=2, more=()):
    """A process group whose processes are started one by one, as on several hosts."""
    address = free_address()
    return [
        lolo("train", "lolo", *more, *options, "--out", run)
        for more in (
            [*more, "--coordinator", address, "--processes", str(count), "--process-id", str(i)] for i in range(count)
        )
    ]


# --- the same bytes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(lolo, tmp_path):
    options = [*OPTIONS, "--outer.steps", "6", "--validation.every", "3", "--validation.steps", "100"]
    assert ends(lolo("train", "lolo", *options, "--out", tmp_path / "one"))[0] == 0
    process = lolo("train", "lolo", *options, "--out", tmp_path / "two", "--processes", "2")
    status, words = ends(process)
    assert status == 0, words
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    assert words.splitlines()[-1] == f"{tmp_path}/two/last.safetensors"  # once, and no noise of JAX
    assert "gloo" not in words.lower()
    timeless = [
        [{k: v for k, v in row.items() if k not in ("inner_steps_per_second", "peak_memory_mb")} for row in rows]
        for rows in (run_log.log_rows(tmp_path / name) for name in ("one", "two"))
    ]
    assert timeless[0] == timeless[1] and len(timeless[0]) == 8
    one, two = (checkpoints.read_checkpoint(tmp_path / name, 6)[0] for name in ("one", "two"))
    assert tensors.digest(one) == tensors.digest(two)  # all of the state, whoever wrote it
    manifest = checkpoints.read_checkpoint(tmp_path / "two", 6)[1]
    assert len(manifest["files"]) == 3 and json.loads((tmp_path / "two/run.json").read_text())["processes"] == 2
    # and a checkpoint of two processes is resumed by one that has nothing else
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(run_folder.checkpoint_folder(tmp_path / "again", 6))
    assert ends(lolo("resume", tmp_path / "again"))[0] == 0
    assert digest(tmp_path / "again") == digest(tmp_path / "one")


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one_with_what_the_successor_chooses(lolo, tmp_path):
    sizes = {"estimator.pairs": 4, "estimator.slots_per_block": 2, "replay.read": "uniform", "unroll.truncation": 3}
    changes = SUCCESSOR | sizes
    options = [word for name, value in changes.items() if name != "tasks" for word in (f"--{name}", str(value))]
    options += ["--task", *changes["tasks"]]
    assert ends(lolo("train", "lolo", *options, "--out", tmp_path / "one"), 600)[0] == 0
    status, words = ends(lolo("train", "lolo", *options, "--out", tmp_path / "two", "--processes", "2"), 600)
    assert status == 0, words
    assert digest(tmp_path / "two") == digest(tmp_path / "one")
    one, two = (checkpoints.read_checkpoint(tmp_path / name, 8)[0] for name in ("one", "two"))
    assert tensors.digest(one) == tensors.digest(two) and any(name.endswith(".push_score") for name in one)


@pytest.mark.slow
def test_fifty_outer_steps_of_a_real_task_on_1_2_and_4_processes(lolo, tmp_path):
    options = ["--task", "fashion-mlp", "--outer.steps", "50", "--unroll.length", "20", "--unroll.truncation", "2"]
    options += ["--estimator.pairs", "4", "--validation.every", "0"]
    for count in (1, 2, 4):
        out = tmp_path / str(count)
        status, words = ends(lolo("train", "lolo", *options, "--out", out, "--processes", str(count)), 600)
        assert status == 0, words
    assert digest(tmp_path / "1") == digest(tmp_path / "2") == digest(tmp_path / "4")


# --- refusals -----------------------------------------------------------------------------------------------------

BAD = [
    (["--hosts", "slurm"], ["'slurm'", "auto"]),
    (["--hosts", "auto", "--processes", "2"], ["--hosts auto", "drop them"]),
    (["--processes", "0"], ["--processes 0", "at least 1"]),
    (["--processes", "3"], ["3 processes", "4 blocks", "1, 2, 4"]),
    (["--coordinator", "127.0.0.1:1", "--processes", "2"], ["--process-id"]),
    (["--coordinator", "127.0.0.1", "--process-id", "0", "--processes", "2"], ["'127.0.0.1'", "HOST:PORT"]),
    (["--coordinator", "127.0.0.1:1", "--process-id", "2", "--processes", "2"], ["--process-id 2", "0 to 1"]),
    (["--processes", "2", "--restarts", "-1"], ["--restarts -1"]),
    (["--processes", "2", "--join-timeout", "0"], ["--join-timeout 0"]),
]


@pytest.mark.parametrize(("options", "words"), BAD, ids=lambda value: " ".join(value)[:40])
def test_options_that_do_not_go_together_are_one_line(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "lolo", *OPTIONS, *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not any(tmp_path.iterdir())


def test_different_recipes_are_refused_and_nothing_is_written(lolo, tmp_path):
    address = free_address()
    common = ["--processes", "2", "--coordinator", address, "--out", tmp_path / "run"]
    began = time.monotonic()
    one = lolo("train", "lolo", *OPTIONS, *common, "--process-id", "0")
    two = lolo("train", "lolo", *OPTIONS, *common, "--process-id", "1", "--replay.threshold", "0.2")
    for process in (one, two):
        status, words = ends(process)
        assert status == 2 and "replay.threshold is 0.2 in process 1" in words and "0.1 in process 0" in words, words
        assert words.splitlines()[-1].startswith("lolo: replay.threshold") and "Traceback" not in words
    assert not (tmp_path / "run").exists() and time.monotonic() - began < 120


@pytest.mark.slow
def test_processes_on_different_paths_are_refused(lolo, tmp_path):
    if library.load() is None:
        pytest.fail("the CPU kernel is not built here: install a C++ compiler, then make install")
    learner = ["--learner.name", "norm_fc", "--learner.kernel", "auto"]
    common = ["--processes", "2", "--coordinator", free_address(), "--out", tmp_path / "run"]
    one = lolo("train", "lolo", *OPTIONS, *learner, *common, "--process-id", "0")
    two = lolo("train", "lolo", *OPTIONS, *learner, *common, "--process-id", "1", more={"LOLO_KERNEL": "0"})
    for process in (one, two):
        status, words = ends(process)
        assert status == 2 and "path" in words and "'plain' in process 1" in words, words
        assert "kernel" in words.splitlines()[-1] and "Traceback" not in words
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_wrong_coordinator_is_refused(lolo, tmp_path):
    address = free_address()
    options = [*OPTIONS, "--processes", "2", "--out", tmp_path / "run", "--join-timeout", "1"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        used = f"127.0.0.1:{taken.getsockname()[1]}"
        nobody = lolo("train", "lolo", *options, "--coordinator", address, "--process-id", "1")
        busy = lolo("train", "lolo", *options, "--coordinator", used, "--process-id", "0")
        other = lolo("train", "lolo", *options, "--coordinator", used, "--process-id", "1")  # listens, but is no lolo
        status, words = ends(nobody)
        assert status == launch.LOST and f"nothing answers at {address}" in words and words.count("\n") == 2, words
        status, words = ends(busy)
        assert status == launch.LOST and f"can't listen at {used}" in words and "Address already in use" in words, words
        status, words = ends(other)
        assert status == launch.LOST and f"not all processes came to {used} within 1 s" in words, words
        assert "Check failure stack trace" not in words
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_with_one_id_are_refused(lolo, tmp_path):
    address = free_address()
    options = [*OPTIONS, "--processes", "3", "--coordinator", address, "--join-timeout", "8"]
    options += ["--estimator.pairs", "3", "--out", tmp_path / "run"]
    began = time.monotonic()
    group = [lolo("train", "lolo", *options, "--process-id", i) for i in (0, 1, 1)]
    words = []
    for process in group:
        status, said = ends(process, 120)
        assert status == launch.LOST and "stack trace" not in said, said
        words.append(said)
    assert "not all processes came" in words[0]
    assert any("another process came with the same --process-id 1" in said for said in words[1:])
    assert time.monotonic() - began < 60 and not (tmp_path / "run").exists()


MEMBER = """
import sys
from lolo.cli import main as cli
from lolo.runtime import environment, launch
if sys.argv.pop(1) == "old":
    mine = environment.versions() | {"jax": "0.9.9"}
    environment.versions = lambda: mine
def main():
    status = cli.main()
    import jax
    print("XLA has started" if jax._src.xla_bridge.backends_are_initialized() else "before XLA")
    return status
launch.run(main)
"""


@pytest.mark.slow
def test_different_versions_are_refused(lolo, tmp_path):
    address = free_address()
    for i, kind in ((0, "new"), (1, "old")):
        place = {"coordinator": address, "process_id": i, "processes": 2, "share": 2, "prints": True}
        place |= {"join_timeout": 20, "heartbeat_timeout": 10, "stdout": 1, "stderr": 2}
        process = lolo(
            kind, "train", "lolo", *OPTIONS, "--out", tmp_path / "run", "--processes", "2",
            program=("-c", MEMBER), more={launch.MEMBER: json.dumps(place)},
        )  # fmt: skip
    status, words = ends(process)
    assert status == 2 and "jax's version is '0.9.9' in process 1" in words, words
    assert "before XLA" in words, words  # which might not get on with the other
    assert not (tmp_path / "run").exists()


# --- a process is lost --------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_when_one_process_is_lost_the_others_end_and_say_so(lolo, tmp_path, victim, number):
    run = tmp_path / "run"
    group = one_by_one(lolo, run, *LONG, more=["--heartbeat-timeout", "3"])
    at_checkpoint(run, 3, *group)
    (lost,) = members(group[victim])
    os.kill(lost, number)
    began = time.monotonic()
    status, words = ends(group[1 - victim], 60)
    assert time.monotonic() - began < 3 + 15  # the heartbeat's timeout, and a slow machine
    assert status == launch.LOST and "give the same command again" in words, words
    assert "lost" in words and "stack trace" not in words and "Traceback" not in words, words
    if number == signal.SIGSTOP:
        os.kill(lost, signal.SIGKILL)  # a stopped process can't end with its parent
    else:
        status, words = ends(group[victim], 60)
        assert status == launch.LOST and f"process {victim} of 2 was killed by SIGKILL" in words, words
    assert checkpoints.newest_checkpoint(run, pytest.fail) is not None


@pytest.mark.slow
def test_the_launcher_starts_a_group_again_and_the_result_is_the_same(lolo, tmp_path):
    options = [*OPTIONS, "--outer.steps", "400", "--checkpoint-seconds", "0"]
    whole = lolo("train", "lolo", *options, "--out", tmp_path / "whole")
    process = lolo("train", "lolo", *options, "--out", tmp_path / "run", "--processes", "2", "--restarts", "2")
    for kill, victim in enumerate((1, 0)):
        newest = (run_folder.checkpoints(tmp_path / "run") or [0])[-1]
        at_checkpoint(tmp_path / "run", newest + 20, process)
        os.kill(members(process)[victim], signal.SIGKILL)
        wait_for(lambda kill=kill: f"restart {kill + 1} of 2" in process.log.read_text(), process)
        assert f"process {victim} of 2 was killed by SIGKILL" in process.log.read_text()
    assert ends(process)[0] == 0, process.log.read_text()
    assert ends(whole)[0] == 0 and digest(tmp_path / "run") == digest(tmp_path / "whole")


@pytest.mark.slow
def test_after_a_loss_one_and_two_processes_resume_and_agree(lolo, tmp_path):
    steps = 400
    options = [*OPTIONS, "--outer.steps", str(steps), "--checkpoint-seconds", "0", "--processes", "2"]
    process = lolo("train", "lolo", *options, "--out", tmp_path / "a")
    at_checkpoint(tmp_path / "a", 20, process)
    os.kill(members(process)[1], signal.SIGKILL)
    status, words = ends(process)
    assert status == launch.LOST and "process 1 of 2 was killed by SIGKILL" in words, words
    assert run_folder.checkpoints(tmp_path / "a")[-1] < steps
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    two = lolo("train", "lolo", *options, "--out", tmp_path / "a")  # the same command
    one = lolo("resume", tmp_path / "b")
    for process in (two, one):
        status, words = ends(process)
        assert status == 0 and "resumed" in words, words
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.slow
def test_a_request_to_stop_ends_all_processes_with_a_checkpoint(lolo, tmp_path):
    run = tmp_path / "run"
    group = one_by_one(lolo, run, *LONG)
    at_checkpoint(run, 3, *group)
    group[1].send_signal(signal.SIGTERM)
    assert ends(group[1], 60)[0] == 3
    status, words = ends(group[0], 60)
    assert status == 3 and f"lolo resume {run}" in words and "stopped by another process" in words, words


def test_a_watched_process_ends_when_its_stdin_does(monkeypatch):
    ended = queue.Queue()
    monkeypatch.setenv(launch.WATCHED, "1")
    monkeypatch.setattr(os, "read", lambda *args: b"")
    monkeypatch.setattr(os, "_exit", ended.put)
    assert launch.member() is None and launch.WATCHED not in os.environ
    assert ended.get(timeout=30) == launch.LOST


@pytest.mark.slow
def test_children_end_with_their_parent(lolo, tmp_path):
    process = lolo("train", "lolo", *LONG, "--out", tmp_path / "run", "--processes", "2")
    at_checkpoint(tmp_path / "run", 2, process)
    pids = members(process)
    assert len(pids) == 2
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}/exe") for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.1)


# --- what the parent makes of its children's ends ------------------------------------------------------------------

NEWER = "absl::Status: ALREADY_EXISTS: Aborted connect attempt as there is a request from a newer incarnation."
DEADLINE = (
    "absl::Status: DEADLINE_EXCEEDED: Deadline Exceeded\n\nRPC: /xla.coordination.CoordinationService/RegisterTask"
)
SILENT = "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n3\nThe tasks have crashed."
GONE = 'UNAVAILABLE: failed to connect {grpc_message:"Socket closed", grpc_status:14}'
ABORTED, KILLED = -int(signal.SIGABRT), -int(signal.SIGKILL)


class Ended:
    """A process that ended, or runs until it is killed."""

    def __init__(self, status):
        self.status = status

    def poll(self):
        return self.status

    def kill(self):
        self.status = KILLED

    def send_signal(self, number):
        self.status = 3


def child(index, status, output="", joined=True, prints=True):
    made = object.__new__(launch.Child)
    made.process, made.index, made.count, made.joined, made.ended_by_us = Ended(status), index, 4, joined, False
    made.place = {"prints": prints, "heartbeat_timeout": 7, "join_timeout": 9, "coordinator": "host:5"}
    made.noise, made.reader = output.splitlines(), threading.Thread()
    made.reader.start()
    return made


ENDS = [
    ([child(0, 0), child(1, 0)], 0, ""),
    ([child(0, 2), child(1, None)], 2, ""),
    ([child(0, launch.LOST), child(1, 5, "noise\nlolo: the disk", prints=False)], 5, "status 5: the disk"),
    ([child(0, None), child(1, KILLED)], launch.LOST, "process 1 of 4 was killed by SIGKILL"),
    (
        [child(0, ABORTED, SILENT), child(1, None)],
        launch.LOST,
        "process 0 of 4 lost process 1, 3: no heartbeat for 7 s",
    ),
    ([child(0, ABORTED, SILENT), child(1, KILLED)], launch.LOST, "process 1 of 4 was killed by SIGKILL"),
    ([child(2, ABORTED, GONE)], launch.LOST, "process 2 of 4 lost the coordinator, process 0"),
    ([child(2, ABORTED, NEWER, joined=False)], launch.LOST, "another process came with the same --process-id 2"),
    ([child(2, ABORTED, DEADLINE, joined=False)], launch.LOST, "not all processes came to host:5 within 9 s"),
    (
        [child(0, ABORTED, f"more recent barrier, incarnation=5\n{DEADLINE}", joined=False)],
        launch.LOST,
        "not all processes",
    ),
    ([child(2, ABORTED, "F1 something else")], launch.LOST, "process 2 of 4 crashed (SIGABRT): F1 something else"),
    ([child(0, None), child(1, 1, "KeyError: 'x'", prints=False)], 1, "ended with status 1: KeyError: 'x'"),
    ([child(None, ABORTED, DEADLINE, joined=False)], launch.LOST, "the process: not all processes came"),
]


@pytest.mark.parametrize(("children", "status", "why"), ENDS)
def test_the_first_cause_is_reported(monkeypatch, children, status, why):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    ended, words = launch.watch(children, launch.Signals(), patience=0.1)
    assert ended == status and (why in words if why else words == ""), words


def test_a_request_to_stop_is_forwarded(monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    signals = launch.Signals()
    signals.take(signal.SIGTERM, None)
    assert launch.watch([child(0, None), child(1, None)], signals) == (3, "")
    signals.take(signal.SIGINT, None)
    assert signals.kill
    stubborn = child(0, None)
    stubborn.process.send_signal = lambda number: None
    assert launch.watch([stubborn], signals) == (130, "interrupted.")
    early = child(0, -int(signal.SIGTERM))
    late = child(1, None)
    signals.kill = False
    assert launch.watch([early, late], signals)[0] == 3


def test_every_process_states_how_many_devices_it_may_use(monkeypatch):
    def refuse(self, facts, cure):
        raise DifferError(json.dumps(facts["--devices"]))

    monkeypatch.setattr(process_group.ProcessGroup, "require_equal", refuse)
    recipe = settings.with_field(recipes.LOLO, "tasks", ("quadratic",))
    with pytest.raises(DifferError, match="3"):
        loop.train(recipe, None, How(devices=3, group=process_group.ProcessGroup(2, 0)))


def test_a_run_that_not_every_process_sees_is_not_resumed(tmp_path, monkeypatch):
    recipe = settings.with_field(recipes.LOLO, "tasks", ("quadratic",))
    run_start.create(tmp_path / "run", recipe, {}, process_group.ALONE)
    monkeypatch.setattr(process_group.ProcessGroup, "agree", lambda self, mine, decide: decide([mine, False]))
    assert not run_start.can_resume(tmp_path / "new", recipe, process_group.ProcessGroup(2, 0))
    checkpoints.write_checkpoint(tmp_path / "run", 0, {"phi": np.zeros(1)}, {})
    with pytest.raises(RunError, match="process 1 does not see .*run: --out must be a folder that all hosts"):
        run_start.can_resume(tmp_path / "run", recipe, process_group.ProcessGroup(2, 0))


def test_hosts_auto_outside_a_cluster_is_bad_input(monkeypatch):
    def initialize(*args, **kwargs):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(ValueError, match="--hosts auto: JAX sees no SLURM step.* or give --coordinator"):
        process_group.join(None, None, None, join_seconds=1, heartbeat_seconds=1)


# --- alone --------------------------------------------------------------------------------------------------------


def test_a_single_process_agrees_with_itself():
    assert process_group.ALONE.agree(3, lambda given: given) == [3]
    process_group.ALONE.require_equal({"a": 1}, "")
    with pytest.raises(ValueError, match="Gloo"), process_group.ALONE.watching("x"):
        raise ValueError("Gloo failed")
    with pytest.raises(ProcessGroupError, match="process 1 of 2 lost another process while x"):
        with process_group.ProcessGroup(2, 1).watching("x"):
            raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
    with pytest.raises(FileError), process_group.ProcessGroup(2, 1).watching("x"):
        raise FileError("a disk is unavailable")  # ours: it says what it means


def test_processes_that_can_not_share_the_blocks_are_refused():
    parallel.check_processes(6, 3)
    with pytest.raises(ValueError, match="4 processes can't share 6 blocks .* use 1, 2, 3, 6 processes"):
        parallel.check_processes(6, 4)
