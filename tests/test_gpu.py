"""What only a GPU can show; run by `make gpu-test`. The CPU's results are the reference."""

import copy

import jax
import numpy as np
import optax
import pytest

import lolo
from lolo.files import tensors
from lolo.optimizers import weights_file
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
    optimizer = lolo.load().optimizer()
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
        take_steps(torch, LoLO(params), params, generator)
        moved[device] = [(p.detach() - s).float().cpu().numpy() for p, s in zip(params, start, strict=True)]
    for ours, reference in zip(moved["cuda"], moved["cpu"], strict=True):
        assert relative(ours, reference) < tolerance


def test_a_state_saved_on_the_gpu_continues_there_and_on_the_cpu(torch):
    from lolo.torch import LoLO

    params, generator = drawn(torch, "cuda", torch.float32)
    optimizer = LoLO(params)
    take_steps(torch, optimizer, params, generator)
    saved, values = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in params]
    drawing = generator.get_state()
    take_steps(torch, optimizer, params, generator)
    for device, tolerance in (("cuda", 0.0), ("cpu", 1e-4)):
        again = [torch.nn.Parameter(value.to(device).clone()) for value in values]
        other = LoLO(again)
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
    optimizer, scaler = LoLO(model.parameters()), torch.amp.GradScaler("cuda")
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
