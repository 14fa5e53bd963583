"""What users of other optimizers reported as bugs does not happen in `lolo.torch`."""

import copy
import sys
import warnings

import pytest
import torch
from drawn import norm_fc_file

from lolo.torch.optimizer import LoLO

pytestmark = pytest.mark.torch

SMALL = "lolo-anytime"
ARCHITECTURES = {"small_fc": SMALL, "norm_fc": norm_fc_file()}
WEIGHTS = SMALL  # of the architecture that a test runs with


@pytest.fixture(autouse=True, params=ARCHITECTURES)
def architecture(request, monkeypatch):
    """Every test runs with each architecture, unless it names one."""
    monkeypatch.setattr(sys.modules[__name__], "WEIGHTS", ARCHITECTURES[request.param])


small_fc_only = pytest.mark.parametrize("architecture", ["small_fc"], indirect=True)


def trained(steps=3, grad=None, dtype=torch.float32, **options):
    """Parameters and optimizer after some steps along fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype) for shape in ((64, 32), (32,))]
    params = [torch.nn.Parameter(x) for x in numbers]
    optimizer = LoLO(params, WEIGHTS, **options)
    for _ in range(steps):
        for param in params:
            draw = torch.randn(param.shape, generator=generator, dtype=torch.float32)
            param.grad = (grad if grad is not None and param.ndim == 2 else draw).to(dtype)
        optimizer.step()
    return params, optimizer


def assert_same(a, b):
    for ours, theirs in zip(a[0], b[0], strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
        one, other = a[1].state[ours], b[1].state[theirs]
        assert {k: (x.dtype, x.device) for k, x in one.items()} == {k: (x.dtype, x.device) for k, x in other.items()}
        assert all(torch.equal(x, other[k]) for k, x in one.items())


# Settings of the process: pytorch #110940, #111671, #120376


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_changes_nothing(dtype):
    plain = trained()
    torch.set_default_dtype(dtype)
    try:
        assert_same(trained(), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_changes_nothing():
    plain = trained()
    params = [torch.nn.Parameter(x.detach().clone()) for x in plain[0]]
    grads = [torch.ones_like(x) for x in params]

    def run():
        again = [torch.nn.Parameter(x.detach().clone()) for x in params]
        optimizer = LoLO(again, WEIGHTS)
        for param, grad in zip(again, grads, strict=True):
            param.grad = grad.clone()
        optimizer.step()
        return again, optimizer

    expected = run()
    with torch.device("meta"):
        assert_same(run(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_step_inside_autocast_is_the_plain_step(dtype):
    plain = trained()
    with torch.autocast("cpu", dtype=dtype):
        assert_same(trained(), plain)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_the_precision_of_products_does_not_reach_the_step_and_stays_as_it_was(precision):
    plain = trained()
    torch.set_float32_matmul_precision(precision)
    try:
        assert_same(trained(), plain)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


# Finite gradients of any size: ferx-core #1112; darkflow #381


@pytest.mark.parametrize("size", [1e18, 1e19, 1e30, 3e38])
def test_one_huge_finite_gradient_makes_no_nan(size):
    grad = torch.full((64, 32), 0.1)
    grad[0, 0] = size
    params, _ = trained(grad=grad)
    assert all(x.isfinite().all() for x in params)


def test_a_float64_gradient_beyond_float32_makes_no_nan():
    params, _ = trained(grad=torch.full((64, 32), 1e300, dtype=torch.float64), dtype=torch.float64)
    assert all(x.isfinite().all() for x in params)


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_seen(bad):
    grad = torch.full((64, 32), 0.1)
    grad[0, 0] = bad
    params, _ = trained(grad=grad)
    assert params[0].isnan().any() and params[1].isfinite().all()


# What wrappers keep in the state: pytorch_optimizer #310


def test_a_wrappers_key_survives_saving_and_loading():
    params, optimizer = trained()
    optimizer.state[params[0]]["slow"] = params[0].detach().clone()
    again = LoLO(params, WEIGHTS)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.state[params[0]]["slow"], params[0]) and "slow" not in again.state[params[1]]
    assert_same((params, again), (params, optimizer))


def test_a_wrappers_key_from_before_the_first_step_is_kept():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = LoLO([param], WEIGHTS)
    optimizer.state[param]["slow"] = torch.zeros(3)
    LoLO([param], WEIGHTS).load_state_dict(optimizer.state_dict())
    param.grad = torch.ones(3)
    optimizer.step()
    assert "slow" in optimizer.state[param] and int(optimizer.state[param]["step"]) == 1


def test_a_missing_key_of_our_own_is_still_refused():
    params, optimizer = trained()
    saved = optimizer.state_dict()
    del saved["state"][0]["rms"]
    with pytest.raises(ValueError, match="saved state of parameter 0"):
        LoLO(params, WEIGHTS).load_state_dict(saved)


# Habits of AdamW: prodigy #27; kohya_ss #950


def make(**options):
    return LoLO([torch.nn.Parameter(torch.ones(3))], WEIGHTS, **options)


@small_fc_only
@pytest.mark.parametrize("lr", [1e-3, 3e-4, torch.tensor(1e-3)])
def test_an_lr_of_adamw_warns_once(lr):
    with pytest.warns(UserWarning, match="lr=.* is a multiple of the step.*leave lr out") as seen:
        make(lr=lr)
    assert len(seen) == 1


@small_fc_only
def test_each_group_with_an_lr_of_adamw_warns_added_later_too():
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1e-3, 1.0, 2e-3, 3e-3)]
    with pytest.warns(UserWarning, match="leave lr out") as seen:
        optimizer = LoLO(groups[:2], WEIGHTS)
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="lr=0.002 is a multiple") as seen:
        optimizer.add_param_group(groups[2])
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="lr=0.003 is a multiple"):
        copy.deepcopy(optimizer).add_param_group(groups[3])


@pytest.mark.parametrize("lr", ["a", True, float("nan"), [1.0]])
def test_an_lr_that_is_no_number_is_refused_by_name(lr):
    with pytest.raises(ValueError, match="lr=.*; expected a number that is not negative"):
        LoLO([{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr}], WEIGHTS)


@pytest.mark.parametrize("name", ["maximize", "freeze_unseen"])
@pytest.mark.parametrize("wrong", ["false", "no", 0, None])
@small_fc_only
def test_a_word_is_no_flag(name, wrong):
    with pytest.raises(ValueError, match=f"{name}=.*; expected True or False"):
        LoLO([{"params": [torch.nn.Parameter(torch.ones(2))], name: wrong}], WEIGHTS)


@pytest.mark.parametrize("architecture", ["norm_fc"], indirect=True)
def test_a_multiple_of_the_shipped_step_is_no_lr_of_norm_fc():
    with pytest.warns(UserWarning, match="lr=1 is no multiple of the shipped rate") as seen:
        make(lr=1.0)
    assert len(seen) == 1


@pytest.mark.parametrize("architecture", ["norm_fc"], indirect=True)
@pytest.mark.parametrize("change", [(None, False), (False, True)])
def test_is_matrix_can_not_change_under_way(change):
    before, after = change
    params, optimizer = trained(1, is_matrix=before)
    kept = [param.clone() for param in params]
    optimizer.param_groups[0]["is_matrix"] = after
    with pytest.raises(ValueError, match="is_matrix=.* is another one"):
        optimizer.step()
    assert torch.equal(params[0], kept[0])


@pytest.mark.parametrize("architecture", ["norm_fc"], indirect=True)
def test_an_lr_of_adamw_is_one_of_norm_fc_too():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(lr=3e-4).param_groups[0]["lr"] == 3e-4


def test_other_rates_and_the_values_of_schedules_do_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for lr in (0.02, 0.1, 0.0) if WEIGHTS is not SMALL else (0.02, 0.5, 1.0, 0.0):
            make(lr=lr)
        optimizer = make()
        torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-4)
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    "option",
    [{"betas": (0.9, 0.99)}, {"eps": 1e-8}, {"amsgrad": True}, {"fused": True}, {"foreach": False}, {"momentum": 0.9}],
    ids=str,
)
def test_arguments_of_other_optimizers_are_refused_with_the_reason(option):
    for call in (
        lambda: make(**option),
        lambda: LoLO([{"params": [torch.nn.Parameter(torch.ones(3))], **option}], WEIGHTS),
    ):
        with pytest.raises(TypeError, match=f"LoLO has no {next(iter(option))}: .*Leave it out"):
            call()


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="LoLO has no 'wieght_decay'; its settings are lr, weights"):
        make(wieght_decay=0.1)


def test_one_cycle_works_without_momentum_and_otherwise_names_its_option():
    torch.optim.lr_scheduler.OneCycleLR(make(), max_lr=1.0, total_steps=10, cycle_momentum=False)
    with pytest.raises(ValueError, match="cycle_momentum"):
        torch.optim.lr_scheduler.OneCycleLR(make(), max_lr=1.0, total_steps=10)


# Entries that never had a gradient: pytorch #3711; NVIDIA-NeMo/Speech #5726; open_lth #6


@small_fc_only
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_entries_without_a_gradient_stand_still_if_asked_to(weight_decay):
    mask = (torch.arange(64) < 20)[:, None].expand(64, 32)
    grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)) * mask
    start, _ = trained(0)
    for asked in (True, False):
        params, _ = trained(20, grad=grad, weight_decay=weight_decay, freeze_unseen=asked)
        moved = params[0] != start[0]
        assert moved[mask].all() and moved[~mask].any() != asked


@small_fc_only
def test_a_state_from_before_the_option_continues_without_it():
    params, optimizer = trained()
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["freeze_unseen"]
    again = LoLO(params, WEIGHTS)
    again.load_state_dict(saved)
    assert again.param_groups[0]["freeze_unseen"] is False
