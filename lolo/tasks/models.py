"""Models of the tasks: multilayer perceptrons, ResNet-18 and GPT-2, as plain functions over dicts of arrays.

Parameters and statistics are flat dicts with PyTorch's names ("layer1.0.conv1.weight"), so that noise, ring
buffers, `jax.vmap` and safetensors need nothing more than `jax.tree.map`. Two layouts differ from PyTorch's:
dense weights are [in, out] and convolutions [height, width, in, out].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lolo.trees import PyTree

Params = dict[str, jax.Array]
Stats = dict[str, jax.Array]


class Model(NamedTuple):
    """A model as two functions. `training` is a Python bool, static under `jax.jit`.

    >>> model = models.mlp((64, 32, 10))
    >>> isinstance(model, models.Model)
    True
    >>> params, stats = model.init(jax.random.key(0))
    >>> logits, stats = model.apply(params, stats, jnp.ones((5, 64)), training=True)
    >>> logits.shape
    (5, 10)
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]  #: key -> params, stats
    apply: Callable[..., tuple[jax.Array, PyTree]]  #: params, stats, inputs, training -> outputs, stats


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross-entropy in nats, in float32. logits: [..., C], labels: [...] int in [0, C). Returns: [].

    >>> models.cross_entropy(jnp.zeros((5, 10)), jnp.zeros(5, jnp.int32)).round(4)
    Array(2.3026, dtype=float32)
    """
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None].astype(jnp.int32), axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


# Multilayer perceptrons


def mlp(widths: Sequence[int], dtype: jax.typing.DTypeLike = jnp.float32) -> Model:
    """Dense layers with ReLU between them: inputs [B, ...] are flattened to [B, widths[0]] → [B, widths[-1]].

    Weights are normal, cut at ±2σ with σ = 1/√fan_in and no correction of the variance; biases are 0.
    `mlp((3072, 128, 128, 128, 1000))` is the paper's network for 32×32 ImageNet: 555,368 parameters.
    `dtype` is that of activations and matrix products; parameters and outputs stay float32.

    >>> params, stats = models.mlp((64, 32, 10)).init(jax.random.key(0))
    >>> {name: x.shape for name, x in params.items()}
    {'layers.0.weight': (64, 32), 'layers.0.bias': (32,), 'layers.1.weight': (32, 10), 'layers.1.bias': (10,)}
    """
    widths = tuple(widths)
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"mlp(widths={widths}) needs input and output widths of at least 1, such as (64, 32, 10).")

    def init(key: jax.Array) -> tuple[Params, Stats]:
        return _init_dense_layers(key, widths), {}

    def apply(params: Params, stats: Stats, inputs: jax.Array, training: bool = False) -> tuple[jax.Array, Stats]:
        flat = inputs.reshape(inputs.shape[0], -1).astype(dtype)
        return _dense_layers(params, flat, len(widths) - 1).astype(jnp.float32), stats

    return Model(init, apply)


def char_mlp(symbols: int = 48, context: int = 8, embedding: int = 8, widths: Sequence[int] = (32, 32)) -> Model:
    """The next symbol from the `context` before it: their embeddings, N(0, 1), side by side into an MLP.

    Inputs: int [B, context] in [0, symbols). Outputs: logits [B, symbols]. `widths` are the hidden ones.

    >>> model = models.char_mlp(symbols=48, context=8)
    >>> params, stats = model.init(jax.random.key(0))
    >>> model.apply(params, stats, jnp.zeros((5, 8), jnp.int32))[0].shape
    (5, 48)
    """
    layers = (context * embedding, *widths, symbols)

    def init(key: jax.Array) -> tuple[Params, Stats]:
        key_embedding, key_layers = jax.random.split(key)
        weight = jax.random.normal(key_embedding, (symbols, embedding))
        return {"embedding.weight": weight, **_init_dense_layers(key_layers, layers)}, {}

    def apply(params: Params, stats: Stats, inputs: jax.Array, training: bool = False) -> tuple[jax.Array, Stats]:
        embedded = params["embedding.weight"][inputs].reshape(inputs.shape[0], context * embedding)
        return _dense_layers(params, embedded, len(layers) - 1), stats

    return Model(init, apply)


def _init_dense_layers(key: jax.Array, widths: Sequence[int]) -> Params:
    params = {}
    for i, (fan_in, fan_out) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        key, key_layer = jax.random.split(key)
        cut_normal = jax.random.truncated_normal(key_layer, -2.0, 2.0, (fan_in, fan_out))
        params[f"layers.{i}.weight"] = cut_normal / math.sqrt(fan_in)
        params[f"layers.{i}.bias"] = jnp.zeros(fan_out)
    return params


def _dense_layers(params: Params, x: jax.Array, layers: int) -> jax.Array:
    for i in range(layers):
        x = dense(params, x, f"layers.{i}")
        x = jax.nn.relu(x) if i < layers - 1 else x
    return x


def small_convolution(classes: int, channels: Sequence[int] = (8, 16), pixels: int = 8) -> Model:
    """3×3 convolutions of stride 2 with bias and ReLU, then one dense layer: gray images [B, pixels²] → [B, classes].

    Each convolution halves the image. Weights are normal, cut at ±2σ with σ = 1/√fan_in, as `mlp`'s; biases are 0.
    """
    sides = [pixels]
    for _ in channels:
        sides.append(-(-sides[-1] // 2))

    def init(key: jax.Array) -> tuple[Params, Stats]:
        key_dense, *keys = jax.random.split(key, len(channels) + 1)
        params = {}
        for i, (fan_in, fan_out) in enumerate(zip((1, *channels), channels, strict=False)):
            cut_normal = jax.random.truncated_normal(keys[i], -2.0, 2.0, (3, 3, fan_in, fan_out))
            params[f"convolutions.{i}.weight"] = cut_normal / math.sqrt(9 * fan_in)
            params[f"convolutions.{i}.bias"] = jnp.zeros(fan_out)
        return params | _init_dense_layers(key_dense, (sides[-1] ** 2 * channels[-1], classes)), {}

    def apply(params: Params, stats: Stats, inputs: jax.Array, training: bool = False) -> tuple[jax.Array, Stats]:
        x = inputs.reshape(-1, pixels, pixels, 1)
        for i in range(len(channels)):
            x = jax.nn.relu(convolve(params, x, f"convolutions.{i}", 2) + params[f"convolutions.{i}.bias"])
        return _dense_layers(params, x.reshape(len(x), -1), 1), stats

    return Model(init, apply)


# ResNet-18

BATCH_NORM_DECAY = 0.9
BATCH_NORM_EPSILON = 1e-5
BLOCKS_PER_LAYER = 2


def resnet18(
    classes: int,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    width: int = 64,
    remat: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> Model:
    """ResNet-18 for images [B, H, W, 3] → logits [B, classes] in float32.

    Args:
      classes: C. With 10 classes and the ImageNet stem at width 64 there are 11,181,642 parameters.
      stem: "imagenet" is 7×7 stride 2 and a 3×3 max-pool of stride 2; "cifar" is 3×3 stride 1 and no pool.
      width: channels of the first of the four layers; each next layer has twice as many.
      remat: keep only each block's input for the backward pass.
      dtype: of activations and convolutions; parameters and BatchNorm's arithmetic stay float32.

    BatchNorm takes the batch's statistics in training and the running ones otherwise. `stats` holds the running
    ones, with decay 0.9 and the unbiased variance, as PyTorch keeps them. Names and initial values (He normal by
    fan-out; the last layer uniform within ±1/√fan_in) are torchvision's.
    Reference: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2016.

    >>> model = models.resnet18(10, stem="cifar", width=8)
    >>> params, stats = jax.eval_shape(model.init, jax.random.key(0))
    >>> params["conv1.weight"].shape
    (3, 3, 3, 8)
    """
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f'resnet18(stem={stem!r}) knows the stems "imagenet" and "cifar".')
    kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)

    def init(key: jax.Array) -> tuple[Params, Stats]:
        shapes = _resnet_convolutions(kernel, width)
        keys = jax.random.split(key, len(shapes) + 1)
        params, stats = {}, {}
        for key_conv, (name, norm, shape) in zip(keys, shapes, strict=False):
            fan_out = shape[0] * shape[1] * shape[3]
            params[f"{name}.weight"] = jax.random.normal(key_conv, shape) * math.sqrt(2.0 / fan_out)
            params[f"{norm}.weight"], params[f"{norm}.bias"] = jnp.ones(shape[3]), jnp.zeros(shape[3])
            stats[f"{norm}.running_mean"], stats[f"{norm}.running_var"] = jnp.zeros(shape[3]), jnp.ones(shape[3])
        bound = 1.0 / math.sqrt(8 * width)
        key_weight, key_bias = jax.random.split(keys[-1])
        params["fc.weight"] = jax.random.uniform(key_weight, (8 * width, classes), minval=-bound, maxval=bound)
        params["fc.bias"] = jax.random.uniform(key_bias, (classes,), minval=-bound, maxval=bound)
        return params, stats

    def block(
        params: Params, stats: Stats, x: jax.Array, name: str, stride: int, training: bool
    ) -> tuple[jax.Array, Stats]:
        y, first = batch_norm(params, stats, convolve(params, x, f"{name}.conv1", stride), f"{name}.bn1", training)
        y = convolve(params, jax.nn.relu(y), f"{name}.conv2", 1)
        y, second = batch_norm(params, stats, y, f"{name}.bn2", training)
        third: Stats = {}
        if f"{name}.downsample.0.weight" in params:
            x = convolve(params, x, f"{name}.downsample.0", stride)
            x, third = batch_norm(params, stats, x, f"{name}.downsample.1", training)
        return jax.nn.relu(x + y), {**first, **second, **third}

    if remat:
        block = jax.checkpoint(block, static_argnums=(3, 4, 5))

    def apply(params: Params, stats: Stats, inputs: jax.Array, training: bool = False) -> tuple[jax.Array, Stats]:
        x = convolve(params, inputs.astype(dtype), "conv1", stride)
        x, new_stats = batch_norm(params, stats, x, "bn1", training)
        x = jax.nn.relu(x)
        if stem == "imagenet":
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
        for layer in range(4):
            for i in range(BLOCKS_PER_LAYER):
                block_stride = 2 if layer > 0 and i == 0 else 1
                x, more = block(params, stats, x, f"layer{layer + 1}.{i}", block_stride, training)
                new_stats.update(more)
        pooled = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return pooled @ params["fc.weight"] + params["fc.bias"], new_stats

    return Model(init, apply)


def _resnet_convolutions(kernel: int, width: int) -> list[tuple[str, str, tuple[int, int, int, int]]]:
    """Name of each convolution, name of the BatchNorm behind it, and the kernel's shape."""
    convolutions = [("conv1", "bn1", (kernel, kernel, 3, width))]
    channels = width
    for layer in range(4):
        out = width * 2**layer
        for i in range(BLOCKS_PER_LAYER):
            name = f"layer{layer + 1}.{i}"
            convolutions.append((f"{name}.conv1", f"{name}.bn1", (3, 3, channels, out)))
            convolutions.append((f"{name}.conv2", f"{name}.bn2", (3, 3, out, out)))
            if channels != out:
                convolutions.append((f"{name}.downsample.0", f"{name}.downsample.1", (1, 1, channels, out)))
            channels = out
    return convolutions


