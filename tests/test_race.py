"""The race: workloads, the search, scores with known answers, and a whole race on a small task."""

import dataclasses
import math
import pathlib
import types

import jax
import numpy as np
import pytest
from helpers import with_slow

import lolo
from lolo.cli.main import main
from lolo.files.disk import FileError
from lolo.optimizers import architecture, weights_file
from lolo.race import (
    entrants,
    pictures,
    records,
    report,
    results,
    scores,
    search,
    stages,
    step_times,
    transfer,
    tuning,
    validation,
    workloads,
)
from lolo.race.records import RaceRow, StepTime, Target, Trial, ValidationRow
from lolo.studies import candidates
from lolo.tasks import by_name

INF = math.inf
QUADRATIC = workloads.Workload("quadratic", 200, {"dimensions": (3, 5)}, "none", "quadratic")


@pytest.fixture
def small(monkeypatch):
    """Two workloads that take no time."""
    table = {"near": QUADRATIC, "far": QUADRATIC._replace(task="quadratic:dimensions=4")}
    monkeypatch.setattr(workloads, "WORKLOADS", table)
    monkeypatch.setattr(search, "SPACES", {kind: search.SPACES[kind] for kind in ("adamw", "nadamw", "nesterov")})


@pytest.mark.parametrize("name", with_slow(workloads.WORKLOADS, {"finetuning"}))
def test_a_workload_and_its_held_out_form_are_tasks_and_differ_in_one_setting(name):
    of = workloads.WORKLOADS[name]
    variant = workloads.variant_of(of)
    assert of.steps % workloads.POINTS == 0 and tuning.steps_of_search(of) % workloads.POINTS == 0
    assert variant != of.task and variant == workloads.variant_of(of)
    drawn = {workloads.variant_of(of, seed) for seed in range(60)}
    assert len(drawn) == sum(map(len, of.variants.values()))  # all are drawn, and none is the workload itself
    first, second = (by_name.outline(task) for task in (of.task, variant))
    assert first.train.init is not second.train.init


def test_embeddings_and_output_layers_are_no_matrices():
    outside = {name: workloads.matrices_of(of.task).outside for name, of in workloads.WORKLOADS.items()}
    assert outside["mlp"] == {"layers.2.weight", "layers.2.bias"}
    assert outside["words"] >= {"embedding.weight", "layers.1.weight"}
    assert outside["transformer"] == {"wte.weight", "wpe.weight"}
    assert {"output.weight", "positions.weight"} <= outside["vit"]
    is_matrix = workloads.matrices_of(workloads.WORKLOADS["mlp"].task)
    shapes = {"layers.0.weight": (64, 256), "layers.0.bias": (256,), "layers.2.weight": (256, 10)}
    with pytest.raises(ValueError, match="is_matrix got the path .*expected a parameter's name, such as 'layers"):
        is_matrix("['layers.2.weight']", jax.ShapeDtypeStruct((2, 2), np.float32))
    answers = {name: is_matrix(name, jax.ShapeDtypeStruct(shape, np.float32)) for name, shape in shapes.items()}
    assert answers == {"layers.0.weight": True, "layers.0.bias": False, "layers.2.weight": False}


def test_muon_leaves_what_is_no_matrix_to_adamw():
    task = workloads.WORKLOADS["words"].task
    name = tuning.rival("muon").name_of(search.settings_of(search.SPACES["muon"])[0])
    ((entry,),) = (group.values() for group in tuning.together(candidates.read([name]), task, 100))
    params = {
        "embedding.weight": np.ones((4, 3)),
        "layers.0.weight": np.ones((3, 3)),
        "layers.1.weight": np.ones((3, 4)),
    }
    state = entry.make(entry.setting).init(jax.tree.map(jax.numpy.asarray, params))
    muon = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "'muon'" in str(path)]
    assert {x.shape for x in muon if getattr(x, "ndim", 0) == 2} == {(3, 3)}


def test_what_a_workload_shares_with_meta_training_is_named():
    of = workloads.WORKLOADS
    assert workloads.shared_with(of["mlp"], ("fashion-mlp:batch=8", "books-mlp")) == ["Fashion-MNIST", "MLP"]
    assert workloads.shared_with(of["gru"], ("fashion-mlp", "books-mlp")) == ["books"]
    assert workloads.shared_with(of["small-batch"], ("fashion-conv",)) == []
    assert workloads.shared_with(of["gru"], ("books-gru",)) == ["books", "GRU"]


SEARCHED = {kind: tuning.rival(kind) for kind in search.SPACES}
SEARCHED |= {name: tuning.weights(name) for name in ("lolo-norm", "lolo-small")}


