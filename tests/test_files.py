"""Weights, checkpoints and logs: whole or absent, verified, refused by name."""

import hashlib
import json
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lolo.files import disk, jsonl, tensors
from lolo.files.disk import FileError
from lolo.optimizers import pretrained, small_fc_spec, weights_file
from lolo.training import checkpoints, run_folder

LEARNER = {
    "name": "small_fc",
    "hidden": 4,
    "step_mult": 1e-3,
    "exp_mult": 1e-3,
    "learn_decays": False,
    "weight_decay": 0.0,
    "clock_limit": None,
}


def meta_params(hidden=4):
    generator = np.random.default_rng(0)
    shapes = small_fc_spec.weight_shapes(hidden)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def weights_path(tmp_path):
    path = tmp_path / "w.safetensors"
    weights_file.write_weights(path, meta_params(), learner=LEARNER, recipe={"seed": 3}, card={"summary": "small"})
    return path


def test_a_lock_is_held_once_and_files_that_are_locked_are_created(tmp_path):
    for path in (tmp_path, tmp_path / "lock"):
        with disk.locked(path) as free, disk.locked(path) as another:
            assert free and not another
        with disk.locked(path) as free_again:
            assert free_again
    assert (tmp_path / "lock").is_file()


def test_without_locks_of_the_system_every_lock_is_granted_and_files_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "fcntl", None)  # as on Windows
    with disk.locked(tmp_path) as free, disk.locked(tmp_path) as another:
        assert free and another
    disk.write_json(tmp_path / "a.json", [1])
    assert disk.read_json(tmp_path / "a.json") == [1]


def test_a_file_is_hashed_in_pieces_with_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "HASH_CHUNK_BYTES", 4)
    (tmp_path / "a").write_bytes(b"0123456789")
    done = []
    assert disk.sha256_of(tmp_path / "a", done.append) == hashlib.sha256(b"0123456789").hexdigest()
    assert done == [4, 8, 10]


def test_weights_come_back_as_they_were(weights_path):
    read = weights_file.read_weights(weights_path)
    assert read.learner == LEARNER and read.recipe == {"seed": 3} and read.card == {"summary": "small"}
    for name, array in meta_params().items():
        np.testing.assert_array_equal(read.meta_params[name], array)


def test_strided_arrays_are_stored_right():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    read, _ = tensors.unpack(
        tensors.pack({"t": array.T, "s": array[:, ::2], "scalar": np.array(5.0, np.float32)}), "test"
    )
    assert read["scalar"].shape == () and read["scalar"] == 5
    np.testing.assert_array_equal(read["t"], array.T)
    np.testing.assert_array_equal(read["s"], array[:, ::2])


def test_a_flipped_byte_is_refused_wherever_it_is(weights_path):
    content = weights_path.read_bytes()
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        weights_path.write_bytes(damaged)
        with pytest.raises(FileError, match=r"w\.safetensors"):
            weights_file.read_weights(weights_path)


def test_weights_of_format_version_1_are_read(weights_path):
    arrays, metadata = tensors.unpack(weights_path.read_bytes(), "test")
    del metadata["about_sha256"]
    weights_path.write_bytes(tensors.pack(arrays, metadata | {"format_version": "1"}))
    assert weights_file.read_weights(weights_path).learner == LEARNER
    weights_path.write_bytes(tensors.pack(arrays, metadata))
    with pytest.raises(FileError, match="sha256 of learner"):
        weights_file.read_weights(weights_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 0.5, -1])
def test_a_truncated_file_is_refused(weights_path, keep):
    content = weights_path.read_bytes()
    weights_path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(FileError, match=r"w\.safetensors"):
        weights_file.read_weights(weights_path)


def rewritten(path, **metadata):
    arrays, old = tensors.unpack(path.read_bytes(), "test")
    new = old | metadata
    path.write_bytes(tensors.pack(arrays, new | {"about_sha256": weights_file.about_digest(new)}))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": "other"}, "not lolo weights"),
        ({"format_version": "9"}, "format_version '9'"),
        ({"sha256": "0" * 64}, "damaged"),
        ({"learner": "{"}, "not JSON"),
    ],
)
def test_foreign_and_future_weights_are_refused_by_name(weights_path, metadata, words):
    rewritten(weights_path, **metadata)
    with pytest.raises(FileError, match=words):
        weights_file.read_weights(weights_path)


