"""LoLO behaves as users of `torch.optim` expect, and says so where it can't."""

import copy
import io
import math
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from drawn import draw_meta_params, draw_norm_fc, following_momentum, norm_fc_file

from lolo.optimizers import weights_file
from lolo.torch.optimizer import LoLO

pytestmark = pytest.mark.torch

ARCHITECTURES = {"small_fc": draw_meta_params, "norm_fc": draw_norm_fc}
DEFAULT_LR = {"small_fc": 1.0, "norm_fc": 1e-3}
PHI, OTHER_PHI, LR = {}, {}, 1.0  # of the architecture that a test runs with


@pytest.fixture(autouse=True, params=ARCHITECTURES)
def architecture(request, monkeypatch):
    """Every test runs with each architecture, unless it names one."""
    draw = ARCHITECTURES[request.param]
    for name, value in {"PHI": draw(), "OTHER_PHI": draw(seed=1), "LR": DEFAULT_LR[request.param]}.items():
        monkeypatch.setattr(sys.modules[__name__], name, value)
    return request.param


small_fc_only = pytest.mark.parametrize("architecture", ["small_fc"], indirect=True)


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 20), torch.nn.ReLU(), torch.nn.Linear(20, 20), torch.nn.Linear(20, 3)
    )
    return model.to(dtype)


