"""The embedded data are the released bytes, whole, split without overlap, and rebuilt by the stated rules."""

import gzip
import hashlib
import importlib.util
import lzma
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lolo.data import embedded
from lolo.data.errors import DataError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "lolo" / "data"


@pytest.fixture(scope="module")
def build():
    """tools/build_embedded_data.py as a module: tools is a folder of scripts, not a package."""
    path = ROOT / "tools" / "build_embedded_data.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def published_images_and_labels():
    """The splits put together again: validation is index 0, 20, 40, ... of the first 60,000."""
    held_out = np.arange(60_000) % 20 == 0
    splits = embedded.fashion_mnist()
    for train, validation, test in zip(splits["train"], splits["validation"], splits["test"], strict=True):
        whole = np.empty((60_000, *train.shape[1:]), np.uint8)
        whole[held_out], whole[~held_out] = validation, train
        yield np.concatenate([whole, test])


@pytest.mark.parametrize("name", embedded.SHA256)
def test_files_have_the_released_hashes(name):
    assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == embedded.SHA256[name]


def test_both_files_together_stay_small():
    assert sum((FOLDER / name).stat().st_size for name in embedded.SHA256) < 8_000_000


def test_fashion_has_its_shapes_and_types():
    for split, n in {"train": 57_000, "validation": 3_000, "test": 10_000}.items():
        images, labels = embedded.fashion_mnist()[split]
        assert images.shape == (n, 64) and images.dtype == np.uint8
        assert labels.shape == (n,) and labels.dtype == np.uint8


def test_fashion_splits_lose_no_example_and_repeat_none():
    images, labels = published_images_and_labels()
    with np.load(FOLDER / embedded.FASHION_FILE, allow_pickle=False) as stored:
        np.testing.assert_array_equal(images, stored["images"])
        np.testing.assert_array_equal(labels, stored["labels"])


def test_fashion_has_the_published_classes_and_first_labels():
    _, labels = published_images_and_labels()
    assert np.bincount(labels[:60_000]).tolist() == [6_000] * 10
    assert np.bincount(labels[60_000:]).tolist() == [1_000] * 10
    assert labels[:10].tolist() == [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]
    assert labels[60_000:60_010].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]


def test_fashion_pixels_have_the_mean_of_the_28x28_original():
    images = next(published_images_and_labels())[:60_000]
    assert abs(images.mean() - 72.94) < 0.01  # a box mean keeps the mean: 72.940 at 28x28 as well
    assert abs(images.std() - 77.72) < 0.01  # and averages away contrast: 90.02 at 28x28


def test_fashion_images_go_with_their_labels():
    train_images, train_labels = embedded.fashion_mnist()["train"]
    images, labels = embedded.fashion_mnist()["test"]
    centres = np.stack([train_images[train_labels == label].mean(0) for label in range(10)])
    distance = ((images[:, None, :] - centres) ** 2).sum(-1)
    assert (distance.argmin(1) == labels).mean() > 0.6  # nearest class mean; chance is 0.1


def test_books_are_whole_and_in_one_split_only():
    titles = [book.title for book in embedded.books()]
    assert len(titles) == len(set(titles)) == 16
    for split, text in embedded.books_text().items():
        assert text == "\n\n".join(book.text for book in embedded.books() if book.split == split)
    assert {book.split for book in embedded.books()} == set(embedded.books_text()) == set(embedded.SPLITS)


def test_each_held_out_split_is_about_a_twentieth_of_the_text():
    lengths = {split: len(text) for split, text in embedded.books_text().items()}
    for split in ("validation", "test"):
        assert 0.04 < lengths[split] / sum(lengths.values()) < 0.06


def test_no_long_passage_of_a_held_out_book_is_in_train():
    train = embedded.books_text()["train"]
    for split in ("validation", "test"):
        text = embedded.books_text()[split]
        assert not any(text[i : i + 100] in train for i in range(0, len(text), 50_000))
    assert train[5_000_000:5_000_100] in train  # the check can tell


