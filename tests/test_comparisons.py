"""Named optimizers, their rows, tables, reports and pictures, on the smallest task."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import small

from lolo.cli.main import main
from lolo.evaluation import long_runs
from lolo.evaluation.statistics import Row
from lolo.files.disk import FileError
from lolo.method import meta
from lolo.optimizers import architecture, pretrained
from lolo.studies import candidates, comparison_report, comparisons, evaluation_folder, headline, plots, tables
from lolo.studies.rows import file_name, load_rows, save_rows
from lolo.tasks import by_name
from lolo.tasks.small import quadratic
from lolo.training import build, recipes

QUADRATIC = quadratic()


def write(path, recipe, learner=None):
    """A weights file that says it comes from a recipe."""
    learner = learner or recipe.learner
    phi = architecture.build_learner(learner).init(jax.random.key(recipe.seed))
    pretrained.save(path, pretrained.Weights(phi, learner, recipes.to_dict(recipe), {}))
    return str(path)


def labels(*names):
    named = candidates.read(names)
    assert list(named) == list(names)
    entries = [candidates.candidate(one, QUADRATIC, 100) for one in named.values()]
    return [(entry.label, entry.meta_seed) for entry in entries]


def test_meta_seeds_of_one_recipe_are_rows_of_one_method(tmp_path):
    a, b = (write(tmp_path / f"{seed}.safetensors", small("lolo", seed=seed)) for seed in (0, 1))
    c = write(tmp_path / "naive.safetensors", small("naive", seed=1))
    assert labels(a, "adamw:1e-3", b, c) == [("lolo", 0), ("adamw 0.001", None), ("lolo", 1), ("naive", 1)]


def test_a_baseline_spelled_twice_is_evaluated_once():
    names = ["adamw:1e-3", "lolo-small", "adamw:0.001", "sgdm:1e-3", "adamw:grid", "lolo-small", "adamw:grid"]
    assert list(candidates.read(names)) == ["adamw:1e-3", "lolo-small", "sgdm:1e-3", "adamw:grid"]
    with pytest.raises(ValueError, match="adamw:fast: give a learning rate"):
        candidates.read(["adamw:fast"])


def test_a_rival_s_name_holds_its_schedule_and_settings():
    names = ["muon-warmup-cosine:3e-3,weight_decay=0.1,warmup=0.1", "schedule-free-warmup:1e-3", "adamw-wsd:grid"]
    found = candidates.read(names)
    assert found[names[0]] == candidates.NamedRival("muon-warmup-cosine", 3e-3, 0.1, 0.1)
    (same,) = candidates.read(["muon:3e-3,schedule=warmup-cosine,weight_decay=0.1,warmup=0.1"]).values()
    assert same == found[names[0]]
    assert candidates.candidate(found[names[0]], QUADRATIC, 100).label == "muon-warmup-cosine 0.003 wd 0.1 warmup 0.1"
    files = evaluation_folder.part_files(
        Path("parts"), "quadratic", candidates.read([*names, "muon-warmup-cosine:3e-3"])
    )
    assert len(set(files.values())) == 4  # each keeps rows of its own
    assert evaluation_folder.part_files(Path(), "quadratic", candidates.read(["adamw:1e-3"]))["adamw:1e-3"] == Path(
        "quadratic/adamw-0.001.jsonl"
    )  # where rows have been kept so far


OWN = """
import jax
import optax
from beside import MOMENTUM

def mine(lr: float = 0.1, steps: int = 1):
    return optax.sgd(optax.cosine_decay_schedule(lr, steps), MOMENTUM)

def nothing():
    return 3

def broken():
    return absent

def torn():
    return optax.GradientTransformation(lambda params: params["absent"], optax.sgd(0.1).update)

def late():
    return optax.GradientTransformation(optax.sgd(0.1).init, lambda grads, state, params: absent)

def single():
    return optax.GradientTransformation(lambda params: (), lambda grads, state, params: grads)

def bare(update):
    return optax.GradientTransformation(lambda params: {"count": 0}, lambda grads, state, params: update(grads, state))

def listed():
    return bare(lambda grads, state: ([grads], state))

def flat():
    return bare(lambda grads, state: (jax.tree.map(lambda g: g.sum(), grads), state))

def grown():
    return bare(lambda grads, state: (grads, state | {"flag": True}))

