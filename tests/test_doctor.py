"""`lolo doctor`: each check says ok, fail or too short to say by its rule, and the run's verdict follows from them."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from helpers import same, small

from lolo.cli import show
from lolo.cli.main import main
from lolo.files.disk import FileError
from lolo.tasks.small import quadratic
from lolo.training import doctor, findings, loop, recipes, run, trial
from lolo.training.findings import Finding, Verdict

OK, FAIL, SHORT, LEFT_OUT = Verdict
NAIVE, LOLO = (small(recipe, {"unroll.length": 12}) for recipe in (recipes.NAIVE, recipes.LOLO))  # 4 outer steps each
ROW = {
    **{"task_loss": [1.0], "alpha_mix": 1.0, "alpha_loss": 1.0, "signal_to_noise": 1.0, "dropped": 0, "starts": []},
    **{"first_bad": [], "inner_steps_per_second": 100.0},
}


def rows(count=1, **fields):
    """Rows of a log; a field is a value for all, or a list with one for each."""
    each = {name: value if isinstance(value, list) else [value] * count for name, value in fields.items()}
    return [{**ROW, "step": i, **{name: values[i] for name, values in each.items()}} for i in range(count)]


# The rule for an interval, and what findings come to.


@pytest.mark.parametrize(
    "low, high, verdict",
    [(1.1, 2.0, OK), (0.2, 0.9, FAIL), (0.2, 1.0, FAIL), (0.9, 1.1, SHORT), (np.nan, np.nan, SHORT)],
)
def test_a_number_is_above_another_if_its_interval_is(low, high, verdict):
    assert findings.above(low, high, 1.0) is verdict


@pytest.mark.parametrize(
    "deciding, others, verdict",
    [
        ([OK, OK], [OK, SHORT], OK),
        ([OK, OK], [FAIL], FAIL),
        ([OK, FAIL], [OK], FAIL),
        ([OK, SHORT], [OK], SHORT),
        ([OK, LEFT_OUT, SHORT], [OK], LEFT_OUT),
        ([], [OK, OK], SHORT),
    ],
)
def test_a_run_is_healthy_if_nothing_failed_and_all_that_decides_is_ok(deciding, others, verdict):
    found = [Finding(v, "", decides=True) for v in deciding] + [Finding(v, "") for v in others]
    assert findings.overall(found) is verdict


def test_the_report_is_aligned_and_ends_with_the_conclusion():
    lines = findings.report([Finding(OK, "one."), Finding(SHORT, "two.", ("three",))]).splitlines()
    assert [line.index(word) for line, word in zip(lines, ("one", "two", "try: three"), strict=False)] == [18] * 3
    assert lines[-1].startswith("too short to say  nothing is wrong so far")


# Signal-to-noise.


def ratios(mean, count, pairs, seed, tails=False):
    """‖mean‖² / mean ‖deviation‖² of `count` meta-gradients from pairs N(mean, 1) [50], some far larger than others."""
    random = np.random.default_rng(seed)
    drawn = random.standard_normal((count, pairs, 50)) + mean
    if tails:
        drawn *= np.exp(2 * random.standard_normal((count, pairs, 1)))
    square, pair = (drawn.mean(axis=1) ** 2).sum(axis=-1), (drawn**2).sum(axis=-1).mean(axis=1)
    return [float(x) for x in square / (pair - square)]


def signal(ratio, recipe=NAIVE, **fields):
    return doctor.signal(rows(len(ratio), signal_to_noise=ratio, **fields), recipe).verdict


def test_a_clear_signal_is_ok():
    assert signal(ratios(1.0, 100, 3, seed=0)) is OK


@pytest.mark.parametrize("tails", [False, True])
def test_noise_is_never_called_a_signal_where_a_bare_threshold_did_so_half_of_the_time(tails):
    runs = [ratios(0.0, 60, 3, seed, tails) for seed in range(40)]
    assert sum(signal(ratio) is OK for ratio in runs) <= 1
    if not tails:
        assert 10 <= sum(np.mean(ratio) > 0.5 for ratio in runs) <= 40  # 1 / (pairs - 1), the rule of before


def test_a_meta_gradient_of_zero_fails():
    assert signal([0.0] * 100) is FAIL


def test_a_weak_signal_is_told_from_none_in_a_longer_run_only():
    weak = ratios(0.15, 4000, 3, seed=1)
    assert signal(weak) is OK and signal(weak[:40]) is SHORT and signal(ratios(0.0, 4000, 3, seed=1)) is not OK


def test_fewer_than_five_unrolls_have_no_interval():
    strong = ratios(1.0, 20, 3, seed=0)
    assert signal(strong) is OK and signal(strong[:19]) is SHORT


def test_one_pair_has_no_signal_to_noise():
    alone = dataclasses.replace(NAIVE, estimator=dataclasses.replace(NAIVE.estimator, pairs=1))
    assert signal([1e6] * 100, alone) is SHORT


def test_outer_steps_with_dropped_pairs_and_bad_numbers_do_not_count():
    strong = ratios(1.0, 100, 3, seed=0)
    assert signal(strong, dropped=1) is SHORT
    assert signal([*strong, float("nan"), float("inf"), -1.0]) is OK


def test_the_noise_of_two_tasks_is_that_of_all_their_pairs():
    """Six pairs of noise: 1/5, which one task's three pairs would take for less than noise, 1/2."""
    two = dataclasses.replace(NAIVE, tasks=("quadratic", "quadratic:dimensions=3"))
    assert signal(ratios(0.3, 400, 6, seed=0), two) is OK and signal(ratios(0.3, 400, 6, seed=0), NAIVE) is FAIL


