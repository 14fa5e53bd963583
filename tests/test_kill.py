"""A real `lolo train`, killed at random moments and resumed each time, ends with the bytes of one that was not."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lolo.files import tensors
from lolo.optimizers import pretrained
from lolo.training import checkpoints, run_folder

pytestmark = pytest.mark.slow

RECIPE = "--task quadratic --outer.steps 400 --unroll.length 100 --unroll.truncation 10 --estimator.pairs 2"
OPTIONS = [*RECIPE.split(), "--validation.every", "0", "--checkpoint-seconds", "0"]


def start(log, *argv):
    with open(log, "a") as output:
        command = [sys.executable, "-m", "lolo.cli", *argv]
        return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)


def digest(run):
    weights = pretrained.load(run / "last.safetensors")
    assert weights.card["outer_step"] == 400
    return tensors.digest({name: np.asarray(x) for name, x in weights.meta_params.items()})


def wait_for(condition, process, log, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.005)


def test_twenty_kills_change_nothing(tmp_path):
    log = tmp_path / "log.txt"
    whole = start(log, "train", "lolo", *OPTIONS, "--out", str(tmp_path / "whole"))
    assert whole.wait(300) == 0, log.read_text()
    run, moments, kills, writing = tmp_path / "killed", random.Random(0), 0, 0
    process = start(log, "train", "lolo", *OPTIONS, "--out", str(run))
    while kills < 20:
        before = run_folder.checkpoints(run)
        wait_for(lambda before=before: run_folder.checkpoints(run) not in ([], before), process, log)
        if kills % 4 == 3:  # in the middle of writing a checkpoint
            wait_for(lambda: any((run / "checkpoints").glob(".*.tmp")), process, log)
            writing += 1
        else:
            time.sleep(moments.uniform(0, 0.05))
        target = os.killpg if kills % 2 else os.kill
        target(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        process = start(log, "resume", str(run), "--checkpoint-seconds", "0")
    assert process.wait(300) == 0, log.read_text()
    assert writing == 5 and digest(run) == digest(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_ends_with_a_checkpoint_and_the_resume_command(tmp_path, number):
    run, log = tmp_path / "run", tmp_path / "log.txt"
    process = start(log, "train", "lolo", *OPTIONS, "--out", str(run))
    wait_for(lambda: len(run_folder.checkpoints(run)) > 1, process, log)
    process.send_signal(number)
    assert process.wait(60) == 3
    words = log.read_text()
    assert f"lolo resume {run}" in words and signal.Signals(number).name in words and "Traceback" not in words
    assert checkpoints.newest_checkpoint(run, pytest.fail) is not None
