"""Checkpoints: complete or absent, verified when they are read."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lolo.files import disk, tensors
from lolo.files.disk import FileError
from lolo.files.settings import diff, differences
from lolo.method import meta, replay
from lolo.optimizers import architecture
from lolo.runtime import environment, parallel
from lolo.training import recipes, run_folder, slots
from lolo.training.recipes import Recipe
from lolo.training.run_folder import RunError

CHECKPOINT_VERSION = 1
LARGE_CHECKPOINT = 32 << 20  # bytes from which on a thread writes it


Agree = Callable[[Any, Callable[[list[Any]], Any]], Any]
"""(a value of this process, decide) -> what process 0 decided on the values of all; see `ProcessGroup.agree`."""


def agree_alone(mine: Any, decide: Callable[[list[Any]], Any]) -> Any:
    """The `Agree` of a single process."""
    return decide([mine])


def write_checkpoint(
    run: Path,
    step: int,
    arrays: tensors.Arrays,
    about: dict[str, Any],
    keep: int = 3,
    *,
    own: tensors.Arrays | None = None,
    rows: tuple[int, int] = (0, 0),
    agree: Agree = agree_alone,
) -> Path:
    """Write a checkpoint completely or not at all, and drop all but the newest `keep`.

    Args:
      arrays: what every process holds alike; process 0 writes it.
      own: what this process alone holds: the given rows of arrays whose first axis is spread over processes.
      agree: how processes agree. All must call this, with one `run` on a file system that all see.

    Raises: FileError if processes hold different `arrays`; OSError.
    """
    draft = Path(agree(None, lambda _: str(_draft(run, step))))
    mine = {"arrays": tensors.digest(arrays), "files": {}}
    try:
        if own:
            name = f"slots-{rows[0]:08d}.safetensors"
            mine["files"] = {name: {**_write_synced(draft / name, tensors.pack(own)), "rows": list(rows)}}
        return Path(agree(mine, lambda held: str(_finish(run, step, draft, arrays, held, about, keep))))
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _draft(run: Path, step: int) -> Path:
    final = run_folder.checkpoint_folder(run, step)
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(".*.tmp"):  # by processes that were killed while they wrote
        shutil.rmtree(left, ignore_errors=True)
    draft = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    draft.mkdir()
    return draft


def _write_synced(path: Path, content: bytes) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _finish(
    run: Path, step: int, draft: Path, arrays: tensors.Arrays, held: list[Any], about: dict[str, Any], keep: int
) -> Path:
    unequal = [index for index, other in enumerate(held) if other["arrays"] != held[0]["arrays"]]
    if unequal:
        raise FileError(
            f"at outer step {step} process {unequal[0]} holds other numbers than process 0 where both must be equal: "
            "these hosts do not compute the same bits. Use hosts of one kind, with the same XLA_FLAGS. Nothing was "
            "written."
        )
    parts = {"state.safetensors": _write_synced(draft / "state.safetensors", tensors.pack(arrays))}
    for other in held:
        parts |= other["files"]
    manifest = {"format_version": CHECKPOINT_VERSION, "outer_step": step, "files": parts, **about}
    disk.write_json(draft / "manifest.json", manifest)
    final = run_folder.checkpoint_folder(run, step)
    if final.exists():  # written before by a run that ended later than this one resumed from
        shutil.rmtree(final)
    os.rename(draft, final)
    disk.sync(final.parent)
    for step_ in run_folder.checkpoints(run)[:-keep]:
        shutil.rmtree(run_folder.checkpoint_folder(run, step_), ignore_errors=True)
    return final


def read_checkpoint(run: Path, step: int, rows: tuple[int, int] | None = None) -> tuple[tensors.Arrays, dict[str, Any]]:
    """Arrays and manifest of one checkpoint, verified. Raises FileError.

    Args:
      rows: of the arrays that processes wrote in parts, only these rows; all, if None. The parts need not be those of
        as many processes.
    """
    folder, manifest, parts = _described(run, step)
    arrays, _ = tensors.unpack(
        _read_verified(folder / "state.safetensors", manifest), str(folder / "state.safetensors")
    )
    stop = parts[-1].stop if parts else 0
    first, end = rows or (0, stop)
    if parts and end > stop:
        raise FileError(f"{folder}/manifest.json: has {stop} rows, and rows up to {end} are asked for.")
    pieces: list[tensors.Arrays] = []
    for part in parts:
        if part.start < end and part.stop > first:
            content, _ = tensors.unpack(_read_verified(folder / part.name, manifest), str(folder / part.name))
            if any(x.ndim == 0 or len(x) != part.stop - part.start for x in content.values()):
                raise FileError(f"{folder / part.name}: does not have the rows that manifest.json states.")
            cut = slice(max(first - part.start, 0), end - part.start)
            pieces.append({name: x[cut] for name, x in content.items()})
    kinds = [{name: (x.dtype, x.shape[1:]) for name, x in piece.items()} for piece in pieces]
    if any(kind != kinds[0] or set(kind) & set(arrays) for kind in kinds):
        names = ", ".join(part.name for part in parts)
        raise FileError(f"{folder}: {names} must hold the same tensors, and none of state.safetensors.")
    for name in pieces[0] if pieces else ():
        arrays[name] = np.concatenate([piece[name] for piece in pieces])
    return arrays, manifest


class _Part(NamedTuple):
    start: int
    stop: int
    name: str


def _described(run: Path, step: int) -> tuple[Path, dict[str, Any], list[_Part]]:
    """Folder, manifest and parts in the order of their rows. Raises FileError."""
    folder = run_folder.checkpoint_folder(run, step)
    manifest = disk.read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("format_version") != CHECKPOINT_VERSION:
        raise FileError(f"{folder}/manifest.json: not a checkpoint of format_version {CHECKPOINT_VERSION}.")
    if manifest.get("outer_step") != step:
        raise FileError(f"{folder}/manifest.json: is of outer step {manifest.get('outer_step')!r}, not {step}.")
    described = manifest.get("files")
    if not isinstance(described, dict) or "state.safetensors" not in described:
        raise FileError(f"{folder}/manifest.json: does not describe state.safetensors.")
    parts = []
    for name, entry in described.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "sha256" not in entry:
            raise FileError(f"{folder}/manifest.json: does not describe {name!r}.")
        if name == "state.safetensors":
            continue
        bounds = entry.get("rows")
        if not (isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(bound, int) for bound in bounds)):
            raise FileError(f"{folder}/manifest.json: {name!r} has no rows.")
        if name != f"slots-{bounds[0]:08d}.safetensors":  # also keeps every path inside the folder
            raise FileError(f"{folder}/manifest.json: {name!r} is no name of rows {bounds}.")
        parts.append(_Part(bounds[0], bounds[1], name))
    parts.sort()
    ends = [0, *(part.stop for part in parts)]
    if any(part.start != end or part.stop <= part.start for part, end in zip(parts, ends, strict=False)):
        raise FileError(f"{folder}/manifest.json: its parts do not hold all rows once.")
    return folder, manifest, parts


def _read_verified(path: Path, manifest: dict[str, Any]) -> bytes:
    expected = manifest["files"][path.name]
    try:
        if path.stat().st_size != expected["bytes"]:
            raise FileError(f"{path}: {path.stat().st_size} bytes, manifest.json says {expected['bytes']}: truncated.")
        content = path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: can't be read ({error.strerror}).") from error
    if hashlib.sha256(content).hexdigest() != expected["sha256"]:
        raise FileError(f"{path}: its sha256 is not that of manifest.json: damaged.")
    return content


def newest_complete(run: Path, warn: Callable[[str], None]) -> int | None:
    """Outer step of the newest complete checkpoint; `warn` is called for each that is not. None if there is none."""
    for step in reversed(run_folder.checkpoints(run)):
        try:
            folder, manifest, parts = _described(run, step)
            for name in ("state.safetensors", *(part.name for part in parts)):
                _read_verified(folder / name, manifest)
            return step
        except FileError as error:
            warn(f"{error} Using the checkpoint before it.")
    return None


def newest_checkpoint(
    run: Path,
    warn: Callable[[str], None],
    rows: tuple[int, int] | None = None,
    agree: Agree = agree_alone,
) -> tuple[tensors.Arrays, dict[str, Any]] | None:
    """The newest complete checkpoint; `warn` is called for each that is not. None if there is none."""
    step = agree(None, lambda _: newest_complete(run, warn))
    return None if step is None else read_checkpoint(run, step, rows)


def name_of(path: tuple[Any, ...]) -> str:
    """The name of a leaf of a MetaState in a checkpoint."""
    # Checkpoints of format 1 know nothing of `Slots.local`, nor of push rules.
    return jax.tree_util.keystr(path).replace(".local", "").replace(".push.", ".push_")


def state_arrays(state: meta.MetaState) -> tuple[tensors.Arrays, tensors.Arrays]:
    """A MetaState as named arrays, for a checkpoint: what lies on every device, and this process's rows of the rest."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    specs = jax.tree.leaves(slots.state_specs(state))
    everywhere: tensors.Arrays = {}
    own: tensors.Arrays = {}
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        (own if parallel.AXIS in spec else everywhere)[name_of(path)] = parallel.local_part(leaf)
    return everywhere, own


