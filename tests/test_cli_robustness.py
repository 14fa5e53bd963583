"""Commands in another process's hands: its locale, its pipes, its closed streams, its current folder."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from lolo.cli import compare, progress, show
from lolo.cli import main as cli
from lolo.files import disk
from lolo.runtime import environment, streams
from lolo.training import plan

ROOT = pathlib.Path(__file__).parent.parent
LOLO = [sys.executable, "-m", "lolo.cli"]
EVAL = ["eval", "sgdm:0.1", "adam:1e-3", "--task", "quadratic", "--steps", "100", "--seeds", "2"]
RUN = ["--task", "quadratic", "--unroll.length", "20", "--unroll.truncation", "10", "--estimator.pairs", "2"]
RUN += ["--outer.steps", "3", "--validation.every", "0"]


def lolo(*argv, shell="{}", env=None, cwd=None):
    """A finished `lolo ARGV`; `shell` is a line of bash around it."""
    command = shell.format(" ".join(map(str, [*LOLO, *argv])))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    return subprocess.run(["bash", "-c", command], capture_output=True, env=environment, cwd=cwd, timeout=300)


POOR = {
    "windows": {"PYTHONIOENCODING": "cp1252"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "latin": {"PYTHONIOENCODING": "latin-1"},
    "C": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


@pytest.mark.slow
@pytest.mark.parametrize("environment", POOR.values(), ids=POOR)
def test_an_evaluation_is_printed_in_any_encoding_and_its_files_are_utf_8(tmp_path, environment):
    out = tmp_path / "out"
    done = lolo(*EVAL, "--out", out, env=environment)
    assert done.returncode == 0, done.stderr
    table = done.stdout.splitlines()
    assert [line[:9] for line in table[-2:]] == [b"| sgdm 0.", b"| adam 0."]
    with pytest.raises(UnicodeEncodeError):  # else the test shows nothing
        (out / "report-quadratic.md").read_text(encoding="utf-8").encode("ascii")
    assert "±" in (out / "report-quadratic.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("argv", [["tasks"], ["recipes"], ["train", "lolo", "--help"], ["eval", "--help"], ["--help"]])
def test_lists_and_help_are_printed_in_any_encoding(argv):
    done = lolo(*argv, env=POOR["ascii"])
    assert done.returncode == 0 and done.stdout and not done.stderr


def test_errors_are_printed_in_any_encoding():
    done = lolo("eval", "αdam:1e-3", env=POOR["ascii"])
    assert done.returncode == 2 and done.stderr.startswith(b"lolo: ") and done.stderr.count(b"\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.parametrize("argv", [["recipes"], ["train", "--help"], ["--help"]])
def test_a_reader_that_leaves_is_no_error(argv, buffered):
    shell = "{} | true; echo status ${{PIPESTATUS[0]}}"  # `true` reads nothing
    done = lolo(*argv, shell=shell, env={"PYTHONUNBUFFERED": buffered})
    assert done.stdout == b"status 141\n" and done.stderr == b""
    done = lolo(*argv, shell="{} | head -1; echo status ${{PIPESTATUS[0]}}", env={"PYTHONUNBUFFERED": buffered})
    assert done.stdout.splitlines()[-1] in (b"status 0", b"status 141") and done.stderr == b""


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
    def broken(argv):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(show, "tasks_command", broken)
    assert cli.main(["tasks"]) == 5 and "Broken pipe" in capsys.readouterr().err


@pytest.mark.slow
def test_a_meta_training_continues_when_nobody_reads_its_messages(tmp_path):
    done = lolo("train", "lolo", *RUN, "--out", tmp_path / "run", shell="{} 2> >(true); echo status $?")
    assert done.stdout.splitlines() == [f"{tmp_path}/run/last.safetensors".encode(), b"status 0"]


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_said(buffered):
    done = lolo("recipes", shell="{} > /dev/full", env={"PYTHONUNBUFFERED": buffered})
    assert done.returncode == 5 and done.stderr.count(b"\n") == 1 and b"No space left" in done.stderr


@pytest.mark.parametrize("buffered", ["", "1"])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_evaluation_that_can_not_be_printed_is_shown_beside_the_messages(buffered):
    done = lolo(*EVAL, shell="{} > /dev/full", env={"PYTHONUNBUFFERED": buffered})
    assert done.returncode == 5 and b"| sgdm 0." in done.stderr and b"No space left" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_not_fail_a_command(closed):
    assert lolo("recipes", shell="{} " + closed).returncode == 0


@pytest.mark.slow
def test_closed_streams_do_not_fail_several_processes(tmp_path):
    run = tmp_path / "run"
    done = lolo("train", "lolo", *RUN, "--processes", "2", "--out", run, shell="{} <&- >&- 2>&-")
    assert done.returncode == 0 and (run / "last.safetensors").is_file()
    for file in run.rglob("*"):  # nothing that was printed came into a file that took the place of a stream
        assert file.is_dir() or b"lolo: " not in file.read_bytes()


@pytest.mark.slow
def test_a_closed_input_does_not_fail_several_processes_and_they_print_in_any_encoding(tmp_path):
    argv = ["train", "lolo", *RUN, "--processes", "2", "--out", tmp_path / "run"]
    done = lolo(*argv, shell="{} <&-", env=POOR["ascii"])
    assert done.returncode == 0 and b"3 of 3 loss" in done.stderr, done.stderr


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_a_version_is_printed(capsys, flag):
    assert cli.main([flag]) == 0
    assert capsys.readouterr().out == f"lolo {environment.versions()['lolo']}\n"


@pytest.mark.filterwarnings("default")
def test_an_evaluation_warns_in_one_line_of_a_step_scale_that_is_a_learning_rate(monkeypatch, capsys):
    monkeypatch.setattr(compare.comparisons, "evaluate", lambda *args, **more: ([], {}))
    monkeypatch.setattr(compare, "table", lambda rows: "no rows")
    argv = ["eval", "lolo-anytime:step_scale=0.001", "lolo-anytime:step_scale=0.5", "--task", "quadratic"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == "no rows\n"
    assert captured.err.startswith("lolo: step_scale=0.001 is no learning rate") and captured.err.count("\n") == 1


FLAGS = [
    (["--dry-run"], True),
    (["--dry-run", "True"], True),
    (["--dry-run=True"], True),
    (["--no-dry-run", "--dry-run"], True),
    (["--dry-run", "False", "--dry-run"], True),
    (["--dry-run", "--no-dry-run", "--task", "absent.py:make"], False),
    (["--dry-run", "--dry-run", "False", "--task", "absent.py:make"], False),
]


@pytest.mark.parametrize("command", [["train", "naive", "--learner.name", "sgd"], ["eval", "adam:1e-3"]], ids=" ".join)
@pytest.mark.parametrize(("words", "dry"), FLAGS, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_flags_parse_in_every_form(monkeypatch, capsys, command, words, dry):
    reports = []
    for name in ("of_training", "of_evaluation"):
        monkeypatch.setattr(plan, name, lambda *args: reports.append(args))
    monkeypatch.setattr(plan, "report", lambda found: "a plan")
    status = cli.main([*command, "--task", "quadratic", *words])
    out, err = capsys.readouterr()
    if dry:
        assert (status, out, len(reports)) == (0, "a plan\n", 1), err
    else:
        assert status == 2 and not reports and "absent.py does not exist" in err


@pytest.mark.parametrize(
    ("command", "flag"),
    [(c, f) for c, fs in {
        "train lolo": ["dry-run", "offload", "measure-blocks"], "eval": ["dry-run"], "resume": ["offload"],
        "reproduce": ["smoke"], "sweep": ["slurm", "table"],
    }.items() for f in fs],
)  # fmt: skip
def test_help_prints_flags_as_they_parse(capsys, command, flag):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    assert f"--{flag}, --no-{flag}" in capsys.readouterr().out
    assert cli.main([*command.split(), f"--{flag}=yes"]) == 2
    assert f"--{flag}=yes: --{flag} takes True or False" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "value"),
    [([], False), (["True"], True), (["False"], False), (["--offload"], True), (["--no-offload"], True)],
)
def test_a_boolean_of_the_recipe_takes_a_word_or_none(monkeypatch, words, value):
    made = []
    monkeypatch.setattr(plan, "of_training", lambda recipe, *args: made.append(recipe))
    monkeypatch.setattr(plan, "report", lambda found: "")
    option = ["--unroll.stagger", *words] if words else []
    assert cli.main(["train", "lolo", "--task", "quadratic", *option, "--dry-run"]) == 0
    assert made[0].unroll.stagger is value


def test_a_learner_s_boolean_is_an_option_too(monkeypatch):
    made = []
    monkeypatch.setattr(plan, "of_training", lambda recipe, *args: made.append(recipe))
    monkeypatch.setattr(plan, "report", lambda found: "")
    words = ["--learner.name", "norm_fc", "--learner.orthogonal", "False", "--dry-run"]
    assert cli.main(["train", "lolo", "--task", "quadratic", *words]) == 0
    assert made[0].learner.orthogonal is False


def test_plain_progress_says_how_long_it_will_take(monkeypatch, capsys):
    clock = iter([100.0, 100.0, 130.0, 160.0, 1000.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    display = progress.ProgressDisplay(None)
    display("runs", 0, 100, "")
    display("runs", 1, 100, "the same tenth")
    display("runs", 10, 100, "loss nan")
    assert capsys.readouterr().err.splitlines() == ["runs: 0 of 100", "runs: 10 of 100 loss nan  0:09:00 left"]


def test_a_notebook_shows_one_line_that_changes(monkeypatch):
    clock, lines = iter([100.0, 100.1, 101.0, 101.1]), []

    class Handle:
        def update(self, data, raw):
            lines[-1] = data["text/plain"]

    def display(data, raw, display_id):
        lines.append(data["text/plain"])
        return Handle()

    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(progress, "time_left", lambda *_: "")
    console = types.SimpleNamespace(is_jupyter=True)
    monkeypatch.setattr(progress.rich.console, "Console", lambda **_: console)
    with progress.progress_display() as shown:
        shown("runs", 0, 100, "")
        assert lines == ["runs " + 24 * "░" + " 0 of 100"]
        shown("runs", 1, 100, "too soon")
        assert lines == ["runs " + 24 * "░" + " 0 of 100"]
        shown("runs", 50, 100, "loss 1.0")
        assert lines == ["runs " + 12 * "█" + 12 * "░" + " 50 of 100 loss 1.0"]
        shown("runs", 100, 100, "the end comes at once")
    assert lines == ["runs " + 24 * "█" + " 100 of 100 the end comes at once"]


def test_a_loss_that_is_not_a_number_is_shown_as_nan(tmp_path, capsys):
    (tmp_path / "bad.py").write_text(BAD_TASK)
    assert (
        cli.main(["train", "naive", "--task", f"{tmp_path}/bad.py:make", *RUN[2:], "--out", str(tmp_path / "r")]) == 0
    )
    err = capsys.readouterr().err
    assert "loss nan" in err and "loss 0.0" not in err


BAD_TASK = """
import dataclasses
import jax
from lolo.tasks import quadratic

