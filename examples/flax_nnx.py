"""Flax NNX: a classifier of Fashion-MNIST at 8x8 trained with lolo. Needs pip install 'lolo[examples]'."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lolo
from lolo.data import embedded


def main(steps: int = 300) -> tuple[float, float]:
    """Returns the first loss, and the mean of the last ten."""
    images, labels = (jnp.asarray(x) for x in embedded.fashion_mnist()["train"])
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(64, 32, rngs=rngs), nnx.relu, nnx.Linear(32, 10, rngs=rngs))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.6e-2, steps // 20, steps)
    learned = lolo.load().optimizer(learning_rate=schedule)  # was: optax.adamw(schedule)
    optimizer = nnx.Optimizer(model, learned, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, key):
        batch = jax.random.randint(key, (128,), 0, len(labels))

        def loss_of(model):
            logits = model((images[batch] - 73.0) / 85.0)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch].astype(int)).mean()

        loss, grads = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer, key)) for key in jax.random.split(jax.random.key(1), steps)]
    return losses[0], sum(losses[-10:]) / 10


if __name__ == "__main__":
    print("first loss {:.3f}, last loss {:.3f}".format(*main()))
