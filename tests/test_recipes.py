"""Recipes: the methods as differences, JSON and back, and errors that name the value and the cure."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small
from hypothesis import given, settings
from hypothesis import strategies as st

from lolo.files.settings import RecipeError, diff, fields, with_field
from lolo.method import experts, inner
from lolo.optimizers import architecture, base
from lolo.tasks.small import quadratic
from lolo.training import build, recipes, sweep
from lolo.training.build import check
from lolo.training.recipes import BC_ONLY, LOLO, NAIVE, from_dict, to_dict


def changed(changes, recipe=LOLO):
    for name, value in changes.items():
        recipe = with_field(recipe, name, value)
    return recipe


def message(call, *args):
    """The one line of the error that a call must raise."""
    with pytest.raises(RecipeError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    return text


# --- methods are differences ----------------------------------------------------------------------------------------


def test_bc_only_is_lolo_without_its_buffer():
    assert diff(LOLO, BC_ONLY) == {"replay.threshold": (0.1, 1.0)}


def test_naive_is_bc_only_without_imitation_and_without_psi():
    assert diff(BC_ONLY, NAIVE) == {
        "imitation.alpha_mix": ("linear", "one"),
        "imitation.alpha_loss": ("linear", "one"),
        "imitation.normalize": ("slot", "none"),
    }


def test_the_paper_and_the_labs_code_give_the_default_sizes():
    assert (LOLO.outer.steps, LOLO.unroll.length, LOLO.unroll.truncation, LOLO.replay.capacity) == (5000, 1000, 50, 4)
    assert (LOLO.estimator.sigma, LOLO.estimator.pairs, LOLO.replay.threshold) == (0.01, 8, 0.1)
    assert (LOLO.imitation.expert, LOLO.imitation.lr, LOLO.unroll.truncations_per_update) == ("adam", 1e-3, 1)


def test_a_recipe_differs_from_itself_in_nothing_and_diff_finds_each_field():
    assert diff(LOLO, LOLO) == {}
    for name, value in fields(LOLO).items():
        others = {tuple: ("quadratic",), str: "other", bool: True, int: -7}
        other = "sgd" if name == "learner.name" else others.get(type(value), -7.0)
        assert diff(LOLO, with_field(LOLO, name, other)) == {name: (value, other)}


def test_methods_are_recognised_by_imitation_and_replay_alone():
    for name, recipe in recipes.RECIPES.items():
        method = {"lolo-paper": "lolo", "norm-fc-naive": "naive"}.get(name, name)  # the same method, elsewhere
        assert recipes.method_of(changed({"seed": 3, "outer.steps": 7}, recipe)) == method
    assert recipes.method_of(with_field(LOLO, "replay.capacity", 5)) is None


def test_a_variant_is_a_named_recipe_with_typed_changes():
    assert recipes.variant("naive") == recipes.NAIVE
    found = recipes.variant(
        "lolo replay.capacity=2 replay.read=pop unroll.stagger=True learner.clock_limit=9 outer.lr=1"
    )
    assert {name: new for name, (_, new) in diff(LOLO, found).items()} == {
        "replay.capacity": 2,
        "replay.read": "pop",
        "unroll.stagger": True,
        "learner.clock_limit": 9.0,
        "outer.lr": 1.0,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lol", "did you mean 'lolo'"),
        ("lolo replay.capacty=2", "did you mean 'replay.capacity'"),
        ("lolo replay.capacity=two", "replay.capacity can't be 'two': expected int"),
        ("lolo unroll.stagger=yes", "expected bool"),
        ("lolo tasks=quadratic", "tasks can't be set"),
        ("lolo learner.clock_limit=x", "learner.clock_limit can't be 'x': expected float"),
        ("", "unknown recipe ''"),
    ],
)
def test_a_variant_that_is_none_is_refused(text, message):
    with pytest.raises(RecipeError, match=message):
        recipes.variant(text)


def test_replay_without_imitation_is_naive_with_lolo_s_buffer():
    assert set(diff(recipes.NAIVE, recipes.REPLAY_ONLY)) == {"replay.threshold"}
    assert set(diff(LOLO, recipes.REPLAY_ONLY)) == {
        f"imitation.{name}" for name in ("alpha_mix", "alpha_loss", "normalize")
    }


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_build_as_they_are(name):
    setup = build.build(recipes.RECIPES[name])
    assert (setup.expert is None) == (name in ("naive", "replay-only", "norm-fc-naive"))
    assert (setup.truncation, setup.capacity, setup.estimator.pairs) == (50, 4, 8)
    assert setup.first_lengths == (20,) * 8


def test_stagger_shortens_first_unrolls_in_whole_truncations():
    setup = build.build(changed({"unroll.stagger": True}))
    assert setup.first_lengths == (3, 5, 8, 10, 13, 15, 18, 20)
    few = build.build(changed({"unroll.stagger": True, "unroll.length": 200, "estimator.pairs": 8}))
    assert few.first_lengths == (1, 1, 2, 2, 3, 3, 4, 4)


# --- JSON -----------------------------------------------------------------------------------------------------------


def values_like(value):
    kinds = {
        bool: st.booleans(),
        int: st.integers(-(2**53), 2**53),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=8),
        tuple: st.lists(st.text(max_size=8), max_size=3).map(tuple),
        type(None): st.none() | st.floats(0, 1e6),
    }
    return kinds[type(value)]


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.fixed_dictionaries(
        {name: values_like(value) for name, value in fields(LOLO).items()} | {"learner.name": st.just("small_fc")}
    )
)
def test_a_recipe_survives_json(values):
    recipe = changed(values)
    assert fields(recipe) == values
    again = from_dict(json.loads(json.dumps(to_dict(recipe))))
    assert again == recipe
    assert [type(value) for value in fields(again).values()] == [type(value) for value in fields(recipe).values()]


def test_whole_numbers_are_read_as_floats_where_floats_are_meant():
    data = to_dict(LOLO)
    data["replay"] = data["replay"] | {"threshold": 1}
    data["learner"] = data["learner"] | {"clock_limit": 10_000}
    recipe = from_dict(data)
    assert isinstance(recipe.replay.threshold, float) and recipe.replay == BC_ONLY.replay
    assert isinstance(recipe.learner.clock_limit, float)


def edited(section, name, value):
    data = to_dict(LOLO)
    if section:
        data[section] = data[section] | {name: value}
    else:
        data[name] = value
    return data


@pytest.mark.parametrize(
    "data,words",
    [
        (edited("replay", "treshold", 0.2), ["'replay.treshold'", "did you mean 'replay.threshold'?"]),
        (edited("", "sead", 1), ["'sead'", "did you mean 'seed'?"]),
        (edited("outer", "steps", "many"), ["'outer.steps'", "'many'", "int"]),
        (edited("outer", "steps", 2.5), ["'outer.steps'", "2.5", "int"]),
        (edited("outer", "steps", True), ["'outer.steps'", "True", "int"]),
        (edited("outer", "lr", True), ["'outer.lr'", "True", "float"]),
        (edited("outer", "lr", None), ["'outer.lr'", "None", "float"]),
        (edited("outer", "lr", 10**400), ["'outer.lr'", "too large"]),
        (edited("unroll", "stagger", 1), ["'unroll.stagger'", "1", "bool"]),
        (edited("learner", "clock_limit", "never"), ["'learner.clock_limit'", "'never'"]),
        (edited("learner", "name", 3), ["'learner.name'", "3", "str"]),
        (edited("", "tasks", "quadratic"), ["'tasks'", "'quadratic'"]),
        (edited("", "tasks", [1]), ["'tasks'", "[1]"]),
        (edited("", "replay", 4), ["'replay'", "object", "int"]),
        (edited("", "format_version", 2), ["format_version 2"]),
        (edited("", "format_version", "1"), ["format_version '1'"]),
        ({}, ["format_version None"]),
        ([], ["JSON object", "list"]),
        (None, ["JSON object", "NoneType"]),
    ],
)
def test_foreign_recipes_are_refused_by_name(data, words):
    text = message(from_dict, data)
    for word in words:
        assert word in text


ADDED = [
    "validation.tasks",
    "imitation.loss",
    "imitation.magnitude",
    "imitation.start",
    "imitation.end",
    "imitation.floor",
]
ADDED += ["imitation.schedule", "imitation.final_lr", "imitation.decay_steps"]


def test_every_field_must_be_there_but_for_those_added_later_which_mean_their_default():
    added = ["learner.step_decay", *ADDED]
    for name in fields(LOLO):
        section, _, field = name.rpartition(".")
        data = json.loads(json.dumps(to_dict(LOLO)))
        del (data[section] if section else data)[field]
        if name in added:
            assert from_dict(data) == LOLO
        else:
            assert f"{name!r} is missing" in message(from_dict, data)


def test_the_architecture_is_read_alone_and_names_its_source():
    stored = dataclasses.asdict(LOLO.learner)
    assert architecture.learner_from_dict(stored, "a.safetensors") == LOLO.learner
    assert message(architecture.learner_from_dict, stored | {"hiden": 3}, "a.safetensors").startswith("a.safetensors: ")


# --- settings of one architecture are its own -----------------------------------------------------------------------


SGD = with_field(LOLO, "learner.name", "sgd")
FORMER = dataclasses.asdict(LOLO.learner) | {"name": "sgd"}  # sgd as it was written with small_fc's fields


def test_the_name_of_an_architecture_brings_its_fields():
    assert SGD.learner == base.SgdSettings() and to_dict(SGD)["learner"] == {"name": "sgd"}
    assert set(fields(LOLO)) - set(fields(SGD)) == {name for name in fields(LOLO) if name.startswith("learner.")} - {
        "learner.name"
    }
    assert with_field(SGD, "learner.name", "small_fc") == LOLO
    wide = with_field(LOLO, "learner.hidden", 64)
    assert with_field(wide, "learner.name", "small_fc") == wide
    assert diff(LOLO, SGD) == {"learner.name": ("small_fc", "sgd")}
    assert diff(SGD, wide) == {"learner.name": ("sgd", "small_fc"), "learner.hidden": (32, 64)}


def test_small_fc_is_written_as_it_always_was():
    assert list(to_dict(LOLO)["learner"].items()) == [
        ("name", "small_fc"),
        ("hidden", 32),
        ("step_mult", 1e-3),
        ("exp_mult", 1e-3),
        ("learn_decays", False),
        ("weight_decay", 0.0),
        ("clock_limit", None),
        ("step_decay", None),
    ]


def test_sgd_as_it_was_written_before_it_had_settings_of_its_own_is_read():
    assert from_dict(to_dict(SGD)) == SGD
    older = {name: value for name, value in FORMER.items() if name != "step_decay"}
    for learner in (FORMER, older):
        assert from_dict(to_dict(LOLO) | {"learner": learner}) == SGD


@pytest.mark.parametrize(("name", "value"), [("hidden", 4), ("weight_decay", 0.1), ("clock_limit", 5.0)])
def test_a_field_of_small_fc_given_to_sgd_is_an_error_that_says_so(name, value):
    words = f"learner.name='sgd' has no {name}; leave it out, or use learner.name='small_fc'"
    assert message(with_field, SGD, f"learner.{name}", value).startswith(words)
    assert message(recipes.variant, f"lolo learner.name=sgd learner.{name}={value}").startswith(words)
    assert message(from_dict, to_dict(LOLO) | {"learner": FORMER | {name: value}}).startswith(words)
    assert message(sweep.changed, LOLO, {f"learner.{name}": value, "learner.name": "sgd"}).startswith(words)


def test_a_name_that_is_not_of_the_settings_type_is_refused():
    odd = dataclasses.replace(LOLO, learner=dataclasses.replace(LOLO.learner, name="sgd"))
    assert "these settings are SmallFcSettings" in message(check, odd)


@pytest.mark.parametrize("name", ["sgdd", ["sgd"], None, 3])
def test_an_architecture_that_is_none_is_refused(name):
    text = message(from_dict, to_dict(LOLO) | {"learner": FORMER | {"name": name}})
    assert "learner.name" in text and repr(name) in text


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,near",
    [
        ("replay.treshold", "replay.threshold"),
        ("outer.step", "outer.steps"),
        ("unroll.len", "unroll.length"),
        ("learner.hiden", "learner.hidden"),
        ("sed", "seed"),
        ("tasks.name", "tasks"),
        ("learner", "learner.name"),  # a section is no field
    ],
)
def test_an_unknown_field_suggests_the_nearest(name, near):
    assert f"{name!r}; did you mean {near!r}?" in message(with_field, LOLO, name, 1)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("outer.steps", 2.0, "int"),
        ("outer.steps", "2", "int"),
        ("outer.lr", "1e-3", "float"),
        ("outer.lr", True, "float"),
        ("unroll.stagger", "False", "bool"),
        ("imitation.expert", len, "str"),
        ("tasks", "quadratic", "tuple"),
        ("learner.clock_limit", "never", "float"),
        ("seed", np.float64(1), "int"),
    ],
)
def test_a_value_of_another_type_is_refused(name, value, kind):
    text = message(with_field, LOLO, name, value)
    assert text == f"recipe field {name!r} can't be {value!r}: expected {kind}."


def test_numbers_of_numpy_are_stored_as_numbers():
    recipe = with_field(with_field(LOLO, "seed", np.int64(3)), "outer.lr", np.float32(0.5))
    assert recipe == with_field(with_field(LOLO, "seed", 3), "outer.lr", 0.5)
    assert type(recipe.seed) is int and type(recipe.outer.lr) is float
    assert with_field(LOLO, "tasks", ["quadratic"]).tasks == ("quadratic",)


@pytest.mark.parametrize(
    "name,value,near",
    [
        ("learner.name", "small_fcc", "small_fc"),
        ("imitation.expert", "adamw", "adam"),
        ("imitation.alpha_mix", "liner", "linear"),
        ("imitation.alpha_loss", "ones", "one"),
        ("imitation.normalize", "slots", "slot"),
        ("imitation.loss", "directions", "direction"),
        ("imitation.schedule", "cosin", "cosine"),
        ("replay.read", "oldst", "oldest"),
        ("replay.push", "randm", "random"),
        ("replay.push", "strugle", "struggle"),
        ("unroll.schedule", "log_uniform", "log-uniform"),
        ("estimator.kind", "ped", "pes"),
        ("outer.clip_position", "befor", "before"),
    ],
)
def test_an_unknown_choice_suggests_the_nearest(name, value, near):
    text = message(lambda: build.build(with_field(LOLO, name, value)))
    assert name in text and repr(value) in text and f"did you mean {near!r}?" in text


# Changes that don't go together -> what the error must say: the field, its value, the cure.
CONFLICTS = [
    ({"unroll.length": 1010}, ["unroll.length=1010", "unroll.truncation=50", "try 1000"]),
    ({"unroll.length": 30}, ["unroll.length=30", "try 50"]),
    ({"unroll.length": 0}, ["unroll.length=0", "try 50"]),
    ({"unroll.length": -50}, ["unroll.length=-50", "try 50"]),
    ({"unroll.truncation": 0}, ["unroll.truncation=0", "at least 1"]),
    (
        {"unroll.stagger": True, "unroll.truncations_per_update": 20},
        ["truncations_per_update=20", "set unroll.stagger to False"],
    ),
    ({"replay.capacity": 0}, ["replay.capacity=0", "at least 1"]),
    ({"unroll.truncations_per_update": 0}, ["unroll.truncations_per_update=0", "at least 1"]),
    ({"estimator.pairs": 0}, ["estimator.pairs=0", "at least 1"]),
    ({"estimator.slots_per_block": 0}, ["estimator.slots_per_block=0", "at least 1"]),
    ({"outer.steps": 0}, ["outer.steps=0", "at least 1"]),
    ({"outer.max_bad_steps": 0}, ["outer.max_bad_steps=0", "at least 1"]),
    ({"learner.hidden": 0}, ["learner.hidden=0", "at least 1"]),
    ({"estimator.slots_per_block": 3}, ["estimator.pairs=8", "=3", "try estimator.slots_per_block=1"]),
    ({"estimator.sigma": 0.0}, ["estimator.sigma=0.0", "positive"]),
    ({"estimator.sigma": float("nan")}, ["estimator.sigma=nan", "positive"]),
    ({"outer.lr": -1e-3}, ["outer.lr=-0.001", "positive"]),
    ({"imitation.lr": float("inf")}, ["imitation.lr=inf", "positive"]),
    ({"imitation.final_lr": 0.0}, ["imitation.final_lr=0.0", "positive"]),
    ({"imitation.decay_steps": 0}, ["imitation.decay_steps=0", "at least 1"]),
    ({"imitation.start": 0.5, "imitation.end": 0.5}, ["start=0.5", "less than imitation.end=0.5", "try"]),
    ({"imitation.start": 0.6, "imitation.end": 0.2}, ["start=0.6", "less than imitation.end=0.2", "try"]),
    ({"imitation.end": 0.0}, ["imitation.start=0.0", "less than imitation.end=0.0"]),
    ({"imitation.start": -0.1}, ["imitation.start=-0.1", "from 0 to 1"]),
    ({"imitation.end": 1.5}, ["imitation.end=1.5", "from 0 to 1"]),
    ({"imitation.floor": 1.01}, ["imitation.floor=1.01", "from 0 to 1"]),
    ({"imitation.floor": float("nan")}, ["imitation.floor=nan", "from 0 to 1"]),
    ({"learner.step_mult": 0.0}, ["learner.step_mult=0.0", "positive"]),
    ({"replay.threshold": 1.5}, ["replay.threshold=1.5", "from 0 to 1"]),
    ({"replay.threshold": -0.1}, ["replay.threshold=-0.1", "from 0 to 1"]),
    ({"replay.threshold": float("nan")}, ["replay.threshold=nan", "from 0 to 1"]),
    ({"tasks": ()}, ["tasks=()", "at least one", "lolo tasks"]),
    ({"tasks": ("quadratic", "quadratic")}, ["tasks=('quadratic', 'quadratic')", "twice"]),
    ({"validation.tasks": ("books-mlp", "books-mlp")}, ["validation.tasks=('books-mlp', 'books-mlp')", "twice"]),
    ({"validation.tasks": ("fashion-mlp",)}, ["'fashion-mlp'", "one of tasks", "take another"]),
    ({"validation.seeds": 0}, ["validation.seeds=0", "at least 1"]),
    ({"validation.every": -1}, ["validation.every=-1", "0 or a positive"]),
    ({"validation.steps": -5}, ["validation.steps=-5", "0 or a positive"]),
    ({"outer.clip": 0.0}, ["outer.clip=0.0", "positive"]),
    ({"outer.final_lr": -1.0}, ["outer.final_lr=-1.0", "0 or a positive"]),
    ({"outer.warmup": 5.0}, ["outer.warmup=5.0", "from 0 to 1"]),
    ({"outer.warmup": float("nan")}, ["outer.warmup=nan", "from 0 to 1"]),
    ({"learner.exp_mult": float("nan")}, ["learner.exp_mult=nan", "positive"]),
    ({"learner.weight_decay": -1.0}, ["learner.weight_decay=-1.0", "positive"]),
    ({"learner.clock_limit": -5.0}, ["learner.clock_limit=-5.0", "0 or more"]),
    ({"learner.step_decay": 3000.0}, ["learner.step_decay=3000.0", "optimizer(step_decay=...)"]),
    ({"learner.hidden": 5000}, ["learner.hidden=5000", "at most 4096"]),
    (
        {"imitation.expert": "adam-of-learner", "learner.name": "sgd"},
        ["imitation.expert='adam-of-learner'", "use imitation.expert='adam'"],
    ),
    (
        {"imitation.expert": "adam-of-learner", "learner.learn_decays": True},
        ["imitation.expert='adam-of-learner'", "use imitation.expert='adam'"],
    ),
    ({"imitation.magnitude": 1.5}, ["imitation.magnitude=1.5", "from 0 to 1"]),
    (
        {"imitation.loss": "direction-magnitude", "learner.name": "norm_fc"},
        ["imitation.loss='direction-magnitude'", "learner.name='norm_fc'", "use imitation.loss='direction'"],
    ),
]


@pytest.mark.parametrize("changes,words", CONFLICTS, ids=lambda x: ",".join(x) if isinstance(x, dict) else "")
def test_values_that_do_not_go_together_are_refused_in_a_sentence(changes, words):
    text = message(check, changed(changes))
    for word in words:
        assert word in text
    assert message(build.build, changed(changes)) == text  # nothing is built from it


def test_the_length_that_an_error_suggests_is_accepted():
    for length, suggested in ((1010, 1000), (30, 50), (1999, 1950)):
        assert f"try {suggested}." in message(check, with_field(LOLO, "unroll.length", length))
        check(with_field(LOLO, "unroll.length", suggested))


# --- schedules ------------------------------------------------------------------------------------------------------


def draws(schedule, step=0, total=100, count=2000):
    """Lengths in truncations that new unrolls get; N / L = 20."""
    draw = build.unroll_schedules(LOLO.unroll, total)[schedule]
    lengths = jax.vmap(lambda key: draw(key, jnp.int32(step)))(jax.random.split(jax.random.key(0), count))
    assert lengths.dtype == jnp.int32
    return np.broadcast_to(lengths, count)


@pytest.mark.parametrize("schedule", ["constant", "uniform", "log-uniform", "curriculum"])
@pytest.mark.parametrize("step", [0, 50, 99])
def test_lengths_are_whole_truncations_from_a_tenth_to_the_whole(schedule, step):
    lengths = draws(schedule, step)
    assert lengths.min() >= 2 and lengths.max() <= 20


def test_a_constant_unroll_is_always_whole_and_random_ones_reach_both_ends():
    assert set(draws("constant").tolist()) == {20}
    for schedule in ("uniform", "log-uniform"):
        assert set(draws(schedule).tolist()) == set(range(2, 21))
    assert np.median(draws("uniform")) > 9 > np.median(draws("log-uniform"))


def test_the_curriculum_grows_to_the_whole_by_half_of_meta_training():
    lengths = [draws("curriculum", step, count=1)[0] for step in range(0, 100, 5)]
    assert lengths == sorted(lengths) and lengths[0] == 2 and lengths[9] < 20 and lengths[10:] == [20] * 10


def test_the_shortest_unroll_is_one_truncation():
    unroll = dataclasses.replace(LOLO.unroll, length=50)
    for draw in build.unroll_schedules(unroll, 10).values():
        assert int(draw(jax.random.key(0), jnp.int32(0))) == 1


# --- what is built --------------------------------------------------------------------------------------------------


def first_update(recipe, scale):
    """The first update of φ that a gradient of the norm `scale` gets."""
    outer, phi = build.build_outer(recipe.outer), {"w": jnp.zeros(4)}
    updates, _ = outer.update({"w": jnp.full(4, scale / 2)}, outer.init(phi), phi)
    return np.asarray(updates["w"])


def test_the_outer_rate_warms_up_and_decays():
    outer, phi = build.build_outer(changed({"outer.steps": 100, "outer.warmup": 0.1}).outer), {"w": jnp.zeros(())}

    def step(state, _):
        updates, state = outer.update({"w": jnp.ones(())}, state, phi)
        return state, -updates["w"]

    rates = np.asarray(jax.lax.scan(step, outer.init(phi), length=100)[1])
    np.testing.assert_allclose(rates[:11].max(), 3e-3, rtol=1e-3)
    assert np.argmax(rates) == 10 and 0 < rates[0] < 1e-3
    np.testing.assert_allclose(rates[99], 1e-3, rtol=0.01)


def test_a_clip_before_adam_normalises_and_one_after_it_does_not_fire():
    # Adam forgets the scale; a clip to 1 of its small updates changes nothing.
    for position in ("before", "after", "none"):
        recipe = with_field(LOLO, "outer.clip_position", position)
        np.testing.assert_allclose(first_update(recipe, 1e3), first_update(recipe, 1e5), rtol=1e-4)
    outer = changed({"outer.clip_position": "before"}).outer
    built, phi = build.build_outer(outer), {"w": jnp.zeros(1)}
    _, state = built.update({"w": jnp.full(1, 1e3)}, built.init(phi), phi)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu")["w"], 0.1, rtol=1e-5)  # 0.1 · the clipped 1


def test_weight_decay_is_given_to_the_expert_too_and_cancels_in_bc():
    decay = {"learner.hidden": 4, "learner.weight_decay": 0.3, "learner.step_mult": 0.01}
    recipe, plain = changed(decay), changed({"learner.hidden": 4, "learner.step_mult": 0.01})
    task, key = quadratic(4).train, jax.random.key(2)

    def bc(learner_recipe, expert_recipe):
        learner, expert = architecture.build_learner(learner_recipe.learner), build.build_expert(expert_recipe)
        optimizer = learner.optimizer(learner.init(jax.random.key(0)))
        state = inner.begin(task, optimizer, expert, jax.random.key(1))
        step = jax.jit(lambda state: inner.inner_step(task, optimizer, expert, jnp.float32(0.5), state, key))
        return float(step(state)[1].bc)

    np.testing.assert_allclose(bc(recipe, recipe), bc(plain, plain), rtol=1e-3)
    assert abs(bc(recipe, plain) / bc(plain, plain) - 1) > 0.1  # without the correction it would not


def test_the_decay_of_the_expert_is_the_learners():
    params = {"x": jnp.array([2.0, -1.0])}
    for make in experts.EXPERTS.values():
        if make is experts.adam_of_learner:
            continue
        expert = make(0.1)
        decayed = experts.with_decay(expert, 0.25)
        grads = {"x": jnp.array([0.3, 0.4])}
        ours, _ = decayed.update(grads, decayed.init(params), params, learner_state=None)
        theirs, _ = expert.update(grads, expert.init(params), params, learner_state=None)
        np.testing.assert_allclose(ours["x"] - theirs["x"], -0.25 * params["x"], rtol=1e-5)


def test_the_hand_over_s_ends_are_shares_of_the_outer_steps():
    setup = build.build(changed({"imitation.start": 0.05, "imitation.end": 0.5, "outer.steps": 1001}))
    for alpha in (setup.alpha_mix, setup.alpha_loss):
        found = [float(alpha(jnp.int32(t))) for t in (0, 50, 275, 500, 1000)]
        np.testing.assert_allclose(found, [0, 0, 0.5, 1, 1], atol=1e-6)


def test_a_floor_needs_the_expert_where_alpha_is_one():
    assert build.build(NAIVE).expert is None
    assert build.build(with_field(NAIVE, "imitation.floor", 0.21)).expert is not None
    assert build.build(with_field(NAIVE, "imitation.loss", "direction")).expert is None


# --- experts --------------------------------------------------------------------------------------------------------

GRADIENT = jax.tree.map(
    lambda shape: jax.random.normal(jax.random.key(3), shape),
    {"weight": (64, 32), "kernel": (3, 3, 4, 8), "bias": (32,), "scale": ()},
    is_leaf=lambda x: isinstance(x, tuple),
)


def first_step(expert):
    """The expert's first update of parameters that are zero."""
    params = jax.tree.map(jnp.zeros_like, GRADIENT)
    return expert.update(GRADIENT, expert.init(params), params, learner_state=None)[0]


