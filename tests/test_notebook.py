"""`lolo.train` and `lolo.compare` as they are used from a notebook."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lolo
from lolo import notebook
from lolo.evaluation import long_runs
from lolo.studies import style
from lolo.tasks import small

SMALL = {"outer.steps": 3, "unroll.length": 20, "unroll.truncation": 10, "validation.every": 0, "estimator.pairs": 2}


def of_lists():
    """A task whose data are lists, which JAX takes for containers."""
    return lolo.Splits(*(dataclasses.replace(task, data=[[1.0, 2.0]]) for task in small.quadratic()))


def same(a, b):
    return all(np.array_equal(a.meta_params[name], b.meta_params[name]) for name in a.meta_params)


@pytest.fixture(scope="module")
def result():
    return lolo.train("lolo", task="quadratic", **SMALL)


def test_names_settings_and_splits_mean_the_same_meta_training(result, tmp_path):
    recipe = lolo.LOLO
    for name, value in (SMALL | {"tasks": ("quadratic",)}).items():
        recipe = lolo.with_field(recipe, name, value)
    assert same(result.weights, lolo.train(recipe, tmp_path / "run").weights)
    words = "lolo outer.steps=3 unroll.length=20 unroll.truncation=10 validation.every=0 estimator.pairs=2"
    given = lolo.train(words, task=small.quadratic())
    assert same(result.weights, given.weights) and given.finished and given.step == 3
    assert lolo.resume(tmp_path / "run").step == 3


def test_progress_is_shown_unless_the_caller_shows_it(capsys):
    lolo.train("lolo", task="quadratic", **SMALL)
    assert "meta-training: 3 of 3 loss" in capsys.readouterr().err
    seen = []
    lolo.train("lolo", None, lolo.How(on_progress=seen.append), task="quadratic", **SMALL)
    assert len(seen) == 3 and "meta-training" not in capsys.readouterr().err


def test_reprs_are_one_line(result):
    assert repr(result.weights) == "Weights(small_fc, 2,402 numbers, meta-trained on quadratic, T = 3)"
    assert repr(small.quadratic().train) == "Task(1,000 examples, batch 4, resident data)"
    assert "\n" not in repr(result) and len(repr(result)) < 200
    assert len(repr(small.fashion_mlp())) < 300
    assert lolo.__version__.count(".") == 2 and repr(lolo.load()).startswith("Weights(norm_fc, ")


def test_a_meta_training_is_drawn_from_its_log(result):
    figure = result.plot()
    assert figure.number not in style.pyplot().get_fignums()  # a notebook would show it a second time
    line = figure.axes[0].lines[0]
    np.testing.assert_allclose(line.get_ydata(), [row["task_loss"][0] for row in result.rows])
    assert len(result.rows) == 3


def test_anything_that_is_an_optimizer_can_be_compared(result):
    entries = {
        "mine": optax.sgd(0.1),
        "φ": result.weights,
        "shipped": "lolo-small",
        "SGD": "sgdm:0.1",
        "AdamW": "adamw:grid",
    }
    found = lolo.compare(entries, "quadratic", steps=100, seeds=2)
    assert [(row.optimizer, row.seed) for row in found.rows] == [(name, seed) for name in entries for seed in (0, 1)]
    by_hand = long_runs.Candidate("mine", None, lambda setting: optax.sgd(0.1), 0.0)
    assert found.rows[:2] == lolo.evaluate("quadratic", small.quadratic(), [by_hand], range(2), 100)
    assert "| mine | " in repr(found) and found._repr_markdown_() == repr(found)
    assert {line.get_label() for line in found.plot().axes[0].get_lines()} >= set(entries)
    own = lolo.compare({"mine": optax.sgd(0.1)}, small.quadratic(), steps=100, seeds=2)
    assert [row.train_loss for row in own.rows] == [row.train_loss for row in found.rows[:2]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lolo.compare({}, "quadratic"), "needs an optimizer"),
        (lambda: lolo.compare({"a": 3}, "quadratic"), "a is int; expected an optax optimizer"),
        (lambda: lolo.compare({"a": optax.sgd}, "quadratic"), "a is function; expected"),
        (lambda: lolo.compare({"a": "adamw:1e-3"}, "quadratic", seeds=0), "seeds=0"),
        (lambda: lolo.compare({"a": "adamw:1e-3"}, "quadratic", held="train"), "'test' or 'validation'"),
        (lambda: lolo.compare({"a": "adamw:1e-3"}, "quadratics"), "did you mean 'quadratic'"),
        (lambda: lolo.train("lol"), "did you mean 'lolo'"),
        (lambda: lolo.train("lolo", task="quadratic", **{"outer.step": 3}), "did you mean 'outer.steps'"),
        (lambda: lolo.train("lolo", task="quadratic", tasks={"a": small.quadratic()}), "leave one out"),
        (lambda: lolo.train("lolo", tasks="quadratic"), "names of tasks are given as task="),
        (lambda: lolo.train("lolo", task=small.quadratic), "expected lolo.Splits; give what it returns"),
        (lambda: lolo.train("lolo", task=small.quadratic().train), "task is Task; expected lolo.Splits"),
        (lambda: lolo.train("lolo", task=[small.quadratic()]), "task is list; expected lolo.Splits"),
        (lambda: lolo.train("lolo", task={"a": small.quadratic().train}), "a is Task; expected lolo.Splits"),
        (lambda: lolo.train("lolo", task="quadratic", **{"outer.steps": 2.0}), "'outer.steps' can't be 2.0"),
        (lambda: lolo.train("lolo", task="quadratic", **{"unroll.stagger": "False"}), "expected bool"),
        (lambda: lolo.train("lolo", task="quadratic", **{"imitation.expert": optax.adam}), "expected str"),
        (lambda: lolo.compare({"a": optax.sgd(0.1)}, small.quadratic().train), "task is Task; expected lolo.Splits"),
        (lambda: lolo.compare({"a": optax.sgd(0.1)}, of_lists()), "the data of its train split have a float"),
        (lambda: lolo.compare({"a": "adamw"}, "quadratic"), "adamw: give a learning rate"),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_as_they_come_are_what_is_compared(result):
    entry = notebook.entry("φ", result.weights, small.quadratic(), 100)
    made = entry.make({name: jnp.asarray(x) for name, x in entry.setting.items()})
    updates, _ = made.update({"x": jnp.ones(8)}, made.init({"x": jnp.ones(8)}), {"x": jnp.ones(8)})
    optimizer = result.weights.optimizer()
    expected, _ = optimizer.update({"x": jnp.ones(8)}, optimizer.init({"x": jnp.ones(8)}), {"x": jnp.ones(8)})
    np.testing.assert_array_equal(updates["x"], expected["x"])
