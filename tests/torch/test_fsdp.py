"""Parameters that are cut (FSDP2's DTensors) move as whole ones do, on 1, 2 and 4 processes that talk through gloo."""

import json
import math
import pathlib
import re
import subprocess
import sys

import pytest

from lolo.optimizers.factored import factored_axes
from lolo.torch import rounds

pytestmark = [pytest.mark.torch, pytest.mark.slow]

RUNS = pathlib.Path(__file__).parent / "fsdp_runs.py"
ARCHITECTURES, WORLDS = ("small_fc", "norm_fc"), (1, 2, 4)
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
each_world = pytest.mark.parametrize("size", WORLDS)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the runs have written, by file: "world-2-0" is of process 0 of 2."""
    folder = tmp_path_factory.mktemp("fsdp")
    done = subprocess.run([sys.executable, str(RUNS), str(folder)], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def apart(ours, theirs):
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


@each_architecture
@each_world
def test_a_step_of_tensors_of_any_shape_is_that_of_whole_ones(found, size, architecture):
    differences = found[f"world-{size}-0"][f"{architecture} tensors"]
    assert len(differences) > 50 and max(differences.values()) <= 1e-5


@each_architecture
def test_so_is_one_of_replicated_tensors_one_in_turns_and_one_on_a_grid_of_processes(found, architecture):
    kinds = [(2, "replicated"), (2, "in turns"), (4, "on a grid")]
    assert all(max(found[f"world-{n}-0"][f"{architecture} {kind}"].values()) <= 1e-5 for n, kind in kinds)


@each_architecture
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_plain_replicated_and_cut_tensors_may_stand_in_one_group(found, dtype, limit, architecture):
    assert found["world-2-0"][f"{architecture} mixed torch.{dtype}"] <= limit


@each_architecture
def test_neither_the_default_dtype_nor_that_of_gradients_changes_it(found, architecture):
    """One matrix: a process that owns none sends nothing back, and what it sends must not be of another dtype."""
    assert 0 <= found["world-2-0"][f"{architecture} default dtype"] <= 1e-5
    assert 0 <= found["world-2-0"][f"{architecture} gradient's dtype"] <= 1e-3  # bfloat16's last digit


@each_architecture
def test_nan_in_the_rows_of_one_process_shows_in_all(found, architecture):
    assert all(found[f"world-2-{rank}"][f"{architecture} NaN"] == [40, 40] for rank in range(2))


@each_architecture
def test_a_process_may_lie_outside_the_mesh_of_a_tensor(found, architecture):
    for rank, kept in enumerate((2, 1)):
        other, states = found[f"world-2-{rank}"][f"{architecture} smaller mesh"]
        assert other <= 1e-5 and states == kept


@each_architecture
def test_it_is_not_where_each_process_has_only_its_own_sums(found, architecture):
    updates = found["world-2-0"][f"{architecture} without sums"]
    assert updates["largest"] > 1e-2 and updates["second"] > 1e-2


@each_architecture
@each_world
def test_a_step_of_a_transformer_is_that_of_one_process(found, size, architecture):
    differences = found[f"world-{size}-0"][f"{architecture} transformer"]
    assert len(differences) == 29 and max(differences.values()) <= 1e-5


@each_architecture
@each_world
def test_a_transformer_trains_as_on_one_process(found, size, architecture):
    losses, alone = found[f"world-{size}-0"][f"{architecture} losses"], found["alone-0-0"][f"{architecture} losses"]
    assert len(losses) == 50 and losses[-1] < losses[0] / 10 and apart(losses, alone) <= 1e-3


def test_the_transformer_has_uneven_tied_and_empty_parts(found):
    rows = [found[f"world-4-{rank}"]["norm_fc rows"] for rank in range(4)]
    assert [own["embedding.weight"] for own in rows] == [6, 6, 6, 5] and "head.weight" not in rows[0]
    assert [own["blocks.0.few.weight"] for own in rows] == [1, 1, 1, 0]


# Collectives. The model of docs/use.md, written out for the transformer of the runs.

WIDTH, WORDS = 12, 23
MATRICES = 2 * [(36, 12), (12, 12), (30, 12), (12, 30), (3, 12), (12, 3)]
EMBEDDING = [(WORDS, WIDTH)]
VECTORS = 7 * 2 + 2  # of both blocks, and of the last norm


def first_round(shape, ties=None):
    """Numbers of the sums for the moments: the one that is a mean over axis 0; the mean of row moments of axis 0."""
    return shape[1] + (0 if factored_axes(shape, ties).largest == 0 else 3)


def test_collectives_and_their_bytes_are_those_of_the_model(found):
    # Of a matrix one of both moments is cut: 6 inputs. All numbers are float32.
    small_fc = [
        ["all_reduce", sum(first_round(shape) for shape in MATRICES + EMBEDDING)],
        ["all_reduce", (16 + 6) * len(MATRICES + EMBEDDING) + 22 * VECTORS],
    ]
    sums = sum(first_round(shape, (1, 0)) for shape in MATRICES)
    for size in (2, 4):
        ranks = [found[f"world-{size}-{rank}"] for rank in range(size)]
        assert all(own["small_fc counted"]["given"] == small_fc for own in ranks)
        given = [own["norm_fc counted"]["given"] for own in ranks]
        for own in given:
            assert [kind for kind, _ in own] == [*2 * ["all_reduce"], *2 * ["all_to_all"], "all_reduce"]
            assert [own[i][1] for i in (0, 1, 4)] == [sums, (18 + 1 + 6) * len(MATRICES), len(MATRICES)]
        for trip in (2, 3):  # every entry of a matrix is sent there and back once, some to the process itself
            assert sum(own[trip][1] for own in given) == sum(map(math.prod, MATRICES))
        assert all(
            own[f"{name} counted"]["seen by torch"] == n
            for own in ranks
            for name, n in (("small_fc", 2), ("norm_fc", 5))
        )
    assert not found["world-1-0"]["norm_fc counted"]["given"]


def test_matrices_are_shared_out_by_cost_and_gathered_in_turns():
    shapes = ((64, 64),) * 6 + ((8, 8),) * 4 + ((256, 64),)
    (turn,) = rounds.turns(shapes, 3, 1 << 20)
    assert sorted(i for own in turn for i in own) == list(range(len(shapes)))
    cost = [sum(min(shapes[i]) ** 2 * (2 * max(shapes[i]) + min(shapes[i])) for i in own) for own in turn]
    assert max(cost) <= 1.1 * sum(cost) / 3
    several = rounds.turns(shapes, 3, 64 * 64)
    assert sorted(i for turn in several for own in turn for i in own) == list(range(len(shapes)))
    assert all(len(own) <= 1 or sum(math.prod(shapes[i]) for i in own) <= 64 * 64 for turn in several for own in turn)
    assert len(several) > 1


# Checkpoints


@each_architecture
@each_world
def test_what_two_processes_saved_is_resumed_on_any_number(found, size, architecture):
    alone = found["alone-0-0"][f"{architecture} losses"][5:8]
    assert apart(found[f"world-{size}-0"][f"{architecture} resumed"], alone) <= 1e-5


@each_architecture
def test_state_is_cut_as_the_parameter_is(found, architecture):
    # [2, 8, 5, 3]: axis 0 is not factored, and lies beside an axis of 3 in K; it is a factor of its own here.
    assert found["world-2-0"][f"{architecture} state"] == {
        "momentum": ["S(1)", 3, 2, 3, 5, 8],
        "rms": ["S(0)", 2, 3, 5, 8],
        "row": ["S(1)", 3, 2, 3, 5, 1],
        "column": ["S(1)", 3, 2, 3, 1, 8],
    }


@each_architecture
def test_checkpoints_of_other_weights_are_refused(found, architecture):
    error = found["world-2-0"][f"{architecture} other weights"]
    assert "param group 0 was saved with the weights" in error and "LoLO(params, weights=...)" in error
    # What DCP says first: a setting that the saved architecture has not.
    missing = {"small_fc": "is_matrix", "norm_fc": "clock_limit"}[architecture]
    assert (
        f"Missing key in checkpoint state_dict: optimizer.param_groups.0.{missing}"
        in (found["world-2-0"][f"{architecture} other architecture"])
    )


# The table of docs/use.md


@each_architecture
@pytest.mark.parametrize("kind", ["offloaded", "exchanged", "accumulated"])
def test_training_is_the_same_with(found, kind, architecture):
    """CPUOffloadPolicy; what Accelerate does to an optimizer; DDP with gradient accumulation."""
    losses = found["world-2-0"][f"{architecture} {kind}"]
    assert apart(losses, found["alone-0-0"][f"{architecture} losses"][:6]) <= 1e-5


@each_architecture
@each_world
def test_clipped_gradients_train_as_on_one_process(found, size, architecture):
    clipped, alone = (found[name][f"{architecture} clipped"] for name in (f"world-{size}-0", "alone-0-0"))
    assert apart(clipped, alone) <= 1e-5
    if architecture == "small_fc":  # norm_fc hardly sees the size of a gradient
        assert apart(clipped, found["alone-0-0"][f"{architecture} losses"][:6]) > 1e-4


@each_architecture
def test_a_bfloat16_policy_trains_nearly_as_float32(found, architecture):
    losses = found["world-2-0"][f"{architecture} bfloat16"]
    assert 0 < apart(losses, found["alone-0-0"][f"{architecture} losses"][:6]) < 0.03


# What goes wrong


def test_other_placements_are_refused_by_name(found):
    errors = found["world-2-0"]["refusals"]
    assert "'head.weight'" in errors["columns"] and "without shard_placement_fn" in errors["columns"]
    assert "redistribute(placements=param.placements)" in errors["gradient"]


def test_a_state_that_is_divided_otherwise_is_refused_and_the_own_one_kept(found):
    refusals = found["world-2-0"]["refusals"]
    assert "set_optimizer_state_dict" in refusals["state"] and refusals["kept"]


def test_autograd_sees_that_a_parameter_moved(found):
    """As with torch's own optimizers: what was computed before a step has no gradient after it."""
    assert "modified by an inplace operation" in found["world-2-0"]["refusals"]["moved before backward"]


@pytest.mark.parametrize(("how", "words"), [("killed", "peer|Broken pipe"), ("stopped", "Timed out")])
def test_a_lost_process_ends_the_others_with_its_cause(found, how, words):
    error, seconds = found[how]["error"], found[how]["seconds"]
    assert "process 0 of 2" in error and "it ended, or is silent for longer" in error and re.search(words, error)
    assert seconds < 30  # the group's timeout is 8 s
