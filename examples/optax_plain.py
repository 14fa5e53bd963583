"""Plain JAX and optax: a small classifier of Fashion-MNIST at 8x8, trained with lolo in place of optax.adamw."""

import jax
import jax.numpy as jnp
import optax

import lolo
from lolo.data import embedded
from lolo.tasks import models


def main(steps: int = 300) -> tuple[float, float]:
    """Returns the first and the last loss."""
    images, labels = (jnp.asarray(x) for x in embedded.fashion_mnist()["train"])
    model = models.mlp((64, 32, 32, 10))
    params, stats = model.init(jax.random.key(0))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.6e-2, steps // 20, steps)
    optimizer = lolo.load().optimizer(learning_rate=schedule)  # was: optax.adamw(schedule)
    state = optimizer.init(params)

    def loss_of(params, batch):
        logits, _ = model.apply(params, stats, (images[batch] - 73.0) / 85.0, training=True)
        return models.cross_entropy(logits, labels[batch])

    @jax.jit
    def step(params, state, key):
        batch = jax.random.randint(key, (128,), 0, len(labels))
        loss, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for key in jax.random.split(jax.random.key(1), steps):
        params, state, loss = step(params, state, key)
        losses.append(float(loss))
    return losses[0], losses[-1]


if __name__ == "__main__":
    print("first loss {:.3f}, last loss {:.3f}".format(*main()))
