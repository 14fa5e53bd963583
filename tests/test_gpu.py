"""What only a GPU can show; run by `make gpu-test`. The CPU's results are the reference."""

import copy
import dataclasses

import jax
import numpy as np
import optax
import pytest

import lolo
from lolo.files import tensors
from lolo.optimizers import norm_fc_spec, weights_file
from lolo.runtime import interrupt
from lolo.tasks import models
from lolo.training import loop, recipes
from lolo.training.how import How

pytestmark = pytest.mark.gpu

SHAPES = [(64, 48), (48,), (8, 16, 3, 3), (300, 40), (40, 300), (7,), ()]


def relative(ours, reference):
    """‖ours − reference‖ / ‖reference‖"""
    ours, reference = np.asarray(ours, np.float64), np.asarray(reference, np.float64)
    return np.linalg.norm(ours - reference) / np.linalg.norm(reference)


# --- JAX ----------------------------------------------------------------------------------------------------------


def test_the_tests_run_on_the_gpu():
    assert jax.default_backend() == "gpu", (
        "JAX_PLATFORMS=cuda, and a JAX that comes with CUDA: pip install 'lolo[cuda]'"
    )


def test_an_update_is_that_of_the_cpu():
    optimizer = lolo.load("lolo-anytime").optimizer()
    params, gradient = models.mlp((784, 256, 64, 10)).init(jax.random.key(0))[0], jax.random.key(1)
    keys = jax.tree.unflatten(jax.tree.structure(params), jax.random.split(gradient, len(jax.tree.leaves(params))))
    grads = jax.tree.map(lambda key, x: 0.01 * jax.random.normal(key, x.shape), keys, params)

    def steps(device):
        here, moved = jax.device_put((params, grads), device)
        state = optimizer.init(here)
        for _ in range(10):
            updates, state = jax.jit(optimizer.update)(moved, state, here)
            here = optax.apply_updates(here, updates)
        return jax.device_get(jax.tree.map(lambda x, start: x - start, here, jax.device_put(params, device)))

    gpu, cpu = steps(jax.devices("gpu")[0]), steps(jax.devices("cpu")[0])
    for ours, reference in zip(jax.tree.leaves(gpu), jax.tree.leaves(cpu), strict=True):
        assert relative(ours, reference) < 1e-3


@pytest.mark.parametrize("slots", [1, 8])
def test_meta_training_repeats_itself_and_resumes_to_the_byte(tmp_path, slots):
    recipe = recipes.variant(
        f"lolo outer.steps=8 unroll.length=20 unroll.truncation=10 validation.every=0 estimator.slots_per_block={slots}"
    )
    for name in ("one", "two"):
        assert loop.train(recipe, tmp_path / name).finished
    stop = interrupt.Stop()

    def told(progress):
        if progress.step >= 3:
            stop.requested = "the test"

    assert not loop.train(recipe, tmp_path / "three", How(stop=stop, on_progress=told)).finished
    assert loop.resume(tmp_path / "three").finished
    phi = [
        weights_file.read_weights(tmp_path / name / "last.safetensors").meta_params for name in ("one", "two", "three")
    ]
    assert [tensors.digest(phi[0])] * 2 == [tensors.digest(again) for again in phi[1:]]


# --- PyTorch ------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def drawn(torch, device, dtype):
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(device, dtype)) for shape in SHAPES
    ]
    return params, generator


def take_steps(torch, optimizer, params, generator, count=10):
    for _ in range(count):
        for param in params:
            param.grad = (0.01 * torch.randn(param.shape, generator=generator)).to(param.device, param.dtype)
        optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 5e-2)])
def test_torch_steps_are_those_of_the_cpu(torch, dtype, tolerance):
    from lolo.torch import LoLO

    moved = {}
    for device in ("cpu", "cuda"):
        params, generator = drawn(torch, device, getattr(torch, dtype))
        start = [param.detach().clone() for param in params]
        take_steps(torch, LoLO(params, "lolo-anytime"), params, generator)
        moved[device] = [(p.detach() - s).float().cpu().numpy() for p, s in zip(params, start, strict=True)]
    for ours, reference in zip(moved["cuda"], moved["cpu"], strict=True):
        assert relative(ours, reference) < tolerance


