"""The optimizers on tensors that lie on several devices: under jit, and in parts inside shard_map.

JAX counts its devices once per process, so the checks of these scripts run in one of their own.
"""

import pathlib
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sharded.py", "sharded_norm_fc.py"])
def test_four_devices_give_what_one_gives_and_partial_tensors_are_refused_or_named(name):
    script = pathlib.Path(__file__).parent / name
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "all passed"
