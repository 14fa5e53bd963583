"""The CPU kernel of `norm_fc` against torch's operations: one step from the same state, in every form there is."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from lolo.files import tensors
from lolo.kernels import library
from lolo.optimizers.norm_fc_spec import NormFcSettings, weight_shapes
from lolo.optimizers.weights_file import WeightsFile
from lolo.torch import LoLO

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(not library.forms(), reason="this installation has no kernel"),
]
SHAPES = {
    "scalar": (),
    "vector": (13,),
    "wide": (3, 50),
    "tall": (50, 3),
    "square": (20, 20),
    "rows of two vectors": (40, 32),
    "last axis 1": (7, 1),
    "conv": (6, 4, 3, 3),
    "large conv": (33, 17, 3, 3),
    "embedding": (120, 8),
    "longer than a piece": (2, 4500),
    "empty": (0, 4),
}
STEP, MOMENTS = 1e-5, 1e-6  # of a tensor's norm


def weights(hidden=8, **settings):
    rng = np.random.default_rng(hidden)
    phi = {n: rng.normal(0.2, 0.4, shape).astype(np.float32) for n, shape in weight_shapes(hidden).items()}
    learner = dataclasses.asdict(NormFcSettings(hidden=hidden, learning_rate=0.01, **settings))
    return WeightsFile(phi, learner, {}, {}, tensors.digest(phi))


def draw(seed, shapes=SHAPES, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(s, generator=generator) * scale).to(dtype).requires_grad_() for s in shapes.values()]


def give(params, seed, noncontiguous=False):
    for param, grad in zip(params, draw(seed, dict(enumerate(p.shape for p in params))), strict=True):
        if noncontiguous and grad.ndim > 1:
            grad = grad.mT.contiguous().mT
        param.grad = grad.detach().to(param.dtype)


def distance(a, b):
    a, b = (x.detach().double().numpy() for x in (a, b))
    np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
    a, b = np.nan_to_num(a), np.nan_to_num(b)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30)) if b.size else 0.0


def stepped(params, state, file, arguments, grads, kernel):
    """Parameters moved by one step, as copies, and the optimizer."""
    mine = [torch.empty_strided(p.size(), p.stride(), dtype=p.dtype).copy_(p.detach()) for p in params]
    for param, grad in zip(mine, grads, strict=True):
        param.grad = grad
    optimizer = LoLO(mine, file, kernel=kernel, **arguments)
    optimizer.load_state_dict(copy.deepcopy(state))
    for group in optimizer.param_groups:
        group["kernel"] = kernel
    optimizer.step()
    return mine, optimizer


def check(monkeypatch, params, file, grads=None, noncontiguous=False, step=STEP, **arguments):
    """After three steps of torch's operations: the next one, by the kernel and by torch."""
    optimizer = LoLO(params, file, kernel="plain", **arguments)
    for t in range(3):
        give(params, 10 + t, noncontiguous)
        optimizer.step()
    give(params, 20, noncontiguous)
    grads = [p.grad for p in params] if grads is None else grads
    state = optimizer.state_dict()
    reference, plain = stepped(params, state, file, arguments, grads, "plain")
    for form in library.forms():
        monkeypatch.setenv(library.VARIABLE, form)
        ours, kernel = stepped(params, state, file, arguments, grads, "auto")
        for before, a, b in zip(params, ours, reference, strict=True):
            assert distance(a - before, b - before) <= step
            for name, moment in plain.state[b].items():
                assert distance(kernel.state[a][name].double(), moment.double()) <= MOMENTS, name
    return reference


SETTINGS = {
    "network alone": (dict(orthogonal=False, baseline="none"), {}),
    "momentum": (dict(orthogonal=False, weight_decay=0.1, adam_scale=0.5), {}),
    "Newton-Schulz": (dict(weight_decay=0.1), {}),
    "AdamW's size": (dict(step_rms="adam", weight_decay=0.1), {}),
    "AdamW's size, vectors too": (dict(orthogonal=False, step_rms="adam"), {"is_matrix": True}),
    "vectors too": (dict(orthogonal=False), {"is_matrix": True}),
    "AdamW alone": (dict(weight_decay=0.1, adam_scale=0.5), {"is_matrix": False}),
    "AdamW with a long memory": (dict(adam_beta2=0.999), {"is_matrix": False}),
    "AdamW without memory": (dict(adam_beta2=0.0), {"is_matrix": False}),
    "climbing": (dict(orthogonal=False), {"maximize": True}),
}