def rms(x):
    return float(jnp.sqrt(jnp.mean(x**2)))


def test_muon_s_step_has_the_size_of_its_rate_whatever_the_shape():
    step = first_step(experts.muon(0.01))
    for name in ("weight", "kernel"):
        assert 0.8 < rms(step[name]) / 0.01 < 1.1
        singular = np.linalg.svd(np.reshape(step[name], (-1, step[name].shape[-1])), compute_uv=False)
        largest = np.sqrt(max(step[name].size // step[name].shape[-1], step[name].shape[-1]))
        assert 0.5 < singular.min() / (0.01 * largest) <= singular.max() / (0.01 * largest) < 1.3
    # optax's own factor, √max(1, columns/rows), would give steps of other sizes.
    plain = optax.contrib.muon(0.01)
    params = jax.tree.map(jnp.zeros_like, GRADIENT)
    assert rms(plain.update(GRADIENT, plain.init(params), params)[0]["weight"]) < 0.2 * 0.01


def test_muon_moves_vectors_as_adam_with_nesterov():
    step, adam = first_step(experts.muon(0.01)), first_step(experts.Expert(*optax.nadam(0.01)))
    for name in ("bias", "scale"):
        np.testing.assert_allclose(step[name], adam[name], rtol=1e-5)
    assert not np.allclose(step["weight"], adam["weight"], rtol=0.1)


def test_a_cosine_starts_at_lr_and_reaches_final_lr_at_decay_steps():
    rate = experts.RATES["cosine"](1e-2, 1e-4, 400)
    found = [float(rate(jnp.int32(t))) for t in (0, 200, 400, 401, 10_000)]
    np.testing.assert_allclose(found, [1e-2, (1e-2 + 1e-4) / 2, 1e-4, 1e-4, 1e-4], rtol=1e-4)
    assert experts.RATES["constant"](1e-2, 1e-4, 400) == 1e-2


@pytest.mark.parametrize("name", [name for name in experts.EXPERTS if name != "adam-of-learner"])
def test_the_cosine_of_an_expert_runs_over_its_own_steps(name):
    changes = {"imitation.expert": name, "imitation.lr": 1e-2, "learner.hidden": 4}
    cosine = changes | {"imitation.schedule": "cosine", "imitation.final_lr": 1e-3, "imitation.decay_steps": 5}
    ours, plain = (build.build_expert(changed(c)) for c in (cosine, changes))
    params = {"x": jnp.ones((2, 3)), "y": jnp.ones(3)}
    grads, ratios = {"x": jnp.arange(6.0).reshape(2, 3) + 1, "y": jnp.ones(3)}, []
    states = [ours.init(params), plain.init(params)]
    for _ in range(8):
        updates, states[0] = ours.update(grads, states[0], params, learner_state=None)
        expected, states[1] = plain.update(grads, states[1], params, learner_state=None)
        ratios.append([float(updates[k].sum() / expected[k].sum()) for k in params])
    rate = [0.1 + 0.9 * (1 + np.cos(np.pi * min(t, 5) / 5)) / 2 for t in range(8)]
    np.testing.assert_allclose(ratios, np.stack([rate, rate], 1), rtol=1e-4)


def test_small_recipes_of_the_tests_are_valid():
    for recipe in recipes.RECIPES.values():
        check(small(recipe))