def backward(model, step=0):
    """A loss and its gradients, the same for the same step."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 6, generator=generator).to(next(model.parameters()).dtype)
    model.zero_grad()
    loss = (model(x) - x[:, :3]).square().mean()
    loss.backward()
    return loss


def train(model, optimizer, steps, start=0, scheduler=None):
    for step in range(start, start + steps):
        backward(model, step)
        optimizer.step()
        if scheduler:
            scheduler.step()


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def trained(steps=5, dtype=torch.float32, **options):
    """Parameters after some steps."""
    model = make_model(dtype)
    train(model, LoLO(model.parameters(), **{"weights": PHI} | options), steps)
    return values(model)


def write(path, phi=None, **learner):
    phi = PHI if phi is None else phi
    small_fc = {
        **{"name": "small_fc", "hidden": 32, "step_mult": 1e-3, "exp_mult": 1e-3, "learn_decays": False},
        **{"weight_decay": 0.0, "clock_limit": None},
    }
    default = small_fc if len(phi["w0"]) == 39 else norm_fc_file(phi).learner
    weights_file.write_weights(path, phi, learner=default | learner)
    return path


# --- settings -----------------------------------------------------------------------------------------------------


def test_lr_scales_the_step():
    start = values(make_model())
    once, half = trained(1), trained(1, lr=LR / 2)
    for x, a, b in zip(start, once, half, strict=True):
        torch.testing.assert_close(a - x, 2 * (b - x), rtol=1e-3, atol=2e-7)
    assert same(trained(3, lr=0.0), start)


def test_weights_by_path_by_value_and_as_arrays_are_the_same(tmp_path):
    path = write(tmp_path / "w.safetensors")
    expected = trained()
    assert same(trained(weights=path), expected)
    assert same(trained(weights=str(path)), expected)
    assert same(trained(weights=weights_file.read_weights(path)), expected)


@small_fc_only
def test_settings_come_with_the_weights_and_can_be_switched_off(tmp_path):
    settings = {"weight_decay": 2.0, "clock_limit": 1.0, "step_decay": 3.0}
    plain, shipped = trained(8), write(tmp_path / "w.safetensors", **settings)
    assert not same(trained(8, weights=shipped), plain)
    assert same(trained(8, weights=shipped), trained(8, **settings))
    assert same(trained(8, weights=shipped, weight_decay=0.0, clock_limit=math.inf, step_decay=math.inf), plain)
    group = LoLO(make_model().parameters(), weights=shipped).param_groups[0]
    assert {name: group[name] for name in settings} == settings


@small_fc_only
def test_weight_decay_is_decoupled_and_scaled_by_lr_and_lambda1():
    param = torch.nn.Parameter(torch.full((4,), 2.0))
    twin = torch.nn.Parameter(param.detach().clone())
    param.grad, twin.grad = torch.zeros(4), torch.zeros(4)
    LoLO([param], weights=PHI, lr=0.5, weight_decay=0.1).step()
    LoLO([twin], weights=PHI, lr=0.5).step()
    torch.testing.assert_close(param - twin, torch.full((4,), -0.5 * 1e-3 * 0.1 * 2.0), rtol=1e-2, atol=0.0)


def test_maximize_follows_the_negated_gradient():
    model, twin = make_model(), make_model()
    ascent, descent = (LoLO(m.parameters(), weights=PHI, maximize=m is model) for m in (model, twin))
    for step in range(3):
        backward(model, step), backward(twin, step)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = -p.grad
        ascent.step(), descent.step()
    assert same(values(model), values(twin))


@small_fc_only
def test_groups_have_their_own_settings_and_weights(tmp_path):
    other = write(tmp_path / "other.safetensors", OTHER_PHI, step_mult=1e-2)
    model = make_model()
    first, second, *rest = model.parameters()
    groups = [
        {"params": [first], "lr": 0.5},
        {"params": [second], "weights": other},
        {"params": rest, "weight_decay": 0.3, "clock_limit": 2.0},
    ]
    train(model, LoLO(groups, weights=PHI), 4)
    for index, options in enumerate([{"lr": 0.5}, {"weights": other}, {"weight_decay": 0.3, "clock_limit": 2.0}]):
        alone = make_model()
        params = list(alone.parameters())
        params = [[params[0]], [params[1]], params[2:]][index]
        optimizer = LoLO(params, **{"weights": PHI} | options)
        # The gradients of the run with all groups: only this group's parameters move by this optimizer.
        reference = make_model()
        r_params = list(reference.parameters())
        r_groups = [
            {**g, "params": p} for g, p in zip(groups, [[r_params[0]], [r_params[1]], r_params[2:]], strict=True)
        ]
        r_optimizer = LoLO(r_groups, weights=PHI)
        for step in range(4):
            backward(reference, step)
            for p, r in zip(alone.parameters(), r_params, strict=True):
                p.grad = r.grad.clone()
            optimizer.step(), r_optimizer.step()
        ids = {id(p) for p in params}
        pairs = [(p, q) for p, q in zip(alone.parameters(), model.parameters(), strict=True) if id(p) in ids]
        assert pairs and all(torch.equal(p, q) for p, q in pairs)


def test_added_groups_are_trained_with_a_clock_of_their_own():
    model = make_model()
    *body, head_weight, head_bias = model.parameters()
    optimizer = LoLO(body, weights=PHI)
    start = values(model)
    train(model, optimizer, 2)
    assert torch.equal(head_weight, start[-2])
    optimizer.add_param_group({"params": [head_weight, head_bias], "lr": 2 * LR})
    train(model, optimizer, 3, start=2)
    assert not torch.equal(head_weight, start[-2])
    assert [int(optimizer.state[p]["step"]) for p in (body[0], head_bias)] == [5, 3]
    assert [g["lr"] for g in optimizer.param_groups] == [LR, 2 * LR]


def test_named_parameters_are_taken():
    model = make_model()
    train(model, optimizer := LoLO(model.named_parameters(), weights=PHI), 5)
    assert same(values(model), trained())
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_schedulers_drive_the_step():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    seen, before = [], values(model)
    for step in range(5):
        backward(model, step)
        optimizer.step()
        scheduler.step()
        seen.append(scheduler.get_last_lr()[0])
        moved, before = not same(values(model), before), values(model)
        assert moved == (step < 4)
    assert seen == pytest.approx([LR * 0.5 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2, 3, 4, 5)], abs=1e-12)


def test_warm_up_and_one_cycle_schedulers_work():
    optimizer = LoLO(make_model().parameters(), weights=PHI)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=10, cycle_momentum=False)
    assert 0 < optimizer.param_groups[0]["lr"] < LR


def test_lr_may_be_a_tensor():
    assert same(trained(lr=torch.tensor(LR / 2)), trained(lr=LR / 2))


def test_clipped_gradients_and_gradient_scalers_work():
    model = make_model()
    optimizer, scaler = LoLO(model.parameters(), weights=PHI), torch.amp.GradScaler("cpu")
    before = values(model)
    for step in range(3):
        model.zero_grad()
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        scaler.scale((model(x) - x[:, :3]).square().mean()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert not same(values(model), before) and all(p.isfinite().all() for p in model.parameters())


# --- step ---------------------------------------------------------------------------------------------------------


def test_a_closure_is_called_once_with_gradients_on_and_its_loss_returned():
    model, calls = make_model(), []
    optimizer = LoLO(model.parameters(), weights=PHI)

    def closure():
        calls.append(torch.is_grad_enabled())
        return backward(model)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True] and loss.item() == backward(make_model()).item()
    assert same(values(model), trained(1))
    assert optimizer.step() is None


def test_hooks_run_around_the_step():
    model, seen = make_model(), []
    optimizer = LoLO(model.parameters(), weights=PHI)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, 2)
    assert seen == ["before", "after"] * 2


def test_steps_in_backward_work():
    model = make_model()
    optimizers = {p: LoLO([p], weights=PHI) for p in model.parameters()}

    def hook(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(hook)
    for step in range(5):
        backward(model, step)
    for ours, expected in zip(values(model), trained(), strict=True):  # alone and in company: other summation order
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


def test_zero_grad_clears():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI)
    backward(model)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_parameters_without_gradient_stand_still_and_so_does_their_clock():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI)
    sleeper, awake = model[0].weight, model[3].weight
    for step in range(4):
        backward(model, step)
        if step < 2:
            sleeper.grad = None
        before = sleeper.detach().clone()
        optimizer.step()
        assert torch.equal(before, sleeper) == (step < 2)
    assert int(optimizer.state[sleeper]["step"]) == 2 and int(optimizer.state[awake]["step"]) == 4


def test_frozen_and_empty_parameters_are_left_alone():
    model = make_model()
    model[0].requires_grad_(False)
    empty = torch.nn.Parameter(torch.zeros(0, 4))
    empty.grad = torch.zeros(0, 4)
    optimizer = LoLO([*model.parameters(), empty], weights=PHI)
    start = values(model)
    train(model, optimizer, 2)
    assert same(values(model)[:2], start[:2]) and not same(values(model)[2:], start[2:])
    assert model[0].weight not in optimizer.state and empty not in optimizer.state


def test_gradients_are_read_only_and_steps_leave_no_graph():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI, maximize=True)
    backward(model)
    grads = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert same([p.grad for p in model.parameters()], grads)
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_reaches_the_parameter_and_no_other():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI)
    backward(model)
    model[0].weight.grad[0, 0] = math.nan
    optimizer.step()
    assert model[0].weight.isnan().all()  # through the mean over the tensor
    assert all(p.isfinite().all() for p in model.parameters() if p is not model[0].weight)


@small_fc_only
def test_loss_falls_with_a_network_that_follows_momentum():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=following_momentum(), lr=3.0)
    first = backward(model).item()
    train(model, optimizer, 100)
    assert backward(model).item() < 0.5 * first


# --- saving and loading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_resuming_is_exact(dtype):
    model = make_model(dtype)
    optimizer = LoLO(model.parameters(), weights=PHI)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.9)
    train(model, optimizer, 3, scheduler=scheduler)
    file = io.BytesIO()
    torch.save([x.state_dict() for x in (model, optimizer, scheduler)], file)
    train(model, optimizer, 4, 3, scheduler)

    file.seek(0)
    resumed = make_model(dtype, seed=5)
    again = LoLO(resumed.parameters(), weights=PHI)
    schedule = torch.optim.lr_scheduler.StepLR(again, 2, 0.9)
    for thing, state in zip((resumed, again, schedule), torch.load(file, weights_only=True), strict=True):
        thing.load_state_dict(state)
    assert all(x.dtype == torch.float32 for s in again.state.values() for k, x in s.items() if k != "step")
    train(resumed, again, 4, 3, schedule)
    assert same(values(model), values(resumed))


@small_fc_only
def test_states_from_before_there_was_a_step_decay_go_on_without_one():
    model, twin = make_model(), make_model()
    optimizer, other = LoLO(model.parameters(), weights=PHI), LoLO(twin.parameters(), weights=PHI, step_decay=2.0)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["step_decay"]
    other.load_state_dict(saved)
    train(model, optimizer, 3)
    train(twin, other, 3)
    assert same(values(model), values(twin)) and other.param_groups[0]["step_decay"] == math.inf


def test_a_loaded_state_is_a_copy():
    model, twin = make_model(), make_model()
    optimizer, other = LoLO(model.parameters(), weights=PHI), LoLO(twin.parameters(), weights=PHI)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    other.load_state_dict(saved)
    train(twin, other, 2)
    assert all(same(saved["state"][i].values(), before[i].values()) for i in before)


def test_the_state_of_other_weights_is_refused():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI)
    train(model, optimizer, 1)
    other = LoLO(make_model().parameters(), weights=OTHER_PHI)
    with pytest.raises(ValueError, match="param group 0 was saved with the weights.*Build it with LoLO"):
        other.load_state_dict(optimizer.state_dict())
    assert not other.state


def test_states_of_other_optimizers_and_shapes_are_refused():
    model = make_model()
    adam = torch.optim.AdamW(model.parameters())
    optimizer = LoLO(model.parameters(), weights=PHI)
    with pytest.raises(ValueError, match="another optimizer"):
        optimizer.load_state_dict(adam.state_dict())
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["momentum"] = saved["state"][0]["momentum"][:2]
    with pytest.raises(ValueError, match="saved state of parameter 0 of shape"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        LoLO([{"params": [p]} for p in model.parameters()], weights=PHI).load_state_dict(optimizer.state_dict())


def test_the_state_names_its_weights_and_holds_only_tensors(tmp_path):
    path = write(tmp_path / "mine.safetensors")
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=path)
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    assert group["weights"] == str(path) and group["weights_sha256"] == weights_file.read_weights(path).sha256
    assert all(isinstance(x, torch.Tensor) for s in saved["state"].values() for x in s.values())


def test_hooks_on_loading_see_what_they_should():
    model = make_model(torch.bfloat16)
    optimizer = LoLO(model.parameters(), weights=PHI)
    train(model, optimizer, 2)
    other, seen = LoLO(make_model(torch.bfloat16).parameters(), weights=PHI), []

    def clear_clocks(_, state_dict):
        state = {k: {**s, "step": torch.zeros((), dtype=torch.int64)} for k, s in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other.register_load_state_dict_pre_hook(clear_clocks)
    other.register_load_state_dict_post_hook(
        lambda o: seen.extend(x.dtype for s in o.state.values() for k, x in s.items() if k != "step")
    )
    other.load_state_dict(optimizer.state_dict())
    assert set(seen) == {torch.float32}
    assert {int(s["step"]) for s in other.state.values()} == {0}
    assert {int(s["step"]) for s in optimizer.state.values()} == {2}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_as_the_original_does(duplicate):
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI)
    train(model, optimizer, 2)
    twin, twin_optimizer = duplicate((model, optimizer))
    train(model, optimizer, 3, 2)
    train(twin, twin_optimizer, 3, 2)
    assert same(values(model), values(twin))


def test_printing_shows_the_settings():
    assert "weights_sha256" in repr(LoLO(make_model().parameters(), weights=PHI))


# --- refusals -------------------------------------------------------------------------------------------------------


def one(tensor):
    return LoLO([tensor], weights=PHI)


def test_sparse_gradients_are_refused():
    table = torch.nn.Embedding(10, 4, sparse=True)
    optimizer = LoLO(table.parameters(), weights=PHI)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_complex_and_unknown_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"complex64.*\[\.\.\., 2\].*torch.view_as_complex"):
        one(torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(TypeError, match="float8_e5m2"):
        one(torch.nn.Parameter(torch.zeros(3, dtype=torch.float8_e5m2), requires_grad=False))


def test_the_cure_for_complex_parameters_moves_both_parts():
    param = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = one(param)
    for _ in range(2):
        optimizer.zero_grad()
        (torch.view_as_complex(param) * (1 + 2j)).abs().square().sum().backward()
        optimizer.step()
    assert (param != 1).all()


def test_sharded_parameters_are_refused():
    class DTensor(torch.nn.Parameter):
        """As torch.distributed's, of which only the name counts."""

    with pytest.raises(TypeError, match="sharded.*DistributedDataParallel"):
        one(DTensor(torch.zeros(3)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"weight_decay": math.nan}, "weight_decay=nan"),
        ({"weights": "no-such-weights"}, "no-such-weights"),
        ({"weights": {"w0": np.zeros((39, 4), np.float32)}}, "hidden=0"),
        ({"weights": {"w0": np.zeros((30, 4), np.float32)}}, "hidden=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoLO(make_model().parameters(), **{"weights": PHI} | options)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda phi: phi.pop("b1"), "has tensors"), (lambda phi: phi.update(b1=phi["b1"] * math.nan), "not finite")],
)
def test_weights_that_make_no_sense_are_refused(change, message):
    phi = dict(PHI)
    change(phi)
    with pytest.raises(ValueError, match=message):
        LoLO(make_model().parameters(), weights=phi)


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("small_fc", {"clock_limit": -3.0}, "clock_limit=-3.0"),
        ("small_fc", {"step_decay": 0.0}, "step_decay=0.0; expected a positive number"),
        ("small_fc", {"step_decay": math.nan}, "step_decay=nan"),
        ("norm_fc", {"adam_scale": -1.0}, "adam_scale=-1.0; expected a number"),
        ("norm_fc", {"adam_beta2": 1.0}, "adam_beta2=1.0 must be 0 or a positive number below 1"),
        ("norm_fc", {"step_rms": "sgd"}, "step_rms='sgd' must be one of 'one', 'adam'"),
        ("norm_fc", {"state_dtype": torch.float16}, "state_dtype=torch.float16; expected torch.float32 or"),
        ("small_fc", {"adam_scale": 1.0}, "adam_scale=1.0: these weights are of small_fc, which has no adam_scale"),
        ("small_fc", {"step_rms": "adam"}, "of small_fc, which has no step_rms; leave it out"),
        ("small_fc", {"is_matrix": False}, "of small_fc, which has no is_matrix; leave it out"),
        ("small_fc", {"state_dtype": torch.bfloat16}, "of small_fc, which has no state_dtype"),
        ("norm_fc", {"clock_limit": 100.0}, "of norm_fc, which has no clock_limit; leave it out"),
        ("norm_fc", {"step_decay": 100.0}, "of norm_fc, which has no step_decay"),
        ("norm_fc", {"freeze_unseen": True}, "of norm_fc, which has no freeze_unseen"),
    ],
    indirect=["architecture"],
)
def test_settings_of_one_architecture_are_checked_and_refused_by_the_other(options, message):
    model = make_model()
    for groups, arguments in ((model.parameters(), options), ([{"params": model.parameters(), **options}], {})):
        with pytest.raises(ValueError, match=message):
            LoLO(groups, weights=PHI, **arguments)


