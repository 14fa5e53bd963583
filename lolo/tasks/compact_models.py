"""Small models of kinds that people train: a residual net with BatchNorm, a vision transformer, a GRU, word embeddings.

As in `models`: flat dicts of arrays, dense weights [in, out], convolutions [height, width, in, out].
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from lolo.tasks import models
from lolo.tasks.models import Model, Params, Stats


def _cut_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Normal, cut at ±2σ with σ = 1/√fan_in; the last axis is the output."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / math.sqrt(math.prod(shape[:-1]))


def _parameters(key: jax.Array, shapes: dict[str, tuple[int, ...]]) -> Params:
    """Zeros for biases, ones for the scales of norms, `_cut_normal` for all else."""
    keys = jax.random.split(key, len(shapes))
    params = {}
    for each, (name, shape) in zip(keys, shapes.items(), strict=True):
        if len(shape) > 1:
            params[name] = _cut_normal(each, shape)
        else:
            params[name] = jnp.zeros(shape) if name.endswith("bias") else jnp.ones(shape)
    return params


def small_resnet(classes: int, width: int = 16, blocks: int = 2, pixels: int = 8) -> Model:
    """Residual blocks of two 3×3 convolutions with BatchNorm, the image halved and the width doubled between them.

    Inputs: gray images [B, pixels²]. Outputs: logits [B, classes]. BatchNorm as in `models.resnet18`.
    """
    widths = [width * 2**i for i in range(blocks)]
    shapes: dict[str, tuple[int, ...]] = {"stem.weight": (3, 3, 1, width)}
    norms = {"stem_norm": width}
    for i, (before, out) in enumerate(zip([width, *widths], widths, strict=False)):
        shapes |= {f"block{i}.conv1.weight": (3, 3, before, out), f"block{i}.conv2.weight": (3, 3, out, out)}
        norms |= {f"block{i}.norm1": out, f"block{i}.norm2": out}
        if before != out:
            shapes[f"block{i}.shortcut.weight"] = (1, 1, before, out)
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    shapes |= {"output.weight": (widths[-1], classes), "output.bias": (classes,)}

    def init(key: jax.Array) -> tuple[Params, Stats]:
        stats = {f"{name}.running_mean": jnp.zeros(size) for name, size in norms.items()}
        stats |= {f"{name}.running_var": jnp.ones(size) for name, size in norms.items()}
        return _parameters(key, shapes), stats

    def apply(params: Params, stats: Stats, inputs: jax.Array, training: bool = False) -> tuple[jax.Array, Stats]:
        new: Stats = {}

        def convolve(x: jax.Array, name: str, norm: str, stride: int = 1) -> jax.Array:
            x, more = models.batch_norm(params, stats, models.convolve(params, x, name, stride), norm, training)
            new.update(more)
            return x

        x = jax.nn.relu(convolve(inputs.reshape(-1, pixels, pixels, 1), "stem", "stem_norm"))
        for i in range(blocks):
            stride = 2 if i else 1
            y = jax.nn.relu(convolve(x, f"block{i}.conv1", f"block{i}.norm1", stride))
            y = convolve(y, f"block{i}.conv2", f"block{i}.norm2")
            if f"block{i}.shortcut.weight" in params:
                x = models.convolve(params, x, f"block{i}.shortcut", stride)
            x = jax.nn.relu(x + y)
        return models.dense(params, jnp.mean(x, axis=(1, 2)), "output"), new

    return Model(init, apply)


def vision_transformer(
    classes: int, width: int = 32, layers: int = 2, heads: int = 2, patch: int = 2, pixels: int = 8
) -> Model:
    """A small ViT: patches into tokens with learned positions, LayerNorm before each half of a block, mean over tokens.

    Inputs: gray images [B, pixels²]. Outputs: logits [B, classes].
    """
    if width % heads or pixels % patch:
        raise ValueError(
            f"vision_transformer(width={width}, heads={heads}, pixels={pixels}, patch={patch}): heads must divide "
            "width, and patch the pixels."
        )
    side = pixels // patch
    shapes: dict[str, tuple[int, ...]] = {"patch.weight": (patch**2, width), "patch.bias": (width,)}
    shapes["positions.weight"] = (side**2, width)
    for i in range(layers):
        dense = {"attention.qkv": (width, 3 * width), "attention.out": (width, width)}
        dense |= {"mlp.in": (width, 4 * width), "mlp.out": (4 * width, width)}
        for name, shape in dense.items():
            shapes |= {f"{i}.{name}.weight": shape, f"{i}.{name}.bias": shape[1:]}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{i}.{norm}.weight": (width,), f"{i}.{norm}.bias": (width,)}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    shapes |= {"output.weight": (width, classes), "output.bias": (classes,)}

    def init(key: jax.Array) -> tuple[Params, Stats]:
        return _parameters(key, shapes), {}

    def apply(params: Params, stats: Stats, inputs: jax.Array, training: bool = False) -> tuple[jax.Array, Stats]:
        count = len(inputs)
        patches = inputs.reshape(count, side, patch, side, patch).swapaxes(2, 3).reshape(count, side**2, patch**2)
        x = models.dense(params, patches, "patch") + params["positions.weight"]
        for i in range(layers):
            mixed = models.dense(params, models.layer_norm(params, x, f"{i}.norm1"), f"{i}.attention.qkv")
            queries, keys, values = jnp.split(mixed.reshape(count, side**2, 3 * heads, -1), 3, axis=2)
            mixed = jax.nn.dot_product_attention(queries, keys, values).reshape(count, side**2, width)
            x = x + models.dense(params, mixed, f"{i}.attention.out")
            hidden = models.dense(params, models.layer_norm(params, x, f"{i}.norm2"), f"{i}.mlp.in")
            x = x + models.dense(params, jax.nn.gelu(hidden), f"{i}.mlp.out")
        pooled = jnp.mean(models.layer_norm(params, x, "norm"), axis=1)
        return models.dense(params, pooled, "output"), stats

    return Model(init, apply)


def gru(symbols: int, width: int = 64, embedding: int = 16) -> Model:
    """A gated recurrent unit over embedded symbols: int [B, T] -> logits of the symbol after each, [B, T, symbols].

    Reference: Cho et al., "Learning Phrase Representations using RNN Encoder–Decoder", 2014; the reset gate is applied
    after the product, as in PyTorch.
    """
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (symbols, embedding)}
    shapes |= {"input.weight": (embedding, 3 * width), "input.bias": (3 * width,)}
    shapes |= {"hidden.weight": (width, 3 * width), "hidden.bias": (3 * width,)}
    shapes |= {"output.weight": (width, symbols), "output.bias": (symbols,)}

    def init(key: jax.Array) -> tuple[Params, Stats]:
        key_embedding, key_rest = jax.random.split(key)
        return _parameters(key_rest, shapes) | {
            "embedding.weight": jax.random.normal(key_embedding, shapes["embedding.weight"])
        }, {}

    def apply(params: Params, stats: Stats, inputs: jax.Array, training: bool = False) -> tuple[jax.Array, Stats]:
        entered = models.dense(params, params["embedding.weight"][inputs], "input")  # [B, T, 3·width]

        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            recurrent = models.dense(params, state, "hidden")
            (x_reset, x_keep, x_new), (h_reset, h_keep, h_new) = jnp.split(x, 3, -1), jnp.split(recurrent, 3, -1)
            keep = jax.nn.sigmoid(x_keep + h_keep)
            new = jnp.tanh(x_new + jax.nn.sigmoid(x_reset + h_reset) * h_new)
            state = keep * state + (1 - keep) * new
            return state, state

        start = jnp.zeros((len(inputs), width))
        _, states = jax.lax.scan(step, start, entered.swapaxes(0, 1))
        return models.dense(params, states.swapaxes(0, 1), "output"), stats

    return Model(init, apply)
