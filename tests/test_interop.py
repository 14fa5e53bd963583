"""Weights go to learned_optimization's and PyLO's files and back; damaged files give the one documented error."""

import pathlib
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lolo.files.disk import FileError
from lolo.files.tensors import pack, unpack
from lolo.optimizers import interop, norm_fc_spec, weights_file
from lolo.optimizers import small_fc_spec as spec

GOLDEN = pathlib.Path(__file__).parent / "golden" / "small_fc.npz"
CELO2 = np.load(pathlib.Path(__file__).parent / "golden" / "celo2.npz")
FLAX = (interop.import_learned_optimization, interop.export_learned_optimization)
PYLO = (interop.import_pylo, interop.export_pylo)
CELO2_FILES = (interop.import_celo2, interop.export_celo2)
ALL = pytest.mark.parametrize(
    ("read", "write"), [FLAX, PYLO, CELO2_FILES], ids=["learned_optimization", "pylo", "celo2"]
)


@pytest.fixture
def msgpack():
    return pytest.importorskip("msgpack")


def draw(hidden=32, learn_decays=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = spec.weight_shapes(hidden, learn_decays=learn_decays)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def draw_for(write, hidden):
    """Meta-parameters of the architecture that `write` takes."""
    if write is not interop.export_celo2:
        return draw(hidden)
    rng = np.random.default_rng(0)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in norm_fc_spec.weight_shapes(hidden).items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == np.float32 and ours[name].flags.c_contiguous
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def flax_array(array, msgpack):
    """As flax.serialization writes it, by hand: extension type 1 of a packed (shape, dtype name, bytes)."""
    array = np.asarray(array)
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes()), use_bin_type=True))


def write_flax(path, tree, msgpack):
    def convert(node):
        return {k: convert(v) for k, v in node.items()} if isinstance(node, dict) else flax_array(node, msgpack)

    path.write_bytes(msgpack.packb(convert(tree), use_bin_type=True))
    return path


@pytest.mark.parametrize("learn_decays", [False, True])
def test_learned_optimization_files_come_back_as_they_went(tmp_path, msgpack, learn_decays):
    phi = draw(learn_decays=learn_decays)
    interop.export_learned_optimization(phi, tmp_path / "theta.state", with_decays=learn_decays)
    assert_equal(interop.import_learned_optimization(tmp_path / "theta.state"), phi)


def test_decays_of_zero_are_added_for_the_reference(tmp_path, msgpack):
    phi = draw()
    interop.export_learned_optimization(phi, tmp_path / "theta.state")
    zeros = {name: np.zeros(count, np.float32) for name, count in spec.DECAY_OFFSETS.items()}
    assert_equal(interop.import_learned_optimization(tmp_path / "theta.state"), phi | zeros)
    with pytest.raises(ValueError, match="learned decays"):
        interop.export_learned_optimization(draw(learn_decays=True), tmp_path / "x", with_decays=False)


@pytest.mark.parametrize("hidden", [1, 4, 32])
def test_pylo_files_come_back_as_they_went(tmp_path, hidden):
    interop.export_pylo(draw(hidden), tmp_path / "model.safetensors")
    assert_equal(interop.import_pylo(tmp_path / "model.safetensors"), draw(hidden))


def test_pylo_files_hold_transposed_weights(tmp_path):
    phi = draw()
    interop.export_pylo(phi, tmp_path / "model.safetensors")
    tensors, _ = unpack((tmp_path / "model.safetensors").read_bytes(), "model")
    assert {n: x.shape for n, x in tensors.items()} == {
        **{"network.input.weight": (32, 39), "network.input.bias": (32,), "network.linear_0.weight": (32, 32)},
        **{"network.linear_0.bias": (32,), "network.output.weight": (2, 32), "network.output.bias": (2,)},
    }
    np.testing.assert_array_equal(tensors["network.input.weight"], phi["w0"].T)
    np.testing.assert_array_equal(tensors["network.linear_0.weight"][3, 7], phi["w1"][7, 3])


def test_pylo_has_no_place_for_learned_decays(tmp_path):
    with pytest.raises(ValueError, match="momentum_decays"):
        interop.export_pylo(draw(learn_decays=True), tmp_path / "x")
    phi = draw() | {name: np.zeros(count, np.float32) for name, count in spec.DECAY_OFFSETS.items()}
    interop.export_pylo(phi, tmp_path / "x")
    assert_equal(interop.import_pylo(tmp_path / "x"), draw())


