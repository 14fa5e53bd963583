"""The host loop: resume equals uninterrupted, folders are protected, weights and logs hold what they promise."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from lolo import files, pretrained, recipes, tasks, training

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
        recipe = recipes.with_field(recipe, field, value)
    return recipe


def phi(result):
    return files.digest({name: np.asarray(x) for name, x in result.weights.meta_params.items()})


class StopAfter(training.Stop):
    """Asks to stop once `steps` outer steps were told."""

    def __init__(self, steps):
        self.steps = steps

    def told(self, progress):
        if progress.step >= self.steps:
            self.requested = "test"


@pytest.mark.parametrize("name", ["lolo", "bc-only", "naive"])
def test_stop_and_resume_equals_uninterrupted(tmp_path, name):
    recipe = small(name, **{"validation.every": 3, "validation.steps": 100, "validation.seeds": 1})
    whole = training.train(recipe, tmp_path / "whole")
    for at in (1, 3, 6):
        stop = StopAfter(at)
        out = tmp_path / f"stopped{at}"
        first = training.train(recipe, out, stop=stop, told=stop.told, say=lambda text: None)
        assert not first.finished and first.step == at
        second = training.resume(out, say=lambda text: None)
        assert second.finished and phi(second) == phi(whole)
        logs = [training.log_rows(folder) for folder in (out, tmp_path / "whole")]
        timeless = [
            [{k: v for k, v in row.items() if k not in ("inner_steps_per_second", "peak_memory_mb")} for row in log]
            for log in logs
        ]
        assert timeless[0] == timeless[1]


def test_another_seed_gives_other_weights():
    assert phi(training.train(small(), None)) != phi(training.train(small(seed=1), None))


def test_a_folder_with_another_run_is_refused_with_the_difference(tmp_path):
    training.train(small(), tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    with pytest.raises(training.RunError, match=r"already holds a run \(seed: 0 there, 5 asked\).*lolo resume"):
        training.train(small(seed=5), tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(training.RunError, match="not an empty folder"):
        training.train(small(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_resume_refuses_a_changed_recipe(tmp_path):
    training.train(small(), tmp_path / "run")
    path = tmp_path / "run" / "recipe.json"
    data = json.loads(path.read_text())
    data["estimator"]["sigma"] = 0.5
    path.write_text(json.dumps(data))
    with pytest.raises(training.RunError, match=r"estimator\.sigma: 0\.01 in the checkpoint, 0\.5 now"):
        training.resume(tmp_path / "run")


def test_resume_without_a_run_or_a_checkpoint_says_so(tmp_path):
    with pytest.raises(training.RunError, match="holds no run"):
        training.resume(tmp_path)
    stop = StopAfter(1)
    training.train(small(), tmp_path / "run", stop=stop, told=stop.told, say=lambda text: None)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    with pytest.raises(training.RunError, match="no whole checkpoint"):
        training.resume(tmp_path / "run", say=lambda text: None)


def test_weights_carry_recipe_and_quantiles_of_realised_steps(tmp_path):
    result = training.train(small(), tmp_path / "run")
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
    training.train(recipe, tmp_path / "run")
    measured = [row["validation"]["held_loss"] for row in training.log_rows(tmp_path / "run") if "validation" in row]
    assert len(measured) == 4
    best = pretrained.load(tmp_path / "run" / "best.safetensors")
    assert best.card["outer_step"] == 2 * (int(np.argmin(measured)) + 1)
    assert best.card["validation"]["held_loss"] == min(measured)


def test_init_goes_on_from_other_weights(tmp_path):
    training.train(small(), tmp_path / "a")
    source = tmp_path / "a" / "last.safetensors"
    recipe = small(**{"outer.steps": 1, "outer.lr": 1e-12, "outer.final_lr": 1e-12})
    result = training.train(recipe, None, init=source)
    for name, array in pretrained.load(source).meta_params.items():
        np.testing.assert_allclose(result.weights.meta_params[name], array, atol=1e-9)
    with pytest.raises(files.FileError, match="--init weights have tensors"):
        training.train(small(**{"learner.hidden": 5}), None, init=source)


def poisoned():
    splits = tasks.quadratic()
    bad = dataclasses.replace(splits.train, data=jax.numpy.full_like(splits.train.data, jax.numpy.nan))
    return {"poisoned": splits._replace(train=bad)}


def test_a_run_of_bad_numbers_stops_with_a_diagnosis_and_keeps_the_last_good_checkpoint(tmp_path):
    recipe = small(**{"outer.max_bad_steps": 3})
    with pytest.raises(training.DivergedError) as caught:
        training.train(recipe, tmp_path / "run", tasks=poisoned())
    words = str(caught.value)
    assert "task 'poisoned'" in words and "the loss went bad first" in words and "outer step 0." in words
    assert files.checkpoints(tmp_path / "run") == [0]
    arrays, _ = files.read_checkpoint(tmp_path / "run", 0)
    assert all(np.isfinite(x).all() for name, x in arrays.items() if x.dtype.kind == "f" and "meta_params" in name)
    assert [row["dropped"] for row in training.log_rows(tmp_path / "run")] == [2, 2, 2]


def test_every_logged_row_names_what_the_evaluation_rules_ask_for(tmp_path):
    training.train(small(), tmp_path / "run")
    row = training.log_rows(tmp_path / "run")[-1]
    assert {
        "task_loss", "bc_loss", "delta_task_rms", "delta_bc_rms", "gradient_ratio", "alpha_mix", "gradient_norm",
        "signal_to_noise", "dropped", "starts", "inner_steps_per_second",
    } <= set(row)  # fmt: skip
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["buffer_bytes_per_slot"] == 4 * about["inner_state_bytes"]
    assert {"versions", "commit", "machine", "command"} <= set(about)
