"""Long runs and their statistics: the same inits and batches for all, and intervals over the right unit."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lolo.evaluation import long_runs, rivals, schedules, statistics
from lolo.evaluation.long_runs import Candidate
from lolo.evaluation.statistics import Row
from lolo.method import inner
from lolo.tasks.small import quadratic

QUADRATIC = quadratic()


def row(optimizer, meta_seed, seed, loss):
    return Row("quadratic", optimizer, meta_seed, seed, 100, loss, loss, loss, {"loss": loss}, False, [loss], [loss])


def rows(optimizer, losses):
    """losses: meta-seed -> the losses of evaluation seeds 0, 1, ..."""
    return [row(optimizer, m, seed, loss) for m, found in losses.items() for seed, loss in enumerate(found)]


# --- intervals ------------------------------------------------------------------------------------------------------


def test_an_interval_by_hand():
    found = statistics.interval([1.0, 2.0, 3.0], "seeds")
    assert (found.mean, found.n, found.unit) == (2.0, 3, "seeds")
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)  # t of 2 degrees of freedom, deviation 1
    assert math.isnan(statistics.interval([5.0], "seeds").half)  # one run shows nothing
    assert math.isnan(statistics.interval([math.inf, 5.0, 5.0], "seeds").half)


def test_the_unit_is_the_meta_seed_where_there_are_several():
    losses = rows("lolo", {0: [1.0, 3.0], 1: [4.0, 6.0], 2: [7.0, 9.0]})
    found = statistics.summary(losses, "lolo")
    assert (found.mean, found.n, found.unit) == (5.0, 3, "meta-seeds")
    assert found.half == pytest.approx(4.302653 * 3.0 / math.sqrt(3), rel=1e-5)  # of 2, 5, 8: not of six numbers
    one = statistics.summary([r for r in losses if r.meta_seed == 0], "lolo")
    assert (one.mean, one.n, one.unit) == (2.0, 2, "seeds")


def test_differences_are_paired_by_evaluation_seed_within_meta_seed():
    ours = rows("lolo", {0: [1.0, 2.0], 1: [5.0, 6.0]})
    theirs = rows("naive", {0: [1.5, 2.7], 1: [5.5, 6.7]})
    found = statistics.paired_difference(ours + theirs[::-1], "lolo", "naive")
    assert (found.n, found.unit) == (2, "meta-seeds")
    assert found.mean == pytest.approx(-0.6) and found.half == pytest.approx(0.0, abs=1e-9)
    back = statistics.paired_difference(ours + theirs, "naive", "lolo")
    assert back.mean == pytest.approx(0.6)


def test_hand_made_optimizers_are_paired_with_every_meta_seed():
    ours, theirs = rows("lolo", {0: [1.0, 2.0], 1: [5.0, 6.0]}), rows("adamw", {None: [2.0, 4.0]})
    found = statistics.paired_difference(ours + theirs, "lolo", "adamw")
    assert (found.mean, found.n, found.unit) == (pytest.approx((-1.5 + 2.5) / 2), 2, "meta-seeds")
    assert statistics.paired_difference(ours + theirs, "adamw", "lolo").mean == pytest.approx(-found.mean)
    two = statistics.paired_difference(theirs + rows("sgdm", {None: [2.5, 4.5]}), "adamw", "sgdm")
    assert (two.mean, two.n, two.unit) == (-0.5, 2, "seeds")


def test_single_weights_of_different_meta_seeds_are_paired_by_evaluation_seed():
    ours, theirs = rows("lolo", {0: [1.0, 2.0]}), rows("naive", {1: [1.5, 2.7]})
    found = statistics.paired_difference(ours + theirs, "lolo", "naive")
    assert (found.mean, found.n, found.unit) == (pytest.approx(-0.6), 2, "seeds")


def test_what_can_not_be_paired_is_an_error():
    ours, theirs = rows("lolo", {0: [1.0], 1: [2.0]}), rows("naive", {2: [1.0], 3: [2.0]})
    with pytest.raises(ValueError, match="no evaluation seed and meta-seed in common"):
        statistics.paired_difference(ours + theirs, "lolo", "naive")
    with pytest.raises(ValueError, match="no evaluation seed and meta-seed in common"):
        statistics.paired_difference([row("a", None, 0, 1.0), row("b", None, 1, 1.0)], "a", "b")


# --- runs -----------------------------------------------------------------------------------------------------------


def by_hand(optimizer, seed, steps):
    """Train losses of plain optax steps from the evaluation seed's init on its batches."""
    task, key = QUADRATIC.train, long_runs.seed_key(seed)
    params, _ = task.init(jax.random.fold_in(key, 0))

    def step(carry, n):
        params, state = carry
        key_batch, key_loss = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, 1), n))
        loss, grads = jax.value_and_grad(lambda p: task.loss(p, {}, task.sample(key_batch, n), key_loss)[0])(params)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
    return params, np.asarray(losses)