def test_every_nesting_of_learned_optimization_is_read(tmp_path, msgpack):
    phi = draw(learn_decays=True)
    network = {n: x for n, x in phi.items() if n in interop.NETWORK}
    decays = {n: x for n, x in phi.items() if n not in network}
    for tree in (
        {"nn": {"~": network}, **decays},
        {"nn": network, **decays},
        {"~": network, **decays},
        phi,
        {"params": {"nn": {"~": network}, **decays}, "gen_id": np.zeros(3), "step": np.int64(7)},
    ):
        assert_equal(interop.import_learned_optimization(write_flax(tmp_path / "t", tree, msgpack)), phi)
    only = write_flax(tmp_path / "t", {"nn": {"~": network}}, msgpack)
    assert_equal(interop.import_learned_optimization(only), network)


def test_a_hand_made_file_is_read_byte_by_byte(tmp_path, msgpack):
    # Written without any library: map of one, "nn" -> map of one, "~" -> map of six, each value ext 8/16/32 of type 1.
    phi = draw(hidden=2)

    def string(text):
        return bytes([0xA0 | len(text)]) + text.encode()

    def array(x):
        data = x.astype("<f4").tobytes()
        shape = bytes([0x90 | x.ndim]) + bytes(x.shape)  # extents below 128 are one byte each
        content = b"\x93" + shape + string("float32") + b"\xc5" + struct.pack(">H", len(data)) + data
        return b"\xc9" + struct.pack(">I", len(content)) + b"\x01" + content

    entries = b"".join(string(name) + array(x) for name, x in phi.items())
    content = b"\x81" + string("nn") + b"\x81" + string("~") + bytes([0x80 | len(phi)]) + entries
    (tmp_path / "theta.state").write_bytes(content)
    assert_equal(interop.import_learned_optimization(tmp_path / "theta.state"), phi)


def test_the_reference_weights_travel(tmp_path, msgpack):
    # golden/small_fc.npz: meta-parameters of learned_optimization at 32186aa
    golden = np.load(GOLDEN)
    phi = {k.removeprefix("theta/"): golden[k] for k in golden if k.startswith("theta/")}
    network, decays = {n: phi[n] for n in interop.NETWORK}, {n: phi[n] for n in spec.DECAY_OFFSETS}
    path = write_flax(tmp_path / "theta.state", {"nn": {"~": network}, **decays}, msgpack)
    imported = interop.import_learned_optimization(path)
    assert_equal(imported, phi)
    learner = {"name": "small_fc", "hidden": 32, "step_mult": 0.01, "exp_mult": 0.001, "learn_decays": True}
    weights_file.write_weights(tmp_path / "w", imported, learner=learner | {"weight_decay": 0.0, "clock_limit": None})
    assert_equal(weights_file.read_weights(tmp_path / "w").meta_params, phi)


def flax_cases(msgpack):
    phi, good = draw(4), lambda x: flax_array(x, msgpack)
    arrays = {n: good(x) for n, x in phi.items()}
    short = msgpack.ExtType(1, msgpack.packb(([4], "float32", b"\0" * 12)))
    return {
        "has no w1, b2": {n: x for n, x in arrays.items() if n not in ("w1", "b2")},
        "has w3: not a small_fc": {**arrays, "w3": good(phi["w1"])},
        "has rnn_params: not a small_fc": {"nn": {"~": arrays}, "rnn_params": good(phi["w1"])},
        "'b0' is 'float64'; expected float32": {**arrays, "b0": good(phi["b0"].astype(np.float64))},
        "'b0' of shape \\[4\\] needs 16 bytes": {**arrays, "b0": short},
        "shape \\[-4\\]": {**arrays, "b0": msgpack.ExtType(1, msgpack.packb(([-4], "float32", b"")))},
        "is not \\(shape, dtype, bytes\\)": {**arrays, "b0": msgpack.ExtType(1, msgpack.packb([1, 2]))},
        "is not an array as flax writes it": {**arrays, "b0": 3},
        "'b1' has numbers that are not finite": {**arrays, "b1": good(phi["b1"] * np.nan)},
        "a small_fc has \\{'w0'": {**arrays, "b1": good(np.zeros(5, np.float32))},
        "holds a list": [1, 2],
    }


