"""The host loop: resume equals uninterrupted, folders are protected, weights and logs hold what they promise."""

import dataclasses
import errno
import json
import os
import shutil
import threading

import jax
import numpy as np
import pytest
from helpers import StopAfter, with_slow

from lolo.files import disk, settings, tensors
from lolo.files.disk import FileError
from lolo.method.task import TaskError
from lolo.optimizers import pretrained, weights_file
from lolo.tasks.small import quadratic
from lolo.training import checkpoints, doctor, loop, recipes, run_folder, run_log, trial
from lolo.training.findings import Verdict
from lolo.training.how import How
from lolo.training.loop import DivergedError
from lolo.training.run import check_init
from lolo.training.run_folder import RunError

SMALL = {
    "tasks": ("quadratic",),
    "outer.steps": 8,
    "unroll.length": 40,
    "unroll.truncation": 10,
    "estimator.pairs": 2,
    "learner.hidden": 4,
    "validation.every": 0,
}


def small(name="lolo", **changes):
    recipe = recipes.RECIPES[name]
    for field, value in (SMALL | changes).items():
        recipe = settings.with_field(recipe, field, value)
    return recipe


def phi(result):
    return tensors.digest({name: np.asarray(x) for name, x in result.weights.meta_params.items()})


@pytest.mark.parametrize("name", with_slow(["lolo", "bc-only", "naive"], {"bc-only", "naive"}))
def test_stop_and_resume_equals_uninterrupted(tmp_path, name):
    recipe = small(name, **{"validation.every": 3, "validation.steps": 100, "validation.seeds": 1})
    whole = loop.train(recipe, tmp_path / "whole")
    for at in (1, 3, 6):
        stop = StopAfter(at)
        out = tmp_path / f"stopped{at}"
        first = loop.train(recipe, out, How(stop=stop, on_progress=stop.on_progress, log=lambda text: None))
        assert not first.finished and first.step == at
        second = loop.resume(out, How(log=lambda text: None))
        assert second.finished and phi(second) == phi(whole)
        logs = [run_log.log_rows(folder) for folder in (out, tmp_path / "whole")]
        timeless = [
            [{k: v for k, v in row.items() if k not in ("inner_steps_per_second", "peak_memory_mb")} for row in log]
            for log in logs
        ]
        assert timeless[0] == timeless[1]


def test_another_seed_gives_other_weights():
    assert phi(loop.train(small(), None)) != phi(loop.train(small(seed=1), None))