@pytest.mark.parametrize("of", SEARCHED.values(), ids=SEARCHED)
def test_trials_fill_their_space_and_are_the_same_each_time(of):
    space, found = of.space, search.settings_of(of.space)
    assert found == search.settings_of(space) and len(set(found)) == search.TRIALS
    for values, (low, high) in zip(zip(*found, strict=True), space[:3], strict=True):
        assert low * 0.999 <= min(values) < low * (high / low) ** 0.2
        assert low * (high / low) ** 0.8 < max(values) <= high * 1.001
    for setting in found:
        (named,) = candidates.read([of.name_of(setting)]).values()
        if isinstance(named, candidates.NamedWeights):
            learner, deployed = named.weights.learner, named.deployment
            rate = deployed.step_scale if space.rate == "step_scale" else deployed.learner[space.rate]
            assert (rate, deployed.learner["weight_decay"], deployed.warmup) == setting and learner.name
            assert deployed.schedule == "warmup-cosine"
        else:
            assert (named.learning_rate, named.weight_decay, named.warmup) == setting


def test_every_architecture_of_shipped_weights_has_a_space():
    shipped = {lolo.load(name).learner.name for name in weights_file.shipped_weights()}
    assert shipped <= set(search.SPACES_OF_WEIGHTS) <= set(architecture.ARCHITECTURES)


@pytest.mark.parametrize("name", ["adamw:1e-3", "muon:1e-3"])
def test_only_weights_and_kinds_of_rivals_are_searched(name):
    with pytest.raises(ValueError, match="the search finds the learning rate; give "):
        tuning.searched(name)
    with pytest.raises(ValueError, match="the search is for weights; give --settings"):
        tuning.weights(name)
    kind = name.partition(":")[0]
    assert (
        tuning.searched(kind, "again").name_of(search.settings_of(search.SPACES[kind])[0]).startswith(f"{kind}-warmup-")
    )
    assert tuning.searched(kind) == tuning.rival(kind) != tuning.searched(kind, "again")
    assert tuning.searched("lolo-norm") == tuning.weights("lolo-norm")


def test_rivals_under_one_name_do_not_share_trials(monkeypatch, tmp_path):
    monkeypatch.setattr(
        tuning, "trials", lambda of, workload, on_steps: [Trial(workload, of.name, 1.0, 1.0, 1.0, float(len(of.start)))]
    )
    found = {
        kind: stages.search_all(tmp_path, [tuning.searched(kind, "mine")], ("mlp",), quiet)
        for kind in ("muon", "lion", "nadamw")
    }
    assert [trials for trials in found.values()] == [
        [Trial("mlp", "mine", 1.0, 1.0, 1.0, float(len(tuning.rival(kind).start)))] for kind in found
    ]


def test_an_entrant_in_the_folder_replaces_all_its_published_rows(small, tmp_path):
    published = RaceRow("near", False, "muon", "muon:1", 0, 8, [1.0], 1.0, {"loss": 1.0})
    other = dataclasses.replace(published, entrant="adamw")
    mine = dataclasses.replace(published, workload="far", optimizer="muon:2")
    records.write(tmp_path / "kept" / stages.ROWS_FILE, [published, other])
    records.write(tmp_path / "mine" / stages.ROWS_FILE, [mine])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "KEPT", tmp_path / "kept")
        assert {row.optimizer for row in stages.read(tmp_path / "mine").rows if row.entrant == "muon"} <= {"muon:2"}
        assert any(row.entrant == "adamw" for row in stages.read(tmp_path / "mine").rows)


def test_one_setting_for_all_has_the_lowest_mean_rank_and_five_cover_what_it_misses():
    losses = {"a": [1.0, 2.0, 9.0, 3.0, 4.0, 5.0, math.nan], "b": [5.0, 2.0, 9.0, 3.0, 4.0, 1.0, 0.5]}
    assert search.one_for_all(losses) == 1  # second on a, third on b
    five = search.five_for_all(losses)
    assert five[0] == 1 and len(set(five)) == 5 and {0, 6} <= set(five[:3])  # the best of a and of b come next
    assert search.five_for_all({"a": [2.0, 1.0]}) == [1, 0]


def test_steps_to_a_target_with_answers_by_hand():
    curve = [3.0, 2.0, math.nan, 1.0]
    assert [scores.steps_to(t, curve, 400) for t in (3.0, 2.5, 1.0, 0.5)] == [100, 200, 400, INF]


def test_scores_with_answers_by_hand():
    times = np.array([[10.0, 20.0], [20.0, INF], [INF, 80.0], [INF, INF]])
    np.testing.assert_allclose(scores.ratios(times), [[1, 1], [2, INF], [INF, 4], [INF, INF]])
    np.testing.assert_allclose(scores.profile_score(times), [1, 1 / 3, 0, 0])
    np.testing.assert_allclose(
        scores.profile(times, np.array([1.0, 2.0, 4.0])), [[1, 1, 1], [0, 0.5, 0.5], [0, 0, 0.5], [0, 0, 0]]
    )
    assert scores.profile_score(np.full((2, 3), INF)).tolist() == [0, 0]
    area = np.trapezoid(scores.profile(times, np.linspace(1, 4, 30001)), dx=1 / 30000, axis=1)
    np.testing.assert_allclose(area, scores.profile_score(times), atol=1e-4)  # B is the area under the profile
    reference = np.array([20.0, 20.0])
    assert scores.speed_up(times[0], reference) == pytest.approx(math.sqrt(2))
    assert scores.speed_up(times[1], reference) == pytest.approx(math.sqrt(1 / 4))
    assert scores.speed_up(np.array([20.0, 800.0]), reference) == pytest.approx(
        math.sqrt(1 / 4)
    )  # no worse than a miss