def test_a_state_saved_on_the_gpu_continues_there_and_on_the_cpu(torch):
    from lolo.torch import LoLO

    params, generator = drawn(torch, "cuda", torch.float32)
    optimizer = LoLO(params, "lolo-anytime")
    take_steps(torch, optimizer, params, generator)
    saved, values = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in params]
    drawing = generator.get_state()
    take_steps(torch, optimizer, params, generator)
    for device, tolerance in (("cuda", 0.0), ("cpu", 1e-4)):
        again = [torch.nn.Parameter(value.to(device).clone()) for value in values]
        other = LoLO(again, "lolo-anytime")
        other.load_state_dict(saved)
        generator.set_state(drawing)
        take_steps(torch, other, again, generator)
        for ours, reference, before in zip(again, params, values, strict=True):
            change = (ours.detach().cpu() - before.cpu()).numpy()
            assert relative(change, (reference.detach() - before).cpu().numpy()) <= tolerance


def test_torch_trains_under_autocast_with_a_gradient_scaler(torch):
    from lolo.torch import LoLO

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.ReLU(), torch.nn.Linear(64, 3)).cuda()
    x = torch.randn(256, 20, device="cuda")
    y = (x[:, :3] + 0.1 * torch.randn(256, 3, device="cuda")).argmax(1)
    optimizer, scaler = LoLO(model.parameters(), "lolo-anytime"), torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- Triton's kernels of norm_fc -----------------------------------------------------------------------------------

MATRICES = [*SHAPES, (2, 257), (130, 65), (1, 40), (5, 3, 2, 2), (1024, 512), (1024, 512)]


