"""The same bytes on any number of devices. Each case is a process of its own: JAX counts its devices once."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import hashlib, json, sys
from lolo import parallel

devices, asked, seed = int(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
parallel.use_cores(devices)

import jax, numpy as np
from lolo import meta, recipes, tasks

recipe = recipes.LOLO
for name, value in json.loads(sys.argv[4]).items():
    recipe = recipes.with_field(recipe, name, tuple(value) if isinstance(value, list) else value)
setup = recipes.build(recipe)
task_group = tuple(tasks.resolve(name).train for name in recipe.tasks)
digest = lambda tree: hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(tree))).hexdigest()

results = {}
for count in asked:
    over = parallel.mesh(recipe.estimator.pairs // recipe.estimator.slots_per_block, count)
    assert over.devices.size == count, over
    state = jax.jit(lambda key: meta.meta_init(setup, task_group, key))(jax.random.key(seed))
    step = parallel.compile_step(setup, state, over)
    state, placed = parallel.place(state, over, parallel.state_specs(state)), parallel.place(task_group, over)
    before = digest(state.meta_params)
    for _ in range(int(sys.argv[5])):
        state, metrics = step(placed, state)
    assert step._cache_size() == 1
    assert digest(state.meta_params) != before
    slots = jax.device_get(state.slots)
    assert max(slots[0].replay.size) > 0
    results[count] = [digest(state.meta_params), digest(jax.device_get((state.outer, slots))), digest(metrics)]
meshes = {blocks: parallel.mesh(blocks).devices.size for blocks in (1, 3, 4, 5, 6, 8)}
parallel.use_cores(1 + devices)
late = len(jax.devices())
print(json.dumps({"results": results, "meshes": meshes, "late": late}))
"""

SMALL = {
    "tasks": ["quadratic"],
    "learner.name": "sgd",
    "unroll.length": 6,
    "unroll.truncation": 3,
    "estimator.pairs": 4,
    "replay.threshold": 0.3,
    "imitation.lr": 0.01,
    "outer.steps": 8,
}


def run(devices, asked, changes, steps, seed=0):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(devices), json.dumps(asked), str(seed), json.dumps(changes), str(steps)],
        capture_output=True,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def on_four():
    return run(4, [1, 2, 4], SMALL, 6)


def test_any_number_of_devices_gives_the_same_bytes(on_four):
    alone = run(1, [1], SMALL, 6)["results"]["1"]
    assert on_four["results"] == {"1": alone, "2": alone, "4": alone}  # φ, all other state, and metrics
    other_seed = run(1, [1], SMALL, 6, seed=1)["results"]["1"]
    assert all(ours != theirs for ours, theirs in zip(alone, other_seed, strict=True))  # the digests can tell


def test_blocks_are_spread_over_as_many_devices_as_divide_them(on_four):
    assert on_four["meshes"] == {"1": 1, "3": 3, "4": 4, "5": 1, "6": 3, "8": 4}


def test_asking_for_cores_after_jax_has_started_changes_nothing(on_four):
    assert on_four["late"] == 4


@pytest.mark.slow
def test_blocks_of_several_slots_give_the_same_bytes():
    results = run(4, [1, 2], SMALL | {"estimator.slots_per_block": 2}, 6)["results"]
    assert results["1"] == results["2"]


@pytest.mark.slow
def test_a_real_task_gives_the_same_bytes_on_1_2_and_4_devices():
    changes = SMALL | {"tasks": ["fashion-mlp"], "learner.name": "small_fc", "unroll.truncation": 3}
    alone = run(1, [1], changes, 2)["results"]["1"]
    assert run(4, [2, 4], changes, 2)["results"] == {"2": alone, "4": alone}
