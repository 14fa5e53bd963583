"""Each official format, written here as it is published, reads back exactly; anything else is DataError."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import time
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lolo.data import batch_pickle, embedded, fineweb, idx, imagenet, npy, prepare, sandbox, textures
from lolo.data import tokens as gpt2
from lolo.data.errors import DataError
from lolo.data.read_plan import grouped
from lolo.data.text import alphabet, read_text

ROOT = Path(__file__).resolve().parent.parent


def rng(seed=0):
    return np.random.default_rng(seed)


def prepared(name, source, target):
    """Prepares, verifies and opens."""
    manifest = prepare.prepare(name, source, target)
    assert prepare.verify(target) == manifest == prepare.prepare(name, source, target)
    return prepare.open_prepared(target), manifest


def drain(plan, scratch):
    """Reads all rows of all parts; what a `prepare` would write, without writing."""
    return [(split, rows) for part in plan.parts for split, rows in part.rows(scratch)]


# ImageNet-32: archives and pickles


def batch(n, seed, mean=True):
    """`data` in planes, labels from 1, and a mean in 0..255 in training files only."""
    data = rng(seed).integers(0, 256, (n, 3072), np.uint8)
    labels = rng(seed + 1).integers(1, 1001, n)
    labels[: min(n, 2)] = (1, 1000)[: min(n, 2)]
    return {"data": data, "labels": labels} | ({"mean": data.astype(np.float64).mean(0)} if mean else {})


BATCHES = {
    "train_data_batch_1": (21, 1),
    "train_data_batch_2": (4, 2),
    "train_data_batch_10": (3, 3),
    "val_data": (5, 4),
}


def contents():
    return {name: batch(n, seed, mean=name != "val_data") for name, (n, seed) in BATCHES.items()}


def write_npz(folder):
    for name, arrays in contents().items():
        np.savez_compressed(folder / f"{name}.npz", **arrays)


def write_pickles(folder, protocol=2):
    for name, arrays in contents().items():
        with (folder / name).open("wb") as stream:
            pickle.dump(arrays | {"labels": arrays["labels"].tolist()}, stream, protocol)


def check_imagenet(opened):
    """Batches in numerical order; of each every 20th example, from its first, is validation."""
    train = ["train_data_batch_1", "train_data_batch_2", "train_data_batch_10"]
    for split, names in {"train": train, "validation": train, "test": ["val_data"]}.items():
        images, labels = [], []
        for name in names:
            arrays = contents()[name]
            held_out = np.arange(len(arrays["data"])) % 20 == 0
            mask = {"train": ~held_out, "validation": held_out, "test": held_out | True}[split]
            planes = arrays["data"][mask]
            red, green, blue = planes[:, :1024], planes[:, 1024:2048], planes[:, 2048:]
            images.append(np.stack([red, green, blue], axis=-1).reshape(-1, 32, 32, 3))
            labels.append(arrays["labels"][mask] - 1)
        np.testing.assert_array_equal(opened[split]["images"], np.concatenate(images))
        np.testing.assert_array_equal(opened[split]["labels"], np.concatenate(labels))
        assert isinstance(opened[split]["images"], np.memmap) and opened[split]["images"].dtype == np.uint8
        assert opened[split]["labels"].dtype == np.uint16


def test_imagenet_archives_read_back_exactly(tmp_path):
    write_npz(tmp_path)
    opened, manifest = prepared("imagenet32", tmp_path, tmp_path / "out")
    check_imagenet(opened)
    assert manifest["format"] == "npz" and manifest["classes"] == 1000 and "map_clsloc" in manifest["label_order"]
    notes = " ".join(manifest["notes"])
    assert "train_data_batch_3" in notes and "has 21 examples, the published file 128,116" in notes
    assert manifest["splits"]["validation"]["count"] == 4


@pytest.mark.parametrize("protocol", range(6))
def test_imagenet_pickles_read_back_exactly(tmp_path, protocol):
    write_pickles(tmp_path, protocol)
    opened, manifest = prepared("imagenet32", tmp_path, tmp_path / "out")
    check_imagenet(opened)
    assert manifest["format"] == "pickle"


def test_a_python_2_pickle_reads_back_exactly(tmp_path):
    # Python 2 writes bytes as strings, and NumPy's module under its old name.
    data, header = bytes(range(256)) * 12, b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    state = b"(I1\n(I1\nI3072\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
    array = header + state + b"T" + struct.pack("<i", len(data)) + data + b"tb"
    (tmp_path / "train_data_batch_1").write_bytes(b"(S'data'\n" + array + b"S'labels'\n(I7\nld.")
    images, labels = batch_pickle.unpickle_batch(tmp_path / "train_data_batch_1")
    assert images.tobytes() == data and images.shape == (1, 3072) and labels.tolist() == [7]


def test_archives_are_preferred_to_pickles(tmp_path):
    write_npz(tmp_path)
    write_pickles(tmp_path)
    assert imagenet.plan(tmp_path).info["format"] == "npz"


def test_a_whole_imagenet_has_the_published_counts():
    assert imagenet.OFFICIAL_TRAIN == 1_281_167 == sum(n for k, n in imagenet.OFFICIAL_BATCHES.items() if k)


def break_npz(path, **changes):
    arrays = batch(4, 1) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([1, 2, 0, 4])}, "row 2: label 0, expected 1..1000"),
        ({"labels": np.array([1, 2, 3, 1001])}, "row 3: label 1001, expected 1..1000"),
        ({"labels": np.ones(3, int)}, r"labels is int64 \(3,\), expected whole numbers \[4\]"),
        ({"labels": np.ones(4)}, "labels is float64"),
        ({"labels": np.ones(4, bool)}, "labels is bool"),
        ({"labels": np.array(["1"] * 4)}, "numbers in C order"),
        ({"labels": None}, r"expected data.npy, labels.npy"),
        ({"extra": np.ones(1)}, r"expected data.npy, labels.npy"),
        ({"data": np.zeros((4, 3071), np.uint8)}, r"expected uint8 \[N, 3072\]"),
        ({"data": np.zeros((4, 3072), np.int8)}, r"data is int8"),
        ({"data": np.asfortranarray(batch(4, 1)["data"])}, "numbers in C order"),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": np.ones(0, int)}, "N in 1"),
        ({"mean": np.full(3072, 256.0)}, "mean has values outside 0..255"),
        ({"mean": np.full(3072, np.nan)}, "mean has values outside 0..255"),
        ({"mean": np.ones(3)}, "mean is float64"),
    ],
)
def test_wrong_archives_are_refused(tmp_path, changes, message):
    break_npz(tmp_path / "train_data_batch_1.npz", **changes)
    with pytest.raises(DataError, match=message):
        drain(imagenet.plan(tmp_path), tmp_path)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_an_archive_with_objects_does_not_unpickle_them(tmp_path):
    evil = np.empty(4, object)
    evil[:] = Malicious(tmp_path / "ran")
    break_npz(tmp_path / "train_data_batch_1.npz", labels=evil)
    with pytest.raises(DataError, match="numbers in C order"):
        imagenet.plan(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_archives_are_refused(tmp_path, keep):
    path = tmp_path / "train_data_batch_1.npz"
    break_npz(path)
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(DataError, match=r"train_data_batch_1.npz: can't be read as an npz archive"):
        imagenet.plan(tmp_path)


def test_a_flipped_bit_in_an_archive_is_found_by_its_checksum(tmp_path):
    path = tmp_path / "train_data_batch_1.npz"
    break_npz(path)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC"):
        drain(imagenet.plan(tmp_path), tmp_path)


def test_an_archive_that_unpacks_to_more_than_it_says_is_refused(tmp_path):
    # 1 GB of zeros in 1 MB, under a header that promises four images.
    path = tmp_path / "train_data_batch_1.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("data.npy", "w", force_zip64=True) as stream:
            stream.write(npy.format_header((4, 3072), np.uint8))
            for _ in range(64):
                stream.write(bytes(1 << 20))
        archive.writestr("labels.npy", npy.format_header((4,), np.uint8) + b"\1\2\3\4")
    with pytest.raises(DataError, match=r"data.npy has 67,108,992 bytes, its header promises \(4, 3072\)"):
        imagenet.plan(tmp_path)


def test_val_data_alone_is_refused(tmp_path):
    np.savez(tmp_path / "val_data.npz", **batch(3, 1, mean=False))
    with pytest.raises(DataError, match="without any train_data_batch"):
        imagenet.plan(tmp_path)


def write_pickle(tmp_path, content, protocol=4):
    path = tmp_path / "train_data_batch_1"
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


class Holder:
    pass


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_calls_anything_does_not_run(tmp_path, protocol):
    evil = batch(2, 1) | {"labels": [1, 2], "mean": Malicious(tmp_path / "ran")}
    write_pickle(tmp_path, evil, protocol)
    with pytest.raises(
        DataError, match=r"calls (builtins|__builtin__)\.getattr|calls pathlib.*, expected NumPy arrays"
    ):
        drain(imagenet.plan(tmp_path), tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, expected a dict"),
        ({"labels": [1]}, "`data` is not a uint8 array"),
        ({"data": np.zeros((1, 3072), np.uint8)}, "`labels` is neither"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [0]}, "label 0, expected 1..1000"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": [1, 2]}, r"\(2,\) labels for 1 images"),
        ({"data": np.zeros((1, 3072), np.uint8), "labels": ["1"]}, "`labels` is neither"),
        ({"data": np.zeros((1, 3072), np.float32), "labels": [1]}, "`data` is not a uint8 array"),
        ({"data": np.zeros((3072, 2), np.uint8).T, "labels": [1, 1]}, "numbers in C order"),
        ({"data": np.array([[None]]), "labels": [1]}, "plain numbers"),
        (Holder, "calls .*Holder|opcode"),
        (b"\x80\x04]r\xff\xff\xff\x7f.", "memo index 2147483647 after 3 opcodes"),
        (b"\x80\x02\x82\x01.", "the opcode EXT1"),
        (b"cos\nsystem\n(S'true'\ntR.", "calls os.system"),
        (b"", "can't be read as a batch pickle"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".", "can't be read as a batch pickle"),
        (b"\x80\x04.", "can't be read as a batch pickle"),
    ],
)
def test_wrong_pickles_are_refused(tmp_path, content, message):
    path = write_pickle(tmp_path, content)
    with pytest.raises(DataError, match=message):
        batch_pickle.unpickle_batch(path)


def test_a_pickle_that_would_work_for_ever_is_stopped(tmp_path, monkeypatch):
    # A dict whose key is a tuple of a tuple ... 60 deep, each twice: 2^60 steps to hash it.
    content = b"\x80\x02}U\x01a\x85" + b"2\x86" * 60 + b"K\x01s."
    write_pickle(tmp_path, content)
    monkeypatch.setattr(sandbox, "SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(DataError, match="its reader died .signal 24|more than 3 s"):
        drain(imagenet.plan(tmp_path), tmp_path)
    assert time.monotonic() - start < 30


# ImageNet-32: HDF5 and parquet


def encode(pixels, form="JPEG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, quality=95)
    return stream.getvalue()


def grey(level, side=32):
    """JPEG keeps a picture of one grey exactly."""
    return np.full((side, side, 3), level, np.uint8)


def write_hdf5(path, *, train=21, validation=3, test=2, labels=None, images=None, split=True):
    total = train + validation + test
    images = images or [encode(grey(10 * i, 32 if i % 2 else 64)) for i in range(total)]
    labels = np.arange(train + validation) * 40 if labels is None else labels
    with h5py.File(path, "w") as file:
        encoded = file.create_dataset("encoded_images", (total,), h5py.vlen_dtype(np.uint8))
        for i, content in enumerate(images):
            encoded[i] = np.frombuffer(content, np.uint8)
        file.create_dataset("targets", data=np.asarray(labels, np.int16)[:, None])
        if split:
            # Fuel's H5PYDataset.create_split_array
            fields = [("split", "S5"), ("source", "S15"), ("start", "i8"), ("stop", "i8")]
            ends = {"train": (0, train), "valid": (train, train + validation), "test": (train + validation, total)}
            rows = [(name, source, *ends[name]) for name in ends for source in ("encoded_images", "targets")]
            file.attrs["split"] = np.array([tuple(row) for row in rows], fields)


def test_imagenet_hdf5_reads_back_exactly(tmp_path):
    write_hdf5(tmp_path / "ilsvrc2012.hdf5")
    opened, manifest = prepared("imagenet32", tmp_path, tmp_path / "out")
    kept = {"train": [i for i in range(21) if i % 20], "validation": [0, 20], "test": [21, 22, 23]}
    for split, indices in kept.items():
        np.testing.assert_array_equal(opened[split]["images"], [grey(10 * i) for i in indices])
        assert opened[split]["labels"].tolist() == [40 * i for i in indices]
    assert manifest["format"] == "hdf5" and "21 + 3 examples" in manifest["notes"][0]


def test_larger_images_are_averaged_over_boxes(tmp_path):
    pixels = rng().integers(0, 256, (96, 64, 3), np.uint8)
    write_hdf5(tmp_path / "a.h5", train=2, validation=1, test=0, images=[encode(pixels, "PNG")] * 3)
    opened, _ = prepared("imagenet32", tmp_path, tmp_path / "out")
    boxes = pixels.reshape(32, 3, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(opened["train"]["images"][0] - boxes).max() <= 1


def test_images_of_any_depth_are_read_as_the_nearest_rgb(tmp_path):
    level, ramp = rng(), np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    gray, colour = level.integers(0, 256, (32, 32), np.uint8), level.integers(0, 256, (32, 32, 3), np.uint8)
    palette = Image.fromarray(colour).quantize(16)
    alpha = level.integers(0, 256, (32, 32, 1), np.uint8)
    kinds = {
        "L": (gray, gray),
        "LA": (np.dstack([gray, alpha]), gray),
        "1": (gray > 127, np.where(gray > 127, 255, 0)),
        "P": (palette, np.asarray(palette.convert("RGB"))),
        "RGBA": (np.dstack([colour, alpha]), colour),
        "I;16": (ramp, np.round(ramp / 257)),  # Pillow's own answer is white wherever a value is above 255
    }
    assert {mode for mode, (pixels, _) in kinds.items() if picture_of(pixels).mode == mode} == set(kinds)
    images = []
    for pixels, _ in kinds.values():
        stream = io.BytesIO()
        picture_of(pixels).save(stream, "PNG")
        images.append(stream.getvalue())
    # The first is validation.
    write_hdf5(tmp_path / "a.h5", train=7, validation=1, test=0, images=[images[0], *images, images[0]])
    opened, _ = prepared("imagenet32", tmp_path, tmp_path / "out")
    for (mode, (_, expected)), pixels in zip(kinds.items(), opened["train"]["images"], strict=True):
        rgb = expected if np.ndim(expected) == 3 else np.dstack([expected] * 3)
        np.testing.assert_array_equal(pixels, rgb, err_msg=mode)


def picture_of(pixels):
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def add_litter(folder):
    """What file managers and copying leave: no data, though some are named like it."""
    names = [path.name for path in folder.iterdir()]
    for name in [".DS_Store", "Thumbs.db", "desktop.ini", *(f"._{name}" for name in names), ".hidden.parquet"]:
        (folder / name).write_bytes(b"\0\5\x16\7 not data")


@pytest.mark.parametrize("name", ["npz", "pickle", "hdf5", "parquet", "bin", "npy", "idx", "idx.gz", "textures"])
def test_litter_among_data_is_not_read_and_in_the_target_is_no_hindrance(tmp_path, name):
    source, target = tmp_path / "source", tmp_path / "out"
    if name == "textures":
        write_pk3(source)
    else:
        source.mkdir()
        {
            "npz": write_npz,
            "pickle": write_pickles,
            "hdf5": lambda folder: write_hdf5(folder / "a.hdf5"),
            "parquet": lambda folder: write_parquet(folder, "bytes"),
            "bin": lambda folder: write_shards(folder, ".bin"),
            "npy": lambda folder: write_shards(folder, ".npy"),
            "idx": write_idx,
            "idx.gz": lambda folder: write_idx(folder, packed=True),
        }[name](source)
    add_litter(source)
    target.mkdir()
    (target / ".DS_Store").write_bytes(b"x")
    kind = {"bin": "fineweb", "npy": "fineweb", "idx": "idx", "idx.gz": "idx", "textures": "textures"}
    prepared(kind.get(name, "imagenet32"), source, target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": False}, "no `split` attribute, expected 1,331,167 or 1,431,167"),
        ({"labels": np.full(24, 1000)}, "row 0: label 1000, expected 0..999"),
        ({"labels": np.zeros(23)}, "23 targets for splits that end at 21 and 24"),
        ({"images": [encode(grey(1))[:50]] * 26}, "image 0: an image that can't be decoded"),
        ({"images": [b"GIF89a" + bytes(50)] * 26}, "image 0: an image that can't be decoded"),
        ({"images": [encode(grey(1), "GIF")] * 26}, "image 0: an image that can't be decoded"),
    ],
)
def test_wrong_hdf5_is_refused(tmp_path, settings, message):
    write_hdf5(tmp_path / "a.hdf5", **settings)
    with pytest.raises(DataError, match=message):
        drain(imagenet.plan(tmp_path), tmp_path)


@pytest.mark.parametrize("kind", ["missing", "external", "soft", "virtual", "type"])
def test_hdf5_must_hold_its_data_itself(tmp_path, kind):
    other, path = tmp_path / "other.h5x", tmp_path / "a.hdf5"
    write_hdf5(other)
    with h5py.File(path, "w") as file:
        file["targets"] = np.zeros(3, np.int16)
        if kind == "external":
            file["encoded_images"] = h5py.ExternalLink(other.name, "encoded_images")
        elif kind == "soft":
            file["encoded_images"] = h5py.SoftLink("/targets")
        elif kind == "virtual":
            layout = h5py.VirtualLayout((26,), h5py.vlen_dtype(np.uint8))
            layout[:] = h5py.VirtualSource(str(other), "encoded_images", (26,))
            file.create_virtual_dataset("encoded_images", layout)
        elif kind == "type":
            file["encoded_images"] = np.zeros((3, 100), np.uint8)
    with pytest.raises(DataError, match="of its own|expected bytes of variable length"):
        imagenet.plan(tmp_path)


def bomb(side):
    """A PNG of side × side black pixels: a thousandth of what it unpacks to."""
    rows = zlib.compressobj(9)
    body = b"".join([rows.compress(bytes(1 + 3 * side)) for _ in range(side)] + [rows.flush()])
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", body), (b"IEND", b"")]
    framed = [struct.pack(">I", len(c)) + name + c + struct.pack(">I", zlib.crc32(name + c)) for name, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


@pytest.mark.parametrize("side", [9_000, 12_000])
def test_decompression_bombs_are_refused(tmp_path, side):
    write_hdf5(tmp_path / "a.hdf5", images=[bomb(side)] * 26)
    with pytest.raises(DataError, match="DecompressionBomb"):
        drain(imagenet.plan(tmp_path), tmp_path)


def images_and_labels(n):
    return rng(n).integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) * 7


def write_parquet(folder, style):
    for name, n in {"train-00000-of-00002": 23, "train-00001-of-00002": 2, "validation-00000-of-00001": 4}.items():
        images, labels = images_and_labels(n)
        if style == "bytes":
            rows = [{"bytes": encode(image, "PNG"), "path": None} for image in images]
            kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        elif style == "nested":
            rows, kind = images.tolist(), pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.uint8())))
        elif style == "planes nested":
            rows, kind = (
                images.transpose(0, 3, 1, 2).tolist(),
                pyarrow.list_(pyarrow.list_(pyarrow.list_(pyarrow.uint8()))),
            )
        elif style == "flat planes":
            rows, kind = images.transpose(0, 3, 1, 2).reshape(n, -1).tolist(), pyarrow.list_(pyarrow.uint8(), 3072)
        table = pyarrow.table({"image": pyarrow.array(rows, kind), "label": pyarrow.array(labels, pyarrow.int64())})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=8)


@pytest.mark.parametrize("style", ["bytes", "nested", "planes nested", "flat planes"])
def test_imagenet_parquet_reads_back_exactly(tmp_path, style):
    write_parquet(tmp_path, style)
    opened, manifest = prepared("imagenet32", tmp_path, tmp_path / "out")
    (first, first_labels), (second, second_labels), (test, test_labels) = map(images_and_labels, (23, 2, 4))
    kept, held_out = np.arange(23) % 20 != 0, np.arange(23) % 20 == 0
    np.testing.assert_array_equal(opened["train"]["images"], np.concatenate([first[kept], second[1:]]))
    np.testing.assert_array_equal(opened["train"]["labels"], np.concatenate([first_labels[kept], second_labels[1:]]))
    np.testing.assert_array_equal(opened["validation"]["images"], np.concatenate([first[held_out], second[:1]]))
    np.testing.assert_array_equal(opened["test"]["images"], test)
    np.testing.assert_array_equal(opened["test"]["labels"], test_labels)
    assert manifest["format"] == "parquet"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"a"], "label": [1]}, "without 'image'"),
        ({"image": [[1] * 3072]}, "without 'label'"),
        ({"image": [[1] * 3072], "label": [1]}, "images as int64 lists of .3072."),
        ({"image": [[[[1.5] * 3] * 32] * 32], "label": [1]}, "images as double lists"),
        ({"image": [[1, 2], [1]], "label": [1, 2]}, r"uint8 lists of lengths"),
        ({"image": [None, [1]], "label": [1, 2]}, "rows without an image"),
        ({"image": [{"bytes": None, "path": "/etc/passwd"}], "label": [1]}, "names of other files"),
        ({"image": [{"bytes": b"x", "path": ""}], "label": [1]}, "row 0: an image that can't be decoded"),
        ({"image": [{"bytes": b"x"}], "label": [1000]}, "label 1000, expected 0..999"),
        ({"image": [{"bytes": b"x"}], "label": ["cat"]}, "labels of type string"),
    ],
)
def test_wrong_parquet_is_refused(tmp_path, columns, message):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=message):
        drain(imagenet.plan(tmp_path), tmp_path)


def test_damaged_parquet_and_hdf5_are_refused(tmp_path):
    for name, magic in (("train.parquet", b"PAR1"), ("a.hdf5", b"\x89HDF\r\n\x1a\n")):
        path = tmp_path / name
        path.write_bytes(magic + bytes(1000) + magic)
        with pytest.raises(DataError, match="can't be read|reader died"):
            imagenet.plan(path)


def test_a_parquet_page_that_unpacks_beyond_the_limit_is_refused(tmp_path):
    path = tmp_path / "train.parquet"
    table = pyarrow.table({"text": ["a" * (400 << 20)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False, write_statistics=False)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match="needs more than 0.5 GiB|MemoryError|reader died"):
        sandbox.run(fineweb.child_parquet, path, tmp_path, [0], 0, "all", memory_bytes=1 << 29)


def test_row_groups_are_read_in_runs_of_bounded_size():
    assert grouped([(4, 1)] * 5, rows=8) == [[0, 1], [2, 3], [4]]
    assert grouped([(1, 100), (1, 5), (1, 5), (1, 5)], rows=99, unpacked_bytes=10) == [[0], [1, 2], [3]]


# FineWeb


DOCUMENTS = ["Hello world", "A second document, longer than the first.", "Third\n\none."] * 40


def stream_of(documents):
    return np.concatenate([gpt2.encode_document(document) for document in documents])


def write_bin(path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())


def write_shards(folder, suffix, raw=False):
    """Three shards of 300 tokens and a rest, cut inside documents, and a validation shard."""
    tokens = stream_of(DOCUMENTS)
    shards = {f"fineweb_train_{k + 1:06d}": tokens[300 * k : 300 * (k + 1)] for k in range(-(-len(tokens) // 300))}
    assert len(shards) >= 3 and all(shard[0] != gpt2.END_OF_TEXT for shard in list(shards.values())[1:3])
    for name, shard in {**shards, "fineweb_val_000000": tokens[:50]}.items():
        path = folder / f"{name}{suffix}"
        if suffix == ".bin":
            write_bin(path, shard)
        elif raw:
            path.write_bytes(shard.astype("<u2").tobytes())
        else:
            np.save(path, shard)
    return tokens


@pytest.mark.parametrize(("suffix", "raw"), [(".bin", False), (".npy", False), (".npy", True)])
def test_shards_read_back_exactly_across_their_borders(tmp_path, suffix, raw):
    tokens = write_shards(tmp_path, suffix, raw)
    opened, manifest = prepared("fineweb", tmp_path, tmp_path / "out")
    train, validation = opened["train"]["tokens"], opened["validation"]["tokens"]
    assert train.dtype == np.uint16 and isinstance(train, np.memmap)
    np.testing.assert_array_equal(np.concatenate([train, validation]), tokens)
    assert len(validation) == len(tokens) // 20
    np.testing.assert_array_equal(opened["test"]["tokens"], tokens[:50])
    assert manifest["vocabulary"] == 50_257


def test_without_a_validation_shard_the_last_twentieths_are_held_out(tmp_path):
    write_bin(tmp_path / "fineweb_train_000001.bin", np.arange(100))
    opened, _ = prepared("fineweb", tmp_path, tmp_path / "out")
    assert [opened[split]["tokens"].tolist() for split in ("validation", "test")] == [
        [*range(90, 95)],
        [*range(95, 100)],
    ]
    assert len(opened["train"]["tokens"]) == 90


def test_shards_are_read_in_pieces(tmp_path, monkeypatch):
    tokens = write_shards(tmp_path, ".bin")
    monkeypatch.setattr(fineweb, "CHUNK_TOKENS", 7)
    pieces = drain(fineweb.plan(tmp_path), tmp_path)
    assert max(len(rows["tokens"]) for _, rows in pieces) == 7
    joined = np.concatenate([rows["tokens"] for split, rows in pieces if split != "test"])
    np.testing.assert_array_equal(joined, tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"magic": 20240801}, r"byte 0: magic number 20240801 \(tokens of Llama 3\), expected 20240520"),
        ({"magic": 20240326}, "weights of a GPT-2"),
        ({"magic": 12345}, "no shard of GPT-2 tokens"),
        ({"magic": int.from_bytes(struct.pack(">i", 20240520), "little", signed=True)}, "big-endian"),
        ({"version": 7}, "byte 4: version 7, expected 1"),
        ({"count": 9}, "byte 8: the header promises 9 tokens, and 10 follow"),
        ({"count": 11}, "byte 8: the header promises 11 tokens, and 10 follow"),
        ({"count": -1}, "byte 8: the header promises -1"),
        ({"tokens": []}, "promises 0 tokens"),
        ({"tokens": [1, 2, 50257]}, "byte 1028: token 50257, expected 0..50256"),
    ],
)
def test_wrong_shards_are_refused(tmp_path, settings, message):
    write_bin(tmp_path / "fineweb_train_000001.bin", **{"tokens": np.arange(10), **settings})
    with pytest.raises(DataError, match=message):
        drain(fineweb.plan(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.arange(10, dtype=np.uint32), r"uint32 \(10,\), expected uint16"),
        (np.zeros((2, 5), np.uint16), r"uint16 \(2, 5\), expected uint16 \[n\]"),
        (np.arange(10, dtype=">u2"), "expected uint16"),
        (np.array([60000], np.uint16), "byte 128: token 60000"),
        (b"abc", "3 bytes are no whole number of uint16"),
        (b"", "no whole number"),
        (b"\xff\xff", "byte 0: token 65535"),
    ],
)
def test_wrong_npy_shards_are_refused(tmp_path, content, message):
    path = tmp_path / "fineweb_train_000001.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(DataError, match=message):
        drain(fineweb.plan(tmp_path), tmp_path)


@pytest.mark.parametrize("suffix", [".bin", ".npy"])
@pytest.mark.parametrize("lost", [1, 2, 19, 21, 500])
def test_truncated_shards_are_refused(tmp_path, suffix, lost):
    path = tmp_path / f"fineweb_train_000001{suffix}"
    np.save(path, np.arange(10, dtype=np.uint16)) if suffix == ".npy" else write_bin(path, np.arange(10))
    os.truncate(path, max(1, path.stat().st_size - lost))
    with pytest.raises(DataError):
        drain(fineweb.plan(tmp_path), tmp_path)


def test_parquet_text_is_tokenised_document_by_document(tmp_path):
    documents = {"train_0": DOCUMENTS[:30], "train_1": DOCUMENTS[30:35], "val_0": DOCUMENTS[:2]}
    for name, texts in documents.items():
        table = pyarrow.table({"text": texts, "url": [""] * len(texts)})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=7)
    opened, _ = prepared("fineweb", tmp_path, tmp_path / "out")
    first, second = documents["train_0"], documents["train_1"]
    held_out = [first[0], first[20], second[0]]
    np.testing.assert_array_equal(opened["validation"]["tokens"], stream_of(held_out))
    np.testing.assert_array_equal(opened["test"]["tokens"], stream_of(DOCUMENTS[:2]))
    train = [*first[1:20], *first[21:], *second[1:]]
    np.testing.assert_array_equal(opened["train"]["tokens"], stream_of(train))


@pytest.mark.parametrize("column", [{"text": [1, 2]}, {"text": ["a", None]}, {"words": ["a"]}])
def test_parquet_without_text_is_refused(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "train.parquet")
    with pytest.raises(DataError, match="a document that is no text|without 'text'"):
        drain(fineweb.plan(tmp_path), tmp_path)


# The tokenizer


def test_the_vocabulary_is_the_released_one():
    content = gpt2.lzma.decompress((ROOT / "lolo" / "data" / gpt2.FILE).read_bytes())
    assert hashlib.sha256(content).hexdigest() == gpt2.SHA256
    assert len(gpt2.merges()) == 50_000 and gpt2.merges()[0] == (b" ", b"t")
    notice = (ROOT / "lolo" / "data" / "NOTICE_GPT2.md").read_text(encoding="utf-8")
    assert gpt2.SHA256 in notice and "Copyright (c) 2019 OpenAI" in notice


def test_tokens_are_gpt2s():
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode(" indivisible").tolist() == [773, 452, 12843]
    assert gpt2.encode("<|endoftext|>").tolist() != [50256] and gpt2.encode_document("").tolist() == [50256]
    assert gpt2.encoding().n_vocab == 50_257


def test_tokens_spell_any_text():
    text = "naïve café — 東京 🦄 \t\n\n  x\r\n" + "".join(map(chr, range(1, 700)))
    assert gpt2.encoding().decode(gpt2.encode(text).tolist()) == text


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab \n\t\r'\u3000", max_size=60))
def test_cutting_a_text_changes_no_token(text):
    pieces = gpt2.PIECE_CHARACTERS
    try:
        gpt2.PIECE_CHARACTERS = 4
        assert gpt2.encode(text).tolist() == gpt2.encoding().encode_ordinary(text)
        assert "".join(gpt2.pieces(text)) == text
    finally:
        gpt2.PIECE_CHARACTERS = pieces


def test_books_become_documents_of_tokens(tmp_path):
    opened, _ = prepared("books", None, tmp_path / "out")
    assert sum(len(split["tokens"]) for split in opened.values()) == 3_061_407
    for split in embedded.SPLITS:
        tokens = opened[split]["tokens"]
        books = [book for book in embedded.books() if book.split == split]
        starts = np.flatnonzero(np.asarray(tokens) == gpt2.END_OF_TEXT)
        assert len(starts) == len(books) and starts[0] == 0
        last = tokens[starts[-1] + 1 :].tolist()
        assert gpt2.encoding().decode(last) == books[-1].text


def test_a_damaged_vocabulary_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt2, "FOLDER", tmp_path)
    with pytest.raises(DataError, match="gpt2_vocab.bpe.xz can't be read.*reinstall"):
        gpt2.merges()
    (tmp_path / gpt2.FILE).write_bytes(gpt2.lzma.compress(b"#version\na b\n"))
    with pytest.raises(DataError, match="is damaged: expected sha256"):
        gpt2.merges()


# IDX and text


def idx_bytes(array):
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(folder, packed=False):
    arrays = {}
    for prefix, n in {"train": 41, "t10k": 3}.items():
        images, labels = rng(n).integers(0, 256, (n, 6, 5), np.uint8), np.arange(n, dtype=np.uint8) % 10
        arrays[prefix] = images, labels
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            content = gzip.compress(idx_bytes(array)) if packed else idx_bytes(array)
            (folder / (name + ".gz" * packed)).write_bytes(content)
    return arrays


@pytest.mark.parametrize("packed", [False, True])
def test_idx_folders_read_back_exactly(tmp_path, packed):
    arrays = write_idx(tmp_path, packed)
    opened, _ = prepared("idx", tmp_path, tmp_path / "out")
    held_out = np.arange(41) % 20 == 0
    for name, index in (("images", 0), ("labels", 1)):
        np.testing.assert_array_equal(opened["train"][name], arrays["train"][index][~held_out])
        np.testing.assert_array_equal(opened["validation"][name], arrays["train"][index][held_out])
        np.testing.assert_array_equal(opened["test"][name], arrays["t10k"][index])


def test_idx_is_read_in_pieces(tmp_path, monkeypatch):
    arrays = write_idx(tmp_path)
    monkeypatch.setattr(idx, "CHUNK_BYTES", 100)
    pieces = list(idx.read_rows(tmp_path / "train-images-idx3-ubyte"))
    assert [len(piece) for piece in pieces] == [3] * 13 + [2]
    np.testing.assert_array_equal(np.concatenate(pieces), arrays["train"][0])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "byte 0: starts with '', expected 00 00 08"),
        (b"\0\0\x0d\1\0\0\0\1", "byte 0: starts with '00 00 0d 01'"),
        (b"\0\0\x08\x09", "the number of axes, 1 to 4"),
        (b"\0\0\x08\2\0\0\0\1", "byte 8: ends inside the header"),
        (b"\0\0\x08\1\0\0\0\4abc", r"byte 4: the header promises \(4,\), 12 bytes in all, and the file has 11"),
        (b"\0\0\x08\1\0\0\0\2abc", r"byte 4: the header promises \(2,\)"),
        (b"\0\0\x08\4" + b"\xff" * 16, "byte 4: rows of shape"),
        (b"\0\0\x08\2\0\0\0\1\0\0\0\0", "rows of shape .0,."),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_wrong_idx_files_are_refused(tmp_path, content, message, packed):
    path = tmp_path / ("a-idx1-ubyte" + ".gz" * packed)
    path.write_bytes(gzip.compress(content) if packed else content)
    if packed and "promises" in message:
        message = "ends inside the data|continues after the data"
    with pytest.raises(DataError, match=message):
        list(idx.read_rows(path))


def test_a_packed_idx_file_can_not_promise_more_than_deflate_can_hold(tmp_path):
    path = tmp_path / "a-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(b"\0\0\x08\1\xff\xff\xff\xff"))
    with pytest.raises(DataError, match="4,294,967,303 bytes in all"):
        idx.read_shape(path)


def test_idx_folders_must_hold_one_whole_data_set(tmp_path):
    with pytest.raises(DataError, match="no IDX files of a training set"):
        idx.plan(tmp_path)
    write_idx(tmp_path)
    (tmp_path / "emnist-train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(DataError, match="no pair of images and labels"):
        idx.plan(tmp_path)
    (tmp_path / "emnist-train-labels-idx1-ubyte").unlink()
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(3, np.uint8)))
    with pytest.raises(DataError, match=r"labels of shape \(3,\) for images of shape \(41, 6, 5\)"):
        idx.plan(tmp_path)


def lines(n):
    return "".join(f"Line {i} of it, é.\n" for i in range(n))


def test_text_becomes_tokens_cut_at_lines(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(lines(200), encoding="utf-8")
    opened, _ = prepared("text", path, tmp_path / "out")
    decoded = {split: gpt2.encoding().decode(opened[split]["tokens"][1:].tolist()) for split in embedded.SPLITS}
    assert "".join(decoded.values()) == lines(200)
    assert all(part.startswith("Line") and part.endswith("\n") for part in decoded.values())
    assert all(opened[split]["tokens"][0] == gpt2.END_OF_TEXT for split in opened)
    assert 0.03 < len(decoded["test"]) / len(lines(200)) < 0.07


@pytest.mark.parametrize("kind", ["text", "characters"])
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path, kind):
    content = lines(200).encode()
    for name, mark in (("plain", b""), ("marked", b"\xef\xbb\xbf")):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.txt").write_bytes(mark + content)
        for split in embedded.SPLITS:
            (tmp_path / name / f"{split}.txt").write_bytes(mark + content)
    for source in (".txt", ""):
        found = [
            prepared(kind, tmp_path / f"{name}{source}", tmp_path / f"out-{name}{source}")[0]
            for name in ("plain", "marked")
        ]
        for split in embedded.SPLITS:
            for array in found[0][split]:
                np.testing.assert_array_equal(found[1][split][array], found[0][split][array])


def test_characters_are_those_of_the_embedded_books(tmp_path):
    for split, content in embedded.books_text().items():
        (tmp_path / f"{split}.txt").write_bytes(content[:400_000].encode())
    opened, manifest = prepared("characters", tmp_path, tmp_path / "out")
    letters = manifest["alphabet"]
    assert len(letters) == 47 and letters == alphabet(embedded.books_text()["train"][:400_000])
    for split, content in embedded.books_text().items():
        spelled = "".join((letters + "?")[symbol] for symbol in opened[split]["symbols"])
        assert spelled == "".join(c if c in letters else "?" for c in content[:400_000].lower())
    assert alphabet(embedded.books_text()["train"]) == embedded.books_alphabet()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, expected 1 to"),
        (b"abc\xff", "byte 3: not UTF-8"),
        (b"a", "too few lines"),
        (b"\xef\xbb\xbf", "a byte-order mark and nothing else"),
        ((lines(9)).encode("utf-16"), "byte 0: UTF-16, expected UTF-8; convert it: iconv -f UTF-16"),
        (b"\xfe\xff" + lines(9).encode("utf-16-be"), "byte 0: UTF-16, expected UTF-8"),
        ((lines(9)).encode("utf-32"), "byte 0: UTF-32, expected UTF-8; convert it: iconv -f UTF-32"),
        (b"Hello\n".decode().encode("utf-16-le") * 90, "UTF-16 or UTF-32, expected UTF-8"),  # without a mark
    ],
)
@pytest.mark.parametrize("name", ["text", "characters"])
def test_wrong_text_is_refused(tmp_path, name, content, message):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare.prepare(name, tmp_path / "a.txt", tmp_path / "out")


def test_a_text_of_more_than_a_gigabyte_is_refused_unread(tmp_path):
    path = tmp_path / "a.txt"
    path.touch()
    os.truncate(path, (1 << 30) + 1)  # a hole: no disk, and no memory if it is refused in time
    with pytest.raises(DataError, match="1,073,741,825 bytes"):
        read_text(path)


# Textures


def tga(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "TGA")
    return stream.getvalue()


def write_pk3(folder):
    """Four textures that count, and one of each kind that does not."""
    kept = {f"textures/a/{i}.tga": rng(i).integers(0, 256, (128, 128, 3), np.uint8) for i in range(3)}
    kept["textures/b/half.TGA"] = np.repeat(np.uint8([0, 200]), 64)[None, :, None].repeat(128, 0).repeat(3, 2)
    alpha = np.dstack([kept["textures/a/0.tga"], np.full((128, 128), 255, np.uint8)])
    others = {
        "textures/a/twice.tga": kept["textures/a/1.tga"],
        "textures/a/small.tga": rng(7).integers(0, 256, (64, 128, 3), np.uint8),
        "textures/a/flat.tga": grey(90, 128),
        "textures/a/alpha.tga": alpha,
        "env/sky.tga": rng(8).integers(0, 256, (128, 128, 3), np.uint8),
    }
    folder.mkdir()
    with zipfile.ZipFile(folder / "pak4-textures.pk3", "w") as archive:
        for name, pixels in {**others, **kept}.items():
            archive.writestr(name, tga(pixels))
        archive.writestr("textures/credits", "by someone")
    return [kept[name] for name in sorted(kept)]


def test_textures_become_crops_that_share_no_pixel_between_splits(tmp_path):
    pictures = write_pk3(tmp_path / "pk3")
    splits = textures.textures(tmp_path / "pk3", stride=8)
    for split, (images, labels) in splits.items():
        expected, classes = [], []
        for row, column in textures.positions(8)[split]:
            for label, picture in enumerate(pictures):
                crop = picture[row : row + 32, column : column + 32]
                if crop.std() > 4:
                    expected.append(crop)
                    classes.append(label)
        np.testing.assert_array_equal(images, expected)
        assert labels.tolist() == classes and labels.dtype == np.uint16
    assert len(splits["test"][0]) < 4 * len(textures.positions(8)["test"])  # a picture's right half is of one colour
    opened, _ = prepared("textures", tmp_path / "pk3", tmp_path / "out")
    np.testing.assert_array_equal(opened["train"]["images"], splits["train"][0])
    np.testing.assert_array_equal(opened["test"]["labels"], splits["test"][1])


def test_crops_of_different_splits_do_not_overlap():
    covered = {}
    for split, places in textures.positions(4).items():
        covered[split] = np.zeros((128, 128), bool)
        for row, column in places:
            covered[split][row : row + 32, column : column + 32] = True
            assert row + 32 <= 128 and column + 32 <= 128
    assert not (covered["train"] & covered["validation"]).any() and not (covered["train"] & covered["test"]).any()
    assert not (covered["validation"] & covered["test"]).any()
    assert not covered["train"][:, 84:].any() and not covered["test"][:, :84].any()


def test_missing_textures_say_how_to_get_them(tmp_path):
    with pytest.raises(DataError, match="apt-get install openarena-081-textures"):
        textures.textures(tmp_path)
