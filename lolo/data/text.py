"""Reader of any text in UTF-8, as GPT-2 tokens or as the 48 symbols of the character task.

One file, of which the first 90 % of characters are train, then 5 % validation and 5 % test, each cut moved to the
next line; or a folder with train.txt, validation.txt and test.txt.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lolo.data import embedded, sandbox, tokens
from lolo.data.errors import DataError
from lolo.data.read_plan import ReadPart, ReadPlan, SplitRows, existing

MAX_BYTES = 1 << 30
SPLITS = embedded.SPLITS
SYMBOLS = embedded.SYMBOLS
CHUNK_CHARACTERS = 4 << 20
CHILD_SECONDS = 3600
TOKENS_FILE = "tokens.bin"


MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
"""Byte-order marks of encodings that are refused; that of UTF-32 in big-endian order starts with 00."""
HEAD_BYTES = 256


def other_encoding(content: bytes) -> str | None:
    """The name of a UTF of wider units, by its byte-order mark or by the zeros in every other byte."""
    for mark, name in MARKS.items():
        if content.startswith(mark):
            return name
    head = content[:HEAD_BYTES]
    zeros = [not any(head[start::2]) for start in (0, 1)]
    return "UTF-16 or UTF-32" if len(head) > 1 and any(zeros) else None


def read_text(path: Path) -> str:
    """The text of a file, with line ends as they are and without a byte-order mark.

    Raises:
        DataError: larger than 1 GiB, empty, or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if not 0 < size <= MAX_BYTES:
            problem = f"{size:,} bytes, expected 1 to {MAX_BYTES:,}"
            raise DataError.at(path, problem, "give smaller files, or parquet to `fineweb`")
        content = path.read_bytes()
        if other := other_encoding(content):
            raise DataError.at(path, f"{other}, expected UTF-8", f"convert it: iconv -f {other[:6]} -t UTF-8", "byte 0")
        text = content.decode("utf-8-sig")
        if not text:
            raise DataError.at(path, "a byte-order mark and nothing else", "give a file with text")
        return text
    except UnicodeDecodeError as error:
        place = f"byte {error.start}"
        raise DataError.at(path, "not UTF-8", "convert it, for instance with iconv -t UTF-8", place) from None
    except OSError as error:
        raise DataError.at(path, f"can't be read ({error.strerror})", "give a readable file of text") from error


def splits(source: Path) -> dict[str, str]:
    """The text of each split."""
    if source.is_dir():
        return {split: read_text(source / f"{split}.txt") for split in SPLITS}
    text = read_text(source)
    first, second = _next_line(text, len(text) * 18 // 20), _next_line(text, len(text) * 19 // 20)
    parts = dict(zip(SPLITS, (text[:first], text[first:second], text[second:]), strict=True))
    for split, part in parts.items():
        if not part:
            problem = f"{len(text):,} characters in too few lines to leave some for {split}"
            raise DataError.at(source, problem, "give a folder with train.txt, validation.txt and test.txt")
    return parts


def _next_line(text: str, start: int) -> int:
    end = text.find("\n", start)
    return start if end < 0 or end > start + len(text) // 40 else end + 1


def plan_tokens(source: Path | None) -> ReadPlan:
    """Any text as GPT-2 tokens, each split one document. Arrays: tokens uint16 [n]."""
    place = existing(source, "text")
    texts = splits(place)
    parts = [ReadPart(split, len(texts[split]), functools.partial(_token_rows, place, split)) for split in SPLITS]
    return ReadPlan(parts, {"kind": "tokens", "format": "text", "vocabulary": tokens.VOCABULARY})


def child_tokens(file: str, scratch: str, split: str) -> None:
    encoded = tokens.encode_document(splits(Path(file))[split])
    encoded.astype("<u2").tofile(Path(scratch, TOKENS_FILE))


def _token_rows(place: Path, split: str, scratch: Path) -> Iterator[SplitRows]:
    # In a child: tiktoken is compiled code, and text can be as hostile as any other file.
    sandbox.run(child_tokens, place, scratch, split, seconds=CHILD_SECONDS, memory_bytes=4 * sandbox.MEMORY_BYTES)
    yield split, {"tokens": np.fromfile(scratch / TOKENS_FILE, "<u2")}


def alphabet(text: str) -> str:
    """The 47 commonest characters of the lower-cased text, ties by code point; fewer if it has fewer."""
    counts = np.zeros(0x110000, np.int64)
    for start in range(0, len(text), CHUNK_CHARACTERS):
        counts += np.bincount(_code_points(text[start : start + CHUNK_CHARACTERS]), minlength=len(counts))
    commonest = np.argsort(-counts, kind="stable")[: SYMBOLS - 1]
    return "".join(chr(character) for character in commonest if counts[character])


def plan_characters(source: Path | None) -> ReadPlan:
    """Any text as the character task's symbols: lower case, the train split's 47 commonest characters and 47 for all
    others. Arrays: symbols uint8 [n]; the alphabet is in the manifest.
    """
    texts = splits(existing(source, "characters"))
    letters = alphabet(texts["train"])
    symbol_of = np.full(0x110000, SYMBOLS - 1, np.uint8)
    symbol_of[_code_points(letters)] = np.arange(len(letters))

    def rows(split: str, scratch: Path) -> Iterator[SplitRows]:
        text = texts[split]
        for start in range(0, len(text), CHUNK_CHARACTERS):
            yield split, {"symbols": symbol_of[_code_points(text[start : start + CHUNK_CHARACTERS])]}

    parts = [ReadPart(split, len(texts[split]), functools.partial(rows, split)) for split in SPLITS]
    return ReadPlan(parts, {"kind": "symbols", "format": "text", "vocabulary": SYMBOLS, "alphabet": letters})


def _code_points(text: str) -> NDArray[np.uint32]:
    """Code points of the lower-cased text: uint32 [n]."""
    return np.frombuffer(text.lower().encode("utf-32-le"), "<u4")
