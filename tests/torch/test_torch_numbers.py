"""The torch optimizer computes what the JAX one does, whatever a tensor's shape, layout in memory, dtype or company."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from drawn import draw_meta_params, norm_fc_file
from helpers import accumulators_per_parameter

from lolo.bench import torch_speed
from lolo.bench.textbook_torch import Textbook
from lolo.data import embedded
from lolo.files import tensors
from lolo.optimizers import small_fc
from lolo.optimizers.weights_file import WeightsFile
from lolo.torch import LoLO, blocks

pytestmark = pytest.mark.torch

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "small_fc.npz"
SHAPES = {
    "scalar": (),
    "one": (1,),
    "vector": (13,),
    "another vector": (13,),
    "wide": (3, 50),
    "tall": (50, 3),
    "linear [out, in]": (40, 24),
    "linear [in, out]": (24, 40),
    "square": (20, 20),
    "short square": (6, 6),
    "same square": (6, 6),
    "first axis 1": (1, 30),
    "last axis 1": (30, 1),
    "all axes 1": (1, 1, 1),
    "middle axis 1": (4, 1, 5),
    "embedding": (90, 8),
    "rank 3": (5, 2, 3),
    "conv [h, w, in, out]": (3, 3, 4, 6),
    "conv [out, in, h, w]": (6, 4, 3, 3),
    "depthwise": (12, 1, 3, 3),
    "ties": (2, 3, 3, 3),
    "all ties": (3, 3, 3),
    "largest first": (9, 2, 3, 4),
}
# Large enough to be cut in blocks, with and without remainders, along every kind of axis.
LARGE_SHAPES = {
    "long vector": (70_011,),
    "long rows": (2, 40_001),
    "tall and narrow": (20_001, 4),
    "even": (512, 96),
    "odd": (301, 177),
    "one column": (40_001, 1),
    "conv [out, in, h, w]": (70, 61, 3, 3),
    "rank 3": (7, 90, 101),
    "large kernel": (2, 3, 130, 140),
}


def weights_file(meta_params, **learner):
    learner = {
        **{"name": "small_fc", "hidden": len(meta_params["b0"]), "step_mult": 1e-3, "exp_mult": 1e-3},
        **{"learn_decays": "momentum_decays" in meta_params, "weight_decay": 0.0, "clock_limit": None},
        **learner,
    }
    return WeightsFile(dict(meta_params), learner, {}, {}, tensors.digest(meta_params))


LEARNERS = {
    "small_fc": weights_file(draw_meta_params(), step_mult=0.1),
    "norm_fc": norm_fc_file(learning_rate=0.1),
    "norm_fc, not orthogonal": norm_fc_file(learning_rate=0.1, orthogonal=False, baseline="none"),
}
each_learner = pytest.mark.parametrize("weights", LEARNERS.values(), ids=LEARNERS)


def draw(shapes, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {n: (scale * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}


def draw_grads(shapes, step):
    """Gradients whose scale differs between tensors and grows with the step."""
    grads = draw(shapes, 100 + step)
    return {n: g * np.float32((step + 1) * 3.0 ** (i % 5 - 3)) for i, (n, g) in enumerate(grads.items())}


def as_parameters(arrays, dtype=torch.float32):
    return {n: torch.nn.Parameter(torch.tensor(x).to(dtype)) for n, x in arrays.items()}


def set_grads(params, grads):
    for name, param in params.items():
        param.grad = torch.tensor(grads[name]).to(param.dtype)


def relative_distance(ours, theirs):
    """max |Δθ| / max(1, |θ|)"""
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return float((np.abs(ours - theirs) / np.maximum(1, np.abs(theirs))).max())


def worst_against_jax(shapes, steps, weights, **options):
    """Largest distance in any step between torch and JAX, both fed the same gradients."""
    learner = {k: v for k, v in weights.learner.items() if k != "name"} | options
    optimizer = small_fc.small_fc(**learner).optimizer({n: jnp.asarray(x) for n, x in weights.meta_params.items()})
    start = draw(shapes, 1)
    ours, theirs = as_parameters(start), {n: jnp.asarray(x) for n, x in start.items()}
    torch_optimizer, state, worst = LoLO(ours.values(), weights=weights, **options), optimizer.init(theirs), 0.0
    update = jax.jit(optimizer.update)
    for step in range(steps):
        grads = draw_grads(shapes, step)
        set_grads(ours, grads)
        torch_optimizer.step()
        updates, state = update({n: jnp.asarray(g) for n, g in grads.items()}, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        worst = max(worst, *(relative_distance(ours[n].detach(), theirs[n]) for n in shapes))
    assert any(np.abs(np.asarray(theirs[n]) - start[n]).max() > 1e-4 for n in shapes)
    return worst


def golden_meta_params():
    golden = np.load(GOLDEN)
    return {k.removeprefix("theta/"): golden[k] for k in golden if k.startswith("theta/")}


def golden_distance(meta_params):
    golden = np.load(GOLDEN)
    names = [k.removeprefix("p0/") for k in golden if k.startswith("p0/")]
    params = as_parameters({n: golden[f"p0/{n}"] for n in names})
    optimizer = LoLO(params.values(), weights=weights_file(meta_params, step_mult=0.01))
    worst = 0.0
    for step in range(6):
        set_grads(params, {n: golden[f"g{step}/{n}"] for n in names})
        optimizer.step()
        worst = max(worst, *(np.abs(params[n].detach().numpy() - golden[f"p{step + 1}/{n}"]).max() for n in names))
    return worst


def test_six_steps_agree_with_learned_optimization():
    # golden/small_fc.npz: values computed with learned_optimization at 32186aa
    assert golden_distance(golden_meta_params()) <= 1e-5


@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 3), (13, 16), (16, 19), (19, 22), (25, 26), (28, 29)])
def test_the_golden_values_tell_two_columns_apart(one, other):
    meta_params = golden_meta_params()
    meta_params["w0"][[one, other]] = meta_params["w0"][[other, one]]
    assert golden_distance(meta_params) > 1e-5


@pytest.mark.parametrize("name", ["momentum_decays", "rms_decays", "adafactor_decays"])
def test_the_golden_values_notice_learned_decays(name):
    meta_params = golden_meta_params()
    meta_params[name] = np.zeros_like(meta_params[name])
    assert golden_distance(meta_params) > 1e-5


def test_fifty_steps_on_recorded_gradients_agree_with_jax():
    assert worst_against_jax(SHAPES, 50, weights_file(draw_meta_params())) <= 1e-6


@pytest.mark.parametrize(
    "options",
    [{"weight_decay": 0.3}, {"clock_limit": 2.0}, {"weight_decay": 0.1, "clock_limit": 0.0}, {"step_decay": 1.5}],
    ids=str,
)
def test_settings_of_use_agree_with_jax(options):
    weights = weights_file(draw_meta_params(), step_mult=0.1)
    shapes = {n: SHAPES[n] for n in ("vector", "another vector", "scalar", "tall", "conv [out, in, h, w]")}
    assert worst_against_jax(shapes, 6, weights, **options) <= 2e-5
    without = {"weight_decay": 0.0, "clock_limit": float("inf"), "step_decay": float("inf")}
    moved = [final_params(shapes, weights, 6, **o) for o in (options, without)]
    assert max(relative_distance(a, b) for a, b in zip(*moved, strict=True)) > 1e-3


def final_params(shapes, weights, steps, **options):
    params = as_parameters(draw(shapes, 1))
    optimizer = LoLO(params.values(), weights=weights, **options)
    for step in range(steps):
        set_grads(params, draw_grads(shapes, step))
        optimizer.step()
    return [p.detach().numpy() for p in params.values()]


@pytest.mark.parametrize("shapes", [SHAPES, LARGE_SHAPES], ids=["small", "cut in blocks"])
def test_the_textbook_form_agrees(shapes):
    # λ1 = 1 makes the step as large as its direction: what λ1 = 1e-3 hides would show.
    assert max(np.prod(s) for s in LARGE_SHAPES.values()) > 4 * blocks.CPU_BLOCK
    meta_params = draw_meta_params(learn_decays=True)
    ours, theirs = as_parameters(draw(shapes, 1)), as_parameters(draw(shapes, 1))
    optimizer = LoLO(ours.values(), weights=weights_file(meta_params, step_mult=1.0, exp_mult=0.1), weight_decay=0.1)
    textbook = Textbook(theirs.values(), meta_params, step_mult=1.0, exp_mult=0.1, weight_decay=0.1)
    for step in range(3):
        for params, stepper in ((ours, optimizer), (theirs, textbook)):
            set_grads(params, draw_grads(shapes, step))
            stepper.step()
    assert max(relative_distance(ours[n].detach(), theirs[n].detach()) for n in shapes) <= 1e-4


def test_a_transposed_matrix_moves_transposed_unless_it_is_square():
    weights = weights_file(draw_meta_params(), step_mult=0.1)

    def moved(shape, transpose):
        x, g = draw({"w": shape}, 1)["w"], draw({"w": shape}, 2)["w"]
        param = torch.nn.Parameter(torch.tensor(x.T.copy() if transpose else x))
        param.grad = torch.tensor(g.T.copy() if transpose else g)
        LoLO([param], weights=weights).step()
        return (param.T if transpose else param).detach().numpy()

    for shape in [(40, 24), (50, 3), (3, 50), (200, 300)]:
        assert relative_distance(moved(shape, True), moved(shape, False)) <= 1e-5
    assert relative_distance(moved((24, 24), True), moved((24, 24), False)) > 1e-4


@each_learner
def test_small_tensors_move_alike_alone_and_together(weights):
    shapes = {**{f"bias {i}": (17,) for i in range(9)}, **{f"head {i}": (6, 20) for i in range(9)}}
    together = final_params(shapes, weights, 3)
    for index, (name, shape) in enumerate(shapes.items()):
        param = torch.nn.Parameter(torch.tensor(draw(shapes, 1)[name]))
        optimizer = LoLO([param], weights=weights)
        for step in range(3):
            param.grad = torch.tensor(draw_grads(shapes, step)[name])
            optimizer.step()
        assert param.shape == shape
        assert relative_distance(param.detach(), together[index]) <= 1e-5


@each_learner
def test_memory_layout_does_not_matter(weights):
    shapes = {"kernel": (24, 16, 3, 3), "matrix": (30, 40), "vector": (9,)}
    expected = final_params(shapes, weights, 2)
    params = {
        "kernel": torch.tensor(draw(shapes, 1)["kernel"]).to(memory_format=torch.channels_last),
        "matrix": torch.tensor(draw(shapes, 1)["matrix"].T.copy()).T,
        "vector": torch.tensor(np.repeat(draw(shapes, 1)["vector"], 2))[::2],
    }
    params = {n: torch.nn.Parameter(x) for n, x in params.items()}
    assert not any(p.is_contiguous() for p in params.values())
    strides = [p.stride() for p in params.values()]
    optimizer = LoLO(params.values(), weights=weights)
    for step in range(2):
        set_grads(params, draw_grads(shapes, step))
        params["kernel"].grad = params["kernel"].grad.to(memory_format=torch.channels_last)
        optimizer.step()
    for param, value in zip(params.values(), expected, strict=True):
        assert relative_distance(param.detach(), value) <= 1e-5
    assert [p.stride() for p in params.values()] == strides


@each_learner
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_stepped_in_float32(dtype, weights):
    shapes = {"matrix": (20, 30), "a": (5,), "b": (5,)}
    start = {n: torch.tensor(x).to(dtype) for n, x in draw(shapes, 1).items()}
    grads = {n: torch.tensor(x).to(dtype) for n, x in draw(shapes, 2).items()}
    params = {n: torch.nn.Parameter(x.clone()) for n, x in start.items()}
    twins = {n: torch.nn.Parameter(x.float()) for n, x in start.items()}
    for group in (params, twins):
        for name, param in group.items():
            param.grad = grads[name].to(param.dtype)
    optimizer = LoLO(params.values(), weights=weights)
    optimizer.step()
    LoLO(twins.values(), weights=weights).step()
    for name, param in params.items():
        assert param.dtype == dtype
        change = (twins[name].double() - start[name].float().double()).detach()
        size = torch.maximum(start[name].double().abs(), (start[name].double() + change).abs())
        ulp = torch.finfo(dtype).eps * size.clamp(min=0.1)
        if dtype == torch.float64:  # computed in float32, added in float64: no digit of the parameter is lost
            ulp = 1e-6
        assert ((param.detach().double() - (start[name].double() + change)).abs() <= ulp).all()
        assert all(x.dtype == torch.float32 for k, x in optimizer.state[param].items() if k != "step")


def test_memory_per_parameter_is_what_the_specification_says():
    params = as_parameters(draw({**SHAPES, **LARGE_SHAPES}, 1))
    optimizer = LoLO(params.values(), weights=draw_meta_params())
    set_grads(params, draw({**SHAPES, **LARGE_SHAPES}, 2))
    optimizer.step()
    for param in params.values():
        moments = {k: x for k, x in optimizer.state[param].items() if k != "step"}
        stored = sum(x.untyped_storage().nbytes() for x in moments.values())
        assert stored == pytest.approx(4 * param.numel() * accumulators_per_parameter(tuple(param.shape)))


def test_closed_loops_in_jax_and_torch_stay_together(record_property):
    images, labels = embedded.fashion_mnist()["train"]
    x, y = ((images[:6400].astype(np.float32) - 73) / 85), labels[:6400].astype(np.int64)
    rng = np.random.default_rng(0)
    start = {
        **{"w0": rng.normal(size=(64, 32)) / 8, "b0": np.zeros(32), "w1": rng.normal(size=(32, 10)) / 6},
        "b1": np.zeros(10),
    }
    start = {n: v.astype(np.float32) for n, v in start.items()}
    meta_params = draw_meta_params()

    def loss(params, x, y):
        logits = jax.nn.relu(x @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    optimizer = small_fc.small_fc().optimizer({n: jnp.asarray(v) for n, v in meta_params.items()})
    theirs = {n: jnp.asarray(v) for n, v in start.items()}
    state, gradient, update = optimizer.init(theirs), jax.jit(jax.grad(loss)), jax.jit(optimizer.update)
    ours = as_parameters(start)
    torch_optimizer = LoLO(ours.values(), weights=meta_params)
    distances = {}
    for step in range(50):
        batch = slice(128 * step, 128 * (step + 1))
        updates, state = update(gradient(theirs, x[batch], y[batch]), state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        hidden = torch.relu(torch.tensor(x[batch]) @ ours["w0"] + ours["b0"])
        torch_optimizer.zero_grad()
        torch.nn.functional.cross_entropy(hidden @ ours["w1"] + ours["b1"], torch.tensor(y[batch])).backward()
        torch_optimizer.step()
        apart, moved = (
            np.sqrt(sum(float(((a - np.asarray(b)) ** 2).sum()) for a, b in pairs))
            for pairs in (
                [(np.asarray(theirs[n]), ours[n].detach().numpy()) for n in start],
                [(np.asarray(theirs[n]), start[n]) for n in start],
            )
        )
        distances[step + 1] = apart / moved
    record_property("relative distance after 10 and 50 steps", [float(distances[10]), float(distances[50])])
    print(f"closed loop, ‖Δθ‖/‖θ − θ0‖: {distances[10]:.2e} after 10 steps, {distances[50]:.2e} after 50")
    assert distances[10] <= 1e-3


def test_the_benchmark_times_both_architectures_the_textbook_and_rivals(monkeypatch):
    monkeypatch.setattr(torch_speed, "SIZES", {"1M": (4, 3)})
    lines = list(torch_speed.steps("cpu", "1M", 0.0))
    assert [line.what.rpartition(": ")[2] for line in lines] == [
        "lolo", "norm_fc", "norm_fc orthogonal", "textbook", "muon", "adamw foreach",
        "textbook / lolo", "lolo / adamw foreach", "norm_fc / adamw foreach", "norm_fc orthogonal / muon",
    ]  # fmt: skip
    assert all(line.value > 0 for line in lines)
