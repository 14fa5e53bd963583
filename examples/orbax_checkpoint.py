"""Orbax: training that is saved half-way and resumed from the checkpoint. Needs pip install 'lolo[examples]'."""

import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import lolo
from lolo.data import embedded


def main(steps: int = 300) -> tuple[float, float]:
    """Returns the first loss, and the mean of the last ten."""
    images, labels = (jnp.asarray(x, int) for x in embedded.fashion_mnist()["train"])
    params, optimizer = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}, lolo.load().optimizer(learning_rate=5e-3)

    def loss_of(params, batch):
        logits = (images[batch] - 73.0) / 85.0 @ params["w"] + params["b"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

    @jax.jit
    def step(run, key):
        loss, grads = jax.value_and_grad(loss_of)(run["params"], jax.random.randint(key, (128,), 0, len(labels)))
        updates, state = optimizer.update(grads, run["state"], run["params"])
        return {"params": optax.apply_updates(run["params"], updates), "state": state}, loss

    run, losses = {"params": params, "state": optimizer.init(params)}, [0.0] * steps
    with tempfile.TemporaryDirectory() as folder, ocp.CheckpointManager(folder) as manager:
        for i, key in enumerate(jax.random.split(jax.random.key(1), steps)):
            if i == steps // 2:  # a new process would restore into the run that it has just made
                manager.save(i, args=ocp.args.StandardSave(run))
                run = manager.restore(i, args=ocp.args.StandardRestore(run))
            run, losses[i] = step(run, key)
    return float(losses[0]), float(sum(losses[-10:])) / 10


if __name__ == "__main__":
    print("first loss {:.3f}, last loss {:.3f}".format(*main()))
