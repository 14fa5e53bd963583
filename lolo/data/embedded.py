"""Embedded data sets: Fashion-MNIST at 8x8 and public-domain books, files of this package that need no download.

Both files are checked against their sha256 when first read. Licences and the list of books: NOTICE.md beside
this file; how the files were made: tools/build_embedded_data.py.
"""

import collections
import functools
import hashlib
import io
import json
import lzma
import re
from importlib import resources
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lolo.data.errors import DataError

FASHION_FILE = "fashion_mnist_8x8.npz"
BOOKS_FILE = "books.json.xz"
SHA256 = {
    FASHION_FILE: "e7a85076697ad3b466fe8899ec7c9811cf75834b754b88921a514b42a04fbb52",
    BOOKS_FILE: "e1c11d4afa3a82cca077050190d3b5770f0e8daed30c8a5469503c869f2072f6",
}
SPLITS = ("train", "validation", "test")

FASHION_TRAIN = 60_000
"""Images of the published training set: they come first in the file, the 10,000 of the test set follow."""

VALIDATION_STRIDE = 20
"""Of the published training set, images 0, 20, 40, ... are validation: 5 %, on any version of NumPy."""

SYMBOLS = 48
"""Classes of the character task: the 47 characters of `books_alphabet()`, and 47 for every other one."""

FOLDER = resources.files(__package__)


class Book(NamedTuple):
    """One book; `year` is that of its first publication, `split` is one of `SPLITS`."""

    title: str
    author: str
    year: int
    split: str
    text: str


def read_verified(name: str) -> bytes:
    """The bytes of one embedded file, as released.

    Args:
        name: a key of `SHA256`.
    Raises:
        DataError: the file is not there, or its sha256 is not the released one.
    """
    file = FOLDER / name
    if not file.is_file():
        raise DataError(f"lolo/data/{name} is missing from this installation; reinstall lolo.")
    content = file.read_bytes()
    require_sha256(name, content, SHA256[name])
    return content


def require_sha256(name: str, content: bytes, expected: str) -> None:
    """Raise DataError unless this content of an embedded file is the released one."""
    actual = hashlib.sha256(content).hexdigest()
    if actual != expected:
        raise DataError(
            f"lolo/data/{name} is damaged: expected sha256 {expected}, found {actual} ({len(content):,} bytes); "
            "reinstall lolo."
        )


@functools.lru_cache(maxsize=1)
def fashion_mnist() -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Fashion-MNIST, box-resized from 28x28 to 8x8: 10 classes of clothing.

    Returns: for each of `SPLITS` the images, uint8 [N, 64] in rows of 8 pixels, and the labels, uint8 [N] in
    0..9; N = 57,000, 3,000 and 10,000. Cached and read-only: copy before you change them.

    >>> images, labels = embedded.fashion_mnist()["train"]
    >>> images.shape
    (57000, 64)

    Reference: Xiao, Rasul, Vollgraf, "Fashion-MNIST", 2017.
    """
    with np.load(io.BytesIO(read_verified(FASHION_FILE)), allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    index = np.arange(len(images))
    published_train = index < FASHION_TRAIN
    held_out = published_train & (index % VALIDATION_STRIDE == 0)
    masks = (published_train & ~held_out, held_out, ~published_train)
    return {
        split: (_read_only(images[mask]), _read_only(labels[mask])) for split, mask in zip(SPLITS, masks, strict=True)
    }


@functools.lru_cache(maxsize=1)
def books() -> tuple[Book, ...]:
    """The books in the file's order. Each is complete and in one split only.

    >>> [book.year for book in embedded.books()][0] < 1930
    True
    """
    content = json.loads(lzma.decompress(read_verified(BOOKS_FILE)))
    return tuple(Book(**entry) for entry in content["books"])


@functools.lru_cache(maxsize=1)
def books_text() -> dict[str, str]:
    """For each of `SPLITS` its books in the file's order, as written, joined by a blank line."""
    return {split: "\n\n".join(book.text for book in books() if book.split == split) for split in SPLITS}


@functools.lru_cache(maxsize=1)
def books_alphabet() -> str:
    """The 47 commonest characters of the lower-cased train split, commonest first, ties by code point.

    Symbol k of `books_symbols` stands for `books_alphabet()[k]`.
    """
    counts = np.bincount(_code_points(books_text()["train"]))
    commonest = np.argsort(-counts, kind="stable")[: SYMBOLS - 1]
    return "".join(map(chr, commonest))


@functools.lru_cache(maxsize=1)
def books_symbols() -> dict[str, NDArray[np.uint8]]:
    """The books as symbols of the character task: lower case, one symbol a character.

    Returns: for each of `SPLITS` uint8 [n] in 0..47; 47 stands for any character outside `books_alphabet()`.
    Cached and read-only: copy before you change them.

    >>> symbols = embedded.books_symbols()["train"]
    >>> text = "".join((embedded.books_alphabet() + "?")[symbol] for symbol in symbols[:40])
    >>> len(text)
    40
    """
    symbol_of = np.full(0x110000, SYMBOLS - 1, np.uint8)  # one entry for each code point of Unicode
    symbol_of[_code_points(books_alphabet())] = np.arange(SYMBOLS - 1)
    return {split: _read_only(symbol_of[_code_points(text)]) for split, text in books_text().items()}


@functools.lru_cache(maxsize=2)
def books_words(vocabulary: int) -> dict[str, NDArray[np.int32]]:
    """The books as words, lower case: word k is the k-th commonest of the train split, ties in alphabetical order.

    Returns: for each of `SPLITS` int32 [n] in 0..vocabulary - 1; the last stands for all rarer words.
    """
    words = {split: re.findall("[a-z]+", text.lower()) for split, text in books_text().items()}
    counts = collections.Counter(words["train"])
    commonest = sorted(counts, key=lambda word: (-counts[word], word))[: vocabulary - 1]
    number = {word: k for k, word in enumerate(commonest)}
    return {
        split: _read_only(np.array([number.get(word, vocabulary - 1) for word in found], np.int32))
        for split, found in words.items()
    }


def _code_points(text: str) -> NDArray[np.uint32]:
    """Code points of the lower-cased text: uint32 [n]."""
    return np.frombuffer(text.lower().encode("utf-32-le"), "<u4")


def _read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.setflags(write=False)
    return array
