"""Our models compute what PyTorch's do, on the same weights: forward, gradient, and BatchNorm's running statistics.

The twins are written here after torchvision's ResNet-18 and OpenAI's GPT-2, whose names they share.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lolo.tasks import models

pytestmark = pytest.mark.torch
torch = pytest.importorskip("torch")
nn = torch.nn


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet18(nn.Module):
    def __init__(self, classes, stem, width):
        super().__init__()
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        channels = width
        for layer in range(4):
            out = width * 2**layer
            blocks = [Block(channels, out, 2 if layer else 1), Block(out, out, 1)]
            setattr(self, f"layer{layer + 1}", nn.Sequential(*blocks))
            channels = out
        self.fc = nn.Linear(channels, classes)

    def forward(self, x):
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


class Dense(nn.Module):
    """GPT-2's Conv1D: a weight of [in, out]."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(fan_in, fan_out))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x):
        return x @ self.weight + self.bias


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.c_attn, self.c_proj = Dense(width, 3 * width), Dense(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.c_attn(x).split(width, dim=2)
        q, k, v = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(2, 3) / (width // self.heads) ** 0.5
        past = torch.tril(torch.ones(length, length, dtype=torch.bool))
        mixed = scores.masked_fill(~past, float("-inf")).softmax(-1) @ v
        return self.c_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Feedforward(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc, self.c_proj = Dense(width, 4 * width), Dense(4 * width, width)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))))


class Transformer(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), Feedforward(width)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT2(nn.Module):
    def __init__(self, vocabulary, context, layers, heads, width):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.h = nn.ModuleList(Transformer(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


def layers_of(widths):
    """An MLP whose parameters are named layers.i.weight."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            pairs = zip(widths[:-1], widths[1:], strict=True)
            self.layers = nn.ModuleList(nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairs)

        def forward(self, x):
            x = x.flatten(1)
            for layer in self.layers[:-1]:
                x = torch.relu(layer(x))
            return self.layers[-1](x)

    return Network()


def to_torch(name, array):
    """Convolutions [h, w, in, out] → [out, in, h, w]; weights of nn.Linear [in, out] → [out, in]."""
    array = np.asarray(array)
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif name.startswith(("layers.", "fc.")) and array.ndim == 2:
        array = array.T
    return torch.from_numpy(np.array(array))


def copy_weights(twin, params, stats):
    """Every name of ours is one of PyTorch's; only its counters of batches have no counterpart."""
    state = {name: to_torch(name, array) for name, array in {**params, **stats}.items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)


def perturbed(tree, seed):
    """Biases, scales and statistics that are not 0 and 1, so that each of them matters."""
    rng = np.random.default_rng(seed)
    return {
        name: leaf + 0.1 * jnp.asarray(rng.uniform(size=leaf.shape), jnp.float32) if leaf.ndim == 1 else leaf
        for name, leaf in tree.items()
    }


def compare(model, twin, inputs, torch_inputs, training, tolerance):
    """Outputs, and gradients of their mean cross-entropy with fixed labels, relative to the largest entry."""
    params, stats = model.init(jax.random.key(1))
    params, stats = perturbed(params, 2), perturbed(stats, 3)
    copy_weights(twin, params, stats)
    twin.train(training)

    def loss(params):
        outputs, new_stats = model.apply(params, stats, inputs, training=training)
        labels = jnp.arange(outputs[..., 0].size).reshape(outputs.shape[:-1]) % outputs.shape[-1]
        return models.cross_entropy(outputs, labels), (outputs, new_stats)

    gradient, (outputs, new_stats) = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = twin(torch_inputs)
    flat = expected.reshape(-1, expected.shape[-1])
    nn.functional.cross_entropy(flat, torch.arange(len(flat)) % flat.shape[-1]).backward()
    errors = {"outputs": relative_error(outputs, expected.detach())}
    for name, parameter in twin.named_parameters():
        errors[name] = relative_error(to_torch(name, gradient[name]), parameter.grad)
    for name, buffer in twin.named_buffers():
        if not name.endswith("num_batches_tracked"):
            errors[name] = relative_error(new_stats[name], buffer)
    worst = max(errors, key=errors.get)
    print(f"outputs {errors['outputs']:.1e}, worst {worst} {errors[worst]:.1e}")
    assert errors[worst] < tolerance, (worst, errors[worst])


def relative_error(ours, theirs):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("stem", "width", "side"), [("imagenet", 64, 64), ("imagenet", 8, 32), ("cifar", 8, 32)])
def test_resnet18_is_torchvisions(stem, width, side, training):
    images = np.random.default_rng(0).normal(size=(4, side, side, 3)).astype(np.float32)
    model = models.resnet18(10, stem, width)
    twin = ResNet18(10, stem, width)
    compare(model, twin, jnp.asarray(images), torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), training, 2e-4)


@pytest.mark.parametrize("size", [(101, 16, 2, 4, 32), (50_257, 64, 6, 6, 192)])
def test_gpt_is_gpt2(size):
    tokens = np.random.default_rng(0).integers(0, size[0], (2, 16))
    compare(models.gpt(*size), GPT2(*size), jnp.asarray(tokens), torch.from_numpy(tokens), True, 1e-4)


def test_mlp_is_a_stack_of_linear_layers():
    widths = (3072, 128, 128, 128, 1000)
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    compare(models.mlp(widths), layers_of(widths), jnp.asarray(images), torch.from_numpy(images), True, 1e-4)


def test_the_comparison_can_tell():
    tokens = np.random.default_rng(0).integers(0, 101, (2, 16))
    twin = GPT2(101, 16, 2, 4, 32)
    twin.h[1].mlp.forward = lambda x: twin.h[1].mlp.c_proj(nn.functional.gelu(twin.h[1].mlp.c_fc(x)))
    twin.h[0].attn.heads = 2
    with pytest.raises(AssertionError):
        compare(models.gpt(101, 16, 2, 4, 32), twin, jnp.asarray(tokens), torch.from_numpy(tokens), True, 1e-4)
