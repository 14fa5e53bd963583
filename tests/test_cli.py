"""The command line: bad input is one line that names value and cure, exit status 2, and nothing half-written."""

import dataclasses
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from test_files import LEARNER, meta_params

from lolo.cli import main as cli
from lolo.evaluation import long_runs
from lolo.files import disk, tensors
from lolo.files.settings import fields
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.runtime import environment, interrupt
from lolo.studies import definitions
from lolo.studies.rows import load_rows
from lolo.training import recipes


def run(capsys, *argv):
    status = cli.main(list(argv))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


BAD = [
    (["trian"], ["'trian'", "'train'"]),
    (["train", "lol"], ["'lol'", "'lolo'"]),
    (["train", "lolo", "--replay.treshold", "0.2"], ["--replay.treshold", "'--replay.threshold'"]),
    (["train", "lolo", "--task", "fashion-mpl"], ["'fashion-mpl'", "'fashion-mlp'"]),
    (["train", "lolo", "--task", "missing.py:make"], ["missing.py", "path.py:function"]),
    (["train", "lolo", "--unroll.length", "120"], ["unroll.length=120", "try 100"]),
    (["train", "lolo", "--init", "nothing.safetensors"], ["nothing.safetensors", "no such weights file"]),
    (["train", "lolo", "--imitation.expert", "adan"], ["'adan'", "'adam'"]),
    (["train", "lolo", "--replay.threshold", "2"], ["replay.threshold=2", "from 0 to 1"]),
    (["train", "lolo", "--seed", "abc"], ["abc", "--seed", "INT"]),
    (["train", "lolo", "--seed", "-1"], ["seed=-1", "from 0"]),
    (["train", "lolo", "--outer.lr", "fast"], ["fast", "--outer.lr", "FLOAT"]),
    (["train", "lolo", "--unroll.stagger", "yes"], ["yes", "--unroll.stagger", "True"]),
    (["train", "lolo", "fashion-mlp"], ["fashion-mlp", "--help"]),
    (["train", "lolo", "--task", "quadratic", "--devices", "0"], ["devices=0", "at least 1"]),
    (["train", "lolo", "--task", "quadratic", "--measure-blocks", "--offload"], ["--estimator.slots-per-block"]),
    (["resume"], ["required", "lolo resume"]),
    (["tasks", "fashion-mlp"], ["fashion-mlp", "lolo tasks"]),
    (["eval", "adamw:1e-3", "--step", "100"], ["--step", "--steps"]),
    (["data", "prepaer"], ["prepaer", "prepare"]),
    (["resume", "nowhere"], ["nowhere", "lolo train"]),
    (["doctor", "nowhere"], ["nowhere", "lolo train"]),
    (["eval", "nothing.safetensors"], ["nothing.safetensors", "no such weights file"]),
    (["eval", "adamw:fast"], ["adamw:fast", "adamw:1e-3"]),
    (["eval", "adammw:1e-3"], ["'adammw'", "'adamw'"]),
    (["eval", "adamw:1e-3", "--task", "book-mlp"], ["'book-mlp'", "'books-mlp'"]),
    (["eval", "adamw:1e-3", "--seeds", "0"], ["--seeds 0", "at least 1"]),
    (["eval", "adamw:1e-3", "--steps", "0"], ["steps=0", "at least 1"]),
    (["eval", "lolo-small:clock=5"], ["lolo-small", "'clock_limit'"]),
    (["reproduce", "quik"], ["'quik'", "'quick'"]),
    (["reproduce", "study", "--only", "figure3"], ["'figure3'", "'figure2'"]),
]


@pytest.mark.parametrize(("argv", "words"), BAD, ids=lambda value: " ".join(value)[:40])
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *argv)
    assert status == 2
    assert err.count("\n") == 1 and err.startswith("lolo: ")
    for word in words:
        assert word in err
    assert not any(tmp_path.iterdir()), "something was written"


def test_corrupted_weights_are_one_line(tmp_path, capsys):
    path = tmp_path / "w.safetensors"
    weights_file.write_weights(path, meta_params(), learner=LEARNER)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    status, _, err = run(capsys, "eval", str(path))
    assert status == 2 and err.count("\n") == 1 and "damaged" in err