def convolve(params: Params, x: jax.Array, name: str, stride: int) -> jax.Array:
    """x: [B, H, W, in] → [B, H', W', out], padded by half the kernel on every side, as PyTorch does.

    JAX's "SAME" would pad a strided convolution more on the right than on the left.
    """
    weight = params[f"{name}.weight"]
    padding = weight.shape[0] // 2
    return lax.conv_general_dilated(
        x,
        weight.astype(x.dtype),
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def batch_norm(params: Params, stats: Stats, x: jax.Array, name: str, training: bool) -> tuple[jax.Array, Stats]:
    """x: [B, H, W, C], normalised in float32 over all axes but the last. Also the entries of `stats` after it."""
    values = x.astype(jnp.float32)
    mean, variance = stats[f"{name}.running_mean"], stats[f"{name}.running_var"]
    running_mean, running_variance = mean, variance
    if training:
        mean, variance = jnp.mean(values, axis=(0, 1, 2)), jnp.var(values, axis=(0, 1, 2))
        n = x.shape[0] * x.shape[1] * x.shape[2]
        unbiased = variance * (n / max(n - 1, 1))
        running_mean = BATCH_NORM_DECAY * running_mean + (1 - BATCH_NORM_DECAY) * mean
        running_variance = BATCH_NORM_DECAY * running_variance + (1 - BATCH_NORM_DECAY) * unbiased
    scale = params[f"{name}.weight"] * lax.rsqrt(variance + BATCH_NORM_EPSILON)
    normalised = (values - mean) * scale + params[f"{name}.bias"]
    return normalised.astype(x.dtype), {
        f"{name}.running_mean": running_mean,
        f"{name}.running_var": running_variance,
    }


# GPT

LAYER_NORM_EPSILON = 1e-5
GPT_INIT_STD = 0.02


class GPTSize(NamedTuple):
    """The arguments of `gpt` that make a named model: `gpt(**GPT_SIZES["gpt2-mini"]._asdict())`.

    >>> models.GPT_SIZES["gpt2-mini"]
    GPTSize(layers=6, heads=6, width=192, context=1024, vocabulary=50257)
    >>> model = models.gpt(**models.GPTSize(layers=2, heads=2, width=32)._asdict())
    """

    layers: int
    heads: int
    width: int
    context: int = 1024
    vocabulary: int = 50_257


GPT_SIZES = {
    # The paper does not define its GPT-2-mini; this is minGPT's gpt-mini with the context and vocabulary of GPT-2.
    "gpt2-mini": GPTSize(layers=6, heads=6, width=192),
    "gpt2-small": GPTSize(layers=12, heads=12, width=768),  # 124,439,808 parameters
    "gpt2-medium": GPTSize(layers=24, heads=16, width=1024),
    "gpt2-large": GPTSize(layers=36, heads=20, width=1280),
    "gpt2-xl": GPTSize(layers=48, heads=25, width=1600),
}


def gpt(
    vocabulary: int,
    context: int,
    layers: int,
    heads: int,
    width: int,
    remat: bool = False,
    dtype: jax.typing.DTypeLike = jnp.float32,
    attention: Literal["xla", "cudnn"] = "xla",
) -> Model:
    """GPT-2 without dropout: tokens int [B, T], T ≤ context → logits of the token after each, [B, T, vocabulary].

    Learned positions, LayerNorm before each half of a block, GELU by its tanh formula, and an output layer that is
    the token embedding. Weights are N(0, 0.02²), those of the two projections back into the residual stream
    divided by √(2·layers); biases are 0. Names and the [in, out] layout are those of GPT-2's released weights.

    Args:
      remat: keep only each block's input for the backward pass.
      dtype: of activations and matrix products; parameters, LayerNorm's arithmetic and logits stay float32.
      attention: which code `jax.nn.dot_product_attention` runs; "cudnn" needs an NVIDIA GPU and bfloat16.
    Reference: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.

    >>> model = models.gpt(vocabulary=48, context=32, layers=1, heads=2, width=16)
    >>> params, stats = jax.eval_shape(model.init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, params, stats, jnp.zeros((5, 32), jnp.int32))[0].shape
    (5, 32, 48)
    """
    if width % heads:
        raise ValueError(f"gpt(width={width}) must be a multiple of heads={heads}; try width={width // heads * heads}.")

    def init(key: jax.Array) -> tuple[Params, Stats]:
        shapes = _gpt_shapes(vocabulary, context, layers, width)
        keys = jax.random.split(key, len(shapes))
        return {name: _init_gpt(keys[i], name, shape, layers) for i, (name, shape) in enumerate(shapes.items())}, {}

    def block(params: Params, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        queries_keys_values = dense(params, layer_norm(params, x, "ln_1"), "attn.c_attn")
        queries, keys, values = jnp.split(queries_keys_values.reshape(batch, length, 3 * heads, -1), 3, axis=2)
        mixed = jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation=attention)
        x = x + dense(params, mixed.reshape(batch, length, width), "attn.c_proj")
        hidden = dense(params, layer_norm(params, x, "ln_2"), "mlp.c_fc")
        return x + dense(params, jax.nn.gelu(hidden, approximate=True), "mlp.c_proj")

    if remat:
        block = jax.checkpoint(block)

    def apply(params: Params, stats: Stats, inputs: jax.Array, training: bool = False) -> tuple[jax.Array, Stats]:
        length = inputs.shape[1]
        if length > context:
            raise ValueError(f"{length} tokens do not fit into gpt(context={context}); shorten them or raise context.")
        x = (params["wte.weight"][inputs] + params["wpe.weight"][:length]).astype(dtype)
        for i in range(layers):
            prefix = f"h.{i}."
            x = block({name[len(prefix) :]: p for name, p in params.items() if name.startswith(prefix)}, x)
        x = layer_norm(params, x, "ln_f")
        embedding = params["wte.weight"].astype(dtype)
        return jnp.einsum("btd,vd->btv", x, embedding, preferred_element_type=jnp.float32), stats

    return Model(init, apply)


def _gpt_shapes(vocabulary: int, context: int, layers: int, width: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, width), "wpe.weight": (context, width)}
    projections = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
    projections |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
    for i in range(layers):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (width,), f"h.{i}.{norm}.bias": (width,)}
        for name, (fan_in, fan_out) in projections.items():
            shapes |= {f"h.{i}.{name}.weight": (fan_in, fan_out), f"h.{i}.{name}.bias": (fan_out,)}
    return shapes | {"ln_f.weight": (width,), "ln_f.bias": (width,)}


def _init_gpt(key: jax.Array, name: str, shape: tuple[int, ...], layers: int) -> jax.Array:
    if name.endswith(".bias"):
        return jnp.zeros(shape)
    if len(shape) == 1:  # LayerNorm's scale
        return jnp.ones(shape)
    std = GPT_INIT_STD / math.sqrt(2 * layers) if name.endswith(".c_proj.weight") else GPT_INIT_STD
    return std * jax.random.normal(key, shape)


def layer_norm(params: Params, x: jax.Array, name: str) -> jax.Array:
    """x: [..., C], centred and scaled over its last axis in float32, times weight plus bias."""
    values = x.astype(jnp.float32)
    centred = values - jnp.mean(values, axis=-1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
    return (centred * scale * params[f"{name}.weight"] + params[f"{name}.bias"]).astype(x.dtype)


def dense(params: Params, x: jax.Array, name: str) -> jax.Array:
    """x: [..., in] → [..., out], in x's dtype."""
    return x @ params[f"{name}.weight"].astype(x.dtype) + params[f"{name}.bias"].astype(x.dtype)