def test_a_run_is_plain_optax_on_the_seed_s_init_and_batches():
    names = {"adamw": 3e-3, "sgdm": 0.1, "adamw-rsqrt": 0.1, "adamw-cosine": 0.1}
    candidates = [rivals.rival(name, lr, 200) for name, lr in names.items()]
    found = long_runs.compare("quadratic", QUADRATIC, candidates, (0, 7), 200)
    schedules = [lambda t: 0.1 * (1 + t / 3000) ** -0.5, optax.cosine_decay_schedule(0.1, 200)]
    optimizers = [optax.adamw(3e-3, weight_decay=1e-4), optax.sgd(0.1, momentum=0.9)]
    optimizers += [optax.adamw(schedule, weight_decay=1e-4) for schedule in schedules]
    assert [(r.optimizer, r.seed) for r in found] == [(c.label, s) for c in candidates for s in (0, 7)]
    for r, (optimizer, seed) in zip(found, [(o, s) for o in optimizers for s in (0, 7)], strict=True):
        params, losses = by_hand(optimizer, seed, 200)
        np.testing.assert_allclose(r.train_curve, losses.reshape(2, 100).mean(axis=1), rtol=1e-3, atol=2e-6)
        assert r.train_loss == r.train_curve[-1] and r.train_minimum == min(r.train_curve) and not r.diverged
        test = QUADRATIC.test.score(params, {}, QUADRATIC.test.data)["loss"]  # the whole split, not train's
        np.testing.assert_allclose(r.held_loss, test, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "theirs"),
    {
        "constant": lambda: optax.constant_schedule(1.0),
        "cosine": lambda: optax.cosine_decay_schedule(1.0, 200),
        "rsqrt": lambda: lambda count: (1 + count / 3000) ** -0.5,
        "warmup": lambda: optax.linear_schedule(0.0, 1.0, 20),
        "warmup-cosine": lambda: optax.warmup_cosine_decay_schedule(0.0, 1.0, 20, 200),
        "wsd": lambda: optax.join_schedules(
            [optax.linear_schedule(0.0, 1.0, 20), optax.constant_schedule(1.0), optax.linear_schedule(1.0, 0.0, 40)],
            [20, 160],
        ),
    }.items(),
)
def test_schedules_are_optax_s_and_may_be_traced(name, theirs):
    counts = jnp.arange(201)
    ours = jax.jit(jax.vmap(schedules.SCHEDULES[name], in_axes=(0, None, None)))(counts, 200.0, 20.0)
    np.testing.assert_allclose(ours, jax.vmap(theirs())(counts), atol=2e-6)
    assert float(schedules.SCHEDULES[name](0, 200, 0)) == 1.0  # without a warm-up the first step is a whole one


def test_every_schedule_has_a_test():
    (mark,) = (m for m in test_schedules_are_optax_s_and_may_be_traced.pytestmark if m.name == "parametrize")
    assert dict(mark.args[1]).keys() == schedules.SCHEDULES.keys()


OPTAX = {
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.1),
    "adam": lambda rate: optax.adam(rate),
    "sgdm": lambda rate: optax.sgd(rate, momentum=0.9),
    "nadamw": lambda rate: optax.nadamw(rate, weight_decay=0.1),
    "nesterov": lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.sgd(rate, 0.9, nesterov=True)),
    "lion": lambda rate: optax.lion(rate, weight_decay=0.1),
    "muon": lambda rate: optax.contrib.muon(rate, weight_decay=0.1, adam_weight_decay=0.1, consistent_rms=1.0),
    "muon-matched": lambda rate: optax.contrib.muon(rate, weight_decay=0.1, adam_weight_decay=0.1, consistent_rms=0.2),
    "schedule-free": lambda rate: optax.contrib.schedule_free_adamw(rate, weight_decay=0.1),
    "prodigy": lambda rate: optax.contrib.prodigy(rate, weight_decay=0.1, safeguard_warmup=True),
}