def test_foreign_safetensors_are_one_line(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    path.write_bytes(tensors.pack({"layer": np.zeros(3, np.float32)}, {"format": "pt"}))
    status, _, err = run(capsys, "eval", str(path))
    assert status == 2 and "not lolo weights" in err


def test_an_output_folder_with_a_run_is_refused(tmp_path, capsys):
    small = ["--task", "quadratic", "--outer.steps", "1", "--unroll.length", "20", "--unroll.truncation", "10"]
    small += ["--estimator.pairs", "2", "--validation.every", "0", "--out", str(tmp_path / "run")]
    status, out, _ = run(capsys, "train", "lolo", *small)
    assert status == 0 and out.strip() == f"{tmp_path}/run/last.safetensors"
    status, _, err = run(capsys, "train", "lolo", *small, "--seed", "3")
    assert status == 2 and "already holds a run (seed: 0 there, 3 requested)" in err
    status, out, _ = run(capsys, "doctor", str(tmp_path / "run"), "--no-evaluate")
    assert status == 7 and "1 of 1 outer steps done" in out and "left out by --no-evaluate" in out


def test_an_evaluation_is_refused_before_it_runs_where_it_can_not_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    command = ["eval", "adamw:1e-3", "--task", "quadratic", "--steps", "100", "--seeds", "1", "--out"]
    for out, word in (("file", "in the way"), ("file/deeper", "in the way"), ("run", "already holds recipe.json")):
        status, _, err = run(capsys, *command, str(tmp_path / out))
        assert status == 2 and err.count("\n") == 1 and word in err and "another --out" in err
    status, out, _ = run(capsys, *command, str(tmp_path / "new"))
    report = (tmp_path / "new" / "report-quadratic.md").read_text()
    assert status == 0 and out in report and "inner steps\n\nTrain loss: " in report
    assert (tmp_path / "file").read_text() == "mine" and len(list((tmp_path / "run").iterdir())) == 1


def test_an_evaluation_continues_and_takes_more_optimizers(tmp_path, monkeypatch, capsys):
    out, made, original = tmp_path / "out", [], long_runs.compare

    def counting(name, splits, entries, *args, **settings):
        made.extend(entry.label for entry in entries)
        return original(name, splits, entries, *args, **settings)

    def evaluate(*names, steps="100", seeds="2"):
        made.clear()
        return run(capsys, "eval", *names, "--task", "quadratic", "--steps", steps, "--seeds", seeds, "--out", str(out))

    def rows():
        return {(row.optimizer, row.seed): row for row in load_rows(out / "rows-quadratic.jsonl")}

    monkeypatch.setattr(long_runs, "compare", counting)
    stopped = interrupt.Stop()
    monkeypatch.setattr(interrupt, "Stop", lambda: stopped)
    stopped.requested = "SIGTERM"
    status, _, err = evaluate("adam:1e-3", "sgdm:0.1")
    assert status == 3 and "Resume with the same command" in err and not (out / "rows-quadratic.jsonl").exists()
    stopped.requested = None

    assert evaluate("adam:1e-3", "sgdm:0.1")[0] == 0 and made == ["adam 0.001", "sgdm 0.1"]
    before = rows()
    assert evaluate("adam:1e-3", "sgdm:0.1")[0] == 0 and made == [] and rows() == before
    assert evaluate("adamw:0.01", "sgdm:0.1", "adam:1e-3")[0] == 0 and made == ["adamw 0.01"]
    assert len(rows()) == 6 and before.items() <= rows().items()
    report = (out / "report-quadratic.md").read_bytes()
    assert b"adamw 0.01" in report and b"adam 0.001" in report

    assert evaluate("adamw:1e-2", "sgdm:1e-1", "adam:0.001")[0] == 0 and made == []  # other words for the same
    report = (out / "report-quadratic.md").read_bytes()
    for asked, words in (
        ({"names": ["adam:1e-3", "sgdm:0.1"]}, "rows of adamw 0.01 that this command would drop: it does not name"),
        ({"steps": "200"}, "rows of quadratic, 100 steps, seeds 0 to 1"),
        ({"seeds": "3"}, "rows of quadratic, 100 steps, seeds 0 to 1"),
        ({"steps": "0"}, "steps=0 must be a whole number, at least 1"),
        ({"versions": {"lolo": "0.0.1", "jax": "0.9"}}, "rows made with lolo 0.0.1, jax 0.9"),
    ):
        disk.write_json(out / "parts" / "versions.json", asked.pop("versions", environment.versions()))
        status, _, err = evaluate(*asked.pop("names", ["adam:1e-3", "sgdm:0.1", "adamw:0.01"]), **asked)
        assert status == 2 and err.count("\n") == 1 and words in err
        assert made == [] and (out / "report-quadratic.md").read_bytes() == report

    disk.write_json(out / "parts" / "versions.json", environment.versions())
    with disk.locked(out):
        status, _, err = evaluate("adam:1e-3", "sgdm:0.1", "adamw:0.01")
    assert status == 2 and "another process is at work" in err
    status, _, err = run(capsys, "eval", "adam:1e-3", "--task", "textures-mlp", "--out", str(tmp_path / "new"))
    assert status == 2 and "lolo data prepare textures" in err and not (tmp_path / "new").exists()
    disk.write_json(out / "about-quadratic.json", {"command": "lolo reproduce quick"})
    status, _, err = evaluate("adam:1e-3", "sgdm:0.1", "adamw:0.01")
    assert status == 2 and "already holds what 'lolo reproduce quick' wrote" in err


def test_meta_seeds_come_to_an_evaluation_one_by_one(tmp_path, monkeypatch, capsys):
    def weights(seed):
        recipe = dataclasses.replace(recipes.LOLO, tasks=("quadratic",), seed=seed)
        path = tmp_path / f"{seed}.safetensors"
        phi = architecture.build_learner(recipe.learner).init(jax.random.key(seed))
        pretrained.save(path, pretrained.Weights(phi, recipe.learner, recipes.to_dict(recipe), {}))
        return str(path)

    def evaluate(*seeds):
        names = [weights(seed) for seed in seeds]
        settings = ["--task", "quadratic", "--steps", "100", "--seeds", "1", "--out", str(tmp_path / "out")]
        assert run(capsys, "eval", *names, *settings)[0] == 0
        rows = load_rows(tmp_path / "out" / "rows-quadratic.jsonl")
        assert {row.optimizer for row in rows} == {"lolo"}
        return {row.meta_seed: row.train_loss for row in rows}

    first = evaluate(0)
    both = evaluate(1, 0)
    assert set(both) == {0, 1} and both[0] == first[0] and both[1] != both[0]
    (tmp_path / "out" / "parts" / "quadratic").rename(tmp_path / "elsewhere")
    status, _, err = run(
        capsys,
        "eval",
        weights(0),
        "--task",
        "quadratic",
        "--steps",
        "100",
        "--seeds",
        "1",
        "--out",
        str(tmp_path / "out"),
    )
    assert status == 2 and "rows of lolo that this command would drop" in err and "parts/ is incomplete" in err


def test_a_task_of_the_same_words_elsewhere_is_another_task(tmp_path, capsys):
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("from lolo.tasks import quadratic")
    settings = ["--steps", "100", "--seeds", "1", "--out", str(tmp_path / "out")]
    assert run(capsys, "eval", "adam:1e-3", "--task", f"{tmp_path}/a/mine.py:quadratic", *settings)[0] == 0
    status, _, err = run(capsys, "eval", "adam:1e-3", "--task", f"{tmp_path}/b/mine.py:quadratic", *settings)
    assert status == 2 and f"rows of {tmp_path}/a/mine.py:quadratic" in err


def test_rows_of_weights_that_have_changed_are_not_lost(tmp_path, capsys):
    path, out = tmp_path / "w.safetensors", tmp_path / "out"
    command = ["eval", str(path), "--task", "quadratic", "--steps", "100", "--seeds", "1", "--out", str(out)]
    weights_file.write_weights(path, meta_params(), learner=LEARNER)
    assert run(capsys, *command)[0] == 0
    weights_file.write_weights(path, {name: 2 * x for name, x in meta_params().items()}, learner=LEARNER)
    status, _, err = run(capsys, *command)
    assert status == 2 and "rows of w that" in err and "changed" in err


def test_help_names_every_part_of_the_study(capsys):
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--help"])
    words = re.split(r"[\s,.:]+", re.sub(r"[^\x20-\x7e]", " ", capsys.readouterr().out))
    assert set(definitions.STUDY) | set(definitions.STUDIES) <= set(words)


def test_help_lists_every_command_and_every_field(capsys):
    _, out, _ = run(capsys, "--help")
    for command in cli.COMMANDS:
        assert f"lolo {command}" in out
    with pytest.raises(SystemExit):
        cli.main(["train", "lolo", "--help"])
    out = capsys.readouterr().out.replace("-", "_")
    for field in fields(recipes.LOLO):
        assert field in out


def test_lists(capsys):
    assert "fashion-mlp" in run(capsys, "tasks")[1]
    assert "replay.threshold=1.0" in run(capsys, "recipes")[1]
    assert run(capsys, "weights")[0] == 0


def test_programs_that_tests_start_find_what_tests_have_compiled():
    """Two folders of compiled programs cost a run of all tests more than 2,000 compilations."""
    assert environment.user_cache() / "jax" == pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
