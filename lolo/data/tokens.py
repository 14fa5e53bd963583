"""GPT-2's tokenizer without a download: the vocabulary is in this package, tiktoken does the work."""

from __future__ import annotations

import functools
import lzma
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lolo.data import embedded
from lolo.data.errors import DataError, library_missing
from lolo.data.read_plan import ReadPart, ReadPlan, SplitRows

VOCABULARY = 50_257
END_OF_TEXT = 50_256
"""Precedes each document, as in FineWeb's shards."""

FILE = "gpt2_vocab.bpe.xz"
SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"  # of the file, unpacked
FOLDER = resources.files(__package__)

# GPT-2's words, as tiktoken writes the pattern: possessive, so that it can't backtrack.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
PIECE_CHARACTERS = 1 << 20
# A single line end between two characters that are no white space is a word of its own wherever the text is cut
# behind it, so the tokens of the pieces are those of the complete text.
CUT = re.compile(r"(?<=\S\n)(?=\S)")


def merges() -> list[tuple[bytes, bytes]]:
    """The 50,000 byte pairs, in the order in which they are merged.

    Raises:
        DataError: the file of this package is missing or damaged.
    """
    file = FOLDER / FILE
    try:
        content = lzma.decompress(file.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise DataError(f"lolo/data/{FILE} can't be read ({error}); reinstall lolo.") from error
    embedded.require_sha256(FILE, content, SHA256)
    letters = _letters()
    pairs = [line.split() for line in content.decode("utf-8").splitlines()[1:] if line]
    return [tuple(bytes(letters[c] for c in side) for side in pair) for pair in pairs]  # type: ignore[misc]


def _letters() -> dict[str, int]:
    """GPT-2 writes each byte as one printable character: those that are printable in Latin-1 as they are."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


@functools.lru_cache(maxsize=1)
def encoding() -> Any:
    """tiktoken's encoding of GPT-2; 50,257 tokens with <|endoftext|>."""
    try:
        import tiktoken
    except ImportError:
        raise library_missing("tiktoken", "GPT-2's tokenizer") from None
    ranks = {bytes([byte]): rank for rank, byte in enumerate(_letters().values())}
    for first, second in merges():
        ranks[first + second] = len(ranks)
    special = {"<|endoftext|>": END_OF_TEXT}
    return tiktoken.Encoding(
        "gpt2", pat_str=WORDS, mergeable_ranks=ranks, special_tokens=special, explicit_n_vocab=VOCABULARY
    )


def pieces(text: str) -> Iterator[str]:
    """The text in pieces of about a million characters, cut where that changes no token."""
    start = 0
    while start < len(text):
        cut = CUT.search(text, start + PIECE_CHARACTERS)
        stop = cut.end() if cut else len(text)
        yield text[start:stop]
        start = stop


def encode(text: str) -> NDArray[np.uint16]:
    """GPT-2's tokens of a text: uint16 [n]. "<|endoftext|>" in it is text like any other.

    encode("Hello world")  # [15496, 995]
    """
    tokens = [np.array(encoding().encode_ordinary(piece), np.uint16) for piece in pieces(text)]
    return np.concatenate([np.zeros(0, np.uint16), *tokens])


def encode_document(text: str) -> NDArray[np.uint16]:
    """The tokens of one document, preceded by `END_OF_TEXT`: uint16 [1 + n]."""
    return np.concatenate([np.array([END_OF_TEXT], np.uint16), encode(text)])


@functools.lru_cache(maxsize=1)
def books() -> dict[str, NDArray[np.uint16]]:
    """The embedded books as GPT-2 tokens, each preceded by `END_OF_TEXT`: uint16 [n] for each split."""
    by_split: dict[str, list[NDArray[np.uint16]]] = {split: [] for split in embedded.SPLITS}
    for book in embedded.books():
        by_split[book.split].append(encode_document(book.text))
    tokens = {split: np.concatenate(documents) for split, documents in by_split.items()}
    for array in tokens.values():
        array.setflags(write=False)
    return tokens


def plan_books(source: Path | None) -> ReadPlan:
    """The embedded books as GPT-2 tokens; `source` is not read. Arrays: tokens uint16 [n]."""

    def rows(split: str, scratch: Path) -> Iterator[SplitRows]:
        yield split, {"tokens": books()[split]}

    texts = embedded.books_text()
    parts = [ReadPart(split, len(texts[split]), functools.partial(rows, split)) for split in embedded.SPLITS]
    return ReadPlan(parts, {"kind": "tokens", "format": "embedded", "vocabulary": VOCABULARY})