def row(entrant, optimizer, seed, curve, held_out=False, workload="near"):
    return RaceRow(workload, held_out, entrant, optimizer, seed, 200, curve, curve[-1], {"loss": curve[-1]})


TARGETS = {("near", False): Target("quadratic", 0.5, "adamw", [0.5]), ("near", True): Target("q2", 0.5, "adamw", [0.5])}


def rows_of(entrant, *curves):
    """Two seeds of each setting; the first setting ran on the held-out form too."""
    return [
        row(entrant, f"{entrant}:{i}", seed, curve, held_out)
        for i, curve in enumerate(curves)
        for held_out in ((False, True) if i == 0 else (False,))
        for seed in (0, 1)
    ]


def test_tuned_takes_the_best_setting_of_each_workload_and_self_tuning_the_first():
    rows = rows_of("adamw", [0.9, 0.8], [0.9, 0.4], [0.4, 0.3])
    chosen = {rules: results.rows_that_count(rows, rules, TARGETS)["adamw"] for rules in results.RULES}
    assert {form: of[0].optimizer for form, of in chosen["self-tuning"].items()} == {
        ("near", False): "adamw:0",
        ("near", True): "adamw:0",
    }
    assert {form: of[0].optimizer for form, of in chosen["tuned"].items()} == {("near", False): "adamw:2"}
    with pytest.raises(ValueError, match="self-tuning and tuned"):
        results.rows_that_count(rows, "both", TARGETS)


def test_equal_rows_under_two_names_score_equal_and_a_miss_is_a_miss():
    rows = rows_of("adamw", [0.9, 0.4]) + rows_of("again", [0.9, 0.4]) + rows_of("never", [0.9, 0.8])
    found = {s.entrant: s for s in results.standings(rows, TARGETS, "self-tuning", {})}
    assert found["adamw"][1:4] == found["again"][1:4] or found["adamw"].profile == found["again"].profile
    assert found["adamw"].profile.mean == 1 and found["adamw"].speed_up.mean == 1
    assert found["never"].profile.mean == 0 and found["never"].speed_up.mean == 0.25
    assert all(math.isinf(steps) for steps in found["never"].steps.values())  # there, and not dropped
    assert math.isnan(found["adamw"].speed_up_seconds.mean)


def test_seconds_are_steps_times_the_time_of_a_step():
    rows = rows_of("adamw", [0.9, 0.4]) + rows_of("fast", [0.4, 0.3])
    times = {("near", "adamw"): 1.0, ("near", "fast"): 3.0}
    found = {s.entrant: s for s in results.standings(rows, TARGETS, "tuned", times)}
    assert found["fast"].speed_up.mean == 2 and found["fast"].speed_up_seconds.mean == pytest.approx(2 / 3)
    assert found["fast"].seconds == {("near", False): 300.0}


def test_entrants_come_back_from_their_rows_unless_their_weights_are_elsewhere():
    turned = [
        dataclasses.replace(r, optimizer="lolo-small" + ":step_scale=2" * (not r.held_out))
        for r in rows_of("lolo-small", [0.9])[::-1]  # first those of the workload itself
    ]
    adamw = [dataclasses.replace(r, entrant="mine", optimizer="adamw:1e-3") for r in rows_of("adamw", [0.9])]
    found = stages.published([*adamw, *rows_of("gone.safetensors", [0.9]), *turned])
    assert found == [
        entrants.Entrant("mine", ("adamw:1e-3",)),
        entrants.Entrant("lolo-small", ("lolo-small", "lolo-small:step_scale=2"), ("fashion-mlp",)),
    ]
    assert stages.published([*adamw, *turned], but=found[1:]) == found[:1]


@pytest.mark.parametrize(("times", "panels"), [({}, 1), ({("near", "adamw"): 1.0}, 2)])
def test_the_profiles_show_seconds_only_where_a_step_time_is_known(times, panels):
    rows = rows_of("adamw", [0.9, 0.4]) + rows_of("mine", [0.4, 0.3])
    figure = pictures.profiles(results.standings(rows, TARGETS, "tuned", times), "tuned")
    assert len(figure.axes) == panels


def test_without_adamw_there_is_nothing_to_compare_with():
    for rows in ([], rows_of("mine", [0.9, 0.4])):
        with pytest.raises(FileError, match="no rows of adamw.*--from-scratch"):
            results.standings(rows, TARGETS, "tuned", {})


def test_where_adamw_misses_its_time_is_that_of_all_steps():
    rows = rows_of("adamw", [0.9, 0.8]) + rows_of("first", [0.4, 0.3])
    found = {s.entrant: s for s in results.standings(rows, TARGETS, "tuned", {})}
    assert found["first"].speed_up.mean == 2 and found["adamw"].speed_up.mean == 0.25


