"""Triton's kernels of `norm_fc`, in Triton's interpreter on the CPU, against torch's operations.

conftest.py sets TRITON_INTERPRET=1, and LOLO_KERNEL=triton lets CPU tensors take that path. The interpreter needs about
a tenth of a second for a tile of 512 entries, so tensors are small, and so is the network.
"""

import copy
import sys

import numpy as np
import pytest
import torch
from test_kernel_torch import MOMENTS, SETTINGS, STEP, distance, draw, give, stepped, weights

from lolo.kernels import library
from lolo.torch import LoLO, kernel, norm_fc, triton_kernel, triton_table

interpreter, tl = pytest.importorskip("triton.runtime.interpreter"), pytest.importorskip("triton.language")
pytestmark = pytest.mark.torch
SHAPES = {
    "scalar": (),
    "vector": (13,),
    "square": (20, 20),
    "tall": (18, 3),
    "wide": (3, 130),  # two tiles across
    "last axis 1": (7, 1),
    "conv": (5, 4, 2, 2),
    "embedding": (40, 8),
    "aligned": (4, 36),
    "empty": (0, 4),
}
FEW = {"vector": (5,), "wide": (3, 50), "square": (20, 20)}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The interpreter, quicker and more exact.

    Numbers may overflow without a warning. Triton's language is patched once in a launch, not in every call in it.
    bfloat16 is rounded to the nearest, as GPUs do, not towards zero.
    """
    patch, convert, patched = interpreter._patch_lang, interpreter._convert_float, set()

    def patch_once(function):
        if sys._getframe(1).f_code is interpreter.GridExecutor.__call__.__code__:
            patched.clear()
        elif function.__module__ in patched:
            return None
        patched.add(function.__module__)
        return patch(function)

    def nearest(x, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(x, source, target, mode)
        return torch.from_numpy(np.array(x, np.float32)).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter, "_convert_float", nearest)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    with np.errstate(all="ignore"):
        yield


def check(monkeypatch, params, file, grads=None, step=STEP, moments=MOMENTS, steps=1, **arguments):
    """After two steps of torch's operations: the next ones, by Triton and by torch."""
    optimizer = LoLO(params, file, kernel="plain", **arguments)
    for t in range(2):
        give(params, 10 + t)
        optimizer.step()
    give(params, 20)
    grads = [p.grad for p in params] if grads is None else grads
    state = copy.deepcopy(optimizer.state_dict())
    reference, plain = stepped(params, state, file, arguments, grads, "plain")
    monkeypatch.setenv(library.VARIABLE, "triton")
    ours, other = stepped(params, state, file, arguments, grads, "auto")
    for _ in range(steps - 1):
        other.step()
        plain.step()
    for before, a, b in zip(params, ours, reference, strict=True):
        assert distance(a.double() - before.double(), b.double() - before.double()) <= step
        for name, moment in plain.state[b].items():
            assert distance(other.state[a][name].double(), moment.double()) <= moments, name
    return ours


VARIANTS = {**SETTINGS, "bfloat16 momenta": (dict(orthogonal=False), {"state_dtype": torch.bfloat16})}


@pytest.mark.parametrize(("settings", "arguments"), VARIANTS.values(), ids=VARIANTS)
def test_all_shapes_equal_torchs_operations(monkeypatch, settings, arguments):
    check(monkeypatch, draw(1, SHAPES), weights(3, **settings), **arguments)


@pytest.mark.parametrize("hidden", [1, 8, 16])
def test_other_widths(monkeypatch, hidden):
    check(monkeypatch, draw(1, {"wide": (3, 50)}), weights(hidden, orthogonal=False, baseline="none"), step=3e-5)


def test_several_steps(monkeypatch):
    check(monkeypatch, draw(1, FEW), weights(3, orthogonal=False), steps=4)


def test_a_matrix_of_several_regions(monkeypatch):
    rows = triton_table.LOOPS * triton_table.TILES["wide"][0]
    assert triton_table.NARROW < 33 < rows
    check(monkeypatch, draw(1, {"two regions": (rows + 2, 33)}), weights(2, orthogonal=False))


def test_parameters_of_16_bits(monkeypatch):
    for dtype in (torch.bfloat16, torch.float16):
        check(monkeypatch, draw(1, FEW, dtype=dtype), weights(3, orthogonal=False), step=2e-2)


def test_gradients_and_parameters_with_other_strides(monkeypatch):
    params = draw(1, {"wide": (3, 36), "square": (20, 20), "conv": (5, 4, 2, 2), "vector": (6,)})
    turned = [p.detach().mT.contiguous().mT.requires_grad_() if p.ndim == 2 else p for p in params]
    twice = torch.randn(12, requires_grad=True)[::2]  # no one piece of memory
    grads = [torch.randn(p.shape).transpose(0, -1).contiguous().transpose(0, -1) for p in params[:3]]
    grads += [torch.randn(1).expand(6)]
    for some in (params, [*turned[:3], twice.detach()]):
        check(monkeypatch, some, weights(3, weight_decay=0.1), grads)


def test_axes_that_no_strides_can_join(monkeypatch):
    """Of a convolution the window's axes become one, which these strides do not allow: it is worked on in a copy."""
    params = [torch.randn(4, 3, 2, 2).transpose(2, 3).requires_grad_()]
    check(monkeypatch, params, weights(3, orthogonal=False), [torch.randn(4, 3, 2, 2).transpose(2, 3)])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e-38, 0.0])
