"""Run folders, rows and weights hold anything at all, and nothing but the documented errors escapes."""

import dataclasses
import hashlib
import json
import random
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from test_interop import draw
from test_training import small
from test_untrusted_files import mutated

from lolo.evaluation import statistics
from lolo.files import tensors
from lolo.files.disk import FileError
from lolo.files.settings import RecipeError
from lolo.method import meta
from lolo.optimizers import interop, pretrained, weights_file
from lolo.studies import rows
from lolo.tasks.small import quadratic
from lolo.training import build, checkpoints, doctor, findings, loop, run_folder
from lolo.training.run_folder import RunError

OURS = (FileError, RecipeError, RunError)
STEP = 2
CHECKPOINT = f"checkpoints/{STEP:08d}"
ODD = [None, True, "", "nan", "x" * 50, -1, 0, 2**70, 1e308, -1e-320, [], {}, [[]], [None], {"a": 1}, [-1, "b"]]


def changed_json(value, random):
    """The value with one node replaced, removed or doubled."""
    if isinstance(value, dict | list) and value and random.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, action = random.choice(keys), random.randrange(8)
        copy = value.copy()
        if action == 0:
            del copy[key]
        elif action == 1 and isinstance(copy, list):
            copy.append(copy[key])
        else:
            copy[key] = changed_json(value[key], random)
        return copy
    return random.choice(ODD)


def json_mutated(content, random):
    return json.dumps(changed_json(json.loads(content), random)).encode()


def lines_mutated(content, random):
    lines = content.splitlines()
    place = random.randrange(len(lines))
    lines[place] = json_mutated(lines[place], random)
    return b"\n".join(lines) + b"\n"


def metadata_mutated(content, random):
    """Weights whose learner, recipe or card is another, and whose sums are right."""
    arrays, metadata = tensors.unpack(content, "seed")
    key = random.choice(["learner", "recipe", "card"])
    metadata[key] = json_mutated(metadata[key], random).decode()
    return tensors.pack(arrays, metadata | {"about_sha256": weights_file.about_digest(metadata)})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two outer steps, with the rows of an evaluation and the weights in the other tools' files beside it."""
    folder = tmp_path_factory.mktemp("seed") / "run"
    loop.train(small(**{"outer.steps": STEP, "validation.every": 1, "validation.steps": 100}), folder)
    curve = [1.0, float("nan")]
    row = statistics.Row("quadratic", "lolo", 0, 1, 200, 1.0, 0.9, 1.1, {"loss": 1.1}, False, curve, curve)
    rows.save_rows(folder / "rows.jsonl", [row, dataclasses.replace(row, seed=2, meta_seed=None)])
    interop.export_learned_optimization(draw(2), folder / "theta.state")
    interop.export_pylo(draw(2), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def state_shapes():
    setup, splits = build.build(small()), quadratic()
    return jax.eval_shape(lambda key: meta.meta_init(setup, (splits.train,), key, None), jax.random.key(0))


def read_state(folder, shapes):
    """As `resume` reads it, from a checkpoint whose manifest states the right sum."""
    path = folder / CHECKPOINT / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        content = (folder / CHECKPOINT / name).read_bytes()
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))
    arrays, _ = checkpoints.read_checkpoint(folder, STEP)
    checkpoints.state_from_arrays(arrays, shapes, ", ".join(manifest["files"]))


class Reader(NamedTuple):
    file: str
    read: Any  # folder, state_shapes -> whatever the program reads from it
    change: Any  # content, random -> content


READERS = [
    Reader("recipe.json", lambda folder, _: run_folder.read_recipe(folder), json_mutated),
    Reader("recipe.json", lambda folder, _: run_folder.read_recipe(folder), mutated),
    Reader("log.jsonl", lambda folder, _: findings.report(doctor.examine(folder)), lines_mutated),
    Reader("log.jsonl", lambda folder, _: findings.report(doctor.examine(folder)), mutated),
    Reader("rows.jsonl", lambda folder, _: rows.load_rows(folder / "rows.jsonl"), lines_mutated),
    Reader(f"{CHECKPOINT}/manifest.json", lambda folder, _: checkpoints.read_checkpoint(folder, STEP), json_mutated),
    Reader(f"{CHECKPOINT}/state.safetensors", lambda folder, _: checkpoints.read_checkpoint(folder, STEP), mutated),
    Reader(f"{CHECKPOINT}/state.safetensors", read_state, mutated),
    Reader(f"{CHECKPOINT}/slots-00000000.safetensors", read_state, mutated),
    Reader("last.safetensors", lambda folder, _: pretrained.load(folder / "last.safetensors"), mutated),
    Reader("last.safetensors", lambda folder, _: pretrained.load(folder / "last.safetensors"), metadata_mutated),
    Reader("theta.state", lambda folder, _: interop.import_learned_optimization(folder / "theta.state"), mutated),
    Reader("model.safetensors", lambda folder, _: interop.import_pylo(folder / "model.safetensors"), mutated),
]


@pytest.mark.parametrize("reader", READERS, ids=lambda r: f"{r.file.rpartition('/')[2]}-{r.change.__name__}")
@pytest.mark.parametrize("examples", [60, pytest.param(1_000, marks=pytest.mark.slow)])
def test_changed_files_of_a_run_raise_nothing_but_the_documented_errors(run, state_shapes, tmp_path, reader, examples):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    reader.read(folder, state_shapes)
    seed, numbers, refused = (run / reader.file).read_bytes(), random.Random(f"{reader.file}-{examples}"), 0
    for _ in range(examples):
        (folder / reader.file).write_bytes(reader.change(seed, numbers))
        try:
            with np.errstate(all="ignore"):
                reader.read(folder, state_shapes)
        except OURS as error:
            assert reader.file.rpartition("/")[2] in str(error)
            refused += 1
    assert refused > examples / 10  # the changes do reach the checks
