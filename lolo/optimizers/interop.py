"""Meta-parameters in the files of other tool chains: learned_optimization (flax msgpack) and PyLO (safetensors).

`small_fc` goes to both, `norm_fc` to PyLO's Celo2. They hold numbers only, not λ1, λ2 or the clock's limit: those are
the caller's to know (docs/interop.md). What is read is untrusted: sizes, names and dtypes are checked before use,
nothing is unpickled, and everything wrong is a `FileError`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lolo.files import disk
from lolo.files.disk import FileError
from lolo.files.tensors import Arrays, pack, unpack
from lolo.optimizers import norm_fc_spec, weights_file
from lolo.optimizers import small_fc_spec as spec

# PyLO's name of each layer -> (our weight, our bias). Its weights are stored [out, in], ours [in, out].
PYLO_LAYERS = {"network.input": ("w0", "b0"), "network.linear_0": ("w1", "b1"), "network.output": ("w2", "b2")}
NETWORK = tuple(spec.weight_shapes(1))
# PyLO's Celo2 stores [in, out] as we do, the first matrix in one piece per group of inputs, in our order.
CELO2_GROUPS = tuple(f"w0.{i}" for i in range(len(norm_fc_spec.GROUPS)))
CELO2_LAYERS = {"b0": "b0", "dense_w.0": "w1", "dense_b.0": "b1", "dense_w.1": "w2", "dense_b.1": "b2"}
CELO2_OUTPUTS = 3  # of which its optimizer reads the first

# flax writes an array as msgpack's extension type 1: a packed (shape, dtype name, bytes in C order).
FLAX_ARRAY = 1
LIMITS = {
    "max_str_len": 1 << 12,
    "max_bin_len": 1 << 26,
    "max_ext_len": 1 << 26,
    "max_array_len": 1 << 10,
    "max_map_len": 1 << 10,
}


class Extension(NamedTuple):
    """A value of an extension type, unread until it is asked for."""

    code: int
    data: bytes


def import_learned_optimization(path: str | Path) -> Arrays:
    """Meta-parameters of a `theta.state` of google/learned_optimization, or of Celo.

    Args:
      path: flax msgpack of `{nn: {~: {w0, b0, w1, b1, w2, b2}}, momentum_decays, rms_decays, adafactor_decays}`; the
        outer levels (also a checkpoint's `params`) and the three decay offsets may be missing.

    Returns: float32 arrays by our names. Raises disk.FileError, and ImportError where msgpack is not installed.

    >>> lolo.interop.export_learned_optimization(lolo.load("lolo-anytime").meta_params, "theta.state")
    >>> phi = lolo.interop.import_learned_optimization("theta.state")
    >>> phi["w0"].shape
    (39, 32)
    """
    tree = _read_msgpack(Path(path))
    top = _descend(tree, "params")
    network = _descend(_descend(top, "nn"), "~")
    unknown = {*network, *top} - {"nn", "~", *NETWORK, *spec.DECAY_OFFSETS}
    if unknown:
        raise FileError(f"{path}: has {', '.join(sorted(map(str, unknown)))}: not a small_fc.")
    found = {name: network[name] for name in NETWORK if name in network}
    found |= {name: top[name] for name in spec.DECAY_OFFSETS if name in top}
    return _checked({name: _flax_array(value, name, path) for name, value in found.items()}, path)


def export_learned_optimization(meta_params: Mapping[str, Any], path: str | Path, *, with_decays: bool = True) -> None:
    """Write meta-parameters as a `theta.state` that learned_optimization and Celo read.

    Args:
      meta_params: those of `small_fc`.
      with_decays: write decay offsets of zero where there are none. Zero offsets change nothing, and the reference's
        optimizer expects the entries; loaders of the later code, which has none, want False.

    Raises ValueError for arrays that are no `small_fc`, or with_decays=False where decays were learned.

    >>> lolo.interop.export_learned_optimization(lolo.load("lolo-anytime").meta_params, "theta.state")
    """
    arrays = _checked(dict(meta_params), "meta_params")
    decays = {name: arrays[name] for name in spec.DECAY_OFFSETS if name in arrays}
    if decays and not with_decays:
        raise ValueError("these meta-parameters have learned decays, without which they are another optimizer.")
    if with_decays and not decays:
        decays = {name: np.zeros(count, np.float32) for name, count in spec.DECAY_OFFSETS.items()}
    msgpack = _msgpack()

    def extension(array: NDArray[np.float32]) -> Any:
        parts = (array.shape, array.dtype.name, np.ascontiguousarray(array).tobytes())
        return msgpack.ExtType(FLAX_ARRAY, msgpack.packb(parts, use_bin_type=True))

    network = {name: extension(arrays[name]) for name in NETWORK}
    tree = {"nn": {"~": network}, **{name: extension(array) for name, array in decays.items()}}
    disk.write_bytes(Path(path), msgpack.packb(tree, use_bin_type=True))


def import_pylo(path: str | Path) -> Arrays:
    """Meta-parameters of a PyLO checkpoint in safetensors: `network.{input,linear_0,output}.{weight,bias}`.

    PyLO keeps decays in its optimizer, not in this file: there are none to read. Raises disk.FileError.

    >>> lolo.interop.export_pylo(lolo.load("lolo-anytime").meta_params, "pylo.safetensors")
    >>> phi = lolo.interop.import_pylo("pylo.safetensors")
    >>> optimizer = lolo.small_fc().optimizer(jax.tree.map(jnp.asarray, phi))
    """
    tensors, _ = unpack(_read(Path(path)), str(path))
    expected = [f"{layer}.{part}" for layer in PYLO_LAYERS for part in ("weight", "bias")]
    if sorted(tensors) != sorted(expected):
        raise FileError(f"{path}: has tensors {sorted(tensors)}; a PyLO network has {sorted(expected)}.")
    arrays = {}
    for layer, (weight, bias) in PYLO_LAYERS.items():
        arrays[weight] = np.ascontiguousarray(tensors[f"{layer}.weight"].T)
        arrays[bias] = tensors[f"{layer}.bias"]
    return _checked(arrays, path)


def export_pylo(meta_params: Mapping[str, Any], path: str | Path) -> None:
    """Write meta-parameters as a safetensors checkpoint of PyLO's network.

    Raises ValueError for arrays that are no `small_fc`, and for learned decays that are not zero: the file has no place
    for them.

    >>> lolo.interop.export_pylo(lolo.load("lolo-anytime").meta_params, "pylo.safetensors")
    """
    arrays = _checked(dict(meta_params), "meta_params")
    if any(arrays[name].any() for name in spec.DECAY_OFFSETS if name in arrays):
        raise ValueError(
            "these meta-parameters have learned decays, and a PyLO checkpoint holds none. Leave "
            f"{', '.join(spec.DECAY_OFFSETS)} out, and set the decays in PyLO's optimizer."
        )
    tensors = {}
    for layer, (weight, bias) in PYLO_LAYERS.items():
        tensors[f"{layer}.weight"], tensors[f"{layer}.bias"] = arrays[weight].T, arrays[bias]
    disk.write_bytes(Path(path), pack(tensors, {"format": "pt"}))


def import_celo2(path: str | Path) -> Arrays:
    """Meta-parameters of `norm_fc` from a Celo2 or ELO-Celo2 checkpoint of PyLO in safetensors (its `CELO2MLP`).

    Celo2 is norm_fc(orthogonal=True, baseline="none"). Its second and third output, which the optimizer does not read,
    are left out; `export_celo2` can put them back.

    Args:
      path: tensors `w0.0` ... `w0.13` [inputs of the group, H], `b0`, `dense_w.0` [H, H], `dense_b.0`, `dense_w.1`
        [H, 3], `dense_b.1`.

    Returns: float32 arrays by our names. Raises FileError.

    >>> celo2 = lolo.norm_fc(baseline="none")
    >>> lolo.interop.export_celo2(celo2.init(jax.random.key(0)), "celo2.safetensors")
    >>> phi = lolo.interop.import_celo2("celo2.safetensors")
    >>> optimizer = celo2.optimizer(jax.tree.map(jnp.asarray, phi))
    """
    tensors = _read_celo2(path)
    arrays = {"w0": np.concatenate([tensors[name] for name in CELO2_GROUPS])}
    arrays |= {ours: tensors[theirs] for theirs, ours in CELO2_LAYERS.items()}
    return {**arrays, "w2": np.ascontiguousarray(arrays["w2"][:, :1]), "b2": arrays["b2"][:1].copy()}


def export_celo2(meta_params: Mapping[str, Any], path: str | Path, unused_from: str | Path | None = None) -> None:
    """Write meta-parameters of `norm_fc` as a checkpoint that PyLO's CELO2_naive and ELO_CELO2_naive read.

    It has no place for the momentum baseline: weights that were meta-trained with it are another optimizer there.

    Args:
      unused_from: a Celo2 checkpoint of the same width, whose two unused outputs are kept: what `import_celo2` read
        from it is then written back bit for bit. None: zeros.

    Raises FileError, a ValueError, for arrays that are no `norm_fc`.

    >>> phi = lolo.norm_fc(baseline="none").init(jax.random.key(0))
    >>> lolo.interop.export_celo2(phi, "celo2.safetensors")
    """
    arrays = {name: np.asarray(array) for name, array in meta_params.items()}
    hidden = arrays["w1"].shape[0] if "w1" in arrays and arrays["w1"].ndim == 2 else 1
    weights_file.check_meta_params(arrays, "norm_fc", norm_fc_spec.weight_shapes(hidden), "meta_params")
    unused = CELO2_OUTPUTS - 1
    w2, b2 = np.zeros((hidden, unused), np.float32), np.zeros(unused, np.float32)
    if unused_from is not None:
        kept = _read_celo2(unused_from)
        w2, b2 = kept["dense_w.1"][:, 1:], kept["dense_b.1"][1:]
        if len(w2) != hidden:
            raise FileError(f"{unused_from}: has hidden={len(w2)}; the meta-parameters have {hidden}.")
    whole = arrays | {"w2": np.concatenate([arrays["w2"], w2], axis=1), "b2": np.concatenate([arrays["b2"], b2])}
    tensors = {name: whole["w0"][rows] for name, rows in zip(CELO2_GROUPS, norm_fc_spec.SLICES.values(), strict=True)}
    tensors |= {theirs: whole[ours] for theirs, ours in CELO2_LAYERS.items()}
    disk.write_bytes(Path(path), pack(tensors, {"format": "pt"}))


def _read_celo2(path: str | Path) -> Arrays:
    """The tensors of a CELO2MLP, once names, dtypes and shapes are right. Raises FileError."""
    tensors, _ = unpack(_read(Path(path)), str(path))
    hidden = tensors["b0"].size if "b0" in tensors else 0
    expected: dict[str, tuple[int, ...]] = {
        name: (count, hidden) for name, (_, count) in zip(CELO2_GROUPS, norm_fc_spec.GROUPS, strict=True)
    }
    expected |= {"b0": (hidden,), "dense_w.0": (hidden, hidden), "dense_b.0": (hidden,)}
    expected |= {"dense_w.1": (hidden, CELO2_OUTPUTS), "dense_b.1": (CELO2_OUTPUTS,)}
    if hidden < 1:
        raise FileError(f"{path}: has tensors {sorted(tensors)}; a CELO2MLP has {sorted(expected)}.")
    weights_file.check_meta_params(tensors, "CELO2MLP of PyLO", expected, str(path))
    return tensors


def _checked(arrays: Mapping[str, Any], source: str | Path) -> Arrays:
    """The arrays, once names, dtypes and shapes are those of `small_fc`. Raises disk.FileError."""
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    if missing := [name for name in NETWORK if name not in arrays]:
        raise FileError(f"{source}: has no {', '.join(missing)}; a small_fc has {', '.join(NETWORK)}.")
    if arrays["w1"].ndim != 2:
        raise FileError(f"{source}: 'w1' has shape {arrays['w1'].shape}; expected [hidden, hidden].")
    learner = spec.SmallFcSettings(
        hidden=int(arrays["w1"].shape[0]), learn_decays=any(name in arrays for name in spec.DECAY_OFFSETS)
    )
    weights_file.check_meta_params(arrays, learner.name, spec.shapes_of(learner), str(source))
    return arrays


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > weights_file.MAX_WEIGHTS_BYTES:
            raise FileError(f"{path}: {path.stat().st_size} bytes; at most {weights_file.MAX_WEIGHTS_BYTES} are read.")
        return path.read_bytes()
    except OSError as error:
        raise FileError(f"{path}: can't be read ({error.strerror}).") from error


def _msgpack() -> ModuleType:
    try:
        return importlib.import_module("msgpack")
    except ImportError as error:
        raise ImportError("files of learned_optimization need msgpack: pip install 'lolo[interop]'.") from error


def _unpack(content: bytes, source: str | Path) -> Any:
    """One msgpack value; whatever is wrong with it is a FileError."""
    msgpack = _msgpack()
    try:
        return msgpack.unpackb(content, ext_hook=Extension, raw=False, strict_map_key=True, **LIMITS)
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise FileError(f"{source}: not msgpack as flax writes it, or damaged ({reason}).") from error


def _read_msgpack(path: Path) -> dict[Any, Any]:
    tree = _unpack(_read(path), path)
    if not isinstance(tree, dict):
        raise FileError(f"{path}: holds a {type(tree).__name__}; expected a map of names to arrays.")
    return tree


def _descend(tree: dict[Any, Any], name: str) -> dict[Any, Any]:
    """The map of that name where there is one, else the tree itself."""
    return tree[name] if isinstance(tree.get(name), dict) else tree


def _flax_array(value: Any, name: str, source: str | Path) -> NDArray[np.float32]:
    """Read one array. Raises disk.FileError unless it is float32 and its size is that of its shape."""
    if not isinstance(value, Extension) or value.code != FLAX_ARRAY:
        raise FileError(f"{source}: {name!r} is not an array as flax writes it.")
    parts = _unpack(value.data, f"{source}, array {name!r}")
    if not isinstance(parts, list) or len(parts) != 3:
        raise FileError(f"{source}: array {name!r} is not (shape, dtype, bytes).")
    shape, dtype, data = parts
    whole = isinstance(shape, list) and all(type(extent) is int and 0 <= extent < 1 << 32 for extent in shape)
    if not whole or len(shape) > 2:
        raise FileError(f"{source}: array {name!r} has shape {shape!r}; expected one or two whole numbers.")
    if dtype != "float32":
        raise FileError(f"{source}: array {name!r} is {dtype!r}; expected float32.")
    if not isinstance(data, bytes) or len(data) != 4 * math.prod(shape):
        raise FileError(f"{source}: array {name!r} of shape {shape} needs {4 * math.prod(shape)} bytes.")
    return np.frombuffer(data, "<f4").astype(np.float32).reshape(shape)