@pytest.mark.parametrize("kind, verdict", [("es", OK), ("pes", SHORT)])
def test_truncations_of_one_update_are_pairs_where_their_noise_is_their_own(kind, verdict):
    """Twelve pairs of a signal below the noise of three: with PES they may be three, so that it can't be said."""
    whole = dataclasses.replace(
        NAIVE,
        unroll=dataclasses.replace(NAIVE.unroll, truncations_per_update=4),
        estimator=dataclasses.replace(NAIVE.estimator, kind=kind),
    )
    assert signal(ratios(0.3, 400, 12, seed=0), whole) is verdict
    assert signal(ratios(0.0, 40, 12, seed=0), whole) is not OK


# Losses.


def validation(*losses):
    return doctor.validation_trend([{"held_loss": loss} for loss in losses]).verdict


def test_a_validation_loss_that_falls_is_ok_and_one_that_jumps_at_the_end_fails():
    assert validation(2.0, 1.0, 0.9, 0.85, 0.84) is OK
    assert validation(2.0, 1.0, 0.9, 0.85, 1.4) is FAIL


def test_a_validation_loss_may_scatter_as_much_as_it_always_did():
    assert validation(1.0, 0.9, 1.02, 0.92, 1.0, 0.95) is OK


def test_two_validations_have_no_trend():
    assert validation(1.0) is SHORT and validation(1.0, 2.0) is SHORT


def test_a_validation_that_is_not_finite_fails_and_is_shown():
    found = doctor.validation_trend([{"held_loss": 1.0}, {"held_loss": float("nan")}])
    assert found.verdict is FAIL and "last nan" in found.what


def trend(losses, recipe=NAIVE, **fields):
    return doctor.loss_trend(rows(len(losses), task_loss=[[x] for x in losses], **fields), recipe).verdict


def test_the_training_loss_of_a_run_without_expert_and_replay_has_a_trend():
    noise = 0.05 * np.random.default_rng(0).standard_normal(80)
    falling = [float(x) for x in np.linspace(1, 0.5, 80) + noise]
    assert trend(falling) is OK and trend(falling[::-1]) is FAIL
    assert trend([float(x) for x in 1 + noise]) is SHORT and trend(falling[:19]) is SHORT


def test_the_training_loss_is_no_evidence_where_the_expert_or_the_buffer_makes_it():
    falling = [float(x) for x in np.linspace(1, 0.5, 80)]
    assert trend(falling, LOLO) is SHORT and trend(falling[::-1], LOLO) is SHORT
    assert trend(falling[::-1], alpha_mix=[i / 80 for i in range(80)]) is SHORT


# The rest of the log.


def test_an_unfinished_run_is_too_short(tmp_path):
    assert doctor.finished(tmp_path, rows(20), 20).verdict is OK
    assert doctor.finished(tmp_path, rows(19), 20).verdict is SHORT


