"""What is not installed is not needed, or named with its cure."""

import subprocess
import sys

import pytest

BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
for name in {absent!r}:
    sys.modules.pop(name, None)
"""
WINDOWS_LACKS = ("fcntl", "resource", "termios", "pwd", "grp")
EVERY_MODULE = """
import importlib, pkgutil, lolo
skipped = ("lolo.torch", "lolo.bench.torch_speed", "lolo.bench.textbook_torch")  # need torch
skipped += ("lolo.kernels._norm_fc", "lolo.cli.__main__")  # a library, and a command
for module in pkgutil.walk_packages(lolo.__path__, "lolo."):
    if not module.name.startswith(skipped) and ".data." not in module.name + ".":
        importlib.import_module(module.name)
"""


def run(code, *absent):
    """Exit status and standard error of Python code in a process where these modules are absent."""
    command = [sys.executable, "-c", BLOCK.format(absent=absent) + code]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr


def test_every_module_is_there_where_windows_lacks_some():
    status, words = run(EVERY_MODULE, *WINDOWS_LACKS)
    assert status == 0, words


def test_a_module_that_is_blocked_is_absent():
    status, words = run("import fcntl", "fcntl")
    assert status == 1 and "No module named 'fcntl'" in words


@pytest.mark.parametrize(
    ("code", "absent", "cure"),
    [
        ("import lolo.torch", "torch", "lolo.torch needs torch, which is not installed: pip install 'lolo[torch]'"),
        ("import lolo; lolo.load()", "jax", "lolo.load needs jax, which is not installed: pip install 'lolo[jax]'"),
        ("import lolo; lolo.train", "rich", "lolo.train needs rich, which is not installed: pip install 'lolo[train]'"),
    ],
)
def test_what_is_absent_is_named_with_its_cure(code, absent, cure):
    status, words = run(code, absent)
    assert status == 1 and words.splitlines()[-1] == f"ModuleNotFoundError: {cure}"


def test_weights_are_used_with_jax_and_optax_alone():
    code = """
import jax.numpy as jnp, lolo
params = {"w": jnp.ones((4, 3))}
optimizer = lolo.load().optimizer()
updates, state = optimizer.update(params, optimizer.init(params), params)
assert updates["w"].shape == (4, 3)
"""
    status, words = run(code, "torch", "rich", "tyro", "matplotlib")
    assert status == 0, words


@pytest.mark.torch
def test_pytorch_needs_torch_numpy_and_safetensors_alone():
    code = """
import torch
from lolo.torch import LoLO
layer = torch.nn.Linear(8, 4)
optimizer = LoLO(layer.parameters())
layer(torch.ones(2, 8)).square().mean().backward()
optimizer.step()
"""
    absent = ("jax", "jaxlib", "optax", "jaxtyping", "scipy", "rich", "tyro", "matplotlib")
    status, words = run(code, *absent)
    assert status == 0, words