def halved():
    return bare(lambda grads, state: (grads, {"count": 0.5 * state["count"]}))

def worded():
    return bare(lambda grads, state: (grads, {"count": "three"}))
"""


@pytest.fixture
def own_file(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "beside.py").write_text("MOMENTUM = 0.9")
    return tmp_path / "own.py"


def test_a_user_s_own_optimizer_runs_beside_the_others_and_knows_the_horizon(own_file, tmp_path):
    name = f"{own_file}:mine:lr=0.2"
    rows, weights = comparisons.evaluate(
        candidates.read([name, "sgdm-cosine:0.2"]), "quadratic", 200, 2, parts=tmp_path / "parts"
    )
    assert [row.optimizer for row in rows] == ["own.py:mine:lr=0.2"] * 2 + ["sgdm-cosine 0.2"] * 2 and not weights
    for mine, theirs in zip(rows[:2], rows[2:], strict=True):
        np.testing.assert_allclose(mine.train_curve, theirs.train_curve, rtol=1e-4)


def test_rows_of_a_user_s_optimizer_are_kept_until_its_file_changes(own_file, tmp_path, monkeypatch):
    name, parts = f"{own_file}:mine", tmp_path / "parts"
    first, _ = comparisons.evaluate(candidates.read([name]), "quadratic", 100, 1, parts=parts)
    with monkeypatch.context() as patch:
        patch.setattr(long_runs, "compare", lambda *args, **kwargs: pytest.fail("ran"))
        assert comparisons.evaluate(candidates.read([name]), "quadratic", 100, 1, parts=parts)[0] == first
    own_file.write_text(OWN.replace("MOMENTUM)", "0.5)"))
    again, _ = comparisons.evaluate(candidates.read([name]), "quadratic", 100, 1, parts=parts)
    assert again != first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("mine:rate=1", "'rate=1' is no setting of 'mine'"),
        ("mine:lr=fast", "must be a number, such as 0.1"),
        ("absent", "has no function 'absent'; define one that returns an optax optimizer"),
        ("nothing", "returned int; expected an optax optimizer"),
        ("broken", "failed with NameError: name 'absent' is not defined"),
    ],
)
def test_a_user_s_optimizer_that_can_t_be_used_is_refused_before_the_first_run(own_file, words, message):
    with pytest.raises(ValueError, match=message):
        candidates.read([f"{own_file}:{words}"])
    with pytest.raises(ValueError, match=r"optimizer file .*none.py does not exist"):
        candidates.read(["none.py:mine"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("torn", r"init of .*own.py:torn failed with KeyError: 'absent'"),
        ("late", r"update of .*own.py:late failed with NameError: name 'absent' is not defined"),
        ("listed", r"update of .*own.py:listed returned updates of another tree"),
        ("flat", r"update of .*own.py:flat returned updates of another tree, or of other shapes, than the gradients"),
        ("grown", r"update of .*own.py:grown returned a state of another tree"),
        ("halved", r"update of .*own.py:halved returned a state .* or dtypes, than it was given"),
        ("worded", r"update of .*own.py:worded: its state or its updates hold what is no number or array"),
        ("single", r"update of .*own.py:single returned \w+; expected \(updates, state\)"),
    ],
)
def test_a_user_s_optimizer_that_fails_under_way_says_where(own_file, words, message, caplog, capsys):
    assert main(["eval", f"{own_file}:{words}", "--task", "quadratic", "--steps", "50", "--seeds", "1"]) == 2
    said = "".join(capsys.readouterr().err.split("\n")) + caplog.text
    assert re.search(message, said) and "Traceback" not in said


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("muon-linear:1e-3", "unknown optimizer 'muon-linear'; did you mean 'muon"),
        ("adamw:1e-3,decay=0.1", "unknown setting of adamw:1e-3,decay=0.1 'decay'; did you mean 'weight_decay'"),
        ("adamw:1e-3,weight_decay=-1", "weight_decay='-1' must be 0 or a positive number"),
        ("adamw-warmup:1e-3,warmup=1.5", "must be a share of the steps"),
        ("lion:1e-3,schedule=linear", "schedule 'linear'; did you mean"),
        ("lion-cosine:1e-3,schedule=cosine", "unknown setting of lion-cosine:1e-3,schedule=cosine 'schedule'"),
        ("lion:0", "the learning rate must be a positive number"),
    ],
)
def test_a_rival_that_makes_no_sense_is_refused(name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        candidates.read([name])


@pytest.mark.parametrize("change", [{"outer.steps": 9}, {"tasks": ("books-mlp",)}, {"estimator.sigma": 0.02}])
def test_weights_of_another_recipe_are_no_meta_seed_of_the_first(tmp_path, change):
    a = write(tmp_path / "a.safetensors", small("lolo"))
    b = write(tmp_path / "b.safetensors", small("lolo", seed=1, **change))
    assert labels(a, b) == [("lolo", 0), (b, 1)]


def test_a_method_with_other_settings_than_in_meta_training_is_a_row_of_its_own(tmp_path):
    recipe = small("lolo")
    limited = dataclasses.replace(recipe.learner, clock_limit=10.0)
    a, b = write(tmp_path / "plain.safetensors", recipe), write(tmp_path / "limited.safetensors", recipe, limited)
    assert labels(a, b) == [("lolo", 0), ("limited", 0)]


def test_weights_with_one_name_and_seed_are_told_apart(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    a, b = (write(tmp_path / folder / "last.safetensors", small("lolo")) for folder in "ab")
    assert labels(a, b) == [("lolo", 0), (b, 0)]


def test_blocks_chosen_for_the_machine_make_no_other_recipe(tmp_path):
    a, b = (
        write(tmp_path / f"{size}.safetensors", small("lolo", seed=size, **{"estimator.slots_per_block": size}))
        for size in (1, 2)
    )
    assert labels(a, b) == [("lolo", 1), ("lolo", 2)]


# --- deployment settings ----------------------------------------------------------------------------------------------


def test_weights_with_deployment_settings_are_rows_of_their_own(tmp_path):
    a, b = (write(tmp_path / f"{seed}.safetensors", small("lolo", seed=seed)) for seed in (0, 1))
    settings = "clock_limit=10,weight_decay=0.1"
    expected = "lolo weight_decay=0.1 clock_limit=10.0"
    assert labels(a, f"{a}:{settings}", b, f"{b}:{settings}", f"{a}:schedule=cosine") == [
        ("lolo", 0),
        (expected, 0),
        ("lolo", 1),
        (expected, 1),
        ("lolo schedule=cosine", 0),
    ]


def test_the_untrained_phi_is_the_one_that_the_meta_training_began_with(tmp_path):
    recipe = small("lolo", seed=3, **{"tasks": ("quadratic",)})
    path = write(tmp_path / "a.safetensors", recipe)
    named = candidates.read([path, f"{path}:untrained=true,step_scale=2", f"{path}:untrained=false"])
    trained, untrained, same = named.values()
    setup = build.build(recipe)
    began = meta.meta_init(setup, (QUADRATIC.train,), jax.random.key(3)).meta_params
    assert [one.label for one in named.values()] == ["lolo", "lolo step_scale=2.0 untrained=true", path]
    for name, array in began.items():
        np.testing.assert_array_equal(untrained.weights.meta_params[name], array)
        np.testing.assert_array_equal(same.weights.meta_params[name], trained.weights.meta_params[name])
    assert any(np.any(trained.weights.meta_params[name] != began[name]) for name in began)


def first_updates(path, steps):
    """The updates of the first `steps` steps on a constant gradient, as `compare` would make them."""
    entry = candidates.candidate(candidates.read([path])[path], QUADRATIC, steps)
    optimizer, params = entry.make(entry.setting), {"x": jnp.full(8, 0.5)}
    state, updates = optimizer.init(params), []
    for _ in range(steps):
        update, state = optimizer.update({"x": jnp.ones(8)}, state, params)
        updates.append(np.asarray(update["x"]))
    return np.stack(updates)


def test_deployment_settings_do_what_they_say(tmp_path):
    path = write(tmp_path / "a.safetensors", small("lolo"))
    plain = first_updates(path, 8)
    cosine = first_updates(f"{path}:schedule=cosine", 8)
    np.testing.assert_allclose(cosine, plain * 0.5 * (1 + np.cos(np.pi * np.arange(8) / 8))[:, None], rtol=1e-5)
    scaled = [first_updates(f"{path}:step_scale=3{more}", 8) for more in ("", ",schedule=cosine")]
    np.testing.assert_allclose(scaled, 3 * np.stack([plain, cosine]), rtol=1e-5)
    shrinking = first_updates(f"{path}:step_decay=2", 8)
    np.testing.assert_allclose(shrinking, plain / np.sqrt(1 + np.arange(8) / 2)[:, None], rtol=1e-5)
    warmed = first_updates(f"{path}:schedule=warmup,warmup=0.5", 8)
    np.testing.assert_allclose(warmed, plain * np.minimum(np.arange(8) / 4, 1)[:, None], rtol=1e-5)
    decayed = first_updates(f"{path}:weight_decay=2", 8)
    np.testing.assert_allclose(decayed, plain - 1e-3 * 2 * 0.5, atol=1e-7)
    frozen = first_updates(f"{path}:clock_limit=3", 8)
    np.testing.assert_array_equal(frozen[:4], plain[:4])
    assert not np.array_equal(frozen[4:], plain[4:])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        pytest.param(
            "lolo-norm",
            "schedule=warmup-cosine,warmup=0.1,learning_rate={}e-1,weight_decay={},adam_scale=2",
            marks=pytest.mark.slow,
        ),
        pytest.param("lolo-norm", "kernel=auto,learning_rate={}e-1,weight_decay={}", marks=pytest.mark.slow),
        pytest.param("lolo-norm", "adam_beta2={},weight_decay={}", marks=pytest.mark.slow),
        pytest.param("lolo-small", "schedule=cosine,step_scale={},weight_decay={}", marks=pytest.mark.slow),
        ("lolo-anytime", "step_decay={}000,clock_limit=100,weight_decay={}"),
    ],
)
def test_deployments_that_differ_in_numbers_alone_share_a_program(weights, words):
    splits = by_name.resolve("digits-mlp")  # with matrices, which the network moves
    names = [f"{weights}:{words.format(*numbers)}" for numbers in ((0.1, 0.5), (0.2, 0.01))]
    entries = [candidates.candidate(named, splits, 20) for named in candidates.read(names).values()]
    assert entries[0].make is entries[1].make
    together = long_runs.compare("digits-mlp", splits, entries, [0], 20)
    alone = [long_runs.compare("digits-mlp", splits, [entry], [0], 20)[0] for entry in entries]
    assert together == alone and together[0].train_loss != together[1].train_loss
    (plain,) = candidates.read([weights]).values()
    assert candidates.candidate(plain, splits, 20).make is not entries[0].make


def test_entries_that_never_had_a_gradient_stand_still_if_asked_to(tmp_path):
    path, grads, params = write(tmp_path / "a.safetensors", small("lolo")), jnp.array([1.0, 0.0]), jnp.ones(2)

    def moved(words):
        (named,) = candidates.read([f"{path}{words}"]).values()
        entry = candidates.candidate(named, QUADRATIC, 8)
        optimizer = entry.make(entry.setting)
        return entry.label, (optimizer.update(grads, optimizer.init(params), params)[0] != 0).tolist()

    assert moved(":freeze_unseen=true") == ("lolo freeze_unseen=true", [True, False])
    assert moved(":freeze_unseen=true,step_scale=2") == ("lolo step_scale=2.0 freeze_unseen=true", [True, False])
    assert moved("") == moved(":freeze_unseen=false") == ("lolo", [True, True])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("freeze_unseen=yes", "unknown .*freeze_unseen 'yes'"),
        ("clock=3", "did you mean 'clock_limit'"),
        ("weight_decay=-1", "weight_decay='-1' must be 0 or a positive number"),
        ("weight_decay=nan", "must be 0 or a positive number"),
        ("weight_decay=inf", "must be 0 or a positive number"),
        ("step_scale=0", "step_scale='0' must be a positive number"),
        ("step_decay=0", "step_decay='0' must be a positive number"),
        ("step_scale=inf", "must be a positive number"),
        ("clock_limit", "clock_limit='' must be"),
        ("cosine", "unknown setting of .*'cosine'"),
        ("schedule=linear", "unknown .*schedule 'linear'"),
        ("schedule=warmup,warmup=2", "warmup='2' must be a share of the steps"),
        ("untrained=yes", "unknown .*untrained 'yes'"),
        ("weight_decay=", "weight_decay='' must be"),
    ],
)
def test_unknown_deployment_settings_are_refused(tmp_path, words, message):
    path = write(tmp_path / "a.safetensors", small("lolo"))
    with pytest.raises(ValueError, match=message):
        candidates.read([f"{path}:{words}"])


@pytest.mark.parametrize("words", ["clock_limit=3", "freeze_unseen=true"])
def test_a_learner_refuses_settings_that_it_lacks(tmp_path, words):
    path = write(tmp_path / "a.safetensors", small("lolo", **{"learner.name": "sgd"}))
    with pytest.raises(ValueError, match=f"'sgd' has no {words.partition('=')[0]}; leave it out"):
        candidates.read([f"{path}:{words}"])


@pytest.mark.parametrize("name", ["adamw:fast", "adamw:0", "adamw:inf", "sgdm:-1", "tiger:1e-3"])
def test_a_bad_baseline_is_refused_before_the_first_run(name, monkeypatch):
    monkeypatch.setattr(long_runs, "compare", lambda *args, **kwargs: pytest.fail("ran"))
    with pytest.raises(ValueError, match=name.partition(":")[0]):
        comparisons.evaluate(candidates.read(["adamw:1e-3", name]), "quadratic", 100, 1)


def test_rows_kept_from_before_are_not_made_again_unless_something_changed(tmp_path, monkeypatch):
    path = write(tmp_path / "a.safetensors", small("lolo"))
    made, compare = [], long_runs.compare

    def counting(task, splits, entries, *args, **kwargs):
        made.extend(entry.label for entry in entries)
        return compare(task, splits, entries, *args, **kwargs)

    monkeypatch.setattr(long_runs, "compare", counting)
    told = []

    def evaluate(*names, steps=100):
        made.clear()
        told.clear()
        rows, _ = comparisons.evaluate(
            candidates.read(names),
            "quadratic",
            steps,
            2,
            lambda what, done, total, word: told.append((done, total)),
            tmp_path / "parts",
        )
        return rows

    first = evaluate(path, "sgdm:grid")
    assert made == ["lolo", "best sgdm 0.3"] and told[-1][0] == told[-1][1] == (2 + 2 + 10) * 100
    assert evaluate(path, "sgdm:grid") == first and made == []
    assert evaluate(path, "adam:1e-3", "sgdm:grid")[:2] == first[:2] and made == ["adam 0.001"]
    evaluate(path, steps=200)
    assert made == ["lolo"]
    write(tmp_path / "a.safetensors", small("lolo", seed=1))
    evaluate(path)
    assert made == ["lolo"]


def test_rows_that_do_not_fit_are_made_again(tmp_path):
    path = write(tmp_path / "a.safetensors", small("lolo"))
    named = candidates.read([path])[path]
    file, rows = tmp_path / "part.jsonl", [row("lolo", 0, seed, 1.0) for seed in (0, 1)]
    save_rows(file, rows)
    assert evaluation_folder.kept_rows(file, "q", 200, 2, named) == rows
    others = [
        ("p", 200, 2, named),
        ("q", 100, 2, named),
        ("q", 200, 1, named),
        ("q", 200, 3, named),
        ("q", 200, 2, candidates.NamedRival("adam", 0.1)),
        ("q", 200, 2, named._replace(meta_seed=1)),
        ("q", 200, 2, named._replace(label="bc-only")),
    ]
    for other in others:
        assert evaluation_folder.kept_rows(file, *other) is None
    file.write_bytes(file.read_bytes()[:-20])  # the last row is half there: it would be left out
    assert evaluation_folder.kept_rows(file, "q", 200, 2, named) is None
    file.write_bytes(b"")
    with pytest.raises(FileError, match=r"no whole row.*Remove it, and its rows are made again"):
        evaluation_folder.kept_rows(file, "q", 200, 2, named)


def part_of(name):
    (file,) = evaluation_folder.part_files(Path("parts"), "quadratic", candidates.read([name])).values()
    return file.name


def test_names_of_parts_tell_weights_by_the_settings_they_came_with(tmp_path):
    recipe, path = small("lolo"), tmp_path / "a.safetensors"

    def part(use, learner=None):
        name = f"{write(path, recipe, learner)}{use}"
        return part_of(name)

    limited = [part("", dataclasses.replace(recipe.learner, clock_limit=limit)) for limit in (10.0, 20.0)]
    assert len({part(""), *limited}) == 3
    assert part(":clock_limit=3,schedule=cosine") == part("").replace("lolo-", "lolo-clock_limit-3.0-schedule-cosine-")
    now, older = part(""), recipes.to_dict(recipe)
    del older["learner"]["step_decay"]  # as recipes were before there was one
    pretrained.save(path, pretrained.load(path)._replace(recipe=older))
    assert part_of(str(path)) == now
    assert part_of("adamw:1e-3") == part_of("adamw:0.001") == "adamw-0.001.jsonl" != part_of("adamw:wide-grid")


def test_rows_of_a_users_task_are_not_kept_when_its_file_changes(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(long_runs, "compare", lambda *args, **_: made.append(1) or [row("adam 0.1", None, 0, 1.0)])
    file = tmp_path / "mine.py"
    for content in ("from lolo.tasks import quadratic", "from lolo.tasks import quadratic  # changed"):
        file.write_text(content)
        comparisons.evaluate(candidates.read(["adam:0.1"]), f"{file}:quadratic", 200, 1, parts=tmp_path / "parts")
    assert len(made) == 2 and len(list((tmp_path / "parts").iterdir())) == 2


def test_an_optimizer_that_is_named_twice_is_run_once(tmp_path, monkeypatch):
    path, run = write(tmp_path / "a.safetensors", small("lolo")), []
    monkeypatch.setattr(long_runs, "compare", lambda name, splits, entries, *args, **_: run.extend(entries) or [])
    comparisons.evaluate(candidates.read([path, "adam:0.1", path, "adam:0.1"]), "quadratic", 100, 1)
    assert [entry.label for entry in run] == ["lolo", "adam 0.1"]


# --- tables and reports ---------------------------------------------------------------------------------------------


def row(optimizer, meta_seed, seed, loss, diverged=False):
    return Row(
        "q", optimizer, meta_seed, seed, 200, loss, loss, loss, {"loss": loss}, diverged, [9.0, loss], [9.0, loss]
    )


def test_a_table_names_units_pairs_and_what_diverged():
    lines = tables.table(
        [row("adamw", None, seed, 1.0 + seed) for seed in (0, 1)]
        + [row("lolo", 0, seed, 0.5 + seed) for seed in (0, 1)]
        + [row("wild", 1, seed, float("inf"), diverged=True) for seed in (0, 1)]
    ).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| lolo", "| adamw", "| wild"]
    assert "| 1.0000 ± 6.3531 (n=2 seeds) |" in lines[0]  # t of 1 degree of freedom: 12.706, deviation 1 / √2
    assert "| -0.5000 ± 0.0000 (n=2 seeds) |" in lines[1] and lines[1].endswith("| 0 of 2 |")
    assert "| inf (n=2 seeds) |" in lines[2] and lines[2].endswith("| 2 of 2 |")


def test_several_meta_seeds_without_one_in_common_are_no_pairs():
    sides = [row("lolo", m, 0, 1.0) for m in (0, 1)] + [row("naive", m, 0, 2.0) for m in (2, 3)]
    assert "| no pairs | no pairs |" in tables.table(sides)


def test_a_report_of_runs_that_all_diverged_is_written(tmp_path):
    lost = dataclasses.replace(
        row("wild", None, 0, float("inf"), diverged=True), train_curve=[np.nan], held_curve=[np.nan]
    )
    comparison_report.write_report(tmp_path, "quadratic", [lost], {}, "lolo eval")
    assert "1 of 1 runs diverged" in (tmp_path / "report-quadratic.md").read_text()


def test_rows_are_kept_whatever_happens_to_the_report(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        comparison_report.write_report(tmp_path, "quadratic", [row("adamw", None, 0, 1.0)], {}, "lolo eval")
    assert load_rows(tmp_path / "rows-quadratic.jsonl") == [row("adamw", None, 0, 1.0)]


def test_start_steps_are_summed_over_meta_seeds_and_drawn_once_for_each_weights(tmp_path, monkeypatch):
    drawn, rows = {}, [row("adamw", None, 0, 1.0)]

    def draw(counts):
        drawn.update({label: dict(zip(*counts[label], strict=True)) for label in counts})
        return plots.curves(rows)

    monkeypatch.setattr(plots, "start_steps", draw)

    def weights(value, **changes):
        card = {"start_steps_per_250": {"0": 8, "250": 2}}  # alike for every method without a buffer
        return pretrained.Weights(
            {"w0": jnp.full(2, value)}, recipes.LOLO.learner, changes | {"unroll": {"length": 9}}, card
        )

    methods = {
        "naive, meta-seed 0": weights(1.0),
        "naive, meta-seed 1": weights(2.0),
        "naive schedule=cosine, meta-seed 0": weights(1.0),  # the same weights
        "bc-only, meta-seed 0": weights(3.0),
        "newest, meta-seed 0": weights(3.0, read="newest"),  # other recipes may give the same bytes
    }
    comparison_report.write_report(tmp_path, "quadratic", rows, methods, "lolo eval")
    assert drawn == {
        "naive": {0: 16, 250: 4},
        "bc-only": {0: 8, 250: 2},
        "newest": {0: 8, 250: 2},
    }
    assert "(start-steps-quadratic.svg)" in (tmp_path / "report-quadratic.md").read_text()
    many = {f"own{i}, meta-seed 0": weights(float(i))._replace(recipe={}) for i in range(headline.FEW + 1)}
    comparison_report.write_report(tmp_path / "many", "quadratic", rows, many, "lolo eval")
    assert "start-steps" not in (tmp_path / "many" / "report-quadratic.md").read_text()


def test_files_of_a_users_task_are_named_after_file_and_function():
    assert file_name("fashion-mlp") == "fashion-mlp"
    assert file_name("fashion-mlp:widths=64-32") == "fashion-mlp-widths=64-32"
    assert file_name("some/where/mine.py:easy") == "mine-easy"
    assert file_name("mine.py:easy:size=3,data=a/b") == "mine-easy-size=3,data=a-b"
    assert file_name(f"mine.py:easy@{'0' * 64}") == "mine-easy"


# --- pictures ---------------------------------------------------------------------------------------------------


def test_optimizers_too_many_for_curves_are_also_shown_by_their_last_losses(tmp_path):
    rows = [row(f"adamw {i}", None, seed, 1.0 + i + seed) for i in range(headline.FEW + 1) for seed in (0, 1)]
    for name, shown in (("few", rows[:-2]), ("many", rows)):
        comparison_report.write_report(tmp_path / name, "quadratic", shown, {}, "lolo eval")
        pictured = (tmp_path / name / "finals-quadratic.svg").is_file()
        assert pictured == ("(finals-quadratic.svg)" in (tmp_path / name / "report-quadratic.md").read_text())
        assert pictured == (name == "many")


def test_the_range_of_curves_shorter_than_the_unroll_is_their_own():
    figure = plots.curves([row("adamw", None, 0, 2.3)], 1000)  # 200 steps
    low, high = figure.axes[0].get_ylim()
    assert low < 2.3 < high and low > 1


def test_long_curves_are_thinned_evenly_on_a_log_axis():
    short = np.arange(5.0)[None]
    steps, means = plots._thinned(short)
    assert list(steps) == [100, 200, 300, 400, 500] and (means == short).all()
    steps, means = plots._thinned(np.arange(1.0, 1001.0)[None])
    assert len(steps) < 150 and (steps[0], steps[-1]) == (100, 100_000)
    assert np.ptp(np.diff(np.log(steps[-60:]))) < 0.03 < np.diff(np.log(steps[-60:])).min()
    holes = np.arange(1.0, 1001.0)
    holes[[0, 500, 999]] = np.nan, np.inf, np.nan
    with_holes = plots._thinned(holes[None])[1][0]
    assert np.isnan(with_holes[0]) and np.isfinite(with_holes[1:]).all()
    bounds = np.concatenate([[0], steps // 100])
    np.testing.assert_allclose(means[0], (bounds[:-1] + 1 + bounds[1:]) / 2)  # of whole numbers in a row


def test_last_losses_are_pictured_best_first_with_mean_and_range():
    rows = [row(name, None, s, x + s) for name, x in (("b", 3.0), ("a", 1.0)) for s in (0, 2)]
    (axis,) = plots.finals(rows).axes
    heights = {text.get_text(): text.xy[1] for text in axis.texts}
    assert heights["a"] > heights["b"]
    first, mean_of_first, *_ = axis.get_lines()
    assert (list(first.get_xdata()), list(mean_of_first.get_xdata())) == ([1.0, 3.0], [2.0])
