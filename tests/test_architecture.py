"""The table of architectures: a new row is all that a new architecture takes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small
from test_files import LEARNER, meta_params, rewritten

import lolo
from lolo.cli import main as cli
from lolo.files import settings
from lolo.files.disk import FileError
from lolo.files.settings import RecipeError, with_field
from lolo.optimizers import architecture, base, pretrained, weights_file
from lolo.optimizers.architecture import ARCHITECTURES, Architecture
from lolo.optimizers.base import LearnedOptimizer
from lolo.studies.rows import load_rows
from lolo.training import loop, recipes, run_folder
from lolo.training.recipes import LOLO


@dataclasses.dataclass(frozen=True)
class SignSettings(settings.Alternative):
    """Signs of momentum, times a learned size."""

    name: str = "sign"
    learning_rate: float = 0.01  # of every entry
    weight_decay: float = 0.0  # times the learning rate
    nesterov: bool = False  # an option of its own


def sign_of(learner, axis_name, sharded_axis):
    def optimizer(meta_params):
        return optax.chain(
            optax.trace(decay=0.9, nesterov=learner.nesterov),
            optax.stateless(lambda updates, params: jax.tree.map(jnp.sign, updates)),
            optax.add_decayed_weights(learner.weight_decay),
            optax.scale(-learner.learning_rate * jnp.exp(meta_params["log_size"])),
        )

    return LearnedOptimizer(lambda key: {"log_size": jnp.zeros(())}, optimizer)


def check_sign(learner):
    settings.check_numbers(settings.fields(learner, "learner."), positive=("learner.learning_rate",))


def read_flag(value):
    if value not in (True, False, "True", "False"):
        raise ValueError("must be True or False.")
    return value in (True, "True")


SIGN = Architecture(
    settings=SignSettings,
    build=sign_of,
    shapes=lambda learner: {"log_size": ()},
    check=check_sign,
    deployment={
        "learning_rate": functools.partial(settings.number, positive=True),
        "weight_decay": settings.number,
        "nesterov": read_flag,
    },
    expert_decay=lambda learner: learner.learning_rate * learner.weight_decay,
    present=lambda optimizer: optax.chain(optimizer, optax.identity()),
)


@pytest.fixture
def sign(monkeypatch):
    """A recipe of an architecture that is a row of the table and nothing else."""
    monkeypatch.setitem(ARCHITECTURES, "sign", SIGN)
    recipe = small(LOLO, {"learner.name": "sign", "outer.steps": 3, "validation.every": 0})
    return with_field(recipe, "learner.learning_rate", 0.02)


def test_a_row_is_all_that_meta_training_takes(sign, tmp_path):
    assert settings.diff(small(LOLO), sign)["learner.learning_rate"] == (0.01, 0.02)
    whole = loop.train(sign, tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / "recipe.json").read_text())["learner"] == {
        "name": "sign",
        "learning_rate": 0.02,
        "weight_decay": 0.0,
        "nesterov": False,
    }
    assert run_folder.read_recipe(tmp_path / "whole") == sign
    loaded = lolo.load(tmp_path / "whole" / "last.safetensors")
    assert loaded.learner == sign.learner and recipes.from_dict(loaded.recipe) == sign
    assert float(loaded.meta_params["log_size"]) == float(whole.weights.meta_params["log_size"]) != 0
    again = loop.train(dataclasses.replace(sign, seed=1), None, init=tmp_path / "whole" / "last.safetensors")
    assert set(again.weights.meta_params) == {"log_size"}


def test_what_a_row_says_is_heeded(sign, tmp_path):
    decayed = with_field(sign, "learner.weight_decay", 0.5)
    expert, params = lolo.build(decayed).expert, {"x": jnp.ones(2)}
    updates, _ = expert.update({"x": jnp.zeros(2)}, expert.init(params), params, learner_state=None)
    np.testing.assert_allclose(updates["x"], -0.02 * 0.5, rtol=1e-5)
    for recipe, words in (
        (with_field(sign, "learner.learning_rate", 0.0), "learner.learning_rate=0.0 must be a positive number"),
        (with_field(sign, "imitation.expert", "adam-of-learner"), "use imitation.expert='adam'"),
    ):
        with pytest.raises(RecipeError, match=words):
            lolo.build(recipe)
    phi = {"log_size": jnp.zeros(())}
    lolo.save(tmp_path / "w.safetensors", pretrained.Weights(phi, sign.learner, {}, {}))
    state = lolo.load(tmp_path / "w.safetensors").optimizer(weight_decay=0.5).init(params)
    assert len(state) == 2 and state[1] == optax.EmptyState()  # as `present` has it
    with pytest.raises(ValueError, match="learner 'sign' has no clock_limit; leave it out"):
        lolo.load(tmp_path / "w.safetensors").optimizer(clock_limit=5.0)


def test_a_row_is_all_that_the_command_line_takes(sign, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = "--task quadratic --learner.name sign --learner.nesterov True --unroll.length 6 --unroll.truncation 3"
    command = [
        "train",
        "lolo",
        *words.split(),
        "--outer.steps",
        "1",
        "--validation.every",
        "0",
        "--estimator.pairs",
        "2",
    ]
    assert cli.main([*command, "--learner.learning_rate=0.05", "--out", "run"]) == 0
    learner = run_folder.read_recipe(tmp_path / "run").learner
    assert learner == SignSettings(learning_rate=0.05, nesterov=True)
    weights = "run/last.safetensors"
    names = [weights, f"{weights}:learning_rate=0.1,nesterov=False,schedule=cosine"]
    assert cli.main(["eval", *names, "--task", "quadratic", "--steps", "100", "--seeds", "1", "--out", "out"]) == 0
    found = load_rows(tmp_path / "out" / "rows-quadratic.jsonl")
    assert [row.optimizer for row in found] == ["lolo", "lolo learning_rate=0.1 nesterov=False schedule=cosine"]
    assert found[0].train_loss != found[1].train_loss
    capsys.readouterr()
    for argv, words in (
        (["eval", f"{weights}:learning_rate=0"], "learning_rate='0' must be a positive number."),
        (["eval", f"{weights}:nesterov=yes"], "nesterov='yes' must be True or False."),
        (["eval", f"{weights}:clock_limit=5"], "learner 'sign' has no clock_limit; leave it out."),
        (["eval", f"{weights}:weight_decai=1"], "did you mean 'weight_decay'?"),
        ([*command, "--learner.hidden", "4"], "learner.name='sign' has no hidden; leave it out, or use"),
        ([*command, "--learner.nesterof", "True"], "did you mean '--learner.nesterov'?"),
        (["train", "lolo", "--learner.nesterov", "True"], "'small_fc' has no nesterov; leave it out, or use"),
        (["train", "lolo", "--learner.name", "sing"], "did you mean 'sign'?"),
    ):
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and words in said, said
    with pytest.raises(SystemExit):
        cli.main(["train", "lolo", "--learner.name", "sign", "--help"])
    text = capsys.readouterr().out
    assert "--learner.nesterov" in text and "of every entry" in text and "--learner.hidden" not in text


def test_one_object_is_built_for_equal_settings():
    first, other = architecture.build_learner(LOLO.learner), dataclasses.replace(LOLO.learner, hidden=4)
    assert architecture.build_learner(dataclasses.replace(other, hidden=32)) is first
    assert architecture.build_learner(other) is not first
    assert pretrained.maker(LOLO.learner) is first.optimizer


def test_sgd_weights_with_the_fields_that_it_had_are_read(tmp_path):
    path, phi = tmp_path / "w.safetensors", {name: np.zeros((), np.float32) for name in base.SGD_SHAPES}
    weights_file.write_weights(path, phi, learner={**LEARNER, "name": "sgd", "hidden": 32, "step_decay": None})
    weights = lolo.load(path)
    assert weights.learner == with_field(LOLO, "learner.name", "sgd").learner
    lolo.save(path, weights)
    assert weights_file.read_weights(path).learner == {"name": "sgd"}
    rewritten(path, learner=json.dumps(LEARNER))
    with pytest.raises(FileError, match="w.safetensors: has tensors .*; a small_fc has"):
        lolo.load(path)
    weights_file.write_weights(path, meta_params(), learner={**LEARNER, "name": "sgd"})
    with pytest.raises(FileError, match="w.safetensors: learner.name='sgd' has no hidden"):  # 4 was never its default
        lolo.load(path)
