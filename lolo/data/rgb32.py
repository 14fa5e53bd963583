"""RGB images of 32×32: their layout, decoding, and shrinking of larger ones."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lolo.data.errors import DataError, library_missing

CLASSES = 1000  # of ImageNet
SIDE = 32
PIXELS = 3 * SIDE * SIDE
CHUNK_ROWS = 4096
MAX_ENCODED_BYTES = 64 << 20
MAX_IMAGE_PIXELS = 1 << 26
IMAGES_FILE = "images.bin"
LABELS_FILE = "labels.bin"


def from_planes(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, 3072] in planes of red, green and blue → [n, 32, 32, 3]."""
    return np.ascontiguousarray(data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1))


def open_image(encoded: bytes, place: str) -> Any:
    """A Pillow image, decoded, from a file's bytes. Call it in a child process: see `lolo.data.sandbox`."""
    try:
        from PIL import Image
    except ImportError:
        raise library_missing("Pillow", "reading images") from None
    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS
    if len(encoded) > MAX_ENCODED_BYTES:
        raise DataError.at(place, f"an image of {len(encoded):,} bytes", "leave it out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG", "TGA"))
            image.load()
        except MemoryError:
            raise
        except Exception as error:
            problem = f"an image that can't be decoded ({type(error).__name__}: {error})"[:300]
            raise DataError.at(place, problem, "fetch the file again, or leave the image out") from error
    return image


def shrink(image: Any, side: int) -> NDArray[np.uint8]:
    """uint8 [side, side, 3]. Each pixel is the mean over a box, whatever the image's shape.

    Grey images get three equal channels, palettes their colours, 16 bits the nearest of 8; transparency is dropped.

    Reference: the box method of Chrabaszcz et al., of which the published archives are made.
    """
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits of grey; Pillow would turn all above 255 white
        image = Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    rgb = image.convert("RGB")
    return np.asarray(rgb if rgb.size == (side, side) else rgb.resize((side, side), Image.Resampling.BOX), np.uint8)


class ChildWriter:
    """Files in which a child process writes its rows: images uint8 [n, 32, 32, 3] and labels uint16 [n]."""

    def __init__(self, scratch: str) -> None:
        self.images = Path(scratch, IMAGES_FILE).open("wb")
        self.labels = Path(scratch, LABELS_FILE).open("wb")

    def write(self, images: NDArray[np.uint8], labels: NDArray[Any]) -> None:
        self.images.write(np.ascontiguousarray(images, np.uint8).tobytes())
        self.labels.write(labels.astype("<u2").tobytes())

    def close(self) -> None:
        self.images.close()
        self.labels.close()
