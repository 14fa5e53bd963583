"""Readers of images in HDF5 and parquet files. They run in child processes: see `lolo.data.sandbox`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lolo.data import rgb32
from lolo.data.errors import DataError, library_missing
from lolo.data.read_plan import check_labels

OFFICIAL_HDF5 = (1_281_167, 50_000, 100_000)
"""Examples of ImageNet's train, validation and test sets."""

BATCH_ROWS = 1000
CURE = "fetch the file again"
HDF5_CURE = "give a file with `encoded_images` (JPEG bytes) and `targets` in the order train, validation, test"
PARQUET_CURE = "give files with `image` (encoded bytes in a struct, or uint8 lists) and `label`"


def _hdf5(file: str) -> tuple[Any, Any, Any]:
    """The open file, its images and its labels."""
    try:
        import h5py
    except ImportError:
        raise library_missing("h5py", "reading HDF5") from None
    content = h5py.File(file, "r")
    datasets = []
    for name in ("encoded_images", "targets"):
        # Soft and external links, external storage and virtual data sets could all point at other files.
        if not isinstance(content.get(name, getlink=True), h5py.HardLink):
            raise DataError.at(file, f"has no data set {name!r} of its own", HDF5_CURE)
        dataset = content[name]
        if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
            raise DataError.at(file, f"{name!r} is not a data set of its own", HDF5_CURE)
        datasets.append(dataset)
    images, labels = datasets
    element = h5py.check_vlen_dtype(images.dtype)
    if images.ndim != 1 or element != np.uint8:
        problem = f"`encoded_images` is {images.dtype} {images.shape}, expected bytes of variable length [N]"
        raise DataError.at(file, problem, HDF5_CURE)
    if labels.shape not in ((len(labels),), (len(labels), 1)) or labels.dtype.kind not in "ui":
        raise DataError.at(file, f"`targets` is {labels.dtype} {labels.shape}, expected whole numbers [N]", HDF5_CURE)
    if len(labels) > len(images):
        raise DataError.at(file, f"{len(labels):,} targets for {len(images):,} images", HDF5_CURE)
    return content, images, labels


def hdf5_sizes(file: str, scratch: str) -> tuple[int, int]:
    """Sizes of the train and validation sets, from the `split` attribute of Fuel, else the published ones."""
    content, images, labels = _hdf5(file)
    official_train, official_validation, official_test = OFFICIAL_HDF5
    train, validation = official_train, official_train + official_validation
    if "split" in content.attrs:
        stops = {
            str(row["split"], "ascii"): (int(row["start"]), int(row["stop"]))
            for row in content.attrs["split"]
            if row["source"] == b"encoded_images"
        }
        (start, train), (middle, validation) = stops.get("train", (-1, 0)), stops.get("valid", (-1, 0))
        if start != 0 or middle != train:
            raise DataError.at(file, f"the `split` attribute says {stops}", "order the examples train, valid, test")
    elif len(images) not in (validation, validation + official_test):
        known = f"{validation:,} or {validation + official_test:,}"
        problem = f"{len(images):,} images and no `split` attribute, expected {known}"
        raise DataError.at(file, problem, "add Fuel's `split` attribute, or give the whole file")
    if not 0 < train <= validation <= len(labels):
        raise DataError.at(file, f"{len(labels):,} targets for splits that end at {train:,} and {validation:,}", CURE)
    return train, validation - train


def hdf5_rows(file: str, scratch: str, start: int, stop: int) -> None:
    """Write examples start..stop-1."""
    _, images, labels = _hdf5(file)
    out = rgb32.ChildWriter(scratch)
    for first in range(start, stop, BATCH_ROWS):
        last = min(first + BATCH_ROWS, stop)
        targets = np.asarray(labels[first:last]).reshape(-1)
        check_labels(targets, 0, rgb32.CLASSES - 1, file, first)
        out.write(_small([bytes(image) for image in images[first:last]], f"{file}, image", first), targets)
    out.close()