@pytest.mark.parametrize("kind", rivals.RIVALS)
def test_a_rival_is_optax_s_optimizer_under_its_schedule(kind):
    params = {"w": jax.random.normal(jax.random.key(0), (6, 4)), "b": jnp.ones(4)}
    grads = jax.random.normal(jax.random.key(1), (5, 4))
    rate = optax.constant_schedule(0.01) if kind == "schedule-free" else optax.cosine_decay_schedule(0.01, 8)
    name = kind if kind == "schedule-free" else f"{kind}-cosine"
    of = rivals.rival(name, 0.01, 8, 0.1)

    def run(optimizer):
        state, now = optimizer.init(params), params
        for g in grads:
            updates, state = optimizer.update({"w": g * now["w"], "b": g}, state, now)
            now = optax.apply_updates(now, updates)
        return now, state

    ours, state = run(of.make(jax.tree.map(jnp.asarray, of.setting)))
    theirs, reference = run(OPTAX[kind](0.01 if kind == "schedule-free" else rate))
    for leaf, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=2e-5, atol=1e-6)
    scored = of.scored(inner.InnerState(ours, {}, state, (), jnp.int32(5)))
    if kind == "schedule-free":
        theirs = optax.contrib.schedule_free_eval_params(reference, theirs)
        assert not np.allclose(scored["w"], ours["w"], atol=1e-4)  # its average is another point
    np.testing.assert_allclose(scored["w"], theirs["w"], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", rivals.NAMES)
def test_a_rival_falls_under_every_schedule(name):
    rate = {"sgdm": 0.01, "nesterov": 0.01, "prodigy": 1.0}.get(rivals.NAMES[name][0], 0.003)
    (found,) = long_runs.compare("quadratic", QUADRATIC, [rivals.rival(name, rate, 200, warmup=0.1)], [0], 200)
    assert not found.diverged and found.train_curve[-1] < found.train_curve[0]


def test_scores_are_taken_where_the_rival_says():
    moved = rivals.rival("sgdm", 0.1, 100)
    frozen = moved._replace(scored=lambda state: jax.tree.map(jnp.zeros_like, state.params))
    first, second = long_runs.compare("quadratic", QUADRATIC, [moved, frozen], [0], 100)
    at_zero = QUADRATIC.test.score({"x": jnp.zeros(8)}, {}, QUADRATIC.test.data)["loss"]
    assert first.train_curve == second.train_curve and first.held_loss != second.held_loss
    np.testing.assert_allclose(second.held_loss, at_zero, atol=1e-6)


def test_the_grid_s_best_is_picked_by_train_loss_on_seeds_that_are_not_reported():
    best = rivals.best_of_grid(QUADRATIC, "sgdm", 100)
    assert best.label == "best sgdm 0.3"
    assert not set(rivals.PICK_SEEDS) & set(range(100_000))


def test_the_wide_grid_tries_a_second_weight_decay_and_its_label_says_which():
    labels = [c.label for c in rivals.grid("adamw-cosine", "wide-grid", 100)]
    assert len(labels) == len(set(labels)) == 10 and "adamw-cosine 0.003 wd 0.1" in labels
    assert len(rivals.grid("adam", "wide-grid", 100)) == 5  # has none
    assert rivals.grid_size("adamw", "wide-grid") == 20 and rivals.grid_size("adamw", 1e-3) == 0


def test_a_run_that_diverged_counts_with_the_loss_limit():
    limited = QUADRATIC._replace(train=dataclasses.replace(QUADRATIC.train, loss_limit=3.0))
    (found,) = long_runs.compare("quadratic", limited, [rivals.rival("sgdm", 1e9, 100)], [0], 100)
    assert found.diverged and found.train_loss == found.held_loss == 3.0
    (found,) = long_runs.compare("quadratic", QUADRATIC, [rivals.rival("sgdm", 1e9, 100)], [0], 100)
    assert found.diverged and found.train_loss == math.inf


@pytest.mark.parametrize(("size", "limit"), [(1000, None), (1000, 300), (700, None), (2300, None), (2300, 1500)])
def test_scores_are_means_over_the_examples_asked_for(size, limit):
    data = jnp.arange(size, dtype=jnp.float32)
    task = dataclasses.replace(
        QUADRATIC.test,
        data=data,
        size=size,
        examples=lambda data, indices: data[indices],
        score=lambda params, stats, batch: {"loss": jnp.mean(batch)},
    )
    found = long_runs.score_split(task, {}, {}, limit)["loss"]
    np.testing.assert_allclose(found, np.mean(np.arange(min(limit or size, size))), rtol=1e-5)


@pytest.mark.parametrize("steps", [0, -100])
def test_a_run_without_a_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps={steps} must be a whole number, at least 1"):
        long_runs.compare(
            "q", QUADRATIC, [Candidate("sgd", None, rivals.maker("sgdm"), {"lr": 0.1, "weight_decay": 0.0})], [0], steps
        )


@pytest.mark.parametrize("steps", [1, 50, 100, 150, 230])
def test_a_run_may_have_any_number_of_steps_and_its_loss_is_the_mean_of_its_last_hundred(steps):
    (found,) = long_runs.compare("q", QUADRATIC, [rivals.rival("sgdm", 0.1, steps)], [3], steps)
    params, losses = by_hand(optax.sgd(0.1, momentum=0.9), 3, steps)
    ends = {1: [1], 50: [50], 100: [100], 150: [100, 150], 230: [100, 200, 230]}[steps]
    expected = [losses[max(end - 100, 0) : end].mean() for end in ends]
    assert long_runs.curve_steps(steps) == ends and len(found.held_curve) == len(ends)
    np.testing.assert_allclose(found.train_curve, expected, rtol=1e-3, atol=2e-6)
    test = QUADRATIC.test.score(params, {}, QUADRATIC.test.data)["loss"]
    np.testing.assert_allclose([found.held_loss, found.held_curve[-1]], [test, test], rtol=1e-3, atol=2e-6)
    assert found.train_loss == found.train_curve[-1]


def test_a_multiple_of_the_window_is_run_in_whole_windows():
    assert long_runs.pieces_of(300, 100) == [[100], [100], [100]]  # so that its rows keep their bytes
    assert long_runs.pieces_of(250, 100) == [[100], [50, 50], [50]] and long_runs.pieces_of(7, 100) == [[7]]