def test_books_keep_their_characters_but_not_the_distributors_words():
    text = "\n\n".join(embedded.books_text().values())
    for kept in ("Call me Ishmael.", "Cæsar, my Lord", "Brunetière, Coppée", "In the beginning God created"):
        assert kept in text
    assert "gutenberg" not in text.lower() and "small print" not in text.lower()
    assert not set("\r\t\x00\x1a\ufffd") & set(text)


def test_alphabet_is_the_47_commonest_characters_of_train():
    alphabet = embedded.books_alphabet()
    counts = Counter(embedded.books_text()["train"].lower())
    assert alphabet == "".join(sorted(counts, key=lambda c: (-counts[c], c))[:47])
    assert len(set(alphabet)) == embedded.SYMBOLS - 1 == 47


@pytest.mark.parametrize("split", embedded.SPLITS)
def test_symbols_spell_the_lower_case_text(split):
    symbols, text = embedded.books_symbols()[split], embedded.books_text()[split].lower()
    assert symbols.dtype == np.uint8 and symbols.shape == (len(text),) and symbols.max() == 47
    place = {character: k for k, character in enumerate(embedded.books_alphabet())}
    assert symbols.tobytes() == bytes(place.get(character, 47) for character in text)


def test_words_are_numbered_from_the_commonest_of_train():
    words = {split: re.findall("[a-z]+", text.lower()) for split, text in embedded.books_text().items()}
    numbered = embedded.books_words(100)
    commonest = [word for word, _ in sorted(Counter(words["train"]).items(), key=lambda of: (-of[1], of[0]))][:99]
    assert commonest[0] == "the" and {array.dtype for array in numbered.values()} == {np.dtype(np.int32)}
    for split in embedded.SPLITS:
        assert len(numbered[split]) == len(words[split])
        for word, number in zip(words[split][:5000], numbered[split], strict=False):
            assert number == (commonest.index(word) if word in commonest else 99)


def test_ties_in_the_alphabet_go_by_code_point(monkeypatch):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 100)))[::-1]  # each once, in falling order
    monkeypatch.setattr(embedded, "books_text", lambda: {"train": text})
    assert embedded.books_alphabet.__wrapped__() == text[::-1][:47]


def test_arrays_cannot_be_written_to():
    arrays = [array for pair in embedded.fashion_mnist().values() for array in pair]
    for array in [*arrays, *embedded.books_symbols().values()]:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("name", "read"), [(embedded.FASHION_FILE, embedded.fashion_mnist), (embedded.BOOKS_FILE, embedded.books)]
)
def test_a_flipped_bit_is_refused_with_the_cure(tmp_path, monkeypatch, name, read):
    content = bytearray((FOLDER / name).read_bytes())
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    (tmp_path / name).write_bytes(content)
    read.__wrapped__()
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    message = f"{name} is damaged: expected sha256 {embedded.SHA256[name]}.*reinstall lolo"
    with pytest.raises(DataError, match=message):
        read.__wrapped__()


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "FOLDER", tmp_path)
    with pytest.raises(DataError, match="books.json.xz is missing.*reinstall lolo"):
        embedded.books.__wrapped__()


def test_box_resize_weighs_by_area(build):
    # 3 -> 2: boxes of 1.5 pixels, the middle pixel counts half in either: weights (2, 1) and (1, 2). By hand:
    # top left (4*9 + 2*18 + 2*0 + 1*27) / 9 = 11; top right (2*18 + 4*36 + 1*27 + 2*9) / 9 = 25;
    # bottom left (2*0 + 1*27 + 4*45 + 2*0) / 9 = 23; bottom right (1*27 + 2*9 + 2*0 + 4*2) / 9 = 5.89 -> 6.
    image = np.array([[9, 18, 36], [0, 27, 9], [45, 0, 2]], np.uint8)
    assert build.box_resize(image[None], 2).tolist() == [[[11, 25], [23, 6]]]


