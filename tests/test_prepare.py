"""Preparation survives kills, verifies what it wrote, trusts no manifest and leaves other files alone."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from test_readers import rng, write_bin

from lolo.data import npy, prepare
from lolo.data import tokens as gpt2
from lolo.data.errors import DataError
from lolo.data.read_plan import ReadPart, ReadPlan

ROOT = Path(__file__).resolve().parent.parent


def three_parts(tmp_path):
    """Writes a source of three shards and returns what `prepare` makes of it when nobody disturbs it."""
    source = tmp_path / "source"
    source.mkdir()
    for k in range(3):
        write_bin(source / f"fineweb_train_{k:06d}.bin", rng(k).integers(0, 50_257, 500 + k))
    write_bin(source / "fineweb_val_000000.bin", np.arange(40))
    prepare.prepare("fineweb", source, tmp_path / "undisturbed")
    return source, files_of(tmp_path / "undisturbed")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {root!r})
    from pathlib import Path
    from lolo.data import fineweb, prepare
    fineweb.CHUNK_TOKENS = 100
    calls = 0
    def counted(function):
        def call(*arguments, **settings):
            global calls
            calls += 1
            if calls == {n}:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **settings)
        return call
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    prepare.np.ascontiguousarray = counted(prepare.np.ascontiguousarray)  # once for each piece of rows
    prepare.prepare("fineweb", Path({source!r}), Path({target!r}))
"""


@pytest.mark.parametrize("step", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_preparation_continues_and_ends_with_the_same_bytes(tmp_path, step):
    source, undisturbed = three_parts(tmp_path)
    # Quick: one kill while part 2 is being written. Slow: one at every write, sync and rename, until none happens.
    for n in [17] if step else range(1, 200):
        target = tmp_path / f"killed-{n}"
        code = KILLED.format(root=str(ROOT), n=n, source=str(source), target=str(target))
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
        if done.returncode == 0:
            assert n > 40
            break
        assert done.returncode == -signal.SIGKILL
        lines = []
        prepare.prepare("fineweb", source, target, lambda done, total, line, lines=lines: lines.append(line))
        assert files_of(target) == undisturbed, n
        if step:
            assert not any("000000.bin" in line and "train" in line for line in lines)  # part 1 was kept
            assert any("train_000001.bin (2 of 4)" in line for line in lines)


def test_an_error_in_a_part_keeps_the_parts_before_it(tmp_path):
    source, undisturbed = three_parts(tmp_path)
    good = (source / "fineweb_train_000002.bin").read_bytes()
    (source / "fineweb_train_000002.bin").write_bytes(good[:-2] + b"\xff\xff")
    with pytest.raises(DataError, match="token 65535"):
        prepare.prepare("fineweb", source, tmp_path / "out")
    (listed,) = [entry for entry in prepare.list_prepared(tmp_path) if entry.folder.name == "out"]
    assert "unfinished; run the same" in listed.problem
    (source / "fineweb_train_000002.bin").write_bytes(good)
    lines = []
    prepare.prepare("fineweb", source, tmp_path / "out", lambda done, total, line: lines.append(line))
    assert files_of(tmp_path / "out") == undisturbed and "train_000002.bin (3 of 4)" in lines[1]


def test_an_unfinished_preparation_refuses_another_source(tmp_path):
    source, _ = three_parts(tmp_path)
    write_bin(source / "fineweb_train_000002.bin", [60_000])
    with pytest.raises(DataError, match="token 60000"):
        prepare.prepare("fineweb", source, tmp_path / "out")
    write_bin(source / "fineweb_train_000002.bin", [1, 2])
    with pytest.raises(DataError, match="unfinished `prepare` of another source"):
        prepare.prepare("fineweb", source, tmp_path / "out")


def test_progress_goes_from_nothing_to_all(tmp_path):
    source, _ = three_parts(tmp_path)
    calls = []
    prepare.prepare("fineweb", source, tmp_path / "out", lambda *call: calls.append(call))
    assert all(0 <= done <= total for done, total, _ in calls)
    assert calls[-1] == (3086, 3086, "done")
    assert [line for _, _, line in calls if " of 4" in line][-1] == "fineweb_val_000000.bin (4 of 4)"


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="holds other files .mine.txt"):
        prepare.prepare("books", None, tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "x"


def test_a_folder_with_another_data_set_is_left_alone(tmp_path):
    source, _ = three_parts(tmp_path)
    with pytest.raises(DataError, match="holds 'fineweb' already"):
        prepare.prepare("books", None, tmp_path / "undisturbed")
    with pytest.raises(DataError, match="is a file"):
        prepare.prepare("books", None, source / "fineweb_val_000000.bin")


def test_two_preparations_do_not_write_into_one_folder(tmp_path):
    source, _ = three_parts(tmp_path)
    with prepare._locked(tmp_path / "undisturbed"):
        with pytest.raises(DataError, match="another `prepare` is at work"):
            prepare.prepare("fineweb", source, tmp_path / "undisturbed")


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(DataError, match="did you mean 'imagenet32'"):
        prepare.prepare("imagenet", tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match="Known: imagenet32, fineweb"):
        prepare.prepare("xyz", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", sorted(set(prepare.PLANS) - {"books", "textures"}))
def test_a_missing_source_is_named(tmp_path, name):
    with pytest.raises(DataError, match=f"{name}|IDX files"):
        prepare.prepare(name, None, tmp_path / "out")
    with pytest.raises(DataError, match="there is no such file or folder"):
        prepare.prepare(name, tmp_path / "nowhere", tmp_path / "out")


def test_a_changed_byte_is_found_by_verify_and_only_there(tmp_path):
    three_parts(tmp_path)
    target = tmp_path / "undisturbed"
    content = bytearray((target / "train_tokens.npy").read_bytes())
    content[-1] ^= 1
    (target / "train_tokens.npy").write_bytes(content)
    prepare.open_prepared(target)
    with pytest.raises(DataError, match="train_tokens.npy: sha256 .*, the manifest says .*; prepare the data again"):
        prepare.verify(target)


@pytest.mark.parametrize("damage", ["missing", "short", "long", "type"])
def test_arrays_that_are_not_the_manifests_are_not_opened(tmp_path, damage):
    three_parts(tmp_path)
    target = tmp_path / "undisturbed"
    path = target / "test_tokens.npy"
    if damage == "missing":
        path.unlink()
    elif damage == "type":
        np.save(path, np.zeros(40, np.uint8))
    else:
        os.truncate(path, path.stat().st_size + (2 if damage == "long" else -2))
    for function in (prepare.open_prepared, prepare.verify):
        with pytest.raises(DataError, match="test_tokens.npy: (can't be read|uint8|2?0?\\d+ bytes)"):
            function(target)
    assert "test_tokens.npy" in prepare.list_prepared(target)[0].problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=99), "format_version 99, expected 1"),
        (lambda m: m.pop("splits"), "fields are missing"),
        (
            lambda m: m["splits"]["test"]["arrays"]["tokens"].update(file="../../secret.npy"),
            "fields are missing or wrong",
        ),
        (lambda m: m["splits"]["test"]["arrays"]["tokens"].update(dtype="O"), "fields are missing or wrong"),
        (lambda m: m["splits"]["test"]["arrays"]["tokens"].update(shape=[1 << 60]), "fields are missing or wrong"),
        (lambda m: m["splits"]["test"]["arrays"]["tokens"].update(shape=[]), "fields are missing or wrong"),
        (lambda m: m["splits"]["test"].update(arrays=3), "fields are missing or wrong"),
    ],
)
def test_manifests_are_not_trusted(tmp_path, change, message):
    three_parts(tmp_path)
    path = tmp_path / "undisturbed" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        prepare.open_prepared(path.parent)


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000, "\udcff"])
def test_manifests_that_are_no_json_objects_are_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="manifest.json"):
        prepare.open_prepared(tmp_path)