def _small(encoded: list[bytes], place: str, start: int) -> NDArray[np.uint8]:
    """Files of images → uint8 [n, 32, 32, 3]; the first is number `start` at `place`."""
    decoded = (rgb32.open_image(content, f"{place} {start + i}") for i, content in enumerate(encoded))
    return np.stack([rgb32.shrink(image, rgb32.SIDE) for image in decoded])


def _parquet(file: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise library_missing("pyarrow", "reading parquet") from None
    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    return pyarrow.parquet.ParquetFile(file, pre_buffer=False)


def parquet_groups(file: str, scratch: str) -> list[tuple[int, int]]:
    """Rows and unpacked bytes of each row group, as the file's end says."""
    metadata = _parquet(file).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [(group.num_rows, group.total_byte_size) for group in groups]


def parquet_batches(file: str, groups: list[int], columns: dict[str, str], rows: int) -> Any:
    """Record batches of some row groups. columns: name -> what it holds, for the error."""
    content = _parquet(file)
    names = content.schema_arrow.names
    for name, what in columns.items():
        if name not in names:
            raise DataError.at(file, f"columns {names[:8]} without {name!r} ({what})", "give files that have it")
    return content.iter_batches(rows, row_groups=groups, columns=list(columns), use_threads=False)


def parquet_images(file: str, scratch: str, groups: list[int], start: int) -> None:
    """Write the examples of some row groups, the first of which is example `start` of the file."""
    out = rgb32.ChildWriter(scratch)
    columns = {"image": "encoded bytes or uint8 lists", "label": "0..999"}
    for batch in parquet_batches(file, groups, columns, BATCH_ROWS):
        labels = batch.column("label")
        images = batch.column("image")
        if labels.null_count or images.null_count:
            raise DataError.at(file, "rows without an image or label", PARQUET_CURE)
        targets = labels.to_numpy(zero_copy_only=False)
        if targets.dtype.kind not in "ui":
            raise DataError.at(file, f"labels of type {labels.type}, expected whole numbers", PARQUET_CURE)
        check_labels(targets, 0, rgb32.CLASSES - 1, file, start)
        out.write(_parquet_pixels(file, images, start), targets)
        start += len(targets)
    out.close()


def _parquet_pixels(file: str, images: Any, start: int) -> NDArray[np.uint8]:
    """A column of images → uint8 [n, 32, 32, 3]."""
    import pyarrow

    n = len(images)
    if isinstance(images, pyarrow.ExtensionArray):  # such as the Array3D of Hugging Face
        images = images.storage
    if pyarrow.types.is_struct(images.type) and images.type.get_field_index("bytes") >= 0:
        encoded = images.field("bytes").to_pylist()
        if not all(isinstance(e, bytes) for e in encoded):
            raise DataError.at(file, "images that are names of other files, or empty", PARQUET_CURE)
        return _small(encoded, f"{file}, row", start)
    outer = []
    while isinstance(images, pyarrow.ListArray | pyarrow.LargeListArray | pyarrow.FixedSizeListArray):
        # Rows must be of one length each: 32 × 32 × 3, 3 × 32 × 32 or 3072 numbers.
        lengths = set(images.value_lengths().to_pylist())
        if images.null_count or len(lengths) != 1:
            raise DataError.at(
                file, f"uint8 lists of lengths {sorted(map(str, lengths))[:5]} in one place", PARQUET_CURE
            )
        outer.append(lengths.pop())
        images = images.flatten()
    numbers = images.to_numpy(zero_copy_only=False)
    sides = {(rgb32.SIDE, rgb32.SIDE, 3), (3, rgb32.SIDE, rgb32.SIDE), (rgb32.PIXELS,)}
    if images.null_count or numbers.dtype != np.uint8 or tuple(outer) not in sides:
        raise DataError.at(file, f"images as {images.type} lists of {outer}, expected uint8 32 × 32 × 3", PARQUET_CURE)
    if outer[-1] == 3:
        return numbers.reshape(n, rgb32.SIDE, rgb32.SIDE, 3)
    return rgb32.from_planes(numbers.reshape(n, rgb32.PIXELS))  # flat rows are planes, as in the archives
