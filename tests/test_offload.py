"""Replay buffers in the host's memory: the same bytes as on the device, before and after a stop."""

import jax
import numpy as np
import pytest
from helpers import SUCCESSOR, StopAfter, same, small

from lolo.files import disk
from lolo.files.disk import FileError
from lolo.files.settings import RecipeError
from lolo.method import replay
from lolo.training import checkpoints, loop, offload, recipes
from lolo.training.how import How
from lolo.training.run import prepare

CHANGES = {
    "unroll.length": 6,
    "estimator.pairs": 2,
    "replay.capacity": 2,
    "replay.threshold": 0.3,
    "outer.steps": 12,
    "validation.every": 0,
}


def digest(run):
    """φ, and everything of the last checkpoint."""
    arrays, _ = checkpoints.newest_checkpoint(run, print)
    return {name: x.tobytes() for name, x in arrays.items()}


@pytest.mark.parametrize(
    ("read", "push"),
    [
        ("oldest", "random"),
        pytest.param("newest", "random", marks=pytest.mark.slow),
        pytest.param("oldest", "struggle", marks=pytest.mark.slow),
    ],
)
def test_buffers_on_the_host_change_no_byte(tmp_path, read, push):
    recipe = small(recipes.LOLO, CHANGES | {"replay.read": read, "replay.push": push})
    loop.train(recipe, tmp_path / "device")
    loop.train(recipe, tmp_path / "host", How(offload=True))
    expected = digest(tmp_path / "device")
    sizes = [np.frombuffer(x, np.int32) for name, x in expected.items() if name.endswith(".replay.size")]
    assert sizes and all((size == 2).all() for size in sizes)  # full: the oldest were dropped
    assert digest(tmp_path / "host") == expected
    assert (
        disk.read_json(tmp_path / "host" / "run.json")["buffer_bytes_per_slot"]
        == (disk.read_json(tmp_path / "device" / "run.json")["buffer_bytes_per_slot"])
    )


def test_a_run_may_go_on_with_its_buffers_on_the_other_side(tmp_path):
    recipe = small(recipes.LOLO, CHANGES)
    loop.train(recipe, tmp_path / "whole")
    for first in (True, False):
        stop, out = StopAfter(7), tmp_path / f"offload-{first}"
        loop.train(recipe, out, How(offload=first, stop=stop, on_progress=stop.on_progress, log=lambda text: None))
        assert loop.resume(out, How(offload=not first, log=lambda text: None)).finished
        assert digest(out) == digest(tmp_path / "whole")


@pytest.mark.slow
def test_what_the_successor_chooses_gives_one_result_stopped_resumed_and_on_the_host(tmp_path):
    recipe = small(recipes.LOLO, SUCCESSOR)
    loop.train(recipe, tmp_path / "whole")
    expected = digest(tmp_path / "whole")
    scores = [np.frombuffer(x, np.float32) for name, x in expected.items() if name.endswith(".push_score")]
    assert len(scores) == 1 and scores[0].any()
    out, offloads = tmp_path / "stopped", [False, True, False]
    for at, offload_ in zip((1, 4, 8), offloads, strict=True):  # in the first unroll, at a start, and to the end
        stop = StopAfter(at)
        how = How(offload=offload_, stop=stop, on_progress=stop.on_progress, log=lambda text: None)
        loop.train(recipe, out, how) if at == 1 else loop.resume(out, how)
    assert digest(out) == expected
    random = small(recipes.LOLO, SUCCESSOR | {"replay.push": "random"})
    loop.train(random, tmp_path / "random")
    theirs = digest(tmp_path / "random")
    assert any(theirs[name] != x for name, x in expected.items() if ".replay." in name and name in theirs)


def test_a_checkpoint_without_scores_starts_them_at_zero(tmp_path):
    recipe = small(recipes.LOLO, CHANGES | {"replay.push": "struggle"})
    loop.train(recipe, tmp_path / "run", How(log=lambda text: None))
    arrays, _ = checkpoints.newest_checkpoint(tmp_path / "run", print)
    shapes = jax.eval_shape(prepare(recipe).complete_state)
    whole = checkpoints.state_from_arrays(arrays, shapes, "here")
    assert any(leaf.any() for leaf in jax.tree.leaves(whole.slots[0].local.push))
    older = {name: x for name, x in arrays.items() if ".push_" not in name}
    assert len(older) == len(arrays) - len(replay.Struggle._fields)
    read = checkpoints.state_from_arrays(older, shapes, "here")
    assert not any(leaf.any() for leaf in jax.tree.leaves(read.slots[0].local.push))
    assert same(whole.slots[0].local.replay, read.slots[0].local.replay)
    with pytest.raises(FileError, match="replay.size"):
        checkpoints.state_from_arrays({n: x for n, x in older.items() if "replay.size" not in n}, shapes, "here")


def test_the_device_holds_one_state_for_each_slot():
    run = prepare(small(recipes.LOLO, CHANGES), How(offload=True))
    ours, whole = run.state.slots[0].local.replay.states, run.complete_state().slots[0].local.replay.states
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(whole), strict=True):
        assert a.shape == (2, 1, *b.shape[2:]) and b.shape[1] == 2 and isinstance(b, np.ndarray)


@pytest.mark.parametrize(
    "change,words",
    [({"replay.read": "uniform"}, "replay.read"), ({"unroll.truncations_per_update": 2}, "truncations_per_update=1")],
)
def test_rules_that_read_within_a_step_are_refused(change, words):
    recipe = small(recipes.LOLO, CHANGES | change)
    with pytest.raises(RecipeError, match=words):
        offload.check(recipe)
    with pytest.raises(RecipeError, match="--offload needs"):
        loop.train(recipe, None, How(offload=True))