def test_list_says_what_is_there(tmp_path):
    three_parts(tmp_path)
    (listed,) = prepare.list_prepared(tmp_path)
    assert listed.name == "fineweb" and listed.problem == "" and listed.folder == tmp_path / "undisturbed"
    assert listed.counts == {"train": 1428, "validation": 75, "test": 40}
    assert listed.data_bytes == sum(len(c) for name, c in files_of(listed.folder).items() if name.endswith(".npy"))
    with pytest.raises(DataError, match="no such folder"):
        prepare.list_prepared(tmp_path / "nowhere")


def test_parts_that_do_not_fit_together_are_refused(tmp_path, monkeypatch):
    def rows(values):
        return lambda scratch: iter([("train", {"images": values})])

    parts = [ReadPart("a", 1, rows(np.zeros((2, 3), np.uint8))), ReadPart("b", 1, rows(np.zeros((2, 4), np.uint8)))]
    monkeypatch.setitem(prepare.PLANS, "books", lambda source: ReadPlan(parts, {}))
    with pytest.raises(DataError, match="b: images of type uint8 and shape"):
        prepare.prepare("books", None, tmp_path)


def test_prepared_arrays_can_not_be_written_to(tmp_path):
    three_parts(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        prepare.open_prepared(tmp_path / "undisturbed")["train"]["tokens"][0] = 1


@pytest.mark.parametrize("shape", [(1,), (1_281_167, 32, 32, 3), (10**10,), (60_000, 28, 28)])
def test_npy_headers_have_one_length_and_are_numpys(shape):
    header = npy.format_header(shape, np.uint8)
    assert len(header) == npy.HEADER_BYTES
    stream = io.BytesIO(header)
    assert np.lib.format.read_magic(stream) == (1, 0)
    assert np.lib.format.read_array_header_1_0(stream) == (shape, False, np.dtype(np.uint8))
    assert npy.read_header(io.BytesIO(header), "x") == (shape, np.dtype(np.uint8), npy.HEADER_BYTES)


@pytest.mark.parametrize("module", ["pyarrow", "h5py", "PIL", "tiktoken"])
def test_a_missing_library_says_what_to_install(tmp_path, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    from lolo.data import encoded, rgb32

    call = {
        "pyarrow": lambda: encoded.parquet_groups("x", ""),
        "h5py": lambda: encoded.hdf5_sizes("x", ""),
        "PIL": lambda: rgb32.open_image(b"", "x"),
        "tiktoken": gpt2.encoding.__wrapped__,
    }[module]
    with pytest.raises(DataError, match=r"needs the Python package .*; run: pip install 'lolo\[data\]'"):
        call()


def test_reading_imports_no_optional_library():
    code = (
        "import sys, lolo.data.prepare; print(sorted({'h5py', 'pyarrow', 'PIL', 'tiktoken', 'jax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
