"""The PyTorch examples train, and fit on a page."""

import importlib.util
import pathlib

import numpy as np
import pytest
from drawn import following_momentum

from lolo import files

pytestmark = pytest.mark.torch

EXAMPLES = sorted((pathlib.Path(__file__).parent.parent.parent / "examples").glob("torch_*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_the_loss_falls(path):
    weights = (
        {"weights": "lolo-small"} if "lolo-small" in files.shipped_weights() else {"weights": following_momentum()}
    )
    first, last = load(path).main(steps=150, **weights)
    assert np.isfinite([first, last]).all() and last < 0.8 * first


def test_examples_have_at_most_forty_lines():
    assert len(EXAMPLES) == 2
    assert all(len(path.read_text().splitlines()) <= 40 for path in EXAMPLES)
