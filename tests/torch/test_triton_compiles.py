"""Triton's interpreter takes what its compiler does not. Here every kernel is compiled, for a GPU that need not be."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).with_name("compile_triton.py")
KERNELS = {
    *("add_squares", "average", "project", "measure", "scale", "move", "measure_orthogonal", "normalize", "finish"),
    *("measure_adam", "size_as_adam", "adam"),
}


@pytest.mark.torch
@pytest.mark.slow
def test_all_kernels_compile_for_a_gpu_as_they_are_launched(tmp_path):
    pytest.importorskip("triton")
    cache = SCRIPT.parents[2] / ".pytest_cache" / "triton"
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": str(SCRIPT.parents[2]),
    }
    done = subprocess.run(
        [sys.executable, SCRIPT, "90", tmp_path], capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == KERNELS
    assert all(max(sizes) <= 96 for sizes in found.values()), f"registers spill, bytes: {found}"
