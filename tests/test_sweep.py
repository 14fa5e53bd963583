"""`lolo sweep`: the runs that a file describes, how far they are, and what failed."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from lolo.cli import main as cli
from lolo.files import settings
from lolo.optimizers import weights_file
from lolo.runtime import interrupt
from lolo.training import loop, recipes, sweep
from lolo.training.how import How
from lolo.training.sweep import SweepError

SMALL = """
[fields]
task = "quadratic"
learner.name = "sgd"
"unroll.length" = 20
"unroll.truncation" = 5
estimator.pairs = 2
outer.steps = 4
validation.every = 0
"""


def write(folder, text, name="try.toml"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_grid_is_every_combination_in_the_order_of_the_file(tmp_path):
    text = f'recipe = "bc-only"\nout = "{tmp_path}/out"\n{SMALL}\n[grid]\nreplay.read = ["pop", "newest"]\n'
    text += "seed = [0, 1, 2]"
    plan = sweep.read(write(tmp_path, text))
    assert [(run.varied["replay.read"], run.varied["seed"]) for run in plan.runs] == [
        (read, seed) for read in ("pop", "newest") for seed in (0, 1, 2)
    ]
    run = plan.runs[4]
    assert run.out == tmp_path / "out" / "004-read=newest-seed=1" and run.number == 4
    assert settings.diff(recipes.BC_ONLY, run.recipe) == {
        "tasks": (("fashion-mlp",), ("quadratic",)),
        "learner.name": ("small_fc", "sgd"),
        "replay.read": ("oldest", "newest"),
        "unroll.length": (1000, 20),
        "unroll.truncation": (50, 5),
        "estimator.pairs": (8, 2),
        "outer.steps": (5000, 4),
        "validation.every": (250, 0),
        "seed": (0, 1),
    }
    assert len(sweep.read(write(tmp_path, SMALL)).runs) == 1  # no grid: one run


def test_tables_of_runs_are_tried_one_at_a_time_and_each_with_the_whole_grid(tmp_path):
    tables = "[[runs]]\n[[runs]]\nouter.lr = 0.01\n[[runs]]\nimitation.start = 0.1\nimitation.floor = 0.2\n"
    runs = sweep.read(write(tmp_path, f"{SMALL}\n{tables}[grid]\nseed = [0, 1]")).runs
    assert [run.name for run in runs][::2] == ["000-seed=0", "002-lr=0.01-seed=0", "004-start=0.1-floor=0.2-seed=0"]
    assert [(run.recipe.outer.lr, run.recipe.imitation.floor, run.recipe.seed) for run in runs] == [
        (lr, floor, seed) for lr, floor in ((0.003, 0.0), (0.01, 0.0), (0.003, 0.2)) for seed in (0, 1)
    ]
    # Each row of the table names what any of the runs changes, also where this run does not.
    assert runs[1].varied == {"outer.lr": 0.003, "imitation.start": 0.0, "imitation.floor": 0.0, "seed": 1}
    assert sweep.table([sweep.row(run) for run in runs]).count("waiting") == 6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("runs = 3", ["runs = 3", "[[runs]]"]),
        ("[runs]\nseed = 1", ["write [[runs]] instead of [runs]"]),
        ('[[runs]]\ntasks = ["books-mpl"]', ["try.toml, tasks=", "'books-mpl'"]),
        ("[[runs]]\n[[runs]]", ["000 and 001 are the same run; take one out"]),
        ("runs = [3]", ["runs = 3", "[[runs]]"]),
        ("[[runs]]\nseed = 1\n[[runs]]\n[grid]\nseed = [0]", ["seed is both in [[runs]]"]),
        ("[[runs]]\nseed = 1\n[[runs]]\nseed = 1", ["000-seed=1 and 001-seed=1 are the same run"]),
        ("[[runs]]\nouter.stps = 1", ["'outer.stps'", "'outer.steps'"]),
        ("recipe = lolo", ["TOML"]),
        ('recipes = "lolo"', ["'recipes'", "'recipe'"]),
        ('recipe = "lol"', ["'lol'", "'lolo'"]),
        ("[grid]\nreplay.treshold = [0.1]", ["'replay.treshold'", "'replay.threshold'"]),
        ("[grid]\nseed = 3", ["grid.seed = 3", "list"]),
        ("[grid]\nseed = []", ["grid.seed = []", "at least one"]),
        ("[grid]\nseed = [0, 1.5]", ["seed=1.5", "'seed' can't be 1.5"]),
        ("[grid]\nreplay.threshold = [0.1, 2.0]", ["threshold=2.0", "from 0 to 1"]),
        ("[fields]\nseed = 1\n[grid]\nseed = [0]", ["seed is both"]),
        ('[fields]\ntask = "fashion-mpl"', ["'fashion-mpl'"]),
        ("recipe = 3", ["recipe = 3", "a string"]),
        ("out = 3", ["out = 3", "a string"]),
        ("fields = 3", ["fields = 3", "[fields]"]),
        ("[[grid]]\nseed = [1]", ["grid = [{'seed': [1]}]", "[grid]"]),
        ("[fields]\nouter.steps = 2024-01-01", ["'outer.steps'", "expected int"]),
        ('[fields]\ntask = "quadratic"\ntasks = ["fashion-mlp"]', ["tasks twice"]),
        ('[fields]\n"unroll.length" = 50\nunroll.length = 100', ["unroll.length twice"]),
        ('[grid]\nreplay.read = ["pop", "nwest"]', ["read=nwest", "'newest'"]),
        ("[grid]\nseed = [0, 1, 0]", ["000-seed=0 and 002-seed=0 are the same run"]),
    ],
)
def test_a_bad_file_is_one_line_and_nothing_runs(tmp_path, monkeypatch, capsys, text, words):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, text)
    assert cli.main(["sweep", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert list(tmp_path.iterdir()) == [path]


def test_the_slurm_script_has_a_task_for_each_run_and_is_valid_shell(tmp_path, capsys):
    path = write(tmp_path, f"{SMALL}\n[grid]\nseed = [0, 1, 2]", "it's a try.toml")
    assert cli.main(["sweep", str(path), "--slurm"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2" in script and '--only "$SLURM_ARRAY_TASK_ID"' in script
    example = pathlib.Path(__file__).parent.parent / "examples" / "scale" / "slurm.sh"
    for text in (script, example.read_text()):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
        (line,) = (line for line in text.splitlines() if line.startswith("exec srun"))
        assert '--cpus-per-task="$SLURM_CPUS_PER_TASK"' in line  # else every task has one core


def test_the_table_tells_how_far_each_run_is(tmp_path, capsys):
    path = write(tmp_path, f'out = "{tmp_path}/out"\n{SMALL}\n[grid]\nseed = [0, 1, 2, 3]')
    done, begun, failed, waiting = sweep.read(path).runs
    loop.train(done.recipe, done.out)
    stop = interrupt.Stop()
    stop.requested = "test"
    loop.train(begun.recipe, begun.out, How(stop=stop, log=lambda text: None))
    sweep.failure_file(failed).write_text("killed by SIGKILL: it printed nothing\n")
    assert [sweep.state_of(run) for run in (done, begun, failed, waiting)] == ["done", "begun", "waiting", "waiting"]
    assert sweep.command(begun, "lolo", 1) == ["resume", str(begun.out), "--devices", "1"]
    assert sweep.command(waiting, "lolo", 1)[:2] == ["train", "lolo"]
    assert cli.main(["sweep", str(path), "--table"]) == 4
    table = capsys.readouterr().out
    assert "1 of 4 runs failed" in table and f"- {failed.name}: killed by SIGKILL" in table
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["state"] for row in rows] == ["done", "begun", "failed", "waiting"]
    assert [row["outer_steps"] for row in rows] == [4, 0, 0, 0] and rows[0]["task_loss"] > 0
    write(tmp_path, path.read_text().replace("outer.steps = 4", "outer.steps = 5"))
    with pytest.raises(SweepError, match="outer.steps: 4 there, 5 in the file"):
        sweep.state_of(sweep.read(path).runs[0])


class Late(interrupt.Stop):
    """A request to stop that comes once the run has been started."""

    def __init__(self):
        self.asked = iter([None])

    @property
    def requested(self):
        return next(self.asked, "SIGTERM")


@pytest.mark.parametrize(
    ("script", "stop", "told", "reason"),
    [
        ("[ -p /dev/stdin ] && [ -n $LOLO_WATCHED ]", interrupt.Stop(), "is done", None),  # it ends with the sweep
        ("exit 3", Late(), "stopped", None),
        ("kill -TERM $$", Late(), "stopped", None),  # before it had a handler
        (
            "kill -TERM $$",
            interrupt.Stop(),
            "failed",
            "killed by SIGTERM: it printed nothing",
        ),  # not what it said before
        ("echo no; exit 2", interrupt.Stop(), "failed", "exit status 2: no"),
    ],
)
def test_how_a_run_ended_is_told(tmp_path, monkeypatch, script, stop, told, reason):
    program, said = tmp_path / "program", []
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (run,) = sweep.read(write(tmp_path, f'out = "{tmp_path}/out"\n{SMALL}')).runs
    run.out.parent.mkdir()
    run.out.with_name(f"{run.name}.log").write_text("words of the time before\n")
    sweep.Pool(stop, said.append).one(run, [])
    assert len(said) == 1 and told in said[0]
    failed = sweep.failure_file(run)
    assert (failed.read_text().strip() if failed.exists() else None) == reason


def test_a_run_that_is_being_started_when_the_sweep_must_stop_is_told():
    stop, finished = interrupt.Stop(), threading.Event()
    pool = sweep.Pool(stop, print)
    watcher = threading.Thread(target=pool.pass_on_stop, args=(finished,))
    watcher.start()
    stop.requested = "SIGTERM"
    time.sleep(0.3)
    with subprocess.Popen(["sleep", "60"]) as child:
        pool.children.add(child)
        try:
            assert child.wait(30) == -signal.SIGTERM
        finally:
            child.kill()
            finished.set()
            watcher.join()


@pytest.mark.slow
def test_a_sweep_runs_lists_what_failed_and_continues(tmp_path):
    # with so large a rate the expert leaves float32 at once
    text = f'out = "out"\n{SMALL}outer.max_bad_steps = 1\n[grid]\nimitation.lr = [0.01, 1e30]\nseed = [0, 1]'
    path = write(tmp_path, text)

    def lolo():
        command = [sys.executable, "-m", "lolo.cli", "sweep", path.name, "--workers", "2"]
        environment = os.environ | {"LOLO_CACHE": str(tmp_path / "cache")}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    first = lolo()
    assert first.returncode == 4 and "2 of 4 runs failed" in first.stdout, first.stderr
    assert first.stdout.count("exit status 4") == 2 and "went bad first" in first.stdout
    good = tmp_path / "out" / "000-lr=0.01-seed=0"
    before = (good / "last.safetensors").stat().st_mtime_ns
    shutil.rmtree(tmp_path / "out" / "001-lr=0.01-seed=1")
    second = lolo()  # runs what is missing, tries again what failed, leaves what is done
    assert second.returncode == 4 and "3 of 4 runs to do" in second.stderr, second.stderr
    assert (good / "last.safetensors").stat().st_mtime_ns == before
    assert (
        weights_file.read_weights(tmp_path / "out" / "001-lr=0.01-seed=1" / "last.safetensors").card["outer_step"] == 4
    )
