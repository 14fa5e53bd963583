"""Weights as one safetensors file: φ, architecture, recipe and model card. NumPy only.

Whatever is read is untrusted: sizes, names, dtypes and sums are checked before use, and everything wrong is a
`FileError`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lolo.files import disk, tensors
from lolo.files.disk import FileError
from lolo.optimizers import hub
from lolo.optimizers.hub import HubError

WEIGHTS_FORMAT = "lolo-weights"
WEIGHTS_VERSION = 2  # 1, which is still read, had no sum over learner, recipe and card
ABOUT = ("learner", "recipe", "card")
MAX_WEIGHTS_BYTES = 64 << 20
SHIPPED = Path(__file__).parents[1] / "weights"
DEFAULT_WEIGHTS = "lolo-anytime"  # of SHIPPED, what `lolo.load()` and `lolo.torch.LoLO` take when nothing is said


class WeightsFile(NamedTuple):
    """Meta-parameters φ and what is known about them."""

    meta_params: tensors.Arrays  # float32
    learner: dict[str, Any]  # the architecture's settings: name, ...
    recipe: dict[str, Any]  # of the meta-training, {} if unknown
    card: dict[str, Any]  # the model card, what people should know: data, results, realised steps, ...
    sha256: str  # of the meta-parameters


def write_weights(
    path: Path | str,
    meta_params: tensors.Arrays,
    *,
    learner: dict[str, Any],
    recipe: dict[str, Any] | None = None,
    card: dict[str, Any] | None = None,
) -> None:
    """Write meta-parameters with their architecture, recipe and card as one safetensors file."""
    arrays = {name: tensors.contiguous(np.asarray(x, np.float32)) for name, x in meta_params.items()}
    about = {"learner": learner, "recipe": recipe or {}, "card": disk.json_safe(card or {})}
    metadata = {
        "format": WEIGHTS_FORMAT,
        "format_version": str(WEIGHTS_VERSION),
        "sha256": tensors.digest(arrays),
        **{key: json.dumps(value) for key, value in about.items()},
    }
    disk.write_bytes(Path(path), tensors.pack(arrays, metadata | {"about_sha256": about_digest(metadata)}))


def about_digest(metadata: dict[str, str]) -> str:
    """sha256 over what weights say about themselves, so that a flipped bit there is recognised too."""
    return hashlib.sha256("\0".join(metadata.get(key, "") for key in ABOUT).encode(errors="replace")).hexdigest()


def shipped_weights() -> list[str]:
    """Names of the weights inside the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.safetensors"))


def read_weights(name_or_path: str | Path) -> WeightsFile:
    """Weights by the name of shipped ones, from a file, or from the Hub (`user/repo[@revision][/file.safetensors]`).

    Whether φ fits the architecture is for `architecture.check_weights` to say.
    Raises FileError: no such file or name, not to be had from the Hub, not ours, another version, damaged, or numbers
    that are not finite.
    """
    path = _locate(name_or_path)
    size = path.stat().st_size
    if size > MAX_WEIGHTS_BYTES:
        raise FileError(f"{path}: {size} bytes; weights have at most {MAX_WEIGHTS_BYTES}.")
    arrays, metadata = tensors.unpack(path.read_bytes(), str(path))
    if metadata.get("format") != WEIGHTS_FORMAT:
        raise FileError(f"{path}: safetensors, but not lolo weights. Weights of other tools: see lolo.interop.")
    version = metadata.get("format_version")
    if version not in ("1", str(WEIGHTS_VERSION)):
        raise FileError(
            f"{path}: weights of format_version {version!r}; this lolo reads 1 to {WEIGHTS_VERSION}. "
            "Read it with the lolo that wrote it, or upgrade lolo."
        )
    if metadata.get("sha256") != tensors.digest(arrays):
        raise FileError(f"{path}: the sha256 of its numbers is not the one it states: damaged. Get the file again.")
    if version != "1" and metadata.get("about_sha256") != about_digest(metadata):
        raise FileError(f"{path}: the sha256 of learner, recipe and card is not the one it states: damaged.")
    learner, recipe, card = (_json_object(metadata, key, path) for key in ABOUT)
    check_finite(arrays, str(path))
    return WeightsFile(arrays, learner, recipe, card, metadata["sha256"])


def _locate(name_or_path: str | Path) -> Path:
    if str(name_or_path) in shipped_weights():
        return SHIPPED / f"{name_or_path}.safetensors"
    path = Path(name_or_path)
    if path.is_file():
        return path
    wanted = hub.parse(name_or_path) if isinstance(name_or_path, str) else None
    if wanted is None:
        names = ", ".join(shipped_weights()) or "none"
        raise FileError(
            f"{name_or_path}: no such weights file. Give a path, a name that ships with lolo ({names}), or user/repo "
            "of the Hugging Face Hub."
        )
    try:
        return hub.fetch(wanted)
    except HubError as error:
        raise FileError(str(error)) from error


def _json_object(metadata: dict[str, str], key: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: metadata {key!r} is not JSON.") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: metadata {key!r} is not a JSON object.")
    return value


def check_meta_params(arrays: tensors.Arrays, name: str, shapes: dict[str, tuple[int, ...]], source: str) -> None:
    """Raise FileError unless the arrays are finite and have the names and shapes of the architecture `name`."""
    found = {name: tuple(x.shape) for name, x in arrays.items()}
    if found != shapes:
        raise FileError(f"{source}: has tensors {found}; a {name} has {shapes}.")
    check_finite(arrays, source)


def check_finite(arrays: tensors.Arrays, source: str) -> None:
    """Raise FileError unless all arrays are float32 and finite."""
    for name, array in arrays.items():
        if array.dtype != np.float32:
            raise FileError(f"{source}: tensor {name!r} is {array.dtype}; expected float32.")
        if not np.isfinite(array).all():
            raise FileError(f"{source}: tensor {name!r} has numbers that are not finite.")