def test_a_folder_with_another_run_is_refused_with_the_difference(tmp_path):
    loop.train(small(), tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(RunError, match=r"already holds a run \(seed: 0 there, 5 requested\).*lolo resume"):
        loop.train(small(seed=5), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(RunError, match="not an empty folder"):
        loop.train(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resume_refuses_a_changed_recipe(tmp_path):
    loop.train(small(), tmp_path / "run")
    path = tmp_path / "run" / "recipe.json"
    data = json.loads(path.read_text())
    data["estimator"]["sigma"] = 0.5
    path.write_text(json.dumps(data))
    with pytest.raises(RunError, match=r"estimator\.sigma: 0\.01 in the checkpoint, 0\.5 now"):
        loop.resume(tmp_path / "run")


def test_resume_without_a_run_or_a_checkpoint_says_so(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        loop.resume(tmp_path)
    stop = StopAfter(1)
    loop.train(small(), tmp_path / "run", How(stop=stop, on_progress=stop.on_progress, log=lambda text: None))
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(RunError, match="no complete checkpoint"):
        loop.resume(tmp_path / "run", How(log=lambda text: None))


def test_two_at_work_on_one_folder_are_kept_apart(tmp_path):
    out, tried = tmp_path / "run", []

    def told(progress):
        with pytest.raises(RunError, match=f"another process is at work on {out}; wait for it"):
            loop.resume(out)
        tried.append(progress.step)

    stop = StopAfter(2)
    loop.train(
        small(), out, How(stop=stop, on_progress=lambda p: (told(p), stop.on_progress(p)), log=lambda text: None)
    )
    log = (out / "log.jsonl").read_text()
    with disk.locked(out) as free, disk.locked(tmp_path) as another:
        assert free and another
        with pytest.raises(RunError, match="another process is at work"):
            loop.resume(out)
    assert (out / "log.jsonl").read_text() == log and tried == [1, 2]
    assert phi(loop.resume(out, How(log=lambda text: None))) == phi(loop.train(small()))


def test_weights_carry_recipe_and_quantiles_of_realised_steps(tmp_path):
    result = loop.train(small(), tmp_path / "run")
    loaded = pretrained.load(tmp_path / "run" / "last.safetensors")
    assert loaded.recipe["unroll"]["length"] == 40
    assert loaded.card["outer_step"] == 8
    realised = loaded.card["realised_steps"]
    assert set(realised) == {"50%", "90%", "99%", "100%"}
    # Two unrolls of 40 steps each; the second may go on from inside the first, at most from step 39.
    assert 40 <= realised["100%"] < 80 and realised["50%"] <= realised["90%"] <= realised["100%"]
    assert sum(loaded.card["start_steps_per_250"].values()) == 4
    for name, array in result.weights.meta_params.items():
        np.testing.assert_array_equal(loaded.meta_params[name], array)


def test_best_weights_are_those_of_the_lowest_validation_loss(tmp_path):
    recipe = small(**{"validation.every": 2, "validation.steps": 100, "validation.seeds": 1})
    loop.train(recipe, tmp_path / "run")
    measured = [row["validation"]["held_loss"] for row in run_log.log_rows(tmp_path / "run") if "validation" in row]
    assert len(measured) == 4
    best = pretrained.load(tmp_path / "run" / "best.safetensors")
    assert best.card["outer_step"] == 2 * (int(np.argmin(measured)) + 1)
    assert best.card["validation"]["held_loss"] == min(measured)


def test_last_weights_say_how_their_step_was_validated(tmp_path, monkeypatch):
    recipe = small(**{"validation.every": 3, "validation.steps": 100, "validation.seeds": 1})
    written, save = [], pretrained.save
    monkeypatch.setattr(pretrained, "save", lambda path, weights: (written.append(path.name), save(path, weights)))
    loop.train(recipe, tmp_path / "run")  # validated after 3, 6 and, because it is the last, 8 outer steps
    assert written.count("last.safetensors") == 3
    measured = [row["validation"] for row in run_log.log_rows(tmp_path / "run") if "validation" in row]
    assert pretrained.load(tmp_path / "run" / "last.safetensors").card["validation"] == measured[-1]
    loop.resume(tmp_path / "run", How(log=lambda text: None))
    assert pretrained.load(tmp_path / "run" / "last.safetensors").card["validation"] == measured[-1]
    stop = StopAfter(7)
    loop.train(recipe, tmp_path / "cut", How(stop=stop, on_progress=stop.on_progress, log=lambda text: None))
    assert "validation" not in pretrained.load(tmp_path / "cut" / "last.safetensors").card


def test_init_continues_from_other_weights(tmp_path):
    loop.train(small(), tmp_path / "a")
    source = tmp_path / "a" / "last.safetensors"
    recipe = small(**{"outer.steps": 1, "outer.lr": 1e-12, "outer.final_lr": 1e-12})
    result = loop.train(recipe, None, init=source)
    for name, array in pretrained.load(source).meta_params.items():
        np.testing.assert_allclose(result.weights.meta_params[name], array, atol=1e-9)
    for name, value, there in (("hidden", 5, "4"), ("step_mult", 0.01, "0.001"), ("learn_decays", True, "False")):
        words = f"learner.{name} is {there} there and {value} in the recipe"
        with pytest.raises(FileError, match=words):
            loop.train(small(**{f"learner.{name}": value}), tmp_path / "b", init=source)
    assert not (tmp_path / "b").exists()
    check_init(
        weights_file.read_weights(source), small(**{"learner.clock_limit": 5.0}).learner
    )  # a deployment setting may differ
    weights = pretrained.load(source)  # and so is how they are shipped: φ means what it was meta-trained as
    shipped = dataclasses.replace(weights.learner, step_mult=2e-3, step_decay=3000.0)
    pretrained.save(tmp_path / "shipped.safetensors", weights._replace(learner=shipped))
    check_init(weights_file.read_weights(tmp_path / "shipped.safetensors"), weights.learner)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["before recipe.json", "in recipe.json", "before the first checkpoint"])
def test_a_run_killed_before_its_first_checkpoint_is_not_in_the_way(tmp_path, killed):
    recipe = small(**{"outer.steps": 2})
    run, whole = tmp_path / "run", phi(loop.train(recipe, tmp_path / "whole"))
    run.mkdir()
    (run / "run.json").write_bytes((tmp_path / "whole" / "run.json").read_bytes())
    if killed == "before the first checkpoint":
        (run / "recipe.json").write_bytes((tmp_path / "whole" / "recipe.json").read_bytes())
        (run / "checkpoints").mkdir()
        assert phi(loop.resume(run, How(log=lambda text: None))) == whole
        return
    if killed == "in recipe.json":
        (run / ".recipe.json.123.tmp").write_text("{")
    assert phi(loop.train(recipe, run)) == whole


def test_a_run_without_checkpoints_is_not_begun_again_over_what_it_made(tmp_path):
    loop.train(small(**{"outer.steps": 1}), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    for gone in (None, "log.jsonl", "last.safetensors"):
        if gone:
            (tmp_path / "run" / gone).rename(tmp_path / gone)
        with pytest.raises(RunError, match="no complete checkpoint"):
            loop.resume(tmp_path / "run", How(log=lambda text: None))
        if gone:
            (tmp_path / gone).rename(tmp_path / "run" / gone)


def own():
    return {"mine": quadratic(3)}


def test_own_tasks_are_named_in_the_weights_and_asked_for_again(tmp_path):
    stop = StopAfter(1)
    first = loop.train(
        small(), tmp_path / "run", How(stop=stop, on_progress=stop.on_progress, log=lambda text: None), tasks=own()
    )
    assert first.weights.recipe["tasks"] == ("mine",)
    with pytest.raises(RunError, match=r"tasks=\('mine',\), not \('yours',\)"):
        loop.resume(tmp_path / "run", tasks={"yours": quadratic(3)})
    with pytest.raises(TaskError, match="unknown task 'mine'"):
        loop.resume(tmp_path / "run", How(log=lambda text: None))
    assert loop.resume(tmp_path / "run", How(log=lambda text: None), tasks=own()).finished


def test_less_than_one_device_is_refused():
    for devices in (0, -1):
        with pytest.raises(ValueError, match=f"devices={devices} must be at least 1"):
            loop.train(small(), None, How(devices=devices))


def poisoned():
    splits = quadratic()
    bad = dataclasses.replace(splits.train, data=jax.numpy.full_like(splits.train.data, jax.numpy.nan))
    return {"poisoned": splits._replace(train=bad)}


def test_a_run_of_bad_numbers_stops_with_a_diagnosis_and_keeps_the_last_good_checkpoint(tmp_path):
    recipe = small(**{"outer.max_bad_steps": 3})
    with pytest.raises(DivergedError) as caught:
        loop.train(recipe, tmp_path / "run", tasks=poisoned())
    words = str(caught.value)
    assert "task 'poisoned'" in words and "the loss went bad first" in words and "outer step 0." in words
    assert run_folder.checkpoints(tmp_path / "run") == [0]
    arrays, _ = checkpoints.read_checkpoint(tmp_path / "run", 0)
    assert all(np.isfinite(x).all() for name, x in arrays.items() if x.dtype.kind == "f" and "meta_params" in name)
    rows = run_log.log_rows(tmp_path / "run")
    assert [row["dropped"] for row in rows] == [2, 2, 2] and np.isnan([row["task_loss"] for row in rows]).all()


def test_steps_without_a_good_pair_do_not_count_in_the_mean_loss():
    rows = [{"task_loss": losses} for losses in ([1.0, np.nan], [2.0, 4.0], [3.0, 6.0])]
    assert run_log.mean_task_loss(rows) == (2.0 + 5.0) / 2
    assert run_log.mean_task_loss([{"task_loss": [0.0]}, {"task_loss": [3.0]}]) == 1.5  # a log of before says 0
    assert all(np.isnan(run_log.mean_task_loss(part)) for part in ([], rows[:1]))


def test_every_logged_row_names_what_the_evaluation_rules_ask_for(tmp_path):
    loop.train(small(), tmp_path / "run")
    row = run_log.log_rows(tmp_path / "run")[-1]
    assert {
        "task_loss", "bc_loss", "delta_task_rms", "delta_bc_rms", "gradient_ratio", "alpha_mix", "gradient_norm",
        "signal_to_noise", "dropped", "starts", "inner_steps_per_second",
    } <= set(row)  # fmt: skip
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["buffer_bytes_per_slot"] == 4 * about["inner_state_bytes"]
    assert {"versions", "commit", "machine", "command"} <= set(about)


def test_large_checkpoints_are_written_while_the_next_outer_steps_run(tmp_path, monkeypatch):
    loop.train(small(), tmp_path / "inline", How(checkpoint_seconds=0.0))
    told, held_up, write = threading.Event(), [], checkpoints.write_checkpoint

    def slow(run, step, arrays, about, **more):
        if step == 1:
            held_up.append(told.wait(20))  # for what the loop does after asking for this checkpoint
        return write(run, step, arrays, about, **more)

    monkeypatch.setattr(checkpoints, "LARGE_CHECKPOINT", 0)
    monkeypatch.setattr(checkpoints, "write_checkpoint", slow)
    loop.train(small(), tmp_path / "run", How(checkpoint_seconds=0.0, on_progress=lambda p: p.step == 2 and told.set()))
    assert held_up == [True]
    for step in run_folder.checkpoints(tmp_path / "inline"):
        ours, theirs = (checkpoints.read_checkpoint(tmp_path / name, step)[0] for name in ("run", "inline"))
        assert tensors.digest(ours) == tensors.digest(theirs)


def test_a_large_checkpoint_that_can_not_be_written_ends_the_run_with_the_reason(tmp_path, monkeypatch):
    write = checkpoints.write_checkpoint

    def full(run, step, arrays, about, **more):
        if step == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(run, step, arrays, about, **more)

    monkeypatch.setattr(checkpoints, "LARGE_CHECKPOINT", 0)
    monkeypatch.setattr(checkpoints, "write_checkpoint", full)
    with pytest.raises(OSError, match="No space left"):
        loop.train(small(), tmp_path / "run", How(checkpoint_seconds=0.0))
    assert run_folder.checkpoints(tmp_path / "run")[-1] == 2
    monkeypatch.setattr(checkpoints, "write_checkpoint", write)
    resumed = loop.resume(tmp_path / "run")
    assert phi(resumed) == phi(loop.train(small()))


def test_bad_numbers_in_one_task_leave_the_others_work_alone(tmp_path):
    recipe = small(**{"tasks": ("poisoned", "good"), "outer.max_bad_steps": 3})
    result = loop.train(recipe, tmp_path / "run", tasks=poisoned() | {"good": quadratic()})
    rows = run_log.log_rows(tmp_path / "run")
    assert result.finished and [row["dropped"] for row in rows] == [2] * 8
    for field in run_log.OF_TASKS:
        assert [np.isnan(row[field]).tolist() for row in rows] == [[True, False]] * 8
    assert {bad["task"] for row in rows for bad in row["first_bad"]} == {"poisoned"}
    assert all(np.isfinite(x).all() for x in result.weights.meta_params.values())
    findings = doctor.examine(tmp_path / "run")
    assert any("50.00 % of all" in finding.what and finding.verdict is Verdict.FAIL for finding in findings)


# --- validation tasks -----------------------------------------------------------------------------------------------

HELD_OUT = """
import dataclasses
from lolo.tasks import quadratic

def larger(scale: float = 1.0):
    splits = quadratic(3)
    return splits._replace(**{
        name: dataclasses.replace(task, data=scale * task.data) for name, task in splits._asdict().items()
    })
"""


def validated(folder, out, **changes):
    sizes = {"validation.every": 4, "validation.steps": 100, "validation.seeds": 1} | changes
    result = loop.train(small("naive", **sizes), folder / out)
    return result, [row["validation"] for row in run_log.log_rows(folder / out) if "validation" in row]


def test_validation_tasks_choose_the_best_and_teach_nothing(tmp_path):
    (tmp_path / "held.py").write_text(HELD_OUT)
    plain, usual = validated(tmp_path, "plain")
    name = f"{tmp_path / 'held.py'}:larger:scale=90.0"
    held, other = validated(tmp_path, "held", **{"validation.tasks": (name,)})
    assert phi(held) == phi(plain)
    assert len(usual) == len(other) == 2 and other[0]["held_loss"] > 2 * usual[0]["held_loss"]
    stored = run_folder.read_recipe(tmp_path / "held").validation.tasks
    assert len(stored) == 1 and stored[0].startswith(f"{name}@")  # pinned by its hash
    best = weights_file.read_weights(tmp_path / "held" / "best.safetensors")
    lowest = min(other, key=lambda measured: measured["held_loss"])
    assert best.card["validation"] == lowest


def test_a_validation_task_that_has_changed_stops_a_resumed_run(tmp_path):
    (tmp_path / "held.py").write_text(HELD_OUT)
    stop, changes = StopAfter(2), {"validation.tasks": (f"{tmp_path / 'held.py'}:larger",)}
    loop.train(small(**changes), tmp_path / "run", How(stop=stop, on_progress=stop.on_progress, log=lambda text: None))
    (tmp_path / "held.py").write_text(HELD_OUT + "\n")
    with pytest.raises(TaskError, match="has changed since the recipe was made"):
        loop.resume(tmp_path / "run", How(log=lambda text: None))


@pytest.mark.slow
def test_a_run_finds_its_validation_tasks_from_any_current_folder(tmp_path, monkeypatch):
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    for folder in (start, elsewhere):
        folder.mkdir()
    (start / "held.py").write_text(HELD_OUT)
    sizes = {"validation.every": 4, "validation.steps": 100, "validation.seeds": 1}
    recipe = small(
        "naive", **sizes, **{"tasks": ("held.py:larger",), "validation.tasks": ("held.py:larger:scale=90.0",)}
    )
    monkeypatch.chdir(start)
    stop = StopAfter(5)
    how = How(stop=stop, on_progress=stop.on_progress, log=lambda text: None)
    loop.train(recipe, start / "run", how)
    monkeypatch.chdir(elsewhere)
    assert loop.resume(start / "run", How(log=lambda text: None)).finished
    (finding,) = trial.examine(start / "run", seconds=0.0)
    assert "more than the 0 seconds allowed" in finding.what  # and not that its file is missing


@pytest.mark.slow
def test_given_splits_that_the_recipe_names_for_validation_are_for_validation_alone(tmp_path):
    given = {"mine": quadratic(4), "held": quadratic(3)}
    sizes = {"validation.every": 4, "validation.steps": 100, "validation.seeds": 1, "validation.tasks": ("held",)}
    stop = StopAfter(5)
    how = How(stop=stop, on_progress=stop.on_progress, log=lambda text: None)
    loop.train(small("naive", **sizes), tmp_path / "run", how, tasks=given)
    assert run_folder.read_recipe(tmp_path / "run").tasks == ("mine",)
    assert loop.resume(tmp_path / "run", How(log=lambda text: None), tasks=given).finished
    with pytest.raises(RunError, match="not \\('held2',\\)"):
        loop.resume(tmp_path / "run", tasks={"held2": quadratic(4), "held": quadratic(3)})