def test_more_than_one_pair_in_a_hundred_dropped_fails():
    lost = rows(100, dropped=[1, *[0] * 99], first_bad=[["the loss"], *[[]] * 99])
    assert doctor.dropped_pairs(lost, 3).verdict is OK
    assert doctor.dropped_pairs(lost[:30], 3).verdict is FAIL


def test_start_steps_are_judged_once_the_buffer_can_have_filled():
    """M = 4 states and P_th = 0.1: 40 unrolls of each of 3 pairs; the stationary mean is 54."""
    assert doctor.start_steps(rows(39, starts=[[0, 0, 0]] * 39), LOLO).verdict is SHORT
    assert doctor.start_steps(rows(40, starts=[[0, 0, 0]] * 40), LOLO).verdict is FAIL
    assert doctor.start_steps(rows(40, starts=[[0, 20, 40]] * 40), LOLO).verdict is OK
    assert doctor.start_steps(rows(40), LOLO).verdict is FAIL


def test_without_a_buffer_every_unroll_is_fresh():
    assert doctor.start_steps(rows(2, starts=[[0], [0]]), NAIVE).verdict is OK
    assert doctor.start_steps(rows(2, starts=[[0], [3]]), NAIVE).verdict is FAIL


def test_a_hand_over_that_never_ends_fails():
    assert doctor.alpha(rows(20), LOLO).verdict is OK
    assert doctor.alpha(rows(20, alpha_loss=0.4), LOLO).verdict is FAIL
    assert doctor.alpha(rows(10, alpha_loss=0.4), LOLO).verdict is SHORT


# What φ does.

FAR, NEAR, LOW = (np.float32([1, 2, 3, 4, 5]) * part for part in (1.0, 0.5, 0.1))  # losses of five seeds


def losses(**changes):
    """φ as good as its expert, both far below the untrained φ."""
    usual = trial.TrialLosses(200, FAR, LOW, NEAR, LOW, NEAR, {1e-3: FAR, 1e-2: NEAR})
    return usual._replace(**changes)


def verdicts(**changes):
    return [finding.verdict for finding in trial.judge("quadratic", losses(**changes), imitates=True, rate=0.01)]


def test_a_good_optimizer_beats_its_start_and_keeps_up_with_its_expert():
    assert verdicts() == [OK, OK, OK]


def test_an_optimizer_that_did_not_change_fails():
    assert verdicts(untrained=LOW)[0] is FAIL


def test_an_optimizer_that_is_better_on_some_seeds_only_can_not_be_judged():
    assert verdicts(untrained=np.float32([0.05, 0.5, 0.2, 2.0, 0.4]))[0] is SHORT


def test_an_optimizer_that_is_better_than_a_bad_start_but_four_times_slower_than_its_expert_fails():
    assert verdicts(trained=NEAR, untrained=1000 * FAR, expert_early=LOW) == [OK, FAIL, OK]


@pytest.mark.parametrize("end", [np.inf, np.nan, 1e30])
def test_an_optimizer_that_diverges_fails(end):
    assert verdicts(trained=np.full(5, end, np.float32))[:2] == [FAIL, FAIL]


def test_a_start_that_diverges_is_beaten_and_one_where_nothing_trains_is_not():
    nothing = {name: FAR for name in ("trained", "untrained", "expert", "expert_early")}
    assert verdicts(untrained=np.full(5, np.inf, np.float32))[0] is OK
    assert verdicts(**nothing, adam_early={1e-3: FAR}) == [FAIL, FAIL, FAIL]


def test_an_expert_that_adam_overtakes_in_a_quarter_of_the_steps_fails():
    assert verdicts(expert=FAR, expert_early=FAR) == [OK, OK, FAIL]
    assert len(trial.judge("quadratic", losses(), imitates=False, rate=0.01)) == 2