def make():
    splits = quadratic()
    bad = jax.numpy.full_like(splits.train.data, jax.numpy.nan)
    return splits._replace(train=dataclasses.replace(splits.train, data=bad))
"""


def test_a_stream_with_a_reader_is_not_unread():
    read, write = os.pipe()
    with os.fdopen(write, "w") as stream:
        assert not streams.is_unread(stream)
        os.close(read)
        assert streams.is_unread(stream)


def test_a_run_finds_its_task_whereever_it_is_resumed_from(tmp_path, monkeypatch, capsys):
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    for folder in (start, elsewhere):
        folder.mkdir()
    (start / "mine.py").write_text(
        "from sizes import SIZE\nfrom lolo.tasks import quadratic as q\nmake = lambda: q(SIZE)\n"
    )
    (start / "sizes.py").write_text("SIZE = 2\n")
    monkeypatch.chdir(start)
    argv = ["train", "lolo", "--task", "mine.py:make", *RUN[2:], "--out", "runs/one"]
    assert cli.main(argv) == 0
    recipe = (start / "runs" / "one" / "recipe.json").read_bytes()
    monkeypatch.chdir(elsewhere)
    assert cli.main(["resume", str(start / "runs" / "one")]) == 0
    assert (start / "runs" / "one" / "recipe.json").read_bytes() == recipe

    about = disk.read_json(start / "runs" / "one" / "run.json")
    assert about.pop("folder") == str(start)
    disk.write_json(start / "runs" / "one" / "run.json", about)  # as an older lolo wrote it
    assert cli.main(["resume", str(start / "runs" / "one")]) == 0

    (start / "mine.py").rename(start / "other.py")
    capsys.readouterr()
    assert cli.main(["resume", str(start / "runs" / "one")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(start) in err and str(elsewhere) in err and "Put it back" in err
