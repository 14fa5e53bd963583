"""`norm_fc` in PyTorch computes what JAX's does; what it has of its own, it does as it says."""

import io
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from drawn import draw_meta_params, draw_norm_fc, norm_fc_file
from helpers import accumulators_per_parameter

from lolo.data import embedded
from lolo.optimizers import norm_fc_spec as spec
from lolo.optimizers import weights_file
from lolo.optimizers.norm_fc import norm_fc
from lolo.torch import LoLO, blocks
from lolo.torch import norm_fc as torch_norm_fc

pytestmark = pytest.mark.torch

GOLDEN = np.load(pathlib.Path(__file__).parent.parent / "golden" / "celo2.npz")
# As PyTorch has them, [out, in, ...]. The embedding is not a matrix here.
SHAPES = {
    "scalar": (),
    "vector": (13,),
    "another vector": (13,),
    "wide": (3, 50),
    "tall": (50, 3),
    "square": (6, 6),
    "same square": (6, 6),
    "one column": (7, 1),
    "conv": (6, 4, 3, 3),
    "ties": (2, 3, 3, 3),
    "embedding": (9, 4),
}
LAYER = {"w": (20, 30), "b": (20,)}
PHI = draw_norm_fc(4)


def draw(shapes, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: (scale * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


def draw_grads(shapes, step):
    """Gradients whose scale differs between tensors and grows with the step."""
    return {
        n: g * np.float32((step + 1) * 3.0 ** (i % 5 - 3)) for i, (n, g) in enumerate(draw(shapes, 100 + step).items())
    }


def turned(x):
    """[out, in, *window] as JAX has it: [*window, in, out]."""
    return np.transpose(x, (*range(2, x.ndim), 1, 0)) if x.ndim > 1 else np.asarray(x)


def groups_of(params):
    embedding = {"params": [p for n, p in params.items() if n == "embedding"], "is_matrix": False}
    others = {"params": [p for n, p in params.items() if n != "embedding"]}
    return [group for group in (others, embedding) if group["params"]]


def as_parameters(arrays, dtype=torch.float32):
    return {n: torch.nn.Parameter(torch.tensor(x).to(dtype)) for n, x in arrays.items()}


def set_grads(params, grads):
    for name, param in params.items():
        param.grad = torch.tensor(grads[name]).to(param.dtype)


def jax_optimizer(weights, **options):
    learner = {k: v for k, v in weights.learner.items() if k != "name"} | options
    phi = {n: jnp.asarray(x) for n, x in weights.meta_params.items()}
    return norm_fc(**learner, is_matrix=lambda name, p: p.ndim > 1 and name != "embedding").optimizer(phi)


def relative(ours, theirs):
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
    return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)


def moments_in_jax(state, shape, group):
    """The moments of one tensor, turned, and with extent 1 for an axis that they are a mean over."""
    place = torch_norm_fc.layout(shape)
    learned = torch_norm_fc.is_learned(torch.empty(shape), group["is_matrix"])
    for name in set(state) - {"step"}:
        x = state[name].numpy()
        if not learned:
            yield name, turned(x)
        elif not place.factored:
            yield name, x
        else:
            lead, axes = x.shape[:-3], (*(shape[axis] for axis in place.order[:-2]), *x.shape[-2:])
            order = [len(lead) + int(axis) for axis in np.argsort(place.order)]
            x = np.transpose(x.reshape(*lead, *axes), (*range(len(lead)), *order))
            yield name, np.stack([turned(part) for part in x]) if lead else turned(x)


def distances(shapes, weights, steps=4, turn=turned, **jax_options):
    """Largest relative distances from JAX, of a tensor's update and of a moment, both fed the same gradients.

    The parameters are float64, so that no digit of an update is lost in them.
    """
    params = as_parameters(draw(shapes, 1), torch.float64)
    ours, theirs = LoLO(groups_of(params), weights), jax_optimizer(weights, **jax_options)
    values = {n: jnp.asarray(turn(p.detach().numpy().astype(np.float32))) for n, p in params.items()}
    state, update, worst, worst_moment = theirs.init(values), jax.jit(theirs.update), 0.0, 0.0
    groups = {id(p): group for group in ours.param_groups for p in group["params"]}
    for step in range(steps):
        grads, before = draw_grads(shapes, step), {n: p.detach().clone() for n, p in params.items()}
        set_grads(params, grads)
        ours.step()
        values = {n: jnp.asarray(turn(x.numpy().astype(np.float32))) for n, x in before.items()}
        updates, state = update({n: jnp.asarray(turn(g)) for n, g in grads.items()}, state, values)
        for name, param in params.items():
            change = turn((param.detach() - before[name]).numpy())
            worst = max(worst, relative(change, updates[name]))
            for moment, x in moments_in_jax(ours.state[param], shapes[name], groups[id(param)]):
                y = np.asarray(getattr(state, moment)[name])
                worst_moment = max(worst_moment, relative(x.reshape(y.shape), y))
    return worst, worst_moment


# JAX's numbers, and PyLO's


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize(("baseline", "step_rms"), [("momentum", "one"), ("none", "one"), ("momentum", "adam")])
def test_updates_and_moments_agree_with_jax(orthogonal, baseline, step_rms):
    settings = dict(orthogonal=orthogonal, baseline=baseline, step_rms=step_rms, weight_decay=0.1, adam_scale=0.5)
    settings["adam_beta2"] = 0.999
    weights = norm_fc_file(PHI, **settings)
    update, moment = distances(SHAPES, weights)
    assert update <= 1e-5 and moment <= 1e-6


@pytest.mark.parametrize(
    "other",
    [
        {"baseline": "none"},
        {"step_rms": "adam"},
        {"orthogonal": False},
        {"weight_decay": 0.0},
        {"adam_scale": 1.0},
        {"adam_beta2": 0.5},
        {"learning_rate": 2e-3},
    ],
    ids=str,
)
def test_the_comparison_notices_other_settings(other):
    shapes = {n: SHAPES[n] for n in ("vector", "square")}
    assert distances(shapes, norm_fc_file(PHI, weight_decay=0.1, adam_scale=0.5), 2, **other)[0] > 1e-3


def test_the_names_of_axes_make_a_square_layer_agree_with_its_transpose_in_jax():
    weights = norm_fc_file(PHI, orthogonal=False)
    assert distances({"square": (6, 6)}, weights, 1)[0] <= 1e-5
    assert distances({"square": (6, 6)}, weights, 1, turn=np.asarray)[0] > 1e-3
    assert distances({"wide": (3, 50)}, weights, 1, turn=np.asarray)[0] <= 1e-5


GOLDEN_SETTINGS = {
    "plain": (dict(orthogonal=False, adam_scale=20.0), {}),
    "orthogonal": (dict(orthogonal=True, adam_scale=20.0, weight_decay=0.1), {}),
    "all": (dict(orthogonal=False), dict(is_matrix=True)),
}


def golden_distance(tag, order=slice(None)):
    """Largest absolute distance from the golden parameters over six steps."""
    learner, options = GOLDEN_SETTINGS[tag]
    phi = {n: GOLDEN[f"theta/{n}"] for n in ("w0", "b0", "w1", "b1", "w2", "b2")}
    phi |= {"w0": phi["w0"][order], "w2": phi["w2"][:, :1], "b2": phi["b2"][:1]}  # PyLO has outputs that nothing reads
    weights = norm_fc_file(phi, baseline="none", learning_rate=0.01, **learner)
    names = ["dense", "tall", "square"] + (["bias"] if tag != "orthogonal" else [])
    params = as_parameters({n: GOLDEN[f"{tag}/p0/{n}"].T.copy() for n in names})
    optimizer, worst = LoLO(params.values(), weights, **options), 0.0
    for t in range(6):
        set_grads(params, {n: GOLDEN[f"{tag}/g{t}/{n}"].T.copy() for n in names})
        optimizer.step()
        apart = (np.abs(p.detach().numpy().T - GOLDEN[f"{tag}/p{t + 1}/{n}"]).max() for n, p in params.items())
        worst = max(worst, *apart)
    return worst


@pytest.mark.parametrize("tag", GOLDEN_SETTINGS)
def test_six_steps_agree_with_pylo(tag):
    # golden/celo2.npz: values computed with PyLO's CELO2_naive at d05c6c1
    assert golden_distance(tag) <= 2e-5


@pytest.mark.parametrize(("one", "other"), [(0, 1), (2, 3), (6, 10), (10, 11), (14, 15), (17, 18), (21, 24), (26, 27)])
def test_the_golden_values_tell_two_inputs_apart(one, other):
    order = np.arange(spec.INPUTS)
    order[[one, other]] = order[[other, one]]
    assert golden_distance("plain", order) > 1e-4


def test_loss_curves_in_jax_and_torch_stay_together(record_property):
    images, labels = embedded.fashion_mnist()["train"]
    x, y = ((images[:6400].astype(np.float32) - 73) / 85), labels[:6400].astype(np.int64)
    start = draw({"w0": (32, 64), "b0": (32,), "w1": (10, 32), "b1": (10,)}, 0, 0.1)
    weights = norm_fc_file(PHI, learning_rate=3e-3)

    def loss(params, x, y):
        logits = jax.nn.relu(x @ params["w0"] + params["b0"]) @ params["w1"] + params["b1"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    theirs, optimizer = {n: jnp.asarray(turned(v)) for n, v in start.items()}, jax_optimizer(weights)
    state, update, gradient = optimizer.init(theirs), jax.jit(optimizer.update), jax.jit(jax.value_and_grad(loss))
    ours, curves = as_parameters(start), []
    torch_optimizer = LoLO(ours.values(), weights)
    for step in range(50):
        batch = slice(128 * step, 128 * (step + 1))
        their_loss, grads = gradient(theirs, x[batch], y[batch])
        updates, state = update(grads, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        hidden = torch.relu(torch.nn.functional.linear(torch.tensor(x[batch]), ours["w0"], ours["b0"]))
        logits = torch.nn.functional.linear(hidden, ours["w1"], ours["b1"])
        our_loss = torch.nn.functional.cross_entropy(logits, torch.tensor(y[batch]))
        torch_optimizer.zero_grad()
        our_loss.backward()
        torch_optimizer.step()
        curves.append((our_loss.item(), float(their_loss)))
    apart = max(abs(a - b) for a, b in curves)
    record_property("largest distance of the losses in 50 steps", float(apart))
    assert apart <= 1e-3 and curves[-1][0] < 0.7 * curves[0][0]


# Tensors in blocks


@pytest.mark.parametrize(
    "shapes",
    [{"long rows": (2, 40_001), "odd": (301, 177)}, {"tall and narrow": (20_001, 4), "conv": (70, 61, 3, 3)}],
    ids=str,
)
def test_blocks_change_nothing(shapes, monkeypatch):
    found, start = [], draw(shapes, 1).values()
    for size in (blocks.CPU_BLOCK, 1 << 30):
        monkeypatch.setattr(blocks, "CPU_BLOCK", size)
        params = as_parameters(draw(shapes, 1), torch.float64)
        optimizer = LoLO(params.values(), norm_fc_file(orthogonal=False))
        for step in range(2):
            set_grads(params, draw_grads(shapes, step))
            optimizer.step()
        found.append([p.detach() - torch.tensor(x) for p, x in zip(params.values(), start, strict=True)])
    assert all(relative(a, b) <= 1e-5 for a, b in zip(*found, strict=True))


# Settings


def stepped(params, steps=3, **options):
    optimizer = LoLO(params.values(), **{"weights": norm_fc_file()} | options)
    for step in range(steps):
        set_grads(params, draw_grads({n: tuple(p.shape) for n, p in params.items()}, step))
        optimizer.step()
    return optimizer


def moved(shapes=LAYER, steps=3, dtype=torch.float32, **options):
    """Parameters after some steps."""
    params = as_parameters(draw(shapes, 1), dtype)
    stepped(params, steps, **options)
    return [p.detach() for p in params.values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_settings_left_out_are_those_of_the_weights():
    learner = {"learning_rate": 0.02, "weight_decay": 0.3, "adam_scale": 0.5, "adam_beta2": 0.5}
    shipped, plain = norm_fc_file(**learner), norm_fc_file()
    group = LoLO([torch.nn.Parameter(torch.ones(2))], shipped).param_groups[0]
    assert [group[name] for name in ("lr", "weight_decay", "adam_scale", "adam_beta2")] == [0.02, 0.3, 0.5, 0.5]
    asked = moved(weights=plain, lr=0.02, weight_decay=0.3, adam_scale=0.5, adam_beta2=0.5)
    assert same(moved(weights=shipped), asked) and not same(moved(weights=plain), asked)
    assert same(
        moved(weights=shipped, lr=1e-3, weight_decay=0.0, adam_scale=1.0, adam_beta2=0.95), moved(weights=plain)
    )


def test_the_learning_rate_is_the_root_mean_square_of_a_matrix_step():
    start = draw(LAYER, 1)
    for x, y in zip(start.values(), moved(steps=1, lr=0.03, dtype=torch.float64), strict=True):
        assert (y - torch.tensor(x)).square().mean().sqrt().item() == pytest.approx(0.03, rel=1e-4)


def test_weight_decay_is_decoupled_and_scaled_by_lr():
    start, plain = draw(LAYER, 1), moved(steps=1, lr=0.1, dtype=torch.float64)
    decayed = moved(steps=1, lr=0.1, weight_decay=0.1, dtype=torch.float64)
    for x, a, b in zip(start.values(), plain, decayed, strict=True):
        torch.testing.assert_close(a - b, torch.tensor(x).double() * 0.01, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta2", [0.0, 0.95, 0.999])
@pytest.mark.parametrize("kernel", ["plain", "auto"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_vectors_and_what_is_no_matrix_get_adamw(state_dtype, kernel, beta2):
    ours, theirs = as_parameters(draw(LAYER, 1)), as_parameters(draw(LAYER, 1))
    optimizer = LoLO(
        ours.values(), norm_fc_file(), lr=0.02, adam_scale=0.5, is_matrix=False, state_dtype=state_dtype,
        weight_decay=0.1, kernel=kernel, adam_beta2=beta2,
    )  # fmt: skip
    adamw = torch.optim.AdamW(theirs.values(), lr=0.01, betas=(0.9, beta2), weight_decay=0.2)
    for step in range(4):
        for params, stepper in ((ours, optimizer), (theirs, adamw)):
            set_grads(params, draw_grads(LAYER, step))
            stepper.step()
    worst = max((ours[n] - theirs[n]).abs().max().item() for n in LAYER)
    assert (worst <= 1e-6) == (state_dtype == torch.float32) and worst <= 3e-2
    assert {k: tuple(x.shape) for k, x in optimizer.state[ours["w"]].items()} == {
        "step": (),
        "momentum": (20, 30),
        "rms": (20, 30),
    }


def test_a_group_says_that_its_tensors_are_no_matrices():
    shapes = {"embedding": (9, 4), "layer": (9, 4), "bias": (9,)}
    params, alone = as_parameters(draw(shapes, 1)), moved(shapes)
    groups = [
        {"params": [params["layer"], params["bias"]]},
        {"params": [params["embedding"]], "is_matrix": False, "lr": 5e-4},
    ]
    optimizer = LoLO(groups, norm_fc_file())
    for step in range(3):
        set_grads(params, draw_grads(shapes, step))
        optimizer.step()
    assert [g["lr"] for g in optimizer.param_groups] == [1e-3, 5e-4]
    assert torch.allclose(params["layer"], alone[1], rtol=0, atol=1e-6)
    assert not torch.allclose(params["embedding"], alone[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("answer", ["yes", 2, [True]])
def test_answers_without_sense_are_refused(answer):
    with pytest.raises(
        ValueError, match=r"is_matrix=.*expected None, True or False: one answer for a whole param group"
    ):
        LoLO([{"params": [torch.nn.Parameter(torch.ones(3))], "is_matrix": answer}], norm_fc_file())


def test_groups_may_have_weights_of_both_architectures():
    shapes = {"a": (6, 5), "b": (6, 5)}
    params = as_parameters(draw(shapes, 1))
    small, norm = draw_meta_params(), norm_fc_file()
    optimizer = LoLO([{"params": [params["a"]], "weights": small}, {"params": [params["b"]], "weights": norm}])
    set_grads(params, draw_grads(shapes, 0))
    optimizer.step()
    assert [g["lr"] for g in optimizer.param_groups] == [1.0, 1e-3]
    assert "clock_limit" in optimizer.param_groups[0] and "clock_limit" not in optimizer.param_groups[1]
    assert torch.equal(params["a"], moved(shapes, 1, weights=small)[0])
    for name, weights in (("a", small), ("b", norm)):
        alone = as_parameters({name: draw(shapes, 1)[name]})
        set_grads(alone, draw_grads(shapes, 0))
        LoLO(alone.values(), weights).step()
        assert torch.allclose(params[name], alone[name], rtol=0, atol=1e-6)


def test_a_weights_file_is_read_by_its_name_on_disk(tmp_path):
    weights, path = norm_fc_file(learning_rate=0.02), tmp_path / "mine.safetensors"
    weights_file.write_weights(path, weights.meta_params, learner=weights.learner)
    assert same(moved(weights=path), moved(weights=weights))


# Entries and gradients


@pytest.mark.parametrize("orthogonal", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_entries_that_never_had_a_gradient_get_no_step(orthogonal, weight_decay):
    shapes = {"rows": (8, 5), "vector": (9,), "untouched": (4, 3)}
    start = as_parameters(draw(shapes, 1))
    params = as_parameters(draw(shapes, 1))
    seen = {n: torch.arange(p.numel()).view(p.shape) < p.numel() // 2 for n, p in params.items()}
    seen["untouched"] = torch.zeros(4, 3, dtype=torch.bool)
    optimizer = LoLO(params.values(), norm_fc_file(orthogonal=orthogonal), lr=0.1, weight_decay=weight_decay)
    for step in range(5):
        set_grads(params, {n: g * seen[n].numpy() for n, g in draw_grads(shapes, step).items()})
        optimizer.step()
    for name, param in params.items():
        still = start[name] * (1 - 0.1 * weight_decay) ** 5
        assert torch.equal(~torch.isclose(param, still, rtol=1e-5, atol=1e-7), seen[name])


def test_gradients_beyond_the_largest_count_as_the_largest():
    grads = draw(LAYER, 5)
    found = []
    for size in (spec.LARGEST_GRADIENT, 3e38):
        params = as_parameters(draw(LAYER, 1))
        optimizer = LoLO(params.values(), norm_fc_file())
        for n in LAYER:
            grads[n].flat[0] = -size
        set_grads(params, grads)
        optimizer.step()
        found.append([p.detach() for p in params.values()])
    assert same(*found) and all(x.isfinite().all() for x in found[0])


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("name", LAYER)
def test_a_gradient_that_is_not_finite_shows_in_its_tensor_and_no_other(bad, name):
    params, grads = as_parameters(draw(LAYER | {"other": (13,)}, 1)), draw(LAYER | {"other": (13,)}, 5)
    optimizer = LoLO(params.values(), norm_fc_file())
    grads[name].flat[0] = bad
    set_grads(params, grads)
    optimizer.step()
    assert [n for n, p in params.items() if p.isnan().any()] == [name]


# State


def kept_bytes(optimizer):
    return sum(x.untyped_storage().nbytes() for s in optimizer.state.values() for k, x in s.items() if k != "step")


def test_memory_is_what_the_specification_says_and_less_in_bfloat16():
    shapes = {"w": (40, 30)}
    full, half = (stepped(as_parameters(draw(shapes, 1)), state_dtype=d) for d in (None, torch.bfloat16))
    assert kept_bytes(full) == 4 * 1200 * accumulators_per_parameter((40, 30))
    assert kept_bytes(full) - kept_bytes(half) == 3 * 1200 * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_momenta_are_stored_and_little_is_lost(dtype):
    params = as_parameters(draw(LAYER, 1), dtype)
    optimizer = stepped(params, state_dtype=torch.bfloat16, lr=0.1)
    for state in optimizer.state.values():
        assert {k: x.dtype for k, x in state.items() if k != "step"} == {
            k: torch.bfloat16 if k == "momentum" else torch.float32 for k in state if k != "step"
        }
    exact, start = moved(dtype=dtype, lr=0.1), as_parameters(draw(LAYER, 1), dtype).values()
    lost = [
        relative((x - z).detach().float(), (y - z).detach().float())
        for x, y, z in zip(params.values(), exact, start, strict=True)
    ]
    assert 0 < max(lost) <= 0.03


def test_bfloat16_momenta_agree_with_jax():
    params = as_parameters({n: x for n, x in draw(SHAPES, 1).items() if n in ("tall", "vector")})
    shapes = {n: tuple(p.shape) for n, p in params.items()}
    optimizer, theirs = LoLO(params.values(), norm_fc_file(PHI), state_dtype=torch.bfloat16), None
    jax_side = jax_optimizer(norm_fc_file(PHI), state_dtype="bfloat16")
    theirs = {n: jnp.asarray(turned(x)) for n, x in draw(SHAPES, 1).items() if n in shapes}
    state, update = jax_side.init(theirs), jax.jit(jax_side.update)
    for step in range(3):
        grads = draw_grads(shapes, step)
        set_grads(params, grads)
        optimizer.step()
        updates, state = update({n: jnp.asarray(turned(g)) for n, g in grads.items()}, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    for name, param in params.items():
        assert np.abs(turned(param.detach().numpy()) - theirs[name]).max() <= 1e-4  # rounding may fall to either side


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("saved", "built"), [(torch.bfloat16, None), (None, torch.bfloat16)])
def test_a_state_comes_back_bit_for_bit_in_the_dtype_that_it_was_saved_in(dtype, saved, built):
    params, twins = (as_parameters(draw(LAYER, 1), dtype) for _ in range(2))
    optimizer, file = stepped(params, state_dtype=saved), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = LoLO(twins.values(), norm_fc_file(), state_dtype=built)
    again.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(params.values(), twins.values(), strict=True):
        one, other = optimizer.state[ours], again.state[theirs]
        assert one.keys() == other.keys()
        assert all(torch.equal(x, other[k]) and x.dtype == other[k].dtype for k, x in one.items())
        theirs.data.copy_(ours.data)
    for stepper, group in ((optimizer, params), (again, twins)):
        set_grads(group, draw_grads(LAYER, 9))
        stepper.step()
    assert same(params.values(), twins.values())


def test_the_state_of_one_architecture_is_refused_by_the_other_with_the_weights_names(tmp_path):
    path = tmp_path / "mine.safetensors"
    weights_file.write_weights(path, PHI, learner=norm_fc_file(PHI).learner)
    norm = LoLO([torch.nn.Parameter(torch.ones(2))], path)
    small = LoLO([torch.nn.Parameter(torch.ones(2))], "lolo-anytime")
    names = [("lolo-anytime", weights_file.read_weights("lolo-anytime")), (str(path), weights_file.read_weights(path))]
    for ours, theirs in ((norm, small), (small, norm)):
        with pytest.raises(ValueError, match="was saved with the weights") as error:
            ours.load_state_dict(theirs.state_dict())
        assert all(name in str(error.value) and file.sha256[:12] in str(error.value) for name, file in names)


@pytest.mark.parametrize(("one", "other"), [("lolo-norm", "lolo-norm-2"), ("lolo-norm-2", "lolo-norm")])
def test_the_state_of_equal_numbers_with_another_step_size_is_refused(one, other):
    params = list(as_parameters(draw(LAYER, 1)).values())
    saved, optimizer = LoLO(params, one).state_dict(), LoLO(params, other)
    with pytest.raises(ValueError, match=f"was saved with step_rms=.*'{one}'.*this optimizer has .*'{other}'"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weights"] == other
    LoLO(params, one).load_state_dict(saved)


def test_a_step_size_that_there_is_not_is_refused_when_a_group_has_it():
    params = as_parameters(draw(LAYER, 1))
    optimizer = stepped(params)
    optimizer.param_groups[0]["step_rms"] = "Adam"
    with pytest.raises(ValueError, match="step_rms='Adam' must be one of 'one', 'adam'"):
        optimizer.step()


def test_the_state_of_another_is_matrix_is_refused():
    saved = stepped(as_parameters(draw(LAYER, 1))).state_dict()
    with pytest.raises(ValueError, match=r"parameter 0 of shape \(20, 30\).*Was is_matrix another one\?"):
        LoLO(as_parameters(draw(LAYER, 1)).values(), norm_fc_file(), is_matrix=False).load_state_dict(saved)
