"""FineWeb as GPT-2 tokens: `.bin` shards, bare `.npy` shards, or parquet files of text that are tokenised here.

The published validation shard is the test split. In shards, the last twentieth of the train tokens is validation;
in parquet, every 20th document of each file, from its first.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lolo.data import encoded, npy, sandbox, tokens
from lolo.data.errors import DataError
from lolo.data.read_plan import VALIDATION_STRIDE, ReadPart, ReadPlan, SplitRows, existing, files_of, grouped, untrusted

MAGIC = 20_240_520
VERSION = 1
HEADER = 256  # int32
OTHER_MAGICS = {
    20_240_326: "weights of a GPT-2 written by llm.c",
    20_240_328: "a tokenizer of llm.c",
    20_240_522: "evaluation examples of llm.c",
    20_240_801: "tokens of Llama 3",
}
CHUNK_TOKENS = 4 << 20
CHILD_BYTES = 64 << 20
"""Text that one child process tokenises, in bytes as parquet unpacks it."""

CHILD_SECONDS = 3600
BATCH_DOCUMENTS = 256
SPLITS = ("train", "validation", "test")
CURE = "fetch the shard again"


class Shard(NamedTuple):
    """One file of tokens, uint16 little-endian, from byte `offset` to its end."""

    path: Path
    offset: int
    tokens: int


def plan(source: Path | None) -> ReadPlan:
    """A folder of `.bin`, else `.npy`, else `.parquet` files, or one such file. Arrays: tokens uint16 [n].

    Files with "val" in the name are the test split. Where there are none, the last twentieth of the tokens (in
    parquet: documents 10, 30, 50, ...) is, and validation comes before it.
    """
    place = existing(source, "fineweb")
    paths = files_of(place)
    for suffix in (".bin", ".npy", ".parquet"):
        shards = [path for path in paths if path.suffix == suffix]
        held_out = [path for path in shards if "val" in path.name]
        train = [path for path in shards if path not in held_out]
        if shards and not train:
            raise DataError.at(place, f"only validation files ({held_out[0].name})", "fetch training shards too")
        if shards:
            parts, info = (_plan_parquet if suffix == ".parquet" else _plan_shards)(train, held_out)
            return ReadPlan(parts, {"kind": "tokens", "format": suffix[1:], "vocabulary": tokens.VOCABULARY, **info})
    expected = "fineweb_train_000001.bin … and fineweb_val_000000.bin, uint16 .npy shards, or .parquet with `text`"
    raise DataError.at(place, "no shards are here", f"give a folder that holds {expected}")


def read_shard(path: Path) -> Shard:
    """Where the tokens of a `.bin` or `.npy` shard are, after its header has been checked against its size.

    Raises:
        DataError: another magic number, version or type, or a file shorter or longer than its header says.
    """
    size = path.stat().st_size
    with untrusted(path, "a shard of tokens"), path.open("rb") as stream:
        if path.suffix == ".bin":
            return Shard(path, 4 * HEADER, _bin_header(stream, path, size))
        if stream.read(len(npy.MAGIC)) != npy.MAGIC:  # bare tokens, without any header
            if size % 2 or not size:
                raise DataError.at(path, f"{size:,} bytes are no whole number of uint16", CURE)
            return Shard(path, 0, size // 2)
        stream.seek(0)
        header = npy.read_header(stream, path)
        if len(header.shape) != 1 or header.dtype != np.dtype("<u2"):
            problem = f"{header.dtype} {header.shape}, expected uint16 [n]"
            raise DataError.at(path, problem, "save the tokens as one row of uint16", "byte 10")
        if header.offset + header.data_bytes != size or not header.shape[0]:
            problem = f"{size:,} bytes, its header promises {header.shape[0]:,} tokens"
            raise DataError.at(path, problem, CURE, "byte 10")
        return Shard(path, header.offset, header.shape[0])


def _bin_header(stream: npy.ByteStream, path: Path, size: int) -> int:
    content = stream.read(4 * HEADER)
    if len(content) < 4 * HEADER:
        raise DataError.at(path, f"{len(content)} bytes, a header has {4 * HEADER}", CURE, f"byte {len(content)}")
    magic, version, count = (int(n) for n in np.frombuffer(content[:12], "<i4"))
    if magic != MAGIC:
        swapped = int.from_bytes(content[:4], "big") == MAGIC
        what = "a shard in big-endian order" if swapped else OTHER_MAGICS.get(magic, "no shard of GPT-2 tokens")
        problem = f"magic number {magic} ({what}), expected {MAGIC}"
        raise DataError.at(path, problem, "give shards of GPT-2 tokens", "byte 0")
    if version != VERSION:
        raise DataError.at(path, f"version {version}, expected {VERSION}", "give shards of version 1", "byte 4")
    if count < 1 or 4 * HEADER + 2 * count != size:
        problem = f"the header promises {count:,} tokens, and {(size - 4 * HEADER) / 2:,.15g} follow"
        raise DataError.at(path, problem, CURE, "byte 8")
    return count


def read_tokens(shard: Shard) -> Iterator[NDArray[np.uint16]]:
    """The tokens of a shard in pieces: uint16 [n], each below 50,257."""
    with untrusted(shard.path, "a shard of tokens"), shard.path.open("rb") as stream:
        stream.seek(shard.offset)
        for start in range(0, shard.tokens, CHUNK_TOKENS):
            n = min(CHUNK_TOKENS, shard.tokens - start)
            content = stream.read(2 * n)
            if len(content) != 2 * n:
                raise DataError.at(shard.path, f"ends after {start + len(content) // 2:,} tokens", CURE)
            piece = np.frombuffer(content, "<u2")
            if piece.max() >= tokens.VOCABULARY:
                first = int(np.argmax(piece >= tokens.VOCABULARY))
                problem = f"token {piece[first]}, expected 0..{tokens.VOCABULARY - 1}"
                place = f"byte {shard.offset + 2 * (start + first)}"
                raise DataError.at(shard.path, problem, "give shards of GPT-2 tokens", place)
            yield piece


def _plan_shards(train: list[Path], held_out: list[Path]) -> ReadPlan:
    shards = [read_shard(path) for path in train]
    total = sum(shard.tokens for shard in shards)
    twentieth = total // VALIDATION_STRIDE
    # The stream of all shards is cut, not each shard: documents continue from one shard to the next.
    ends = [total - twentieth, total] if held_out else [total - 2 * twentieth, total - twentieth, total]
    parts = []
    start = 0
    for shard in shards:
        parts.append(ReadPart(shard.path.name, 2 * shard.tokens, functools.partial(_train_rows, shard, start, ends)))
        start += shard.tokens
    for path in held_out:
        shard = read_shard(path)
        parts.append(ReadPart(path.name, 2 * shard.tokens, functools.partial(_test_rows, shard)))
    return ReadPlan(parts, {"notes": [f"{len(train)} train shards, {len(held_out)} validation shards"]})


def _train_rows(shard: Shard, start: int, ends: list[int], scratch: Path) -> Iterator[SplitRows]:
    """ends: of the splits, in tokens of the whole stream, in which this shard begins at `start`."""
    for piece in read_tokens(shard):
        cuts = np.clip(np.array(ends) - start, 0, len(piece))
        for split, some in zip(SPLITS, np.split(piece, cuts[:-1]), strict=False):
            if len(some):
                yield split, {"tokens": some}
        start += len(piece)


def _test_rows(shard: Shard, scratch: Path) -> Iterator[SplitRows]:
    for piece in read_tokens(shard):
        yield "test", {"tokens": piece}


# Text in parquet


def _plan_parquet(train: list[Path], held_out: list[Path]) -> ReadPlan:
    parts = []
    for path in train + held_out:
        with tempfile.TemporaryDirectory() as scratch:
            groups = sandbox.run(encoded.parquet_groups, path, Path(scratch))
        which = "test" if path in held_out else "train" if held_out else "all"
        start = 0
        for piece in grouped(groups, rows=1 << 20, unpacked_bytes=CHILD_BYTES):
            rows = functools.partial(_parquet_rows, path, piece, start, which)
            parts.append(ReadPart(f"{path.name}[{piece[0]}:{piece[-1] + 1}]", sum(groups[i][1] for i in piece), rows))
            start += sum(groups[i][0] for i in piece)
    return ReadPlan(parts, {"notes": [f"tokenised from {len(train)} train files, {len(held_out)} validation files"]})


def child_parquet(file: str, scratch: str, groups: list[int], start: int, which: str) -> None:
    """Write the tokens of some row groups, the first of which is document `start`, into a file for each split.

    which: "test" sends all documents there; "train" keeps every 20th for validation; "all" also one for test.
    """
    place = {"test": {}, "train": {0: "validation"}, "all": {0: "validation", VALIDATION_STRIDE // 2: "test"}}[which]
    other = "test" if which == "test" else "train"
    files = {split: Path(scratch, f"{split}.bin").open("wb") for split in SPLITS}
    for batch in encoded.parquet_batches(file, groups, {"text": "documents"}, BATCH_DOCUMENTS):
        for text in batch.column("text").to_pylist():
            if not isinstance(text, str):
                raise DataError.at(file, "a document that is no text", "leave it out", f"row {start}")
            split = place.get(start % VALIDATION_STRIDE, other)
            files[split].write(tokens.encode_document(text).astype("<u2").tobytes())
            start += 1
    for stream in files.values():
        stream.close()


def _parquet_rows(path: Path, groups: list[int], start: int, which: str, scratch: Path) -> Iterator[SplitRows]:
    sandbox.run(child_parquet, path, scratch, groups, start, which, seconds=CHILD_SECONDS)
    for split in SPLITS:
        file = scratch / f"{split}.bin"
        size = file.stat().st_size
        for piece in read_tokens(Shard(file, 0, size // 2)):
            yield split, {"tokens": piece}