def test_from_given_weights_phi_is_compared_with_no_training():
    found = trial.judge("quadratic", losses(untrained=None), imitates=False, rate=0.01)
    assert [finding.verdict for finding in found] == [OK, OK] and "with no step at all" in found[0].what


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A naive run that is finished and too short to be good."""
    out = tmp_path_factory.mktemp("doctor") / "run"
    loop.train(small(recipes.NAIVE, {"outer.steps": 2, "validation.every": 0, "outer.lr": 1e-9}), out)
    return out


def test_the_first_meta_params_are_those_that_the_run_began_with():
    recipe = small(recipes.LOLO, {"learner.name": "small_fc", "seed": 3})
    assert same(trial.first_meta_params(recipe), run.prepare(recipe).state.meta_params)
    other = dataclasses.replace(recipe, seed=4)
    assert not same(trial.first_meta_params(other), trial.first_meta_params(recipe))


@pytest.mark.slow
def test_a_run_that_changed_nothing_fails_and_progress_is_told(folder):
    told = []
    found = trial.examine(folder, on_steps=lambda *words: told.append(words))
    assert found[0].verdict is FAIL and found[0].decides
    assert told[-1][1] == told[-1][2] and [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_the_expert_by_itself_is_the_plain_optimizer():
    given = dataclasses.replace(LOLO.imitation, expert="adam-of-learner", lr=0.1)
    expert, grads = trial.expert_maker(given, 0.0)(0.0), {"x": jax.numpy.ones(3)}
    updates, _ = expert.update(grads, expert.init(grads), grads)
    np.testing.assert_allclose(updates["x"], -0.1, rtol=1e-5)


def test_the_limit_of_time_ends_the_trial(folder):
    (found,) = trial.examine(folder, seconds=0.0)
    assert found.verdict is LEFT_OUT and "0 seconds" in found.what


def test_a_task_that_is_not_here_leaves_the_rest_of_the_report(tmp_path):
    recipe = small(recipes.NAIVE, {"outer.steps": 1, "validation.every": 0})
    loop.train(recipe, tmp_path / "run", tasks={"mine": quadratic()})
    (found,) = trial.examine(tmp_path / "run")
    assert found.verdict is LEFT_OUT and "mine" in found.what and found.decides


def test_a_run_from_given_weights_does_not_claim_to_know_its_start(tmp_path, folder):
    recipe = small(recipes.NAIVE, {"outer.steps": 1, "validation.every": 0})
    loop.train(recipe, tmp_path / "run", init=folder / "last.safetensors")
    assert "with no step at all" in trial.examine(tmp_path / "run")[0].what


def test_weights_of_another_learner_are_refused(tmp_path, folder):
    other = recipes.to_dict(small(recipes.NAIVE, {"learner.name": "small_fc"}))
    (tmp_path / "recipe.json").write_text(json.dumps(other))
    (tmp_path / "last.safetensors").write_bytes((folder / "last.safetensors").read_bytes())
    with pytest.raises(FileError, match="last.safetensors"):
        trial.examine(tmp_path)


def test_without_weights_there_is_nothing_to_try(tmp_path, folder):
    (tmp_path / "recipe.json").write_text((folder / "recipe.json").read_text())
    assert [found.verdict for found in trial.examine(tmp_path)] == [LEFT_OUT]
    assert [found.verdict for found in doctor.examine(tmp_path)] == [SHORT]


# The command.


@pytest.mark.parametrize("verdict, status", [(OK, 0), (FAIL, 7), (SHORT, 8), (LEFT_OUT, 8)])
def test_the_exit_status_is_the_verdict(folder, monkeypatch, capsys, verdict, status):
    monkeypatch.setattr(show.environment, "set_up", lambda: None)
    monkeypatch.setattr(doctor, "examine", lambda run: [Finding(OK, "the log.")])
    monkeypatch.setattr(trial, "examine", lambda *arguments: [Finding(verdict, "what φ does.", decides=True)])
    assert main(["doctor", str(folder)]) == status
    assert "what φ does." in capsys.readouterr().out


def test_without_evaluation_no_run_is_called_healthy(folder, capsys):
    assert main(["doctor", str(folder), "--no-evaluate"]) in (7, 8)
    assert "left out by --no-evaluate" in capsys.readouterr().out


def test_the_help_says_what_it_costs_and_what_the_statuses_mean(capsys):
    with pytest.raises(SystemExit):
        main(["doctor", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("--no-evaluate", "--seconds", "0 healthy, 7", "too short to say", "a quarter of the steps"):
        assert words in said
