"""Whole studies, on the smallest task."""

import dataclasses

import numpy as np
import pytest
from test_training import SMALL, small

from lolo.data.errors import DataError
from lolo.evaluation import statistics
from lolo.files.settings import RecipeError
from lolo.optimizers import architecture, pretrained
from lolo.runtime import interrupt
from lolo.runtime.process_group import ALONE
from lolo.studies import candidates, comparison_report, comparisons, definitions, plots, studies
from lolo.studies.rows import load_rows
from lolo.training import build, loop, recipes, run_log, run_start
from lolo.training.run_folder import RunError

TINY = definitions.Study(
    about="the smallest study",
    tasks=("quadratic",),
    methods=("lolo",),
    meta_seeds=2,
    eval_steps=100,
    eval_seeds=2,
    rivals=("adamw:1e-2",),
    changes=tuple((SMALL | {"outer.steps": 3, "learner.name": "sgd"}).items()),
)


def test_the_study_of_the_default_weights_deploys_them_as_they_are_shipped():
    shipped = pretrained.load("lolo-norm-2")
    meta_trained = architecture.learner_from_dict(shipped.recipe["learner"], "its recipe")
    deployed = candidates.parse_deployment(definitions.SHIPPED_AS, "lolo-norm-2", meta_trained)
    assert architecture.deployed(meta_trained, deployed.learner) == shipped.learner


@pytest.mark.slow
def test_a_study_continues_where_it_was_stopped_and_reports_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setitem(definitions.STUDIES, "tiny", TINY)
    stop = interrupt.Stop()

    def stop_in(word):
        def told(what, done, total, _):
            if word in what:
                stop.requested = "SIGTERM"

        return told

    for word in ("lolo on quadratic, T = 3, meta-seed 1", "evaluating"):
        stop.requested = None
        with pytest.raises(interrupt.Interrupted, match="same command"):
            studies.reproduce("tiny", tmp_path, stop=stop, on_progress=stop_in(word), log=lambda text: None)
        assert not (tmp_path / "report-quadratic.md").exists()
    trained = []
    tables = studies.reproduce("tiny", tmp_path, on_progress=lambda what, *rest: trained.append(what))
    assert set(trained) == {"evaluating on quadratic"}  # nothing is meta-trained twice
    found = load_rows(tmp_path / "rows-quadratic.jsonl")
    assert len(found) == 2 * 2 + 2 and "(n=2 meta-seeds)" in tables["quadratic"]
    report = (tmp_path / "report-quadratic.md").read_text()
    assert tables["quadratic"] in report and "The smallest study. Meta-training took 0.0" in report
    for picture in ("curves", "start-steps"):
        assert (tmp_path / f"{picture}-quadratic.svg").stat().st_size > 5000 and f"{picture}-quadratic.svg" in report
    named = candidates.read([tmp_path / "runs/quadratic-lolo-T3-seed1/last.safetensors", "adamw:1e-2"])
    again, _ = comparisons.evaluate(named, "quadratic", 100, 2)
    expected = [r for r in found if (r.optimizer, r.meta_seed) in (("lolo", 1), ("adamw 0.01", None))]
    assert again == expected
    assert statistics.paired_difference(again, "lolo", "adamw 0.01").unit == "seeds"


def test_a_study_refuses_runs_of_another_recipe(tmp_path, monkeypatch):
    monkeypatch.setitem(definitions.STUDIES, "tiny", TINY)
    other = dataclasses.replace(studies.recipe_of(TINY, "lolo", "quadratic", 0), seed=7)
    run_start.create(tmp_path / "runs" / "quadratic-lolo-T3-seed0", other, {}, ALONE)
    with pytest.raises(RunError, match=r"another recipe \(seed differ\)"):
        studies.reproduce("tiny", tmp_path)


@pytest.mark.slow
def test_of_a_finished_meta_training_the_last_weights_are_enough(tmp_path, monkeypatch):
    monkeypatch.setitem(definitions.STUDIES, "tiny", dataclasses.replace(TINY, meta_seeds=1))
    studies.reproduce("tiny", tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    before = (run / "last.safetensors").read_bytes()
    for file in run.rglob("*"):
        if file.is_file() and file.name != "last.safetensors":
            file.unlink()
    monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("meta-trained again"))
    studies.reproduce("tiny", tmp_path)
    assert (run / "last.safetensors").read_bytes() == before
    other = dataclasses.replace(TINY, meta_seeds=1, fixed=(*TINY.fixed, ("outer.lr", 0.5)))
    monkeypatch.setitem(definitions.STUDIES, "tiny", other)
    with pytest.raises(RunError, match=r"another recipe \(outer.lr differ\)"):
        studies.reproduce("tiny", tmp_path)


