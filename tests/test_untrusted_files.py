"""Readers get anything at all, and nothing but DataError escapes."""

import gzip
import io
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_readers import batch, drain, idx_bytes, write_hdf5, write_parquet

from lolo.data import batch_pickle, fineweb, idx, imagenet, prepare, text
from lolo.data.errors import DataError

ROOT = Path(__file__).resolve().parent.parent


def npz_seed():
    stream = io.BytesIO()
    np.savez_compressed(stream, **batch(3, 1))
    return stream.getvalue()


def npy_seed():
    stream = io.BytesIO()
    np.save(stream, np.arange(40, dtype=np.uint16))
    return stream.getvalue()


def bin_seed():
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 40
    return header.tobytes() + np.arange(40, dtype="<u2").tobytes()


def drain_idx(path):
    list(idx.read_rows(path))


def drain_text(path):
    plan = text.plan_characters(path)
    drain(plan, path.parent)


def drain_imagenet(path):
    drain(imagenet.plan(path), path.parent)


def drain_fineweb(path):
    drain(fineweb.plan(path), path.parent)


READERS = {
    # name of the file: what reads it, whole and valid files
    "train_data_batch_1.npz": (drain_imagenet, [npz_seed()]),
    "train_data_batch_1": (
        batch_pickle.unpickle_batch,
        [pickle.dumps(batch(1, 1) | {"labels": [5]}, protocol) for protocol in range(6)],
    ),
    "fineweb_train_1.bin": (drain_fineweb, [bin_seed()]),
    "fineweb_train_1.npy": (drain_fineweb, [npy_seed()]),
    "a-idx1-ubyte": (drain_idx, [idx_bytes(np.arange(24, dtype=np.uint8).reshape(4, 3, 2))]),
    "a-idx1-ubyte.gz": (drain_idx, [gzip.compress(idx_bytes(np.arange(24, dtype=np.uint8).reshape(4, 3, 2)))]),
    "a.txt": (drain_text, ["Fünf Boxkämpfer\njagen.\n".encode() * 9]),
    "manifest.json": (
        lambda path: prepare.read_manifest(path.parent),
        [
            b'{"format_version": 1, "name": "a", "splits": {"train": {"count": 2, "arrays": {"tokens": '
            b'{"file": "a.npy", "shape": [2], "dtype": "<u2", "sha256": "00"}}}}}'
        ],
    ),
}
"""The readers that are our own; those of other libraries run in the sandbox."""


def mutated(content, random):
    """Bytes changed, numbers planted, pieces cut out, doubled or moved."""
    content = bytearray(content)
    for _ in range(random.randint(1, 4)):
        # Headers are at the beginning and, in zip files, at the end.
        start = random.choice([0, max(0, len(content) - 300), random.randrange(len(content) + 1)])
        place = min(len(content), start + random.randrange(300))
        kind = random.randrange(5)
        if kind == 0:
            content[place : place + 1] = bytes([random.randrange(256)])
        elif kind == 1:
            number = random.choice([0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1])
            width = random.choice([1, 2, 4, 8])
            order = random.choice(["little", "big"])
            content[place : place + width] = (number & ((1 << 8 * width) - 1)).to_bytes(width, order)
        elif kind == 2:
            del content[place : place + random.choice([1, 2, 16, 1 << 20])]
        elif kind == 3:
            content[place:place] = content[place : place + random.choice([1, 8, 64])]
        else:
            content[place:place] = random.randbytes(random.choice([1, 4, 32]))
        if not content:
            return b""
    return bytes(content)


def check_only_data_error_escapes(tmp_path, name, inputs):
    read, seeds = READERS[name]
    path = tmp_path / name
    for content in seeds:
        path.write_bytes(content)
        read(path)
    refused = 0
    for content in inputs(seeds):
        path.write_bytes(content)
        try:
            read(path)
        except DataError as error:
            assert name in str(error) and ";" in str(error)
            refused += 1
    return refused


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("examples", [100, pytest.param(2_500, marks=pytest.mark.slow)])
def test_mutations_of_valid_files_raise_nothing_but_the_documented_error(tmp_path, name, examples):
    random_numbers = random.Random(f"{name}-{examples}")
    refused = check_only_data_error_escapes(
        tmp_path, name, lambda seeds: (mutated(random_numbers.choice(seeds), random_numbers) for _ in range(examples))
    )
    assert refused > examples / 10  # the mutations do reach the checks


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("examples", [100, pytest.param(2_500, marks=pytest.mark.slow)])
def test_random_bytes_raise_nothing_but_the_documented_error(tmp_path, name, examples):
    read, seeds = READERS[name]
    path = tmp_path / name
    starts = st.sampled_from([b"", *[seed[:n] for seed in seeds for n in (4, 10, 64, len(seed) // 2)]])

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(starts, st.binary(max_size=400))
    def check(start, rest):
        path.write_bytes(start + rest)
        try:
            read(path)
        except DataError as error:
            assert name in str(error)

    check()


@pytest.mark.parametrize("form", ["hdf5", "parquet"])
@pytest.mark.parametrize("examples", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_mutated_hdf5_and_parquet_raise_nothing_but_the_documented_error(tmp_path, form, examples):
    path = tmp_path / f"train.{form}"
    if form == "hdf5":
        write_hdf5(path)
    else:
        write_parquet(tmp_path, "bytes")
        path.write_bytes((tmp_path / "train-00001-of-00002.parquet").read_bytes())
    seed = path.read_bytes()
    random_numbers = random.Random(examples)
    refused = 0
    for _ in range(examples):
        path.write_bytes(mutated(seed, random_numbers))
        try:
            drain_imagenet(path)
        except DataError:
            refused += 1
    assert refused
