"""Loggers beside the log: the numbers of log.jsonl, each step once, whatever happened to the process before."""

import json
import math
import struct
import sys
from pathlib import Path

import pytest
from helpers import StopAfter
from test_training import small

from lolo.cli import main as cli
from lolo.training import loggers, loop, run_log
from lolo.training.how import How
from lolo.training.run_folder import RunError

RECIPE = small(**{"validation.every": 4, "validation.steps": 100, "validation.seeds": 1})


def silent(text):
    pass


def expected(run):
    """(step, name) -> number, as the log has them."""
    return {
        (row["step"], name): value
        for row in run_log.log_rows(run)
        for name, value in loggers.scalars(row, RECIPE.tasks).items()
    }


@pytest.fixture
def memory(monkeypatch):
    """A kind of logger that keeps what it gets: one list of (step, name, value) for each time that it was opened."""
    opened = []

    def open_(run, recipe):
        assert recipe["outer.steps"] == RECIPE.outer.steps
        got = []
        opened.append(got)
        return loggers.Logger(
            lambda scalars, step: got.extend((step, name, value) for name, value in scalars.items()),
            lambda: got.append("closed"),
        )

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", loggers.Kind("json", open_))
    return opened


@pytest.mark.slow
def test_a_logger_gets_the_numbers_of_the_log_each_step_once_also_after_a_kill(tmp_path, memory):
    stop = StopAfter(5)
    loop.train(
        RECIPE, tmp_path / "run", How(loggers=("tensorboard",), stop=stop, on_progress=stop.on_progress, log=silent)
    )
    # As a SIGKILL leaves it: rows that are past the newest complete checkpoint, and no logger closed.
    with open(tmp_path / "run" / "log.jsonl", "a") as log:
        log.write(json.dumps(run_log.log_rows(tmp_path / "run")[-1] | {"step": 5, "task_loss": [99.0]}) + "\n")
    loop.resume(tmp_path / "run", How(log=silent))  # logs where it logged before
    first, second = memory
    assert first.pop() == "closed" and second.pop() == "closed"
    assert {step for step, _, _ in first} == set(range(5))
    assert len(second) == len(set((step, name) for step, name, _ in second))
    assert {(step, name): value for step, name, value in second} == expected(tmp_path / "run")
    assert {step for step, _, _ in second} == set(range(8))


def test_resume_can_add_a_logger_that_starts_at_the_first_step_and_can_drop_it(tmp_path, memory):
    stop = StopAfter(3)
    loop.train(RECIPE, tmp_path / "run", How(stop=stop, on_progress=stop.on_progress, log=silent))
    assert memory == []
    loop.resume(tmp_path / "run", How(loggers=("tensorboard",), log=silent))
    assert {entry[0] for entry in memory[0][:-1]} == set(range(8))
    loop.resume(tmp_path / "run", How(loggers=(), log=silent))
    loop.resume(tmp_path / "run", How(log=silent))
    assert len(memory) == 1


def test_a_logger_that_fails_is_left_out_and_reported_and_the_run_continues(tmp_path, monkeypatch):
    def fail(scalars, step):
        if step == 2:
            raise RuntimeError("no space")

    monkeypatch.setitem(
        loggers.LOGGERS, "tensorboard", loggers.Kind("json", lambda run, recipe: loggers.Logger(fail, lambda: None))
    )
    said = []
    result = loop.train(small(), tmp_path / "run", How(loggers=("tensorboard",), log=said.append))
    assert result.finished and len(run_log.log_rows(tmp_path / "run")) == 8
    assert len(said) == 1 and "no space" in said[0] and "lolo resume --log tensorboard" in said[0]


def test_a_logger_that_does_not_open_is_one_line(tmp_path, monkeypatch, capsys):
    def refuse(run, recipe):
        raise RuntimeError("no permission")

    monkeypatch.setitem(loggers.LOGGERS, "wandb", loggers.Kind("json", refuse))
    argv = [f"--{name}={' '.join(value) if isinstance(value, tuple) else value}" for name, value in TINY.items()]
    assert cli.main(["train", "lolo", *argv, "--log", "wandb", "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "--log wandb can't be opened (no permission)" in err.splitlines()[-1]


TINY = {"tasks": ("quadratic",), "outer.steps": 1, "unroll.length": 20, "unroll.truncation": 10, "estimator.pairs": 2}


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_extra_is_one_line_that_names_it_before_anything_is_written(
    tmp_path, monkeypatch, capsys, name, package
):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "lolo", "--log", name]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"pip install 'lolo[{name}]'" in err
    assert not any(tmp_path.iterdir())


def test_an_unknown_logger_names_the_nearest(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "lolo", "--log", "tensorbord"]) == 2
    assert "'tensorbord'; did you mean 'tensorboard'" in capsys.readouterr().err


def test_a_logger_without_a_run_folder_is_refused():
    with pytest.raises(RunError, match="needs a run folder"):
        loop.train(small(), None, How(loggers=("tensorboard",)))


def test_numbers_of_a_row():
    row = {"step": 3, "task_loss": [1.0, "nan"], "alpha_mix": "inf", "starts": [0, 50], "reached": [], "dropped": 1}
    row |= {"first_bad": [{"task": "a"}], "validation": {"held_loss": 2.0}}
    found = loggers.scalars(row, ["a", "b"])
    assert math.isnan(found.pop("task_loss/b"))
    expected = {"task_loss/a": 1.0, "alpha_mix": float("inf"), "starts/mean": 25.0, "dropped": 1.0}
    assert found == expected | {"validation/held_loss": 2.0}


# --- the libraries themselves -------------------------------------------------------------------------------------


def read_tensorboard(run):
    """(step, name, value) of every scalar in every event file."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in (run / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
            content = content[16 + length :]
    return found


def read_wandb(run):
    """(step, name, value) of every number in every offline run: records in blocks of 32 KiB after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in (run / "wandb").glob("offline-run-*/*.wandb"):
        content, position, record = path.read_bytes(), 7, b""
        while position + 7 <= len(content):
            if 32768 - position % 32768 < 7:
                position += 32768 - position % 32768
                continue
            _, length, kind = struct.unpack("<IHB", content[position : position + 7])
            record += content[position + 7 : position + 7 + length]
            position += 7 + length
            if kind in (1, 4):  # whole, or the last part
                history = wandb_internal_pb2.Record.FromString(record).history
                items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in history.item}
                found += [(items["_step"], name, value) for name, value in items.items() if not name.startswith("_")]
                record = b""
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "read"), [("tensorboard", read_tensorboard), ("wandb", read_wandb)])
def test_each_library_holds_each_step_once_after_a_resume(tmp_path, monkeypatch, name, read):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # tensorboardX imports torch where it can, and takes the folder of tests of that name for it where it can't.
    monkeypatch.setitem(sys.modules, "torch", None)
    stop = StopAfter(5)
    run = tmp_path / "run"
    loop.train(RECIPE, run, How(loggers=(name,), stop=stop, on_progress=stop.on_progress, log=silent))
    assert {step for step, _, _ in read(run)} == set(range(5))
    loop.resume(run, How(log=silent))
    found = read(run)
    assert len(found) == len(expected(run))
    for step, scalar, value in found:
        assert value == pytest.approx(expected(run)[step, scalar], rel=1e-6), (step, scalar)


def test_every_kind_of_logger_is_an_extra_of_its_name():
    text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text()
    for name, kind in loggers.LOGGERS.items():
        assert f'\n{name} = ["{kind.package}>=' in text