@small_fc_only
def test_weights_of_another_architecture_are_refused(tmp_path):
    path, numbers = (
        tmp_path / "sgd.safetensors",
        {n: np.zeros((), np.float32) for n in ("log_learning_rate", "momentum_logit")},
    )
    weights_file.write_weights(
        path, numbers, learner={"name": "sgd", "step_mult": 1.0, "exp_mult": 1.0, "weight_decay": 0.0}
    )
    with pytest.raises(ValueError, match="sgd"):
        LoLO(make_model().parameters(), weights=path)


def test_torchs_own_refusals_stay():
    with pytest.raises(ValueError, match="empty parameter list"):
        LoLO([], weights=PHI)
    with pytest.raises(TypeError, match="only optimize Tensors"):
        LoLO([3.0], weights=PHI)
    with pytest.raises(ValueError, match="non-leaf"):
        one(torch.ones(3, requires_grad=True) * 2)
    param = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="more than one parameter group"):
        LoLO([{"params": [param]}, {"params": [param]}], weights=PHI)


# --- company --------------------------------------------------------------------------------------------------------


def test_compiled_training_steps_do_what_plain_ones_do():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI)

    @torch.compile(backend="eager")
    def training_step(x):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :3]).square().mean()
        loss.backward()
        optimizer.step()

    for step in range(3):
        training_step(torch.randn(16, 6, generator=torch.Generator().manual_seed(1000 + step)))
    for ours, expected in zip(values(model), trained(3), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)


