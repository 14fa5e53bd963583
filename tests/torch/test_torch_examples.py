"""The PyTorch examples train."""

import example_runs
import pytest

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("path", example_runs.found("torch_*.py"), ids=lambda path: path.stem)
def test_the_loss_falls(path):
    example_runs.assert_trains(path)