def norm_fc_file(**settings):
    rng = np.random.default_rng(0)
    shapes = norm_fc_spec.weight_shapes(8)
    phi = {name: rng.normal(0.2, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}
    learner = dataclasses.asdict(norm_fc_spec.NormFcSettings(learning_rate=0.01, **settings))
    return weights_file.WeightsFile(phi, learner, {}, {}, tensors.digest(phi))


def matrices(torch, dtype="float32"):
    """Parameters on the GPU, with gradients, and what draws more."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to("cuda", getattr(torch, dtype)) for shape in MATRICES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to("cuda", param.dtype)
    return params, generator


def gradients(torch, params, generator):
    """New values in the same memory."""
    for param in params:
        param.grad.copy_(torch.randn(param.shape, generator=generator))


def changes(params, start):
    return [(p.double() - s.double()).cpu().numpy() for p, s in zip(params, start, strict=True)]


def test_torch_norm_fc_runs_on_triton(torch):
    from lolo.torch import kernel

    assert kernel.path(torch.device("cuda")) == "kernel triton"


FORMS = [  # dtypes of parameters and momenta, settings: few, as each is compiled
    ("float32", "float32", {"orthogonal": False}),
    ("float32", "float32", {"orthogonal": False, "baseline": "none"}),
    ("float32", "float32", {}),
    ("bfloat16", "bfloat16", {"orthogonal": False}),
    ("float16", "float32", {"orthogonal": False}),
]


@pytest.mark.parametrize(("dtype", "state_dtype", "settings"), FORMS)
def test_torch_kernels_take_the_step_of_torchs_operations(torch, dtype, state_dtype, settings):
    from lolo.torch import LoLO

    params, generator = matrices(torch, dtype)
    others = [param.clone() for param in params]
    arguments = {"state_dtype": getattr(torch, state_dtype), "weight_decay": 0.1}
    ours = LoLO(params, norm_fc_file(**settings), **arguments)
    plain = LoLO(others, norm_fc_file(**settings), kernel="plain", **arguments)
    for _ in range(3):
        gradients(torch, params, generator)
        before = [param.clone() for param in params]
        for other, param in zip(others, params, strict=True):
            other.copy_(param)
            other.grad = param.grad.clone()
        state = copy.deepcopy(ours.state_dict())
        state["param_groups"] = plain.state_dict()["param_groups"]
        plain.load_state_dict(state)
        ours.step()
        plain.step()
        for a, b in zip(changes(params, before), changes(others, before), strict=True):
            assert relative(a, b) <= (1e-5 if dtype == "float32" else 2e-2)
        for a, b in zip(params, others, strict=True):
            for name, moment in plain.state[b].items():
                same = relative(ours.state[a][name].double().cpu(), moment.double().cpu())
                assert same <= (1e-3 if moment.dtype == torch.bfloat16 else 1e-6), name


def test_torch_kernels_repeat_themselves_to_the_byte(torch):
    from lolo.torch import LoLO

    found = []
    for _ in range(2):
        params, generator = matrices(torch)
        take_steps(torch, LoLO(params, norm_fc_file(orthogonal=False)), params, generator, 3)
        found.append(torch.cat([p.flatten() for p in params]))
    assert torch.equal(*found)


def test_torch_a_step_waits_for_nothing(torch):
    from lolo.torch import LoLO

    params, generator = matrices(torch)
    optimizer = LoLO(params, norm_fc_file(), lr=torch.tensor(0.01, device="cuda"))
    optimizer.step()
    for param in params:
        param.grad = param.grad.clone()  # somewhere else
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("orthogonal", [False, True])
def test_torch_steps_in_a_cuda_graph_are_the_plain_ones(torch, orthogonal):
    """The graph has gradients of its own, and reads the learning rate and the step count anew."""
    from lolo.torch import LoLO

    rate = torch.tensor(0.01, device="cuda")
    params, generator = matrices(torch)
    optimizer = LoLO(params, norm_fc_file(orthogonal=orthogonal), lr=rate)
    optimizer.step()
    torch.cuda.synchronize()
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.clone() for p in params]
    drawn = [param.grad.clone() for param in params]
    graph = torch.cuda.CUDAGraph()
    for param in params:
        param.grad = None
    with torch.cuda.graph(graph):
        for param, source in zip(params, drawn, strict=True):
            param.grad = 2 * source
        optimizer.step()
    gradients_of = []
    for t in range(3):
        for source in drawn:
            source.copy_(torch.randn(source.shape, generator=generator))
        gradients_of.append([2 * source for source in drawn])
        rate.fill_(0.01 / (1 + t))
        graph.replay()
    again = [value.clone() for value in values]
    eager = LoLO(again, norm_fc_file(orthogonal=orthogonal))
    eager.load_state_dict(saved)
    for t, grads in enumerate(gradients_of):
        eager.param_groups[0]["lr"] = 0.01 / (1 + t)
        for param, grad in zip(again, grads, strict=True):
            param.grad = grad
        eager.step()
    for a, b in zip(changes(params, values), changes(again, values), strict=True):
        assert relative(a, b) <= 1e-5
    assert {int(own["step"]) for own in optimizer.state.values()} == {4}


def test_torch_odd_gradients_pass_as_in_torchs_operations(torch):
    from lolo.torch import LoLO

    for value in (float("nan"), float("inf"), 3e38, 1e-38, 0.0):
        moved = []
        for kernel in ("auto", "plain"):
            params, _ = matrices(torch)
            for param in params:
                param.grad.view(-1)[0] = value
            start = [p.clone() for p in params]
            LoLO(params, norm_fc_file(orthogonal=False), kernel=kernel).step()
            moved.append(changes(params, start))
        for a, b in zip(*moved, strict=True):
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
            if np.nan_to_num(b).any():
                assert relative(np.nan_to_num(a), np.nan_to_num(b)) <= 1e-5


def test_torch_a_state_of_the_kernels_continues_on_the_cpu(torch):
    from lolo.torch import LoLO

    params, generator = matrices(torch)
    optimizer = LoLO(params, norm_fc_file(orthogonal=False))
    optimizer.step()
    saved, start = copy.deepcopy(optimizer.state_dict()), [p.clone() for p in params]
    gradients(torch, params, generator)
    there = [p.cpu().clone() for p in start]
    other = LoLO(there, norm_fc_file(orthogonal=False))
    other.load_state_dict(saved)
    for mine, param in zip(there, params, strict=True):
        mine.grad = param.grad.cpu()
    optimizer.step()
    other.step()
    for a, b in zip(changes(params, start), changes(there, [s.cpu() for s in start]), strict=True):
        assert relative(a, b) <= 1e-4
