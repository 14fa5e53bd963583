"""Weights as one safetensors file, shipped, on a disk or on the Hugging Face Hub: φ, architecture, recipe, model card.

NumPy only.

Whatever is read is untrusted: sizes, names, dtypes and sums are checked before use, and everything wrong is a
`FileError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from lolo.files import disk, settings, tensors
from lolo.files.disk import FileError
from lolo.files.settings import Alternative, RecipeError, UserCodeError

WEIGHTS_FORMAT = "lolo-weights"
WEIGHTS_VERSION = 2  # 1, which is still read, had no sum over learner, recipe and card
ABOUT = ("learner", "recipe", "card")
MAX_WEIGHTS_BYTES = 64 << 20
SHIPPED = Path(__file__).parents[1] / "weights"
DEFAULT_WEIGHTS = "lolo-norm-2"  # of SHIPPED, what `lolo.load()` and `lolo.torch.LoLO` take when nothing is said
HUB_FILE = "model.safetensors"  # of a repository, when no file is named
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./-]+\.safetensors))?"
)


@runtime_checkable
class ArchitectureRow(Protocol):
    """What weights are checked against, of an architecture: in JAX's table and in PyTorch's."""

    @property
    def settings(self) -> type[Any]: ...  # a subclass of Alternative

    @property
    def shapes(self) -> Callable[[Any], dict[str, tuple[int, ...]]]: ...  # learner -> names and shapes of φ

    @property
    def check(self) -> Callable[[Any], None]: ...  # raises RecipeError for a learner that can't be


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
    wanted = parse_hub(name_or_path) if isinstance(name_or_path, str) else None
    if wanted is None:
        names = ", ".join(shipped_weights()) or "none"
        raise FileError(
            f"{name_or_path}: no such weights file. Give a path, a name that ships with lolo ({names}), or user/repo "
            "of the Hugging Face Hub."
        )
    return fetch_from_hub(wanted)


class HubFile(NamedTuple):
    """One file of a repository."""

    repo: str  # user/repo
    revision: str | None  # branch, tag or commit; None: the newest
    file: str


def parse_hub(name: str) -> HubFile | None:
    """The Hub file that `user/repo[@revision][/file.safetensors]` means; None for what can only be a local path."""
    match = _HUB_ID.fullmatch(name)
    if match is None or (match["file"] is None and name.endswith(".safetensors")):
        return None
    # A mistyped path in a folder that exists must not ask the network.
    if Path(name).exists() or Path(name.partition("/")[0]).exists():
        return None
    return HubFile(match["repo"], match["revision"], match["file"] or HUB_FILE)


def fetch_from_hub(wanted: HubFile) -> Path:
    """The file on this machine, fetched by huggingface_hub (extra `hub`) unless its cache has it.

    Raises FileError: huggingface_hub is missing, no network, no such repository, revision or file.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise FileError(
            f"{wanted.repo}: no such file or folder here, and to get it from the Hugging Face Hub the extra is "
            "missing: pip install 'lolo[hub]'."
        ) from error
    at = f"{wanted.repo} at {wanted.revision}" if wanted.revision else wanted.repo
    try:
        return Path(huggingface_hub.hf_hub_download(wanted.repo, wanted.file, revision=wanted.revision))
    except errors.LocalEntryNotFoundError as error:
        raise FileError(
            f"{at}: the Hugging Face Hub can't be reached, and {wanted.file} is not in its cache. Connect and try "
            "again, or give the path of a file."
        ) from error
    except errors.EntryNotFoundError as error:
        raise FileError(
            f"{at}: has no {wanted.file} on the Hugging Face Hub; name the file: {wanted.repo}/NAME.safetensors."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileError(f"{wanted.repo}: has no revision {wanted.revision} on the Hugging Face Hub.") from error
    except errors.RepositoryNotFoundError as error:  # a gated one is of this class too
        raise FileError(
            f"{wanted.repo}: no such file here, and no such repository on the Hugging Face Hub that you may read. "
            "Mind the spelling; for a private one log in with `hf auth login`."
        ) from error
    except (OSError, ValueError) as error:  # the connection, the server, the disk, or a name the Hub does not allow
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FileError(
            f"{at}: can't be had from the Hugging Face Hub ({reason}). Check the name and the connection."
        ) from error


def _json_object(metadata: dict[str, str], key: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: metadata {key!r} is not JSON.") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: metadata {key!r} is not a JSON object.")
    return value


def check_learner(
    meta_params: tensors.Arrays, data: Any, rows: Mapping[str, ArchitectureRow], source: str
) -> Alternative:
    """The architecture stored with weights, one of `rows`. Raises FileError unless it can be, and φ fits it."""
    types = {name: row.settings for name, row in rows.items()}
    try:
        learner = settings.parse_alternative(types, data, "learner")
        (row,) = (row for row in rows.values() if row.settings is type(learner))
        row.check(learner)
        shapes = row.shapes(learner)
    except (RecipeError, UserCodeError) as error:
        raise FileError(f"{source}: {error}") from error
    check_meta_params(meta_params, learner.name, shapes, source)
    return learner


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
