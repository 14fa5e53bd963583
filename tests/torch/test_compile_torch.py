"""`torch.compile` around training steps gives what steps without it give."""

import pytest
import torch
from drawn import draw_meta_params, norm_fc_file

from lolo.torch import LoLO

pytestmark = [
    pytest.mark.torch,
    # What torch says of itself while it compiles, of torch.optim.AdamW's steps too.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
OPTIMIZERS = {
    "small_fc": (draw_meta_params, {}),
    "norm_fc": (norm_fc_file, {}),
    "norm_fc, plain": (norm_fc_file, {"kernel": "plain"}),
}


def trained(name, compiled=lambda step: step, whole=True):
    """Parameters and losses after four steps. compiled: what wraps the training step, or the optimizer's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 3))
    draw, arguments = OPTIMIZERS[name]
    optimizer = LoLO(model.parameters(), draw(), **arguments)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    move = optimizer.step if whole else compiled(optimizer.step)

    def training_step(x):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        move()
        return loss

    step, losses = compiled(training_step) if whole else training_step, []
    for t in range(4):
        losses.append(step(torch.randn(16, 6, generator=torch.Generator().manual_seed(t))).detach())
        schedule.step()
    return [*losses, *(param.detach() for param in model.parameters())]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_training_step_is_the_plain_one(name, backend):
    ours = trained(name, torch.compile(backend=backend))
    for a, b in zip(ours, trained(name), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_a_training_step_that_inductor_compiles_is_the_plain_one():
    """The model's own last bits are others."""
    for a, b in zip(trained("norm_fc", torch.compile()), trained("norm_fc"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_compiled_step_of_the_optimizer_is_the_plain_one(name):
    ours = trained(name, torch.compile(backend="eager"), whole=False)
    for a, b in zip(ours, trained(name), strict=True):
        assert torch.equal(a, b)


def test_a_whole_graph_is_refused_by_torch_since_the_step_is_not_compiled():
    with pytest.raises(torch._dynamo.exc.Unsupported):
        trained("norm_fc", torch.compile(backend="eager", fullgraph=True), whole=False)
