"""`lolo bench`: what it measures in is right; speed itself is not for tests."""

import json
import time

import pytest
from test_training import SMALL, small

from lolo.bench import speed
from lolo.cli import main as cli
from lolo.files.settings import RecipeError
from lolo.optimizers import small_fc
from lolo.runtime import parallel
from lolo.training import run_folder


def test_calls_take_turns_and_medians_are_theirs():
    order = []

    def call(name, seconds):
        order.append(name)
        time.sleep(seconds)
        return 0

    times = speed.interleaved({"a": lambda: call("a", 0.002), "b": lambda: call("b", 0.02)}, 0.0, least=3)
    assert order == ["a", "b"] * 4 and times["a"] < times["b"]


def test_the_lanes_of_both_forms_compute_the_same():
    """What the benchmark compares is one function: the losses of 16 trajectories agree."""
    task, steps = speed.synthetic((12, 8, 4)).train, 3
    losses = [
        program(*args)
        for program, args in (
            speed.lanes(task, small_fc.small_fc().optimizer, steps, True),
            speed.lanes(task, speed.textbook.small_fc, steps, False),
        )
    ]
    assert losses[0].shape == (2 * speed.PAIRS, steps)
    assert abs(losses[0] - losses[1]).max() < 1e-5
    assert len(parallel.mesh(speed.PAIRS).devices) >= 1


@pytest.mark.slow
def test_a_new_process_times_its_first_outer_step_and_later_ones(tmp_path):
    first, median = speed.child(1, 2, str(tmp_path), pin=True)
    assert first > median > 0


def test_numbers_are_written_with_their_machine_and_unknown_parts_refused(tmp_path, monkeypatch):
    lines = [speed.Line(f"growth with pairs: {n}", 10.0 * n, "ms") for n in (2, 4)]
    monkeypatch.setattr(speed, "PARTS", {"growth": lambda: [*lines, speed.Line("other", float("nan"), "x")]})
    speed.run(["growth"], tmp_path / "b.json", log=lambda text: None)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [line["value"] for line in written["lines"]] == [20.0, 40.0, "nan"] and written["machine"]["cores"] >= 1
    assert speed.growth_curves(lines) == {"pairs": [(2.0, 20.0), (4.0, 40.0)]}
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RecipeError, match="growth"):
        speed.run(["growht"], None)


def test_blocks_that_are_timed_divide_the_pairs_and_leave_no_device_idle(monkeypatch):
    recipe = small("lolo", **{"estimator.pairs": 12, "outer.steps": 9})
    monkeypatch.setattr(speed, "in_turns", lambda calls, rounds: {name: float(name) for name in calls})
    monkeypatch.setattr(speed, "outer_step", lambda recipe, splits, devices: speed.OuterStep(lambda: 0, None, 0))
    assert list(speed.block_times(recipe, devices=1)) == [1, 2, 4]
    assert list(speed.block_times(small("lolo", **{"estimator.pairs": 3}), devices=1)) == [1]


def test_the_fastest_block_is_stored_in_the_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speed, "in_turns", lambda calls, rounds: {name: {"1": 0.2, "2": 0.1}[name] for name in calls})
    options = [f"--{name}={value}" for name, value in SMALL.items() if name != "tasks"]
    words = ["train", "lolo", "--task", "quadratic", *options, "--devices", "1", "--measure-blocks"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0
    assert run_folder.read_recipe(tmp_path / "run").estimator.slots_per_block == 2
    assert "1: 200.0 ms, 2: 100.0 ms. Storing 2" in capsys.readouterr().err
    monkeypatch.setattr(speed, "block_times", lambda *args: pytest.fail("timed before the folder was looked at"))
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 2
    assert "already holds a run" in capsys.readouterr().err