def test_wrong_flax_files_say_what_is_wrong(tmp_path, msgpack):
    path = tmp_path / "theta.state"
    for message, tree in flax_cases(msgpack).items():
        path.write_bytes(msgpack.packb(tree, use_bin_type=True))
        with pytest.raises(FileError, match=message) as caught:
            interop.import_learned_optimization(path)
        assert str(path) in str(caught.value)


def test_wrong_pylo_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "model.safetensors"
    interop.export_pylo(draw(4), path)
    good, _ = unpack(path.read_bytes(), "good")
    for message, tensors in {
        "network.linear_1.weight": good | {"network.linear_1.weight": np.zeros((4, 4), np.float32)},
        "a PyLO network has": {n: x for n, x in good.items() if n != "network.output.bias"},
        "'b0' is float64; expected float32": good | {"network.input.bias": np.zeros(4)},
        "a small_fc has": good | {"network.input.weight": np.zeros((4, 40), np.float32)},
        "'w1' has shape": good | {"network.linear_0.weight": np.zeros(16, np.float32)},
        "not finite": good | {"network.input.bias": np.full(4, np.inf, np.float32)},
    }.items():
        path.write_bytes(pack(tensors))
        with pytest.raises(FileError, match=message):
            interop.import_pylo(path)


@ALL
def test_missing_and_large_files_are_refused(tmp_path, msgpack, monkeypatch, read, write):
    with pytest.raises(FileError, match="can't be read"):
        read(tmp_path / "nowhere")
    with pytest.raises(FileError, match="can't be read"):
        read(tmp_path)
    write(draw_for(write, 4), tmp_path / "w")
    monkeypatch.setattr(weights_file, "MAX_WEIGHTS_BYTES", 100)
    with pytest.raises(FileError, match="at most 100"):
        read(tmp_path / "w")


@pytest.mark.parametrize("write", [FLAX[1], PYLO[1]], ids=["learned_optimization", "pylo"])
def test_only_small_fc_is_written(tmp_path, msgpack, write):
    for phi in ({}, {"w0": np.zeros(3)}, draw(4) | {"b0": np.zeros(4)}, draw(4) | {"b1": np.zeros(5, np.float32)}):
        with pytest.raises(ValueError, match="meta_params"):
            write(phi, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@ALL
def test_truncated_files_are_refused(tmp_path, msgpack, read, write):
    write(draw_for(write, 3), tmp_path / "w")
    content = (tmp_path / "w").read_bytes()
    for length in range(0, len(content), 7):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(FileError):
            read(tmp_path / "cut")


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ALL
@FUZZ
@given(edits=st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=4)), min_size=1, max_size=8))
def test_damaged_files_are_read_or_refused(tmp_path, msgpack, read, write, edits):
    write(draw_for(write, 2), tmp_path / "w")
    content = bytearray((tmp_path / "w").read_bytes())
    for place, data in edits:
        # Mostly among names and sizes: half of the edits hit the first 400 bytes.
        place %= 400 if place % 2 else len(content)
        content[place : place + len(data)] = data
    (tmp_path / "bad").write_bytes(content)
    expect_arrays_or_file_error(read, tmp_path / "bad")


@pytest.mark.parametrize("read", [FLAX[0], PYLO[0], CELO2_FILES[0]], ids=["learned_optimization", "pylo", "celo2"])
@FUZZ
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(tmp_path, msgpack, read, content):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(FileError):
        read(tmp_path / "bad")


def expect_arrays_or_file_error(read, path):
    try:
        arrays = read(path)
    except FileError:
        return
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 and np.isfinite(x).all() for x in arrays.values())


def test_deep_and_greedy_msgpack_is_refused(tmp_path, msgpack):
    bombs = {
        "deep": b"\x91" * 100_000,
        "deep maps": b"\x81\xa1a" * 100_000,
        "array of 4 billion": b"\xdd\xff\xff\xff\xff",
        "map of 4 billion": b"\xdf\xff\xff\xff\xff",
        "bytes of 4 GB": b"\xc6\xff\xff\xff\xff",
        "extension of 4 GB": b"\xc9\xff\xff\xff\xff\x01",
        "time stamp": b"\xc7\x05\xff\x00\x00\x00\x00\x00",
        "key of a list": b"\x81\x91\x01\x01",
        "not UTF-8": b"\xa2\xff\xff",
    }
    for name, content in bombs.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileError):
            interop.import_learned_optimization(tmp_path / name)


