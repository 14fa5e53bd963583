"""Equinox: a classifier of Fashion-MNIST at 8x8 trained with lolo. Needs pip install 'lolo[examples]'."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import lolo
from lolo.data import embedded


def main(steps: int = 300) -> tuple[float, float]:
    """Returns the first loss, and the mean of the last ten."""
    images, labels = (jnp.asarray(x) for x in embedded.fashion_mnist()["train"])
    model = eqx.nn.MLP(64, 10, width_size=32, depth=1, key=jax.random.key(0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.6e-2, steps // 20, steps)
    layout = optax.contrib.MuonDimensionNumbers(1, 0)  # inputs and outputs: equinox's layers are [out, in]
    optimizer = lolo.load().optimizer(learning_rate=schedule, is_matrix=lambda _, x: x.ndim == 2 and layout)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def loss_of(model, batch):
        logits = jax.vmap(model)((images[batch] - 73.0) / 85.0)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch].astype(int)).mean()

    @eqx.filter_jit
    def step(model, state, key):
        batch = jax.random.randint(key, (128,), 0, len(labels))
        loss, grads = eqx.filter_value_and_grad(loss_of)(model, batch)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        model, state, loss = step(model, state, key)
        losses.append(loss.item())
    return losses[0], sum(losses[-10:]) / 10


if __name__ == "__main__":
    print("first loss {:.3f}, last loss {:.3f}".format(*main()))