@pytest.mark.parametrize(("settings", "arguments"), SETTINGS.values(), ids=SETTINGS)
def test_all_shapes_equal_torchs_operations(monkeypatch, settings, arguments):
    check(monkeypatch, draw(1), weights(**settings), **arguments)


@pytest.mark.parametrize("hidden", [1, 5, 16])
def test_other_widths(monkeypatch, hidden):
    check(monkeypatch, draw(1), weights(hidden, orthogonal=False, baseline="none"), step=3e-5)


def test_the_comparison_can_tell(monkeypatch):
    file = weights(orthogonal=False)
    other = weights(orthogonal=False, baseline="none")
    params = draw(1)
    give(params, 2)
    moved = []
    for each in (file, other):
        optimizer = LoLO([p.detach().clone().requires_grad_() for p in params], each)
        for mine, param in zip(optimizer.param_groups[0]["params"], params, strict=True):
            mine.grad = param.grad
        optimizer.step()
        moved.append(optimizer.param_groups[0]["params"])
    assert distance(moved[0][4] - params[4], moved[1][4] - params[4]) > 10 * STEP


def test_it_is_the_kernel_that_runs(monkeypatch):
    called = []
    real = library.step
    monkeypatch.setattr(library, "step", lambda *args: called.append(len(args[1])) or real(*args))
    for kernel in (None, "plain"):
        params = draw(1)
        give(params, 2)
        LoLO(params, weights(), kernel=kernel).step()
    assert called == [len(SHAPES) - 1], "one call for all tensors with entries, none under kernel='plain'"


@pytest.fixture
def threads():
    """torch.set_num_threads, undone."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("is_matrix", [None, True])
def test_threads_that_share_the_tensors_change_no_bit(threads, is_matrix):
    """Without Newton-Schulz, whose products are torch's."""
    shapes = SHAPES | {"large": (300, 400), "long": (40_000,)}
    file, moved = weights(orthogonal=False), []
    for count in (1, 2, 3, 30):
        params = draw(1, shapes)
        optimizer = LoLO(params, file, is_matrix=is_matrix)
        threads(count)
        for seed in (2, 3):
            give(params, seed)
            optimizer.step()
        moved.append(params)
    for others in moved[1:]:
        for ours, alone in zip(others, moved[0], strict=True):
            torch.testing.assert_close(ours, alone, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_of_16_bits(monkeypatch, dtype):
    check(monkeypatch, draw(1, dtype=dtype), weights(orthogonal=False), step=2e-2)


def test_gradients_and_parameters_with_other_strides(monkeypatch):
    check(monkeypatch, draw(1), weights(orthogonal=False), noncontiguous=True)
    turned = [p.detach().mT.contiguous().mT.requires_grad_() if p.ndim == 2 else p for p in draw(1)]
    assert not turned[4].is_contiguous()
    check(monkeypatch, turned, weights(weight_decay=0.1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-38, 0.0])
def test_odd_gradients_pass_as_in_torchs_operations(monkeypatch, value):
    params = draw(1)
    give(params, 3)
    grads = [p.grad.clone() for p in params]
    for grad in grads:
        if grad.numel():
            grad.view(-1)[0] = value
    check(monkeypatch, params, weights(orthogonal=False), grads)


def test_what_the_kernel_does_not_serve_goes_the_plain_way(monkeypatch):
    called = []
    monkeypatch.setattr(library, "step", lambda *args: called.append(args))
    for params, arguments in ((draw(1, dtype=torch.float64), {}), (draw(1), {"state_dtype": torch.bfloat16})):
        give(params, 2)
        before = [p.detach().clone() for p in params]
        LoLO(params, weights(), **arguments).step()
        assert not called
        assert all(not p.numel() or not torch.equal(a, p) for a, p in zip(before, params, strict=True))


def test_autograd_notices_that_parameters_changed():
    param = torch.randn(20, 20).requires_grad_()
    loss = (param**3).sum()
    param.grad = torch.randn(20, 20)
    LoLO([param], weights(orthogonal=False)).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_kernel_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="kernel='fast' must be one of 'auto', 'plain'"):
        LoLO(draw(1), weights(), kernel="fast")
