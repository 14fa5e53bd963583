"""`lolo bench`: what it measures in is right; speed itself is not for tests."""

import json
import time

import jax.numpy as jnp
import pytest
from test_training import SMALL, small

from lolo.bench import batch_speed, parts_speed, speed, timing
from lolo.cli import main as cli
from lolo.files.settings import RecipeError
from lolo.method import meta
from lolo.method.inner import InnerState
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


@pytest.mark.slow
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


def test_architectures_are_compared_on_one_task_in_one_run(monkeypatch):
    built = []

    def outer_step(recipe):
        built.append(recipe)
        params, state = jnp.zeros((16, 10)), jnp.zeros((16, 30 if recipe.learner.name == "norm_fc" else 40))
        inner = InnerState(params, (), state, (), jnp.zeros(16))
        local = meta.LocalSlots(inner, (), ())
        slots = meta.Slots(local, (), position=0, length=0, fresh=0)
        return speed.OuterStep(lambda: 0, meta.MetaState({}, (), (slots,), 0, 0, 0), 0)

    seconds = {"small_fc": 0.8, "norm_fc, plain": 0.4, "norm_fc, kernel": 0.2, "norm_fc, Newton-Schulz": 1.6}
    monkeypatch.setattr(speed, "outer_step", outer_step)
    monkeypatch.setattr(speed, "in_turns", lambda calls, rounds: {name: seconds[name] for name in calls})
    lines = {line.what: line.value for line in speed.bench_architectures(["quadratic"])}
    assert lines == {
        "quadratic: state of small_fc": 4.0,
        "quadratic: state of norm_fc, plain": 3.0,
        "quadratic: state of norm_fc, kernel": 3.0,
        "quadratic: state of norm_fc, Newton-Schulz": 3.0,
        "quadratic: inner steps with small_fc": 1000.0,
        "quadratic: inner steps with norm_fc, plain": 2000.0,
        "quadratic: inner steps with norm_fc, kernel": 4000.0,
        "quadratic: inner steps with norm_fc, Newton-Schulz": 500.0,
        "quadratic: speed of norm_fc, plain / small_fc": 2.0,
        "quadratic: speed of norm_fc, kernel / small_fc": 4.0,
        "quadratic: speed of norm_fc, Newton-Schulz / small_fc": 0.5,
    }
    assert [recipe.tasks for recipe in built] == [("quadratic",)] * 4
    assert [getattr(recipe.learner, "orthogonal", None) for recipe in built] == [None, False, False, True]


def test_the_batch_from_which_a_step_is_cheap_follows_from_the_times():
    lines = {line.what: line.value for line in batch_speed.lines("ours", 0.1, {10: 0.1, 100: 0.9})}
    assert lines == {
        "share of a training step at batch 10: ours": pytest.approx(50.0),
        "share of a training step at batch 100: ours": pytest.approx(10.0),
        "batch from which the step is below 10%: ours": pytest.approx(100.0),
    }


@pytest.mark.slow
def test_passes_and_steps_are_timed_in_one_process():
    times = timing.on_one_core(batch_speed.CHILD, 1, 8, 6, 4)
    assert {"passes at batch 128", "passes at batch 4,096", "adamw", "muon", "small_fc"} <= times.keys()
    assert sum(name.startswith("norm_fc") for name in times) == 2 and min(times.values()) > 0


@pytest.mark.slow
def test_parts_of_a_step_are_timed_in_one_process_and_compared_with_products():
    times = timing.on_one_core(parts_speed.CHILD, 1, 40)
    assert min(times.values()) > 0
    lines = {line.what: line.value for line in parts_speed.lines(dict.fromkeys(times, 0.1), ", here", 1)}
    assert lines["1M, here: the layers' products / step"] == pytest.approx(3)
    assert lines["1M, here: arithmetic, step of small_fc"] == pytest.approx(32)


def test_a_new_process_gets_the_variables_and_one_core_or_all():
    code = "import json, os; print(json.dumps({os.environ['LOLO_TEST']: float(len(os.sched_getaffinity(0)))}))"
    for call, cores in ((timing.on_one_core, 1), (timing.on_all_cores, parallel.cores())):
        assert call(code, variables={"LOLO_TEST": "a word"}) == {"a word": cores}


def test_numbers_are_written_with_their_machine_and_unknown_parts_refused(tmp_path, monkeypatch):
    lines = [speed.Line(f"growth with pairs: {n}", 10.0 * n, "ms") for n in (2, 4)]
    monkeypatch.setattr(speed, "PARTS", {"growth": lambda: [*lines, speed.Line("other", float("nan"), "x")]})
    speed.run(["growth"], tmp_path / "b.json", log=lambda text: None)
    written = json.loads((tmp_path / "b.json").read_text())
    assert [line["value"] for line in written["lines"]] == [20.0, 40.0, "nan"] and written["machine"]["cores"] >= 1
    assert speed.growth_curves(lines) == {"pairs": [(2.0, 20.0), (4.0, 40.0)]}
    assert "Twice the pairs, 2.0 times the time" in (tmp_path / "b.svg").read_text()
    with pytest.raises(RecipeError, match="growth"):
        speed.run(["growht"], None)


def test_blocks_that_are_timed_divide_the_pairs_and_leave_no_device_idle(monkeypatch):
    recipe = small("lolo", **{"estimator.pairs": 12, "outer.steps": 9})
    monkeypatch.setattr(speed, "in_turns", lambda calls, rounds: {name: float(name) for name in calls})
    monkeypatch.setattr(speed, "outer_step", lambda recipe, splits, devices: speed.OuterStep(lambda: 0, None, 0))
    assert list(speed.block_times(recipe, devices=1)) == [1, 2, 4]
    assert list(speed.block_times(small("lolo", **{"estimator.pairs": 3}), devices=1)) == [1]


@pytest.mark.slow
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
