"""What docs/use.md tells those who come from AdamW about `lolo.torch`."""

import pytest
import torch

from lolo.torch import LoLO

pytestmark = pytest.mark.torch

INPUTS, TARGETS = torch.randn(2, 64, 8, generator=torch.Generator().manual_seed(1)).unbind(0)


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))


def trained(steps=20, make=LoLO, factor=1.0, groups=lambda model: model.parameters(), parts=1):
    """Parameters after some steps; the gradients times `factor`, made in `parts`."""
    model = network()
    optimizer = make(groups(model))
    for _ in range(steps):
        optimizer.zero_grad()
        for inputs, targets in zip(INPUTS.chunk(parts), TARGETS.chunk(parts), strict=True):
            loss = (model(inputs) - targets).square().mean()
            (factor * loss / parts).backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


START = trained(0)


def difference(ours, theirs):
    """Of the ways from the start, relative."""
    return float((ours - theirs).norm() / (theirs - START).norm())


def test_accumulated_gradients_are_those_of_the_whole_batch():
    assert difference(trained(parts=4), trained()) < 1e-3
    assert difference(trained(steps=19), trained()) > 1e-2  # so that the test can tell


def small_fc(params):
    return LoLO(params, "lolo-anytime")


def test_gradients_scaled_far_down_move_less_in_small_fc_and_not_in_norm_fc_and_adamw():
    """So under small_fc a loss is not to be scaled down, nor gradients clipped at a tiny norm."""
    assert difference(trained(factor=1e-4, make=torch.optim.AdamW), trained(make=torch.optim.AdamW)) < 0.05
    assert difference(trained(factor=1e-4), trained()) < 0.1
    move = (trained(factor=factor, make=small_fc) - START for factor in (1e-4, 1.0))
    assert next(move).norm() < 0.5 * next(move).norm()


def without_decay(model):
    vectors = [param for param in model.parameters() if param.ndim < 2]
    return [
        {"params": [param for param in model.parameters() if param.ndim > 1], "weight_decay": 0.5},
        {"params": vectors, "weight_decay": 0.0},
    ]


def of_one_decay(decay):
    return lambda model: [{"params": list(model.parameters()), "weight_decay": decay}]


def test_param_groups_do_what_a_mask_for_weight_decay_does():
    ours, all_of_it, none = (
        trained(1, groups=groups) for groups in (without_decay, of_one_decay(0.5), of_one_decay(0))
    )
    matrices = torch.cat([torch.full((param.numel(),), param.ndim > 1) for param in network().parameters()])
    assert torch.equal(ours[matrices], all_of_it[matrices]) and not torch.equal(ours[matrices], none[matrices])
    assert torch.equal(ours[~matrices], none[~matrices]) and not torch.equal(ours[~matrices], all_of_it[~matrices])
