"""What the tests of the examples share; imports neither JAX nor PyTorch."""

import importlib.util
import math
import pathlib

FOLDER = pathlib.Path(__file__).parent.parent / "examples"


def found(pattern):
    """Examples whose file names match; at least one."""
    paths = sorted(FOLDER.glob(pattern))
    assert paths, f"no examples/{pattern}"
    return paths


def assert_trains(path):
    """150 steps lower the loss by a fifth or more."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    first, last = module.main(steps=150)
    assert math.isfinite(first) and last < 0.8 * first