def test_odd_gradients_pass_as_in_torchs_operations(monkeypatch, value):
    params = draw(1, FEW)
    give(params, 3)
    grads = [p.grad.clone() for p in params]
    for grad in grads:
        grad.view(-1)[0] = value
    check(monkeypatch, params, weights(2, orthogonal=False), grads)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_entries_without_a_gradient_do_not_move(monkeypatch, orthogonal):
    monkeypatch.setenv(library.VARIABLE, "triton")
    params = draw(1, {"square": (20, 20)})
    before = params[0].detach().clone()
    optimizer = LoLO(params, weights(2, orthogonal=orthogonal))
    for _ in range(2):
        give(params, 2)
        params[0].grad[3] = 0
        optimizer.step()
    assert torch.equal(params[0][3], before[3]) and not (params[0] == before).all(1)[4:].any()


def test_it_is_triton_that_runs_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(triton_kernel, "step", lambda *_: pytest.fail("Triton"))
    params = draw(1, FEW)
    give(params, 2)
    LoLO(params, weights(3)).step()
    monkeypatch.setenv(library.VARIABLE, "triton")
    assert kernel.path(torch.device("cpu")) == "kernel triton"
    LoLO(params, weights(3), kernel="plain").step()
    with pytest.raises(pytest.fail.Exception, match="Triton"):
        LoLO(params, weights(3)).step()


def test_without_the_interpreter_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="LOLO_KERNEL=triton.*do not run on cpu.*TRITON_INTERPRET=1"):
        kernel.path(torch.device("cpu"))


def test_other_accelerators_take_the_plain_path():
    assert triton_kernel.form(torch.device("mps"), required=False) is None


def test_what_the_kernels_do_not_serve_goes_the_plain_way(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "triton")
    monkeypatch.setattr(triton_kernel, "step", lambda *_: pytest.fail("Triton"))
    params = draw(1, FEW, dtype=torch.float64)
    give(params, 2)
    LoLO(params, weights(3)).step()


def test_autograd_notices_that_parameters_changed(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "triton")
    param = torch.randn(5, 4).requires_grad_()
    loss = (param**3).sum()
    param.grad = torch.randn(5, 4)
    LoLO([param], weights(2, orthogonal=False)).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_learning_rate_may_be_a_tensor_and_change(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "triton")
    moved = []
    for rate in (0.02, torch.tensor(0.01)):
        params = draw(1, {"square": (5, 20), "vector": (5,)})
        give(params, 2)
        start = [p.detach().clone() for p in params]
        optimizer = LoLO(params, weights(2, orthogonal=False), lr=rate)
        if isinstance(rate, torch.Tensor):
            rate.fill_(0.02)
        optimizer.step()
        moved.append([p - s for p, s in zip(params, start, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(*moved, strict=True))


def test_the_table_is_written_again_when_addresses_change(monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "triton")
    written, upload = [], triton_kernel.Launch.upload

    def counted(self, addresses, device):
        before = self.table
        after = upload(self, addresses, device)
        written.append(after is not before)
        return after

    monkeypatch.setattr(triton_kernel.Launch, "upload", counted)
    params = draw(1, {"square": (5, 20)})
    optimizer = LoLO(params, weights(2, orthogonal=False))
    held = []
    for fresh in (True, False, True):
        if fresh:
            give(params, 2)
            held.append(params[0].grad)
        optimizer.step()
    assert written == [True, False, True]


def test_a_capture_takes_the_spare_table_and_says_when_there_is_none():
    made = triton_table.adam_plan([5, 2000])
    launch, table = triton_kernel.Launch(made, torch.device("cpu")), torch.from_numpy(made.rows)
    launch.spare = torch.empty_like(table), torch.empty_like(table)
    there = launch._upload_in_capture(table)
    assert torch.equal(there, table) and any(there is x for pair in launch.captured for x in pair)
    with pytest.raises(RuntimeError, match="needs a step outside of one before"):
        launch._upload_in_capture(table)


def test_launches_have_a_limit_and_keep_equal_shapes_together(monkeypatch):
    monkeypatch.setattr(triton_kernel, "LIMIT", 100)
    params = [torch.randn(shape, requires_grad=True) for shape in ((5, 10), (6, 30), (5, 10), (2, 5))]
    for param in params:
        param.grad = torch.randn_like(param)
    located = [triton_kernel.prepare(param, None) for param in params]
    shapes = [[tuple(x.param.shape) for x in some] for some in triton_kernel.batches(located)]
    assert shapes == [[(2, 5), (5, 10)], [(5, 10)], [(6, 30)]]
    monkeypatch.setattr(triton_kernel, "LIMIT", 1000)
    (some,) = triton_kernel.batches(
        [triton_kernel.prepare(param, norm_fc.layout(tuple(param.shape))) for param in params]
    )
    made = triton_table.plan(list(map(triton_kernel.extents_of, some)), "wide", 2)
    scratch = torch.arange(made.floats, dtype=torch.float32)
    batches = triton_kernel.matrices(some, made, scratch)
    assert [steps.shape for _, steps in batches] == [(1, 1, 2, 5), (2, 1, 5, 10), (1, 1, 6, 30)]
    starts = made.rows[:, triton_table.AT["step"]]
    assert [float(steps.flatten()[0]) for _, steps in batches] == [starts[0], starts[1], starts[3]]
