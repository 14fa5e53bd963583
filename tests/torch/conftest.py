"""Tests that need PyTorch. Where it is missing they are not collected, unless nothing may be skipped."""

import importlib.util
import os

import pytest

# Triton reads it when it is imported: its kernels run on a CPU then. Nothing else uses Triton in these tests.
os.environ["TRITON_INTERPRET"] = "1"

# This folder is itself found as an empty package "torch" where PyTorch is not installed: only a file counts.
FOUND = importlib.util.find_spec("torch")
MISSING = FOUND is None or FOUND.origin is None
if MISSING and os.environ.get("LOLO_REQUIRE_ALL") != "1":
    collect_ignore_glob = ["*.py"]


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