def test_records_come_back_and_damaged_ones_are_refused(tmp_path):
    kept = {
        "trials.jsonl.gz": Trial("near", "adamw", 1e-3, 0.1, 0.02, math.nan),
        "targets.jsonl": TARGETS["near", False],
        "rows.jsonl.gz": row("adamw", "adamw:0", 1, [0.5, INF]),
        "step-times.jsonl": StepTime("near", "adamw", 0.1, "cpu"),
    }
    for name, record in kept.items():
        records.write(tmp_path / name, [record, record])
        assert str(records.read(tmp_path / name, type(record))) == str([record, record])  # NaN is not equal to itself
        first = (tmp_path / name).read_bytes()
        records.write(tmp_path / name, [record, record])
        assert (tmp_path / name).read_bytes() == first
        (tmp_path / name).write_bytes(first[: len(first) // 2])
        if name.endswith(".gz"):
            with pytest.raises(FileError, match=name):
                records.read(tmp_path / name, type(record))
    assert records.read(tmp_path / "none.jsonl", Trial) == []
    records.write(tmp_path / "rows.jsonl", [kept["rows.jsonl.gz"]])
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace('"seed": 1', '"seed": "x"'))
    with pytest.raises(FileError, match="seed"):
        records.read(tmp_path / "rows.jsonl", RaceRow)


def test_an_entrant_s_settings_stand_after_its_name(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "import jax.numpy as jnp\nimport optax\n\ndef mine(steps, is_matrix, lr=0.1):\n"
        "    assert is_matrix('layer.weight', jnp.ones((2, 2))) and not is_matrix('bias', jnp.ones(2))\n"
        "    return optax.sgd(optax.cosine_decay_schedule(lr, steps))\n\ndef plain(lr=0.1):\n    return optax.sgd(lr)\n"
    )
    assert entrants.entrant(f"{file}:plain", ("lr=0.1", "lr=0.2")).optimizers == (
        f"{file}:plain:lr=0.1",
        f"{file}:plain:lr=0.2",
    )
    (named,) = candidates.read([f"{file}:mine"]).values()
    assert candidates.candidate(named, by_name.resolve("quadratic"), 10).label == "own.py:mine"  # outside a race too
    assert entrants.entrant(f"{file}:plain").meta_tasks == ()
    assert entrants.entrant("lolo-small", ("schedule=cosine",)).meta_tasks == ("fashion-mlp",)
    with pytest.raises(ValueError, match="6 settings; expected 1 to 5"):
        entrants.entrant(f"{file}:plain", [f"lr={x}" for x in range(1, 7)])
    with pytest.raises(ValueError, match="momentum"):
        entrants.entrant(f"{file}:plain", ("momentum=0.9",))


def quiet(what, done, total, status):
    assert 0 <= done <= total


def all_rivals():
    return [tuning.rival(kind) for kind in search.SPACES]


def test_the_search_finds_a_rate_that_is_known_to_be_best(small, monkeypatch):
    """A workload whose loss after any run is the squared distance of log(rate) from that of the best one."""
    best = {"quadratic": 2e-3, "quadratic:dimensions=4": 2e-2}

    def run(task, entries, seeds, steps, on_steps):
        losses = [math.log(entry.setting["lr"] / best[task]) ** 2 for entry in entries for _ in seeds]
        return types.SimpleNamespace(held_loss=np.array(losses)[:, None])

    monkeypatch.setattr(tuning, "run", run)
    of = tuning.rival("adamw")
    rates = [setting.learning_rate for setting in search.settings_of(of.space)]
    found, nearest = [], []
    for name, rate in zip(("near", "far"), best.values(), strict=True):
        mine = tuning.trials(of, name, lambda count: None)
        distances = [abs(math.log(x / rate)) for x in rates]
        nearest.append(rates[int(np.argmin(distances))])
        (first,) = candidates.read(tuning.names_of(mine, of)[:1]).values()
        assert first.learning_rate == nearest[-1]
        found += mine
    of_both = {named.learning_rate for named in candidates.read(tuning.names_of(found, of)).values()}
    assert set(nearest) < of_both


@pytest.mark.slow
def test_a_whole_race_finds_the_best_rate_and_resumes(small, tmp_path):
    found = stages.search_all(tmp_path, all_rivals(), (), quiet)
    assert len(found) == 2 * 3 * search.TRIALS
    (reference,) = candidates.read([tuning.reference_of(found, "near")]).values()
    kind = reference.name.partition("-")[0]
    losses = {trial.learning_rate: trial.loss for trial in found if (trial.kind, trial.workload) == (kind, "near")}
    assert reference.learning_rate == min(losses, key=losses.get)
    assert min(losses.values()) < 0.01 < max(losses.values())
    stages.set_targets(tmp_path, (), quiet)
    targets = tuning.read_targets(tmp_path)
    assert set(targets) == {(name, form) for name in ("near", "far") for form in (False, True)}
    assert all(target.loss == sorted(target.reruns)[2] and len(target.reruns) == 5 for target in targets.values())

    field = [*stages.rivals(found), entrants.Entrant("bad rate", ("adamw-warmup-cosine:1e-7",))]
    stages.race(tmp_path, field, 2, (), quiet)
    stages.time_steps(tmp_path, field[-2:], (), quiet)
    race = stages.read(tmp_path)
    standings = {s.entrant: s for s in results.standings(race.rows, race.targets, "tuned", {})}
    assert standings["bad rate"].profile.mean == 0 < standings["adamw"].profile.mean
    assert all(t.seconds > 0 for t in race.step_times) and len(race.step_times) == 4
    # Each row is what `lolo eval` would say of that optimizer's run: its end, by hand.
    text = report.write(race, tmp_path, field, ["bad rate"], "lolo race")
    assert "bad rate" in text and {"profile-tuned.svg", "curves-self-tuning.svg"} <= {
        f.name for f in tmp_path.iterdir()
    }

    before = (tmp_path / stages.ROWS_FILE).read_bytes()
    made = []
    stages.race(tmp_path, field, 2, (), lambda *progress: made.append(progress))
    assert (tmp_path / stages.ROWS_FILE).read_bytes() == before and made[-1][1] == made[-1][2]
    (next((tmp_path / "parts" / "near").iterdir())).unlink()
    stages.race(tmp_path, field, 2, (), quiet)
    assert (tmp_path / stages.ROWS_FILE).read_bytes() == before  # made again, with the same bytes


@pytest.mark.slow
def test_the_settings_of_weights_are_searched_as_those_of_rivals_are(small, monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "KEPT", tmp_path / "kept")
    rivals = stages.search_all(tmp_path / "kept", all_rivals(), ("near",), quiet)
    stages.set_targets(tmp_path / "kept", ("near",), quiet)
    stages.race(tmp_path / "kept", stages.rivals(rivals)[:1], 1, ("near",), quiet)
    words = ["race", "--optimizer", "lolo-norm", "--name", "mine", "--search", "--only", "near", "--seeds", "1"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    found = [trial for trial in records.read(tmp_path / stages.TRIALS_FILE, Trial) if trial.kind == "mine"]
    assert len(found) == search.TRIALS
    best = search.settings_of(search.SPACES_OF_WEIGHTS["norm_fc"])[np.argmin([trial.loss for trial in found])]
    rows = [row for row in stages.read(tmp_path).rows if row.entrant == "mine"]
    assert {row.optimizer for row in rows if row.held_out} == {tuning.weights("lolo-norm").name_of(best)}
    assert len({row.optimizer for row in rows}) == 5
    # Other weights under the same name have trials of their own.
    new = [Trial("near", "mine", 1.0, 1.0, 1.0, 0.5)]
    monkeypatch.setattr(tuning, "trials", lambda of, workload, on_steps: new)
    other = tuning.weights("lolo-norm", "mine")._replace(contents="0" * 64)
    assert stages.search_all(tmp_path, [other], ("near",), quiet) == new


@pytest.mark.slow
def test_one_optimizer_under_two_names_scores_equal(small, tmp_path):
    stages.search_all(tmp_path, all_rivals(), (), quiet)
    stages.set_targets(tmp_path, (), quiet)
    names = stages.rivals(stages.read(tmp_path).trials)[0].optimizers
    field = [entrants.Entrant("adamw", names), entrants.Entrant("again", names)]
    stages.race(tmp_path, field, 2, (), quiet)
    race = stages.read(tmp_path)
    for rules in results.RULES:
        first, second = results.standings(race.rows, race.targets, rules, {})
        assert {first.entrant, second.entrant} == {"adamw", "again"} and first[1:2] == second[1:2]
        assert first.profile == second.profile and first.speed_up == second.speed_up


def test_settings_in_another_order_and_fewer_seeds_run_nothing_twice(small, tmp_path):
    first, second = "adamw:1e-2", "adamw:1e-3"
    ran = []
    both = entrants.run_on(entrants.Entrant("mine", (first, second)), "near", 2, tmp_path)
    turned = entrants.run_on(entrants.Entrant("mine", (second, first)), "near", 2, tmp_path, ran.append)
    assert sum(ran) == 2 * 200  # the second setting on the held-out form
    assert {row.optimizer for row in both if row.held_out} == {first}
    assert {row.optimizer for row in turned if row.held_out} == {second}
    again = []
    assert entrants.run_on(entrants.Entrant("mine", (first, second)), "near", 2, tmp_path, again.append) == both
    fewer = entrants.run_on(entrants.Entrant("mine", (first, second)), "near", 1, tmp_path, again.append)
    assert not again and [row for row in both if row.seed == 0] == fewer


def test_runs_are_kept_as_they_end(small, tmp_path):
    ran = []

    def stop(count):
        ran.append(count)
        if sum(ran) > 3 * 200:
            raise KeyboardInterrupt

    mine = entrants.Entrant("mine", ("adamw:1e-2", "nadamw:1e-2"))
    with pytest.raises(KeyboardInterrupt):
        entrants.run_on(mine, "near", 2, tmp_path, stop)
    done = [row for file in tmp_path.rglob("*.jsonl") for row in records.read(file, RaceRow)]
    assert [(row.optimizer, row.held_out) for row in done] == [("adamw:1e-2", False)] * 2
    again = []
    entrants.run_on(mine, "near", 2, tmp_path, again.append)
    assert sum(again) == 2 * 2 * 200


def test_rows_of_other_settings_under_the_same_name_are_dropped(small, tmp_path):
    first, second = (entrants.Entrant("mine", (f"adamw:{rate}",)) for rate in ("1e-2", "1e-3"))
    other = entrants.Entrant("other", ("nadamw:1e-3",))
    stages.race(tmp_path, [first, other], 1, (), quiet)
    with pytest.warns(UserWarning, match="rows of mine were made with other settings"):
        stages.race(tmp_path, [second], 1, ("near",), quiet)
    found = {(row.entrant, row.workload, row.optimizer) for row in records.read(tmp_path / stages.ROWS_FILE, RaceRow)}
    assert found == {("mine", "near", "adamw:1e-3")} | {("other", name, "nadamw:1e-3") for name in ("near", "far")}


def test_rows_of_a_file_before_it_was_edited_are_dropped(small, tmp_path):
    file = tmp_path / "own.py"
    file.write_text("import optax\n\ndef f():\n    return optax.sgd(0.1)\n")
    stages.race(tmp_path / "out", [entrants.entrant(f"{file}:f", name="mine")], 1, (), quiet)
    file.write_text("import optax\n\ndef f():\n    return optax.sgd(0.2)\n")
    with pytest.warns(UserWarning, match="rows of mine were made with .*another file"):
        stages.race(tmp_path / "out", [entrants.entrant(f"{file}:f", name="mine")], 1, ("near",), quiet)
    rows = records.read(tmp_path / "out" / stages.ROWS_FILE, RaceRow)
    assert {row.workload for row in rows} == {"near"}


def test_a_schedule_that_has_no_room_in_one_step_is_no_mistake(tmp_path):
    file = tmp_path / "own.py"
    schedule = "optax.warmup_cosine_decay_schedule(0.0, 0.1, 100, steps)"
    file.write_text(f"import optax\n\ndef f(steps):\n    return optax.sgd({schedule})\n")
    assert entrants.entrant(f"{file}:f").optimizers == (f"{file}:f",)


def test_an_optimizer_that_is_timed_alone_counts_in_adamw_s_known_time(small, monkeypatch, tmp_path):
    """This machine is twice as slow as the one of the published times."""
    kept, names = tmp_path / "kept", ("adamw-warmup-cosine:1e-2",)
    monkeypatch.setattr(stages, "KEPT", kept)
    stages.race(kept, [entrants.Entrant("adamw", names)], 1, ("near",), quiet)
    published = [StepTime("near", "adamw", 1.0, "theirs"), StepTime("near", "muon", 3.0, "theirs")]
    records.write(kept / stages.TIMES_FILE, published)

    def measure(workload, field, device, on_done):
        return [StepTime(workload, one.name, 2.0 if one.name == "adamw" else 8.0, device) for one in field]

    def known():
        return {t.entrant: t.seconds for t in stages.read(tmp_path / "out").step_times}

    monkeypatch.setattr(step_times, "measure", measure)
    mine = entrants.Entrant("mine", ("nadamw:1e-2",))
    stages.time_steps(tmp_path / "out", [mine], ("near",), quiet)
    assert known() == {"adamw": 1.0, "muon": 3.0, "mine": 4.0}
    stages.time_steps(tmp_path / "out", [entrants.Entrant("adamw", names), mine], ("near",), quiet)
    assert known() == {"adamw": 2.0, "mine": 8.0}, "times of two machines do not stand side by side"


def test_a_workload_without_a_target_is_refused_before_the_first_run(small, tmp_path, capsys):
    records.write(tmp_path / stages.TARGETS_FILE, [Target("quadratic", 0.1, "adamw:1e-3", [0.1])])
    words = ["race", "--optimizer", "adamw:1e-3", "--only", "far", "--seeds", "1", "--out", str(tmp_path)]
    assert main(words) == 2
    assert "was raced from scratch without far: run lolo race --from-scratch --only far" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists()


def test_a_race_of_some_workloads_from_scratch_is_reported_without_the_others(small, tmp_path, capsys):
    stages.search_all(tmp_path, all_rivals(), ("near",), quiet)
    stages.set_targets(tmp_path, ("near",), quiet)
    stages.race(tmp_path, stages.rivals(stages.read(tmp_path).trials)[:1], 1, ("near",), quiet)
    assert main(["race", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("| adamw |") == len(results.RULES)


def test_seeds_that_not_all_have_do_not_choose_a_setting():
    """The first setting is the faster one on seed 0, and the slower one on the others, which AdamW does not have."""
    rows = rows_of("two", [0.9, 0.9, 0.4], [0.9, 0.4, 0.4])
    rows = [dataclasses.replace(r, curve=[0.4] * 3) if r.optimizer == "two:0" and r.seed == 0 else r for r in rows]
    rows += [dataclasses.replace(r, seed=2) for r in rows if r.seed == 1]
    adamw = [r for r in rows_of("adamw", [0.9, 0.9, 0.4]) if r.seed == 0]
    for known, seeds, first in ((rows, 3, "two:1"), ([*rows, *adamw], 1, "two:0")):
        chosen = results.rows_that_count(results.comparable(known), "tuned", TARGETS)["two"]
        assert {(r.optimizer) for mine in chosen.values() for r in mine} == {first}
        assert all(len(mine) == seeds for mine in chosen.values())
    assert results.short_of_seeds([*rows, *adamw]) == {"adamw": 1} and results.short_of_seeds(rows) == {}
    incomplete = [dataclasses.replace(r, entrant="incomplete") for r in adamw if not r.held_out]
    assert results.comparable([*rows, *incomplete]) == [*rows, *incomplete]
    assert results.short_of_seeds([*rows, *incomplete]) == {}


def test_pictures_show_those_that_were_entered_and_adamw():
    entered = [rows_of(name, [0.9 - 0.01 * i, 0.4]) for i, name in enumerate(("a", "b", "c", "d", "e", "f", "g"))]
    rows = [row for mine in entered for row in mine]
    rows += rows_of("adamw", [0.9, 0.9]) + rows_of("mine", [0.9, 0.9]) + rows_of("lolo-norm", [0.9, 0.8])
    standings = results.standings(rows, TARGETS, "tuned", {})
    shown = [of.entrant for of in pictures.few(standings, ["mine"])]
    assert {"mine", "adamw", "lolo-norm"} < set(shown) and len(shown) == 6
    assert "mine (0.00) is" in pictures.finding(standings, "tuned", ["mine"])
    assert "mine" not in pictures.finding(standings, "tuned")


def mappings():
    return len(pathlib.Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(not pathlib.Path("/proc/self/maps").exists(), reason="only Linux counts a process's mappings")
@pytest.mark.slow
def test_a_race_of_many_entrants_holds_no_more_programs_than_a_short_one(small, tmp_path):
    found = []
    for kind in ("adamw", "lion", "nadamw", "prodigy"):
        stages.race(tmp_path, [entrants.Entrant(kind, (f"{kind}:1e-2",))], 1, ("near",), quiet)
        found.append(mappings())
    assert max(found[1:]) < found[0] + 50, found


def test_step_times_are_those_of_the_whole_step(small):
    slow, fast = (entrants.Entrant(name, (name,)) for name in ("lolo-small", "adamw:1e-3"))
    found = step_times.measure("near", [slow, fast], "cpu")
    assert [t.entrant for t in found] == ["lolo-small", "adamw:1e-3"] and all(0 < t.seconds < 10 for t in found)


@pytest.mark.slow
def test_learning_rates_are_tried_on_transformers_of_several_sizes(monkeypatch, tmp_path, capsys):
    sizes = {"WIDTHS": (8, 16), "DEPTHS": (1,), "STEPS": 50, "SEEDS": 1, "RATES": (1e-5, 1e-2), "SCALES": (0.001, 1.0)}
    for name, value in sizes.items():
        monkeypatch.setattr(transfer, name, value)
    words = ["race", "--out", str(tmp_path), "--transfer", "adamw", "lolo-small"]
    assert main(words) == 0 and (tmp_path / "transfer.svg").stat().st_size > 10_000
    assert capsys.readouterr().err.count("step_scale=0.001 is no learning rate") == 1
    rows = records.read(tmp_path / stages.TRANSFER_FILE, records.TransferRow)
    names, losses = transfer.grid(rows, "adamw")
    assert names == ["adamw-warmup-cosine:1e-05", "adamw-warmup-cosine:0.01"] and losses.shape == (2, 2)
    assert (losses[:, 1] < losses[:, 0] - 0.1).all()  # at 1e-5 nothing is learned in 50 steps
    before = (tmp_path / stages.TRANSFER_FILE).read_bytes()
    weights = lolo.load("lolo-small")
    changed = weights._replace(meta_params={name: 1.01 * x for name, x in weights.meta_params.items()})
    for one in (weights, changed):  # the same name, another φ
        lolo.save(tmp_path / "w.safetensors", one)
        assert main(["race", "--out", str(tmp_path), "--transfer", str(tmp_path / "w.safetensors")]) == 0
        (contents,) = {
            r.contents for r in records.read(tmp_path / stages.TRANSFER_FILE, records.TransferRow) if "w.s" in r.entrant
        }
        assert contents == transfer.contents_of(str(tmp_path / "w.safetensors"))
    (tmp_path / stages.TRANSFER_FILE).write_bytes(before)
    assert main(words) == 0 and (tmp_path / stages.TRANSFER_FILE).read_bytes() == before
    assert main(["race", "--out", str(tmp_path), "--transfer", "adamw:1e-3"]) == 2


@pytest.mark.slow
def test_optimizers_are_compared_on_the_search_s_data_and_none_is_run_twice(small, tmp_path):
    ran = []

    def validate(*optimizers, seeds=2):
        ran.append(0)
        return stages.validate(tmp_path, optimizers, seeds, (), (), lambda what, done, total, _: ran.append(done))

    validate("adamw:1e-2")
    assert ran[-1] == 2 * 2 * 150  # workloads, seeds, three quarters of the steps
    files = sorted((tmp_path / "validation").rglob("*.jsonl"))
    rows = [row for file in files for row in records.read(file, ValidationRow)]
    assert {(r.workload, r.seed) for r in rows} == {
        (name, seed) for name in ("near", "far") for seed in (search.TRIAL_SEED, search.TRIAL_SEED + 1)
    }
    of, (setting,) = tuning.rival("adamw"), search.settings_of(search.SPACES["adamw"], 1)
    (trial,) = tuning.trials(of, "near", lambda count: None, count=1)
    validate(of.name_of(setting), seeds=1)
    (new,) = set((tmp_path / "validation" / "near").iterdir()) - set(files)
    assert records.read(new, ValidationRow)[0].loss == trial.loss
    said = validate("adamw:1e-2", "adamw:1e-3")
    assert ran[-1] == 2 * 2 * 150  # of the second alone
    validate("adamw:1e-3", "adamw:1e-2")
    assert ran[-1] == 0
    assert "| adamw:1e-2 |" in said and "| – |" in said and "95 % interval" in said
    files[0].write_text("{\n")
    with pytest.raises(FileError, match="Remove it, and its rows are made again"):
        validate("adamw:1e-2")


def test_weights_with_other_settings_are_validated_again(small, tmp_path):
    weights, found = lolo.load("lolo-small"), []
    for step_mult in (weights.learner.step_mult, 1e-5):
        lolo.save(
            tmp_path / "w.safetensors",
            weights._replace(learner=dataclasses.replace(weights.learner, step_mult=step_mult)),
        )
        found.append(stages.validate(tmp_path, [str(tmp_path / "w.safetensors")], 1, ("near",), (), quiet))
    assert found[0] != found[1]


def test_a_comparison_has_its_interval_and_says_what_diverged():
    first, half = {"a": 1.0, "b": 2.0, "c": 4.0}, {"a": 0.5, "b": 1.0, "c": 2.0}
    lines = validation.table({"x": first, "y": half, "z": half | {"c": math.nan}, "q": half | {"c": 1.0}}).splitlines()
    assert lines[2] == "| x | 1.0000 | 2.0000 | 4.0000 | – |"
    assert lines[3] == "| y | 0.5000 | 1.0000 | 2.0000 | -50.0 % (-50.0 to -50.0) |"
    assert lines[4] == "| z | 0.5000 | 1.0000 | diverged | – |"
    assert lines[5].startswith("| q | 0.5000 | 1.0000 | 1.0000 | -60.3 % (")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--validate", "adamw:1e-3", "--seeds", "8"], "at most 7"),
        (["--validate", "adamw:1e-3", "--dry-run"], "leave out --dry-run"),
        (["--validate", "adamw:1e-3", "--optimizer", "lolo-norm"], "leave out --optimizer"),
        (["--transfer", "adamw", "--validate", "adamw:1e-3"], "leave out --validate"),
        (["--validate"], "at least one optimizer"),
        (["--validate", "adamw:grid"], "give each rate by itself"),
        (["--validate", "lolo-norm:kernel=plain,kernel=auto"], "kernel is given twice"),
        (["--only", "mpl"], "did you mean 'mlp'"),
        (["--settings", "lr=1"], "are of --optimizer"),
        (["--optimizer", "lolo-norm", "--name", "muon"], "muon is in the published race; give the entrant another"),
        (["--optimizer", "adamw:1e-3", "--name", "lolo-norm"], "lolo-norm is in the published race"),
        (["--optimizer", "adamw", "--settings", "1e-6"], "adamw is in the published race; give the entrant another"),
        (["--optimizer", "adamw", "--search"], "adamw is in the published race; give the entrant another --name"),
        (["--optimizer", "adamw:grid", "--name", "mine"], "give each rate by itself in a race"),
        (["--optimizer", "lolo-norm", "--settings", "learning_rate=1", "--settings", "learning_rate=2"], "given twice"),
        (["--transfer", "muon", "--only", "mlp"], "leave out --only"),
        (["--optimizer", "muon:1e-3", "--search"], "the search finds the learning rate; give muon alone"),
        (["--optimizer", "sgdm", "--search"], "the search knows the rivals adamw, nadamw"),
        (["--seeds", "0"], "at least 1"),
        (["--optimizer", "none.py:mine"], "does not exist"),
        (["--optimizer", "adamw"], "adamw"),
    ],
)
def test_what_can_t_race_is_refused_in_one_line(words, message, capsys, tmp_path):
    assert main(["race", "--out", str(tmp_path / "race"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "race").exists()


def test_a_folder_that_another_process_works_on_is_refused(capsys, tmp_path):
    words = ["race", "--validate", "adamw:1e-3", "--only", "small-batch", "--out", str(tmp_path / "race")]
    with stages.held(tmp_path / "race"):
        assert main(words) == 2
    assert "another process is at work on" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*words[:-1], str(tmp_path / "file")]) == 2
    assert "can't be a folder" in capsys.readouterr().err
