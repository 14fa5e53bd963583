"""A real `lolo train` under real faults: a full disk, a folder that can't be written, an optimizer that explodes."""

import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from lolo.files import tensors
from lolo.optimizers import pretrained
from lolo.training import checkpoints, run_folder

pytestmark = pytest.mark.slow

RECIPE = "--task quadratic --outer.steps 240 --unroll.length 100 --unroll.truncation 10 --estimator.pairs 2"
OPTIONS = [*RECIPE.split(), "--validation.every", "0", "--checkpoint-seconds", "0"]
# What a process does to itself before it becomes lolo.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))"  # no file may grow beyond
# Root writes anywhere; without CAP_DAC_OVERRIDE (1) in its bounding set it is held to a folder's mode like others.
OBEY_PERMISSIONS = "import ctypes; ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)"
BECOME_LOLO = "; import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'lolo.cli', *sys.argv[1:]])"


def lolo(*argv, before="pass"):
    command = [sys.executable, "-c", before + BECOME_LOLO, *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip()


def stopped(run):
    """A run that was asked to stop once it had a few checkpoints."""
    command = [sys.executable, "-m", "lolo.cli", "train", "lolo", *OPTIONS, "--out", str(run)]
    process, until = subprocess.Popen(command, stderr=subprocess.DEVNULL), time.monotonic() + 200
    while not run_folder.checkpoints(run)[2:] and time.monotonic() < until:
        time.sleep(0.005)
    process.terminate()
    assert process.wait(60) == 3


def digest(path):
    return tensors.digest({name: np.asarray(x) for name, x in pretrained.load(path).meta_params.items()})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The digest of a run that met no fault."""
    run = tmp_path_factory.mktemp("whole") / "run"
    status, words = lolo("train", "lolo", *OPTIONS, "--out", run)
    assert status == 0, words
    return digest(run / "last.safetensors")


@pytest.mark.parametrize("room", [30_000, 80_000])
def test_a_full_disk_stops_the_run_with_the_reason_and_nothing_is_lost(tmp_path, whole, room):
    """No file may grow beyond `room` bytes: less than a checkpoint (never started), or less than the log (midway)."""
    run = tmp_path / "run"

    status, words = lolo("train", "lolo", *OPTIONS, "--out", run, before=FULL.format(room=room))
    assert status == 5 and "File too large" in words.splitlines()[-1]
    assert not list(run.rglob("*.tmp"))
    if run_folder.checkpoints(run):
        assert checkpoints.newest_checkpoint(run, pytest.fail) is not None
        status, words = lolo("resume", run)
    else:
        shutil.rmtree(run)
        status, words = lolo("train", "lolo", *OPTIONS, "--out", run)
    assert status == 0 and digest(run / "last.safetensors") == whole


def test_a_folder_that_can_not_be_written_is_refused_before_the_work(tmp_path):
    tmp_path.chmod(0o555)
    status, words = lolo("train", "lolo", *OPTIONS, "--out", tmp_path / "run", before=OBEY_PERMISSIONS)
    tmp_path.chmod(0o755)
    assert status == 2 and "Permission denied" in words and "give another --out" in words
    assert not list(tmp_path.iterdir())


def test_a_run_whose_folder_became_read_only_is_told_and_continues_once_it_is_writable(tmp_path, whole):
    run = tmp_path / "run"
    stopped(run)
    places = [run, run / "checkpoints"]
    for place in places:
        place.chmod(0o555)
    status, words = lolo("resume", run, before=OBEY_PERMISSIONS)
    for place in places:
        place.chmod(0o755)
    assert status == 5 and "Permission denied" in words
    assert lolo("resume", run)[0] == 0 and digest(run / "last.safetensors") == whole


def test_an_exploding_optimizer_is_stopped_with_a_diagnosis(tmp_path):
    explode = ["--learner.step_mult", "1e30", "--imitation.alpha_mix", "one", "--replay.threshold", "1"]
    status, words = lolo("train", "lolo", *OPTIONS, *explode, "--out", tmp_path / "run")
    assert status == 4 and "went bad first" in words and "Try a smaller learner.step_mult" in words
    arrays, _ = checkpoints.newest_checkpoint(tmp_path / "run", pytest.fail)
    assert all(np.isfinite(x).all() for name, x in arrays.items() if "meta_params" in name)


def test_a_damaged_newest_checkpoint_costs_the_steps_since_the_one_before(tmp_path, whole):
    run = tmp_path / "run"
    stopped(run)
    *_, before, newest = run_folder.checkpoints(run)
    path = run_folder.checkpoint_folder(run, newest) / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    status, words = lolo("resume", run)
    assert status == 0 and "damaged" in words and f"at outer step {before} of 240" in words
    assert digest(run / "last.safetensors") == whole