def celo2_checkpoint(path, hidden=8, seed=0):
    """Tensors as PyLO's CELO2MLP names and shapes them, written to a file."""
    rng, counts = np.random.default_rng(seed), (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
    shapes = {f"w0.{i}": (count, hidden) for i, count in enumerate(counts)}
    shapes |= {"b0": (hidden,), "dense_w.0": (hidden, hidden), "dense_b.0": (hidden,)}
    shapes |= {"dense_w.1": (hidden, 3), "dense_b.1": (3,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    path.write_bytes(pack(tensors, {"format": "pt"}))
    return tensors


@pytest.mark.parametrize("hidden", [1, 8])
def test_celo2_files_come_back_byte_for_byte(tmp_path, hidden):
    tensors = celo2_checkpoint(tmp_path / "celo2", hidden)
    phi = interop.import_celo2(tmp_path / "celo2")
    assert {n: x.shape for n, x in phi.items()} == norm_fc_spec.weight_shapes(hidden)
    interop.export_celo2(phi, tmp_path / "again", unused_from=tmp_path / "celo2")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "celo2").read_bytes()

    interop.export_celo2(phi, tmp_path / "zeros")
    zeros, _ = unpack((tmp_path / "zeros").read_bytes(), "zeros")
    assert not zeros["dense_w.1"][:, 1:].any() and not zeros["dense_b.1"][1:].any()
    assert_equal(interop.import_celo2(tmp_path / "zeros"), phi)
    np.testing.assert_array_equal(zeros["w0.13"], tensors["w0.13"])


def test_the_celo2_reference_weights_travel(tmp_path):
    # golden/celo2.npz: w0 is PyLO's fourteen pieces one below the other, w2 and b2 have all three outputs
    theta = {k.removeprefix("theta/"): CELO2[k] for k in CELO2 if k.startswith("theta/")}
    tensors, start = {"b0": theta["b0"], "dense_w.0": theta["w1"], "dense_b.0": theta["b1"]}, 0
    for i, count in enumerate((1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)):
        tensors[f"w0.{i}"] = theta["w0"][start : start + count]
        start += count
    tensors |= {"dense_w.1": theta["w2"], "dense_b.1": theta["b2"]}
    (tmp_path / "celo2").write_bytes(pack(tensors))
    expected = theta | {"w2": theta["w2"][:, :1], "b2": theta["b2"][:1]}
    assert_equal(interop.import_celo2(tmp_path / "celo2"), expected)


def test_wrong_celo2_files_say_what_is_wrong(tmp_path):
    path = tmp_path / "celo2"
    good = celo2_checkpoint(path, 4)
    for message, tensors in {
        "a CELO2MLP of PyLO has": {n: x for n, x in good.items() if n != "w0.13"},
        "a CELO2MLP has": {n: x for n, x in good.items() if n != "b0"},
        "dense_w.2": good | {"dense_w.2": np.zeros((4, 4), np.float32)},
        "'w0.3': \\(3, 4\\)": good | {"w0.3": np.zeros((4, 3), np.float32)},
        "'dense_w.1': \\(4, 3\\)": good | {"dense_w.1": np.zeros((4, 1), np.float32)},
        "'b0' is float64; expected float32": good | {"b0": np.zeros(4)},
        "not finite": good | {"b0": np.full(4, np.inf, np.float32)},
    }.items():
        path.write_bytes(pack(tensors))
        with pytest.raises(FileError, match=message):
            interop.import_celo2(path)
    celo2_checkpoint(path, 4)
    with pytest.raises(FileError, match="has hidden=4; the meta-parameters have 8"):
        celo2_checkpoint(tmp_path / "wide", 8)
        interop.export_celo2(interop.import_celo2(tmp_path / "wide"), tmp_path / "x", unused_from=path)
    for phi in ({}, {"w0": np.zeros(3)}, draw(4)):
        with pytest.raises(ValueError, match="meta_params: has tensors .*; a norm_fc has"):
            interop.export_celo2(phi, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_without_msgpack_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "msgpack", None)
    (tmp_path / "theta.state").write_bytes(b"\x80")
    with pytest.raises(ImportError, match=r"pip install 'lolo\[interop\]'"):
        interop.import_learned_optimization(tmp_path / "theta.state")
    with pytest.raises(ImportError, match=r"pip install 'lolo\[interop\]'"):
        interop.export_learned_optimization(draw(2), tmp_path / "out")