def test_a_compiled_step_alone_works():
    model = make_model()
    optimizer = LoLO(model.parameters(), weights=PHI)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(3):
        backward(model, step)
        compiled()
    assert same(values(model), trained(3))


def test_processes_with_averaged_gradients_stay_equal_and_may_share_the_work(tmp_path, architecture):
    code = f"""
        import sys
        import torch
        import torch.multiprocessing as mp
        from torch.distributed.optim import ZeroRedundancyOptimizer
        from torch.nn.parallel import DistributedDataParallel
        from drawn import {ARCHITECTURES[architecture].__name__} as draw
        from lolo.torch import LoLO

        def work(rank, folder):
            torch.set_num_threads(1)
            store = f"file://{{folder}}/store"
            torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
            torch.manual_seed(0)
            model = torch.nn.Linear(6, 3)
            parallel = DistributedDataParallel(model)
            optimizer = LoLO(parallel.parameters(), weights=draw())
            for step in range(3):
                x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
                optimizer.zero_grad()
                (parallel(x) - x[:, :3]).square().mean().backward()
                optimizer.step()
            torch.manual_seed(0)
            twin = torch.nn.Linear(6, 3)
            sharded = ZeroRedundancyOptimizer(DistributedDataParallel(twin).parameters(), LoLO, weights=draw())
            for step in range(3):
                for steps_on in range(2):
                    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + steps_on))
                    loss = (twin(x) - x[:, :3]).square().mean() / 2
                    loss.backward()
                sharded.step()
                twin.zero_grad()
            close = [torch.allclose(p, q, rtol=0, atol=1e-6) for p, q in zip(model.parameters(), twin.parameters())]
            assert all(close), close
            torch.save(model.state_dict(), f"{{folder}}/{{rank}}.pt")
            torch.distributed.destroy_process_group()

        if __name__ == "__main__":
            mp.spawn(work, ("{tmp_path}",), nprocs=2)
    """
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(code))
    run_python(script=script)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def run_python(code=None, script=None):
    """Standard output of a fresh interpreter that finds lolo and this folder."""
    import pathlib

    here = pathlib.Path(__file__).parent
    paths = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent.parent)!r}]\n"
    if script is not None:
        script.write_text(paths + script.read_text())
    command = (
        [sys.executable, str(script)] if script is not None else [sys.executable, "-c", paths + textwrap.dedent(code)]
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@small_fc_only
def test_lolo_torch_needs_no_jax_and_lolo_no_torch():
    blocked = """
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in {names}:
                    raise ImportError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Block())
    """
    without_jax = textwrap.dedent(blocked.format(names={"jax", "jaxlib", "optax"})) + textwrap.dedent("""
        import lolo.torch, lolo.interop, torch
        from drawn import draw_meta_params, draw_norm_fc
        param = torch.nn.Parameter(torch.ones(3, 4))
        param.grad = torch.ones(3, 4)
        for phi in (draw_meta_params(), draw_norm_fc()):
            lolo.torch.LoLO([param], weights=phi).step()
        assert not any(name.split(".")[0] == "jax" for name in sys.modules)
        print("stepped", bool((param != 1).all()))
    """)
    assert "stepped True" in run_python(without_jax)
    without_torch = (
        textwrap.dedent(blocked.format(names={"torch"})) + "\nimport lolo, lolo.interop\nprint('imported')\n"
    )
    assert "imported" in run_python(without_torch)