def test_a_study_does_not_overwrite_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setitem(definitions.STUDIES, "tiny", TINY)
    rows, _ = comparisons.evaluate(candidates.read(["adam:0.1"]), "quadratic", 100, 1)
    comparison_report.write_report(tmp_path, "quadratic", rows, {}, "lolo eval adam:0.1")
    with pytest.raises(RunError, match=r"holds an evaluation on quadratic.*another --out"):
        studies.reproduce("tiny", tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_parts_of_a_study_share_their_meta_trainings(tmp_path, monkeypatch):
    second = dataclasses.replace(
        TINY, methods=("lolo", "lolo replay.read=pop"), deployments=(("lolo", "schedule=cosine"),)
    )
    second = dataclasses.replace(second, changes=(*TINY.changes, ("learner.name", "small_fc")), rivals=())
    first = dataclasses.replace(second, methods=("lolo",), deployments=(), eval_tasks=("quadratic:dimensions=3",))
    monkeypatch.setattr(definitions, "STUDY", {"a": first, "b": second})
    monkeypatch.setattr(studies, "META_LOSS_WINDOW", 1)
    heard = []

    def told(what, done, total, word):
        if what not in heard:
            heard.append(what)

    tables = studies.reproduce("study", tmp_path, on_progress=told, only=["a"])
    assert list(tables) == ["a, quadratic:dimensions=3"] and not (tmp_path / "b").exists()
    tables |= studies.reproduce("study", tmp_path, on_progress=told)
    pop = [f"lolo replay.read=pop on quadratic, T = 3, meta-seed {seed}" for seed in (0, 1)]
    plain = [f"lolo on quadratic, T = 3, meta-seed {seed}" for seed in (0, 1)]
    assert heard == [*plain, "evaluating on quadratic:dimensions=3", *pop, "evaluating on quadratic"]
    assert {line.split(" | ")[0] for line in tables["b, quadratic"].splitlines()[2:]} == {
        "| lolo",
        "| lolo schedule=cosine",
        "| lolo replay.read=pop",
    }
    report = (tmp_path / "b" / "report-quadratic.md").read_text()
    assert "Meta-training took 0.0" in report and "(meta-loss-quadratic.svg)" in report
    assert (tmp_path / "b" / "meta-loss-quadratic.svg").is_file()


def test_meta_losses_are_pictured_against_the_median_time_of_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "META_LOSS_WINDOW", 2)
    seen = {}
    draw = plots.meta_losses
    monkeypatch.setattr(plots, "meta_losses", lambda runs, title: seen.update(runs) or draw(runs, title))
    loop.train(small("lolo"), tmp_path / "run")
    rows = run_log.log_rows(tmp_path / "run")
    studies.picture_meta_losses(tmp_path / "a.svg", "quadratic", {("lolo", 0): tmp_path / "run"})
    [(hours, losses)] = seen["lolo"]
    pace = np.median([row["inner_steps_per_second"] for row in rows])
    np.testing.assert_allclose(hours, np.array([2, 4, 6, 8]) * 2 * 2 * 10 / pace / 3600)
    np.testing.assert_allclose(losses, np.mean([row["task_loss"] for row in rows], axis=1).reshape(4, 2).mean(axis=1))
    assert (tmp_path / "a.svg").stat().st_size > 5000
    (tmp_path / "run" / "log.jsonl").unlink()  # logs of finished runs need not be kept
    studies.picture_meta_losses(tmp_path / "b.svg", "quadratic", {("lolo", 0): tmp_path / "run"})
    assert not (tmp_path / "b.svg").exists()


def test_an_unknown_part_of_a_study_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'figure2'"):
        studies.reproduce("study", tmp_path, only=["figure3"])
    with pytest.raises(RecipeError, match="unknown study 'quik'; did you mean 'quick'"):
        studies.reproduce("quik", tmp_path)
    with pytest.raises(RecipeError, match="quick is one study"):
        studies.reproduce("quick", tmp_path, only=["figure2"])


def test_data_that_are_missing_are_said_before_the_first_meta_training(tmp_path, monkeypatch):
    monkeypatch.setenv("LOLO_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match="lolo data prepare textures"):
        studies.reproduce("study", tmp_path / "out", only=["figure2", "transfer"])
    assert not (tmp_path / "out").exists()


def test_a_method_has_the_last_word_over_its_study_and_fixed_fields_over_both():
    study = definitions.Study(about="", tasks=("quadratic",), changes=(("outer.steps", 8), ("unroll.length", 200)))
    found = studies.recipe_of(study, "naive outer.steps=5", "quadratic", 3)
    assert (found.outer.steps, found.unroll.length, found.tasks, found.seed) == (5, 200, ("quadratic",), 3)
    assert recipes.method_of(found) == "naive"
    assert studies.recipe_of(study, "naive seed=5", "quadratic", 3).seed == 3
    smoked = dataclasses.replace(study, fixed=definitions.SMOKE)
    assert (
        studies.recipe_of(smoked, "naive outer.steps=5", "quadratic", 3).outer.steps
        == dict(definitions.SMOKE)["outer.steps"]
    )


@pytest.mark.parametrize("part", definitions.STUDY)
def test_every_recipe_of_the_study_can_be_built(part):
    study = definitions.STUDY[part]
    for task in study.tasks:
        for method in study.methods:
            build.build(studies.recipe_of(study, method, task, 0))
    assert all(method in study.methods for method, _ in study.deployments)
    for name in study.rivals:
        assert candidates.rival(name) is not None
    for method, words in study.deployments:
        learner = studies.recipe_of(study, method, study.tasks[0], 0).learner
        candidates.parse_deployment(words, "weights", learner)