def state_from_arrays(arrays: tensors.Arrays, like: meta.MetaState, source: str) -> meta.MetaState:
    """The MetaState of `state_arrays`; `like` gives names, shapes and dtypes. Raises FileError.

    A score of the push rule that is not there starts at zero, as it does in an unroll.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    named = [(name_of(path), leaf) for path, leaf in leaves]
    scores = tuple(f".push_{field}" for field in replay.Struggle._fields)
    arrays = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in named if name.endswith(scores)} | arrays
    if set(arrays) != {name for name, _ in named}:
        differing = sorted(set(arrays) ^ {name for name, _ in named})
        raise FileError(f"{source}: tensors do not match the recipe; first difference: {differing[0]!r}.")
    for name, leaf in named:
        if arrays[name].shape != leaf.shape or arrays[name].dtype != leaf.dtype:
            raise FileError(
                f"{source}: {name!r} is {arrays[name].dtype}{arrays[name].shape}, expected {leaf.dtype}{leaf.shape}."
            )
    return jax.tree_util.tree_unflatten(structure, [arrays[name] for name, _ in named])


def state_shapes(state: meta.MetaState, rows: tuple[int, int]) -> meta.MetaState:
    """Shapes of what `state_arrays` gives where these rows lie."""

    def shape(leaf: Any, spec: Any) -> jax.ShapeDtypeStruct:
        full = tuple(leaf.shape)
        return jax.ShapeDtypeStruct((rows[1] - rows[0], *full[1:]) if parallel.AXIS in spec else full, leaf.dtype)

    return jax.tree.map(shape, state, slots.state_specs(state))


def check_manifest(
    manifest: dict[str, Any], run: Path, recipe: Recipe, log: Callable[[str], None], other_path: bool = False
) -> None:
    """Raise RunError if a checkpoint is of another recipe, or of another path of the learner's update.

    Logs it if it is of other versions, and of another path where that is wanted (`other_path`).
    """
    changed = diff(recipes.from_dict(manifest.get("recipe")), recipe)
    if changed:
        differs = differences(changed, "in the checkpoint", "now")
        raise RunError(f"{run}/recipe.json is not the recipe of the checkpoint ({differs}). Undo the change.")
    if manifest.get("versions") != environment.versions():
        log(f"versions differ from the checkpoint's ({manifest.get('versions')}): the result may differ in last bits.")
    before, now = manifest.get("path", "plain"), architecture.path_of(recipe.learner)
    if before != now and not other_path:
        raise RunError(
            f"{run} was meta-trained on the path {before!r}, and here the learner's update runs on {now!r}, which "
            f"differs in last bits. Resume it where {before!r} runs ($LOLO_KERNEL chooses), or with --other-path."
        )
    if before != now:
        log(f"the path differs from the checkpoint's ({before}; now {now}): the result may differ in last bits.")