@pytest.mark.parametrize(
    ("learner", "words"),
    [
        ({"name": "big_fc"}, "unknown learner.name 'big_fc'"),
        ({"hidden": 5}, "has tensors"),
        ({"hidden": 10**9}, "hidden=1000000000"),
        ({"hidden": True}, "'learner.hidden' can't be True"),
        ({"step_mult": "x"}, "'learner.step_mult' can't be 'x'"),
        ({"step_mult": float("nan")}, "step_mult=nan must be a positive number"),
        ({"step_decay": 0.0}, "step_decay=0.0 must be a positive number"),
        ({"step_decay": -3000}, "step_decay=-3000.0 must be a positive number"),
        ({"width": 3}, "unknown recipe field 'learner.width'"),
    ],
)
def test_weights_that_do_not_fit_their_architecture_are_refused_by_name(weights_path, learner, words):
    rewritten(weights_path, learner=json.dumps({**LEARNER, **learner}))
    weights_file.read_weights(weights_path)  # the file is whole
    with pytest.raises(FileError, match=rf"w\.safetensors: .*{words}"):
        pretrained.load(weights_path)


def test_weights_with_nan_are_refused(tmp_path):
    bad = meta_params()
    bad["w1"][0, 0] = np.nan
    weights_file.write_weights(tmp_path / "w.safetensors", bad, learner=LEARNER)
    with pytest.raises(FileError, match="'w1' has numbers that are not finite"):
        weights_file.read_weights(tmp_path / "w.safetensors")


def test_a_missing_name_lists_what_ships(tmp_path):
    with pytest.raises(FileError, match="no such weights file"):
        weights_file.read_weights("no-such-weights")


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {"a": 1},
        {"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}},
        {"__metadata__": {"a": 1}},
    ],
)
def test_descriptions_that_lie_are_refused(entries):
    with pytest.raises(FileError):
        tensors.unpack(header(entries) + b"\0" * 4, "test")


@hypothesis.given(st.binary(max_size=200))
@hypothesis.settings(max_examples=200, deadline=None)
def test_random_bytes_raise_nothing_but_the_documented_error(content):
    with pytest.raises(FileError):
        tensors.unpack(content, "fuzz")


# --- checkpoints ---------------------------------------------------------------------------------------------------


def arrays(step):
    return {"a": np.full((3, 2), step, np.float32), "empty": np.zeros((0, 2), np.float32)}


def test_checkpoints_keep_the_newest_and_come_back(tmp_path):
    for step in (10, 20, 30, 40):
        checkpoints.write_checkpoint(tmp_path, step, arrays(step), {"note": step}, keep=2)
    assert run_folder.checkpoints(tmp_path) == [30, 40]
    read, manifest = checkpoints.read_checkpoint(tmp_path, 40)
    np.testing.assert_array_equal(read["a"], arrays(40)["a"])
    assert read["empty"].shape == (0, 2) and manifest["note"] == 40