def test_box_resize_rounds_halves_up_and_keeps_white(build):
    images = np.array([[[0, 1], [1, 0]], [[1, 1], [1, 0]], [[255, 255], [255, 255]]], np.uint8)
    assert build.box_resize(images, 1).ravel().tolist() == [1, 1, 255]


def test_box_weights_from_28_to_8_cover_each_pixel_once(build):
    weights = build.box_weights(28, 8) / 8
    assert weights.shape == (8, 28)
    np.testing.assert_array_equal(weights.sum(0), 1.0)
    np.testing.assert_array_equal(weights.sum(1), 3.5)
    np.testing.assert_array_equal(weights[1, 3:7], [0.5, 1, 1, 1])


@pytest.mark.parametrize("packed", [False, True])
def test_idx_reader_reads_plain_and_packed_files(build, tmp_path, packed):
    content = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3]) + bytes(range(6))
    name, content = ("images.gz", gzip.compress(content)) if packed else ("images", content)
    (tmp_path / name).write_bytes(content)
    assert build.read_idx(tmp_path / "images").tolist() == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bytes([0, 0, 13, 1, 0, 0, 0, 1, 7]), "IDX file of unsigned bytes"),
        (bytes([0, 0, 8, 1, 0, 0, 0, 4, 1, 2, 3]), r"holds 3 bytes after its header, which promises \(4,\)"),
        (b"", "IDX file of unsigned bytes"),
    ],
)
def test_idx_reader_refuses_other_files(build, tmp_path, content, message):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build.read_idx(tmp_path / "labels")


def test_idx_reader_names_a_missing_file(build, tmp_path):
    with pytest.raises(FileNotFoundError, match="Neither labels nor labels.gz"):
        build.read_idx(tmp_path / "labels")


def test_fashion_file_is_built_from_idx_files_and_reads_back(build, tmp_path):
    images = {"train": np.full((3, 28, 28), 7, np.uint8), "t10k": np.full((2, 28, 28), 9, np.uint8)}
    for part, array in images.items():
        shape = np.array(array.shape, ">u4").tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + shape + array.tobytes())
        labels = bytes(range(len(array)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + shape[:4] + labels)
    content = build.fashion_file(tmp_path)
    assert content == build.fashion_file(tmp_path)
    (tmp_path / "built.npz").write_bytes(content)
    with np.load(tmp_path / "built.npz", allow_pickle=False) as built:
        assert built["images"].shape == (5, 64) and built["images"][:, 5].tolist() == [7, 7, 7, 9, 9]
        assert built["labels"].tolist() == [0, 1, 2, 0, 1]


def test_clean_book_takes_only_the_distributors_part_away(build):
    raw = "[A Title 1900]  \r\n\r\n  A caf\xe9 [sic],  \r\nand THE end.\x1a\r\n\r\n"
    raw += "End of Project Gutenberg's A Title\r\nterms"
    assert build.clean_book(raw.encode("latin-1")) == "  A café [sic],\nand THE end."
    assert build.clean_book("Only “this”.\n".encode()) == "Only “this”."
    with pytest.raises(ValueError, match="distributor's name"):
        build.clean_book(b"Project Gutenberg\nText")


def test_notice_and_build_script_list_the_same_books_as_the_file(build):
    notice = (FOLDER / "NOTICE.md").read_text(encoding="utf-8")
    stored = [(book.title, book.author, book.year, book.split) for book in embedded.books()]
    assert stored == [tuple(source[1:]) for source in build.BOOKS]
    for title, author, year, split in stored:
        assert f"| {title} | {author} | {year} | {split} |" in notice
    assert "Zalando SE" in notice and "Permission is hereby granted, free of charge" in notice


def test_books_file_is_utf8_json_in_xz():
    content = lzma.decompress((FOLDER / embedded.BOOKS_FILE).read_bytes())
    assert content.startswith(b'{\n"books": [') and "Cæsar".encode() in content
