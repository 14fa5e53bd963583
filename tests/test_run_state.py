"""Long runs that are stopped or killed: they go on from the last state kept, with the same numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_task, same

from lolo.data.stream import Stream
from lolo.evaluation import long_runs, rivals
from lolo.evaluation.run_state import RunState
from lolo.files.disk import FileError
from lolo.runtime.interrupt import Interrupted
from lolo.studies import candidates, comparisons
from lolo.tasks.small import quadratic

STEPS = 450  # the last segment is shorter than the others


def noisy(setting):
    """Its state has a key in it, a bfloat16 and an integer."""
    return optax.chain(
        optax.trace(0.9, accumulator_dtype=jnp.bfloat16),
        optax.add_noise(setting["lr"], 0.5, jax.random.key(3)),
        optax.scale(-0.05),
    )


def streamed():
    values = np.random.default_rng(0).normal(size=700).astype(np.float32)

    def loss(params, stats, batch):
        return jnp.mean((params["x"] - batch) ** 2), stats

    task = make_task(lambda key: ({"x": jax.random.normal(key)}, {}), loss)
    examples = {"examples": lambda data, i: data[0][i], "size": 700, "batch": 4}
    task = dataclasses.replace(task, data=(), stream=Stream((values,)), **examples)
    return task, dataclasses.replace(task, stream=None, data=(jnp.ones(5),), size=5)


def resident():
    splits = quadratic()
    return splits.train, splits.test


SETTINGS = [{"lr": lr, "weight_decay": 0.0, "steps": float(STEPS), "warmup": 20.0} for lr in (0.01, 0.02, 0.03)]


def run(tasks, make, keep=None, settings=SETTINGS, seeds=(1, 2, 1), steps=STEPS, stop_after=math.inf, stop=Interrupted):
    """The curves, and the steps that were reported."""
    reported = []

    def on_steps(count):
        reported.append(count)
        if sum(reported) >= stop_after:
            raise stop

    return long_runs.run(*tasks, make, settings, seeds, steps, on_steps, keep=keep), reported


@pytest.mark.parametrize("make", [rivals.maker("adamw-warmup-cosine"), noisy], ids=["adamw", "noisy"])
@pytest.mark.parametrize(
    "tasks, stop_after, first",
    [
        (resident, 300, 300),
        (resident, 1350, 1350),
        # A stream's seeds run one after the other: first the two runs of one, then the one of the other.
        (streamed, 400, 400),
        (streamed, 900, 900),
        (streamed, 1200, 900),
        (streamed, 1350, 900),
    ],
)
def test_a_run_goes_on_where_it_was_stopped(tmp_path, tasks, make, stop_after, first):
    tasks = tasks()
    whole, reported = run(tasks, make)
    keep = RunState(tmp_path / "a.safetensors")
    with pytest.raises(Interrupted):
        run(tasks, make, keep, stop_after=stop_after)
    resumed, again = run(tasks, make, keep)
    assert same(resumed, whole)
    assert sum(again) == sum(reported) == 3 * STEPS
    assert again[0] == first  # what was there is reported at once
    keep.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_goes_on_from_the_last_write(tmp_path):
    tasks, keep = resident(), RunState(tmp_path / "a.safetensors", every_s=0.0)
    with pytest.raises(MemoryError):
        run(tasks, noisy, keep, stop_after=900, stop=MemoryError)
    resumed, reported = run(tasks, noisy, keep)
    assert same(resumed, run(tasks, noisy)[0]) and reported[0] == 900


def test_a_short_run_leaves_no_file(tmp_path):
    run(resident(), noisy, RunState(tmp_path / "a.safetensors"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        {"seeds": (1, 2, 3)},
        {"steps": STEPS + 1},
        {"settings": [{**setting, "lr": 0.5} for setting in SETTINGS]},
        {"settings": SETTINGS[:2], "seeds": (1, 2)},
    ],
    ids=["seeds", "steps", "settings", "fewer"],
)
def test_the_state_of_another_run_is_not_used(tmp_path, other):
    tasks, keep = resident(), RunState(tmp_path / "a.safetensors")
    with pytest.raises(Interrupted):
        run(tasks, noisy, keep, stop_after=900)
    assert same(run(tasks, noisy, keep, **other)[0], run(tasks, noisy, **other)[0])


@pytest.mark.parametrize("damage", [lambda content: content[:-40], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_state_is_refused(tmp_path, damage):
    tasks, keep = resident(), RunState(tmp_path / "a.safetensors")
    with pytest.raises(Interrupted):
        run(tasks, noisy, keep, stop_after=900)
    keep.path.write_bytes(damage(keep.path.read_bytes()))
    with pytest.raises(FileError, match="Remove it"):
        run(tasks, noisy, keep)


def test_states_that_do_not_fit_the_optimizer_are_refused(tmp_path):
    tasks, keep = resident(), RunState(tmp_path / "a.safetensors")
    with pytest.raises(Interrupted):
        run(tasks, noisy, keep, stop_after=900)
    with pytest.raises(FileError, match="Remove it"):
        run(tasks, rivals.maker("adamw-warmup-cosine"), keep)


# The grid's runs are 10 × 300 steps; those of the optimizer it picks 2 × 300, the ones before it 2 × 300.
@pytest.mark.parametrize("stop_after", [200, 600, 1600, 3600, 4000])
def test_a_comparison_goes_on_within_the_optimizer_that_it_was_stopped_in(tmp_path, stop_after):
    names = candidates.read(["adamw-warmup-cosine:1e-3", "sgdm:grid"])

    def evaluate(parts, at=math.inf):
        told = []

        def on_progress(what, done, total, status):
            told.append(done)
            if done >= at:
                raise Interrupted

        return comparisons.evaluate(names, "quadratic", 300, 2, on_progress, parts)[0], told

    whole, _ = evaluate(None)
    parts = tmp_path / "parts"
    with pytest.raises(Interrupted):
        evaluate(parts, at=stop_after)
    assert len(list(parts.rglob("*.safetensors"))) == 1 + (stop_after > 3600)  # the grid's own, and its choice's
    rows, told = evaluate(parts)
    assert rows == whole and told[-1] == 4200
    assert told[0] >= min(stop_after, 600)
    assert not list(parts.rglob("*.safetensors"))