@pytest.mark.parametrize("damage", ["flip", "truncate", "no manifest", "bad manifest", "no state"])
def test_the_checkpoint_before_a_damaged_one_is_used_and_the_user_told(tmp_path, damage):
    for step in (1, 2):
        checkpoints.write_checkpoint(tmp_path, step, arrays(step), {})
    folder = run_folder.checkpoint_folder(tmp_path, 2)
    state, manifest = folder / "state.safetensors", folder / "manifest.json"
    content = state.read_bytes()
    if damage == "flip":
        state.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "truncate":
        state.write_bytes(content[:-3])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "bad manifest":
        manifest.write_text("{}")
    else:
        state.unlink()
    told = []
    newest = checkpoints.newest_checkpoint(tmp_path, told.append)
    assert newest is not None and newest[1]["outer_step"] == 1
    assert len(told) == 1 and "00000002" in told[0]


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    left = tmp_path / "checkpoints" / ".00000003.1.tmp"
    left.mkdir(parents=True)
    (left / "slots-00000000.safetensors").write_bytes(b"half")
    checkpoints.write_checkpoint(tmp_path, 4, arrays(4), {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000004"]


def test_no_whole_checkpoint_is_none(tmp_path):
    assert checkpoints.newest_checkpoint(tmp_path, print) is None


@pytest.mark.parametrize("when", ["fsync", "replace", "rename"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, when):
    checkpoints.write_checkpoint(tmp_path, 1, arrays(1), {})
    disk.write_json(tmp_path / "recipe.json", {"a": 1})

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, when, full)
    with pytest.raises(OSError, match="No space left"):
        disk.write_json(tmp_path / "recipe.json", {"a": 2})
        checkpoints.write_checkpoint(tmp_path, 2, arrays(2), {})
    monkeypatch.undo()
    assert run_folder.checkpoints(tmp_path) == [1]
    assert not list(tmp_path.rglob("*.tmp"))
    checkpoints.read_checkpoint(tmp_path, 1)


def test_a_half_written_last_line_of_a_log_is_skipped_and_one_in_the_middle_is_not(tmp_path):
    log = tmp_path / "log.jsonl"
    jsonl.append_json_line(log, {"step": 0, "x": float("nan")})
    log.write_text(log.read_text() + '{"step": 1, "lo')
    assert list(jsonl.read_json_lines(log, jsonl.fields(step=jsonl.whole_number))) == [{"step": 0, "x": "nan"}]
    log.write_text('{"step": 1, "lo\n{"step": 2}\n')
    with pytest.raises(FileError, match="line 1"):
        list(jsonl.read_json_lines(log, jsonl.fields(step=jsonl.whole_number)))


class Together:
    """`agree` of several processes that are threads here."""

    def __init__(self, count):
        self.barrier, self.said, self.answers = threading.Barrier(count), [None] * count, []

    def agree(self, index):
        def agree(mine, decide):
            self.said[index] = mine
            self.barrier.wait(20)
            if index == 0:
                try:
                    self.answers.append(decide(list(self.said)))
                except FileError as error:
                    self.answers.append(error)
            self.barrier.wait(20)
            if isinstance(self.answers[-1], Exception):
                raise self.answers[-1]
            return self.answers[-1]

        return agree


SPREAD = np.arange(12.0).reshape(6, 2)


def write_in_parts(run, step, cuts, differing=False):
    """A checkpoint whose 6 rows lie with several processes: from each cut to the next."""
    together = Together(len(cuts))

    def process(index):
        rows = cuts[index], [*cuts[1:], 6][index]
        arrays = {"phi": np.full(3, float(differing and index > 0))}
        own = {"slots": SPREAD[slice(*rows)]}
        return checkpoints.write_checkpoint(run, step, arrays, {}, own=own, rows=rows, agree=together.agree(index))

    with ThreadPoolExecutor(len(cuts)) as threads:
        return list(threads.map(process, range(len(cuts))))


@pytest.mark.parametrize("cuts", [[0], [0, 3], [0, 2, 4], [0, 1, 2, 3, 4, 5]])
def test_a_checkpoint_in_parts_is_read_whole_or_by_any_rows(tmp_path, cuts):
    assert set(write_in_parts(tmp_path, 5, cuts)) == {run_folder.checkpoint_folder(tmp_path, 5)}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000005"]
    for rows in (None, (0, 6), (0, 3), (3, 6), (2, 4), (5, 6)):
        arrays, _ = checkpoints.newest_checkpoint(tmp_path, pytest.fail, rows)
        np.testing.assert_array_equal(arrays["slots"], SPREAD[slice(*(rows or (0, 6)))])
        np.testing.assert_array_equal(arrays["phi"], np.zeros(3))


def test_a_checkpoint_that_lacks_a_part_is_not_whole(tmp_path):
    write_in_parts(tmp_path, 4, [0, 3])
    write_in_parts(tmp_path, 5, [0, 3])
    part = run_folder.checkpoint_folder(tmp_path, 5) / "slots-00000003.safetensors"
    content, told = part.read_bytes(), []
    for damaged in (content[:-1], content[:-1] + b"?", None):
        part.unlink() if damaged is None else part.write_bytes(damaged)
        assert checkpoints.newest_complete(tmp_path, told.append) == 4
    assert len(told) == 3 and all("slots-00000003" in words for words in told)


@pytest.mark.parametrize(
    "change",
    [
        {"slots-00000003.safetensors": None},
        {"slots-00000003.safetensors": {"rows": [2, 6]}},
        {"slots-00000003.safetensors": {"rows": [3, 5]}},
        {"slots-00000003.safetensors": {"rows": None}},
        {"../../../slots-00000003.safetensors": {"rows": [3, 6]}},
    ],
)
def test_a_manifest_whose_parts_do_not_fit_is_refused(tmp_path, change):
    write_in_parts(tmp_path, 5, [0, 3])
    path = run_folder.checkpoint_folder(tmp_path, 5) / "manifest.json"
    manifest = json.loads(path.read_text())
    entry = manifest["files"].pop("slots-00000003.safetensors")
    manifest["files"] |= {name: entry | more for name, more in change.items() if more is not None}
    path.write_text(json.dumps(manifest))
    if change == {"slots-00000003.safetensors": None}:  # what is there is whole, but for the rows that are asked for
        with pytest.raises(FileError, match="rows"):
            checkpoints.read_checkpoint(tmp_path, 5, (3, 6))
    else:
        with pytest.raises(FileError, match="checkpoints/00000005"):
            checkpoints.read_checkpoint(tmp_path, 5)


def test_processes_that_hold_different_numbers_write_nothing(tmp_path):
    with pytest.raises(FileError, match="process 1 holds other numbers than process 0"):
        write_in_parts(tmp_path, 5, [0, 3], differing=True)
    assert not any((tmp_path / "checkpoints").iterdir())
