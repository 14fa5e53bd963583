"""Tensors of one shape share a program (optimizers/alike.py): nothing but the compile time may show it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from helpers import with_slow

import lolo
from lolo.optimizers import alike

LAYERS = 6


def layers_of(key: jax.Array) -> dict[str, jax.Array]:
    """Equal layers; all but the first two are matrices for the network."""
    keys = jax.random.split(key, LAYERS)
    return {f"layer{i}": jax.random.normal(k, (8, 24)) * 10.0**i for i, k in enumerate(keys)}


def is_matrix(path: str, param: jax.Array) -> bool:
    return path not in ("layer0", "layer1")


LEARNERS = {
    "norm_fc": lambda mask: lolo.norm_fc(is_matrix=is_matrix, weight_decay=0.1, mask=mask, kernel="plain"),
    "norm_fc, bfloat16": lambda mask: lolo.norm_fc(weight_decay=0.1, mask=mask, state_dtype=jnp.bfloat16),
    "small_fc": lambda mask: lolo.small_fc(weight_decay=0.1, mask=mask),
}


@pytest.mark.parametrize("name", with_slow(LEARNERS, {"norm_fc, bfloat16"}))
def test_a_layer_moves_as_if_it_were_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "LEAST", 3)
    params = layers_of(jax.random.key(0))

    def after_two_steps(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
        learner = LEARNERS[name](lambda tree: {path: path != "layer5" for path in tree})
        phi = jax.tree.map(lambda x: x + 0.01, learner.init(jax.random.key(1)))
        optimizer = learner.optimizer(phi)
        state = optimizer.init(params)
        for seed in (2, 3):
            grads = {path: layers_of(jax.random.key(seed))[path] for path in params}
            updates, state = jax.jit(optimizer.update)(grads, state, params)
        return updates

    together = after_two_steps(params)
    for path, param in params.items():
        (alone,) = after_two_steps({path: param}).values()
        assert jnp.linalg.norm(together[path] - alone) <= 1e-6 * jnp.linalg.norm(alone), path


def test_only_equal_kinds_and_shapes_share_a_program() -> None:
    seen = []

    def double(kind: str, tree: tuple[jax.Array]) -> jax.Array:
        seen.append((kind, tree[0].shape))
        return 2 * tree[0]

    kinds = ["a"] * 5 + ["b"] * 2 + ["a"] * 5 + ["a"]
    trees = [(jnp.full(3, i),) for i in range(7)] + [(jnp.full(4, i),) for i in range(5)] + [(jnp.zeros(0),)]
    done = alike.over_alike(double, kinds, trees)
    assert all((each == 2 * tree[0]).all() for each, tree in zip(done, trees, strict=True))
    assert sorted(seen) == sorted([("a", (3,)), ("b", (3,)), ("b", (3,)), ("a", (4,)), ("a", (0,))])


@pytest.mark.parametrize("name", ("norm_fc", "small_fc"))
def test_a_program_does_not_grow_with_the_layers(name: str) -> None:
    learner = lolo.norm_fc(kernel="plain") if name == "norm_fc" else lolo.small_fc()
    optimizer = learner.optimizer(learner.init(jax.random.key(0)))

    def size(layers: int) -> int:
        params = {f"layer{i}": jnp.ones((64, 64)) for i in range(layers)}
        return jax.jit(optimizer.update).lower(params, optimizer.init(params), params).as_text().count("dot_general")

    assert size(8) == size(16) < size(3)
