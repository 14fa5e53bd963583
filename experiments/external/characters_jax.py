"""A small transformer that reads characters of books, in plain JAX: trained by LoLO and by AdamW.

Two pre-norm layers of width 32 with two heads, context 32, batches of 8; 48 symbols.
Run: python experiments/external/characters_jax.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rows import WINDOW, Make, experiment

import lolo
from lolo.data import embedded

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 32, 2, 2, 32, 8
HELD_WINDOWS = 256  # of the validation books, evenly spaced
EVERY = 5  # of WINDOW steps each, between two held-out losses


def init(key):
    keys = iter(jax.random.split(key, 4 + 4 * LAYERS))

    def normal(*shape, scale=0.02):
        return scale * jax.random.normal(next(keys), shape)

    def layer():
        return {
            "norm1": jnp.ones(WIDTH),
            "qkv": normal(WIDTH, 3 * WIDTH, scale=WIDTH**-0.5),
            "out": normal(WIDTH, WIDTH, scale=WIDTH**-0.5),
            "norm2": jnp.ones(WIDTH),
            "up": normal(WIDTH, 4 * WIDTH, scale=WIDTH**-0.5),
            "down": normal(4 * WIDTH, WIDTH, scale=(4 * WIDTH) ** -0.5),
        }

    return {
        "tokens": normal(embedded.SYMBOLS, WIDTH),
        "positions": normal(CONTEXT, WIDTH),
        "layers": [layer() for _ in range(LAYERS)],
        "norm": jnp.ones(WIDTH),
        "head": normal(WIDTH, embedded.SYMBOLS, scale=WIDTH**-0.5),
    }


def normed(x, gain):
    return gain * x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attention(layer, x):
    split = (x @ layer["qkv"]).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
    mixed = jax.nn.dot_product_attention(*jnp.moveaxis(split, 2, 0), is_causal=True)
    return mixed.reshape(x.shape) @ layer["out"]


def loss_of(params, windows):
    """Mean cross-entropy of the next symbol. windows: int [B, CONTEXT + 1]."""
    x = params["tokens"][windows[:, :-1]] + params["positions"]
    for layer in params["layers"]:
        x = x + attention(layer, normed(x, layer["norm1"]))
        x = x + jax.nn.gelu(normed(x, layer["norm2"]) @ layer["up"]) @ layer["down"]
    logits = normed(x, params["norm"]) @ params["head"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def windows_at(text, starts):
    return text[starts[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)


def programs(optimizer):
    """Start, WINDOW steps in one program, and the held-out loss."""
    text = jnp.asarray(embedded.books_symbols()["train"])
    held_text = jnp.asarray(embedded.books_symbols()["validation"])
    held_starts = jnp.linspace(0, len(held_text) - CONTEXT - 1, HELD_WINDOWS).astype(jnp.int32)

    def start(key):
        params = init(key)
        return params, optimizer.init(params)

    def step(carry, key):
        params, state = carry
        windows = windows_at(text, jax.random.randint(key, (BATCH,), 0, len(text) - CONTEXT))
        loss, grads = jax.value_and_grad(loss_of)(params, windows)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    many = jax.jit(lambda carry, key: jax.lax.scan(step, carry, jax.random.split(key, WINDOW)))
    return jax.jit(start), many, jax.jit(lambda params: loss_of(params, windows_at(held_text, held_starts)))


def run(make: Make, seed: int, steps: int) -> tuple[np.ndarray, dict[int, float]]:
    start, many, held_loss = programs(make())
    key_init, key_batches = jax.random.split(jax.random.key(seed))
    carry, losses, held = start(key_init), [], {}
    for i, key in enumerate(jax.random.split(key_batches, steps // WINDOW), 1):
        carry, loss = many(carry, key)
        losses.append(loss)
        if i % EVERY == 0 or i == steps // WINDOW:
            held[i * WINDOW] = float(held_loss(carry[0]))
    return np.concatenate(losses), held


if __name__ == "__main__":
    learned = lolo.load("lolo-small").optimizer
    title = "characters of books, transformer (2 layers, width 32) in JAX, batch 8"
    experiment(run, learned, lambda lr: optax.adamw(lr), "characters-jax", title, seeds=1)
