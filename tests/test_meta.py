"""One outer step: starts, pushes, gradients, and what happens to bad numbers."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import agrees, all_finite, assert_close, linear_learner, make_task, recording, run, same, small
from scipy import stats

from lolo.method import experts, imitation, inner, meta, replay
from lolo.tasks.small import fashion_mlp, quadratic
from lolo.training import build
from lolo.training.recipes import BC_ONLY, LOLO, NAIVE, RECIPES

QUADRATIC = (quadratic(4).train,)


@functools.cache
def built(recipe):
    """Equal recipes share one Setup, and with it what `helpers.run` has compiled."""
    return build.build(recipe)


def setup_of(recipe, changes=None, **fields):
    return built(small(recipe, changes))._replace(**fields)


def of_slot(tree, p):
    """Leaves [P, ...] -> those of slot p."""
    return jax.tree.map(lambda x: x[p], tree)


# --- one code path --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name,per_update", [("lolo", 1), ("bc-only", 1), ("naive", 1), ("lolo", 4)])
def test_a_recipe_compiles_once(name, per_update):
    history = run(setup_of(RECIPES[name], {"unroll.truncations_per_update": per_update}), QUADRATIC, 8)
    assert history.compilations == 1
    assert all_finite(history.states[-1]) and all_finite(history.metrics)
    assert not same(history.states[-1].meta_params, history.states[0].meta_params)
    assert int(history.states[-1].outer_step) == 8


def test_alpha_runs_from_0_to_1():
    history = run(setup_of(LOLO), QUADRATIC, 20)
    for schedule in ("alpha_mix", "alpha_loss"):
        alphas = [float(getattr(measured, schedule)) for measured in history.metrics]
        np.testing.assert_allclose(alphas, np.arange(20) / 19, rtol=1e-6)


def test_naive_carries_no_expert():
    naive, bc_only = (run(setup_of(recipe), QUADRATIC, 1).states[-1].slots[0] for recipe in (NAIVE, BC_ONLY))
    assert jax.tree.leaves(naive.local.inner.expert) == jax.tree.leaves(naive.local.replay.states.expert) == []
    assert jax.tree.leaves(bc_only.local.inner.expert) != []


def straight_line_pes(setup, task, outer_steps, seed):
    """PES written a second time, in Python loops: no imitation, no buffer, no shared code but the optimizers'."""
    key_params, key_run = jax.random.split(jax.random.key(seed))
    phi = setup.learned.init(key_params)
    outer_state, sigma, pairs = setup.outer.init(phi), setup.estimator.sigma, setup.estimator.pairs
    names, thetas, memories, sums = sorted(phi), {}, {}, [None] * pairs

    @jax.jit
    def train_step(phi, theta, memory, key):
        key_batch, key_loss = jax.random.split(key)
        batch = task.data[jax.random.randint(key_batch, (task.batch,), 0, task.size)]
        loss, gradient = jax.value_and_grad(lambda theta: task.loss(theta, {}, batch, key_loss)[0])(theta)
        update, memory = setup.learned.optimizer(phi).update(gradient, memory, theta)
        return jax.tree.map(jnp.add, theta, update), memory, loss

    for t in range(outer_steps):
        group_key = jax.random.fold_in(jax.random.fold_in(key_run, t), 0)
        (key,) = jax.random.split(group_key, 1)
        _, key = jax.random.split(key)
        gradient = dict.fromkeys(names, 0.0)
        for p in range(pairs):
            _, _, key_noise, key_start, key_steps, _ = jax.random.split(jax.random.fold_in(key, p), 6)
            if t % setup.first_lengths[0] == 0:
                theta, _ = task.init(jax.random.split(key_start, 4)[2])
                for sign in (1, -1):
                    thetas[p, sign], memories[p, sign] = theta, setup.learned.optimizer(phi).init(theta)
                sums[p] = dict.fromkeys(names, 0.0)
            normal = sigma * jax.random.normal(key_noise, (len(names),))
            noise = dict(zip(names, normal, strict=True))
            sums[p] = {name: sums[p][name] + noise[name] for name in names}
            mean = {}
            for sign in (1, -1):
                candidate, losses = {name: phi[name] + sign * noise[name] for name in names}, []
                for n in range(setup.truncation):
                    step_key = jax.random.fold_in(key_steps, n)
                    thetas[p, sign], memories[p, sign], loss = train_step(
                        candidate, thetas[p, sign], memories[p, sign], step_key
                    )
                    losses.append(float(loss))
                mean[sign] = np.mean(losses)
            weight = (mean[1] - mean[-1]) / (2 * sigma**2 * pairs)
            gradient = {name: gradient[name] + weight * sums[p][name] for name in names}
        gradient = {name: jnp.asarray(value, jnp.float32) for name, value in gradient.items()}
        updates, outer_state = setup.outer.update(gradient, outer_state, phi)
        phi = optax.apply_updates(phi, updates)
    return phi


def test_naive_equals_a_straight_line_pes():
    # A clip that never fires: it would hide the gradient's scale.
    setup = setup_of(NAIVE, {"outer.clip_position": "none"}, outer=optax.sgd(1e-2, momentum=0.5))
    history = run(setup, QUADRATIC, 10, seed=4)  # two unrolls and a half
    ours, again = history.states[-1].meta_params, straight_line_pes(setup, QUADRATIC[0], 10, seed=4)
    moved = {name: ours[name] - history.states[0].meta_params[name] for name in ours}
    for name in ours:
        np.testing.assert_allclose(ours[name], again[name], atol=2e-4 * abs(float(moved[name])) + 1e-7)
    # Another outer step, or another seed, is seen.
    assert abs(ours["momentum_logit"] - history.states[-2].meta_params["momentum_logit"]) > 1e-4
    other = straight_line_pes(setup, QUADRATIC[0], 10, seed=5)
    assert abs(other["momentum_logit"] - ours["momentum_logit"]) > 1e-4


@pytest.mark.parametrize("alpha_loss", ["zero", "one"])
def test_alpha_zero_follows_adam(alpha_loss):
    changes = {"imitation.alpha_mix": "zero", "imitation.alpha_loss": alpha_loss, "replay.threshold": 1.0}
    setup = setup_of(LOLO, changes)
    history = run(setup, QUADRATIC, 4)  # one unroll
    task, adam, key_run = QUADRATIC[0], optax.adam(0.01), jax.random.split(jax.random.key(0))[1]
    for p in range(setup.estimator.pairs):
        for t in range(4):
            (key,) = jax.random.split(jax.random.fold_in(jax.random.fold_in(key_run, t), 0), 1)
            keys = jax.random.split(jax.random.fold_in(jax.random.split(key)[1], p), 6)
            if t == 0:
                theta, _ = task.init(jax.random.split(keys[3], 4)[2])
                memory = adam.init(theta)
            for n in range(setup.truncation):
                key_batch, key_loss = jax.random.split(jax.random.fold_in(keys[4], n))
                batch = task.sample(key_batch, jnp.int32(0))
                gradient = jax.grad(lambda theta: task.loss(theta, {}, batch, key_loss)[0])(theta)  # noqa: B023
                update, memory = adam.update(gradient, memory, theta)
                theta = optax.apply_updates(theta, update)
        for sign in (0, 1):
            found = jax.tree.map(lambda x: x[p, sign], history.states[-1].slots[0].local.inner.params)  # noqa: B023
            assert_close(found, theta, rtol=2e-6, atol=2e-7)
    for measured in history.metrics:
        assert float(measured.tasks.delta_task_rms[0]) == 0.0  # both signs follow the expert: exactly, not nearly
        assert float(measured.tasks.delta_bc_rms[0]) > 0.0
        assert all_finite(measured)
    assert all_finite(history.states[-1])
    norms = [float(m.gradient_norm) for m in history.metrics]
    if alpha_loss == "one":
        assert norms == [0.0] * 4  # ψ(0) = 0
    else:
        assert min(norms) > 0.0


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_adam_read_from_the_learners_accumulators_is_adam(schedule):
    changes = {"learner.name": "small_fc", "learner.hidden": 4, "estimator.pairs": 2, "imitation.expert": "adam"}
    changes |= {"imitation.schedule": schedule, "imitation.decay_steps": 20}
    own = run(setup_of(LOLO, changes), QUADRATIC, 6)
    shared = run(setup_of(LOLO, changes | {"imitation.expert": "adam-of-learner"}), QUADRATIC, 6)
    assert jax.tree.leaves(shared.states[-1].slots[0].local.inner.expert) == []
    assert_close(
        shared.states[-1].slots[0].local.inner.params, own.states[-1].slots[0].local.inner.params, rtol=1e-4, atol=1e-6
    )
    assert_close(shared.states[-1].meta_params, own.states[-1].meta_params, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(shared.metrics, own.metrics, strict=True):
        np.testing.assert_allclose(ours.tasks.bc_loss, theirs.tasks.bc_loss, rtol=1e-4)


NORM_FC = {"learner.name": "norm_fc", "estimator.pairs": 2, "imitation.expert": "muon", "imitation.loss": "direction"}


@pytest.mark.slow
def test_norm_fc_learns_the_direction_of_muon_with_an_early_hand_over_and_a_floor():
    task = fashion_mlp("4").train
    changes = {"imitation.start": 0.1, "imitation.end": 0.4, "imitation.floor": 0.2, "imitation.schedule": "cosine"}
    history = run(setup_of(LOLO, NORM_FC | changes), (task,), 12)
    assert history.compilations == 1 and all_finite(history.states[-1]) and all_finite(history.metrics)
    alphas = [float(measured.alpha_mix) for measured in history.metrics]
    np.testing.assert_allclose(alphas, np.clip((np.arange(12) / 19 - 0.1) / 0.3, 0, 1), atol=1e-6)
    for measured in history.metrics:
        assert 0 < float(measured.tasks.bc_loss[0]) < 2  # 1 - a cosine
        assert float(measured.tasks.delta_bc_rms[0]) > 0


def test_a_floor_teaches_imitation_after_the_hand_over():
    def gradient(floor):
        setup = setup_of(NAIVE, {"imitation.floor": floor, "imitation.normalize": "slot"}, outer=recording())
        # Without a floor there is no expert: bc is 0.
        return run(setup, QUADRATIC, 2).states[-1].outer

    assert not same(gradient(0.5), gradient(0.0))
    assert same(gradient(0.5), gradient(0.5))


@pytest.mark.slow
def test_imitation_in_parts_is_measured_as_their_sum_and_needs_no_part_without_an_expert():
    changes = {"imitation.loss": "direction-magnitude", "imitation.alpha_loss": "zero", "imitation.magnitude": 0.25}
    setup = setup_of(LOLO, changes, outer=recording())
    parts = run(setup, QUADRATIC, 2)
    for name in ("direction", "magnitude"):
        one = setup._replace(imitation_loss=imitation.ImitationLoss(getattr(imitation, f"{name}_distance"), 1.0))
        alone = run(one, QUADRATIC, 2)
        assert not same(parts.states[-1].outer, alone.states[-1].outer)  # each part teaches something else
        weight = {"direction": 0.75, "magnitude": 0.25}[name]
        measured = [float(history.metrics[0].tasks.bc_loss[0]) for history in (parts, alone)]
        rest = measured[0] - weight * measured[1]  # of the other part, φ being where it was
        assert 0 < rest < measured[0]
    naive = [setup_of(NAIVE, {"imitation.loss": loss}) for loss in ("squared", "direction-magnitude")]
    ours, theirs = (run(setup, QUADRATIC, 2).states[-1].meta_params for setup in naive)
    assert naive[1].expert is None and same(ours, theirs)


# --- the gradient ---------------------------------------------------------------------------------------------------

DECAY, LENGTH, TRUNCATION = 0.9, 20, 5
WEIGHTS = np.array([1.0, -0.5, 2.0], np.float32)


def linear_setup(kind, pairs=16):
    changes = {"unroll.length": LENGTH, "unroll.truncation": TRUNCATION, "estimator.kind": kind}
    changes |= {"estimator.pairs": pairs, "estimator.sigma": 0.1}
    return setup_of(NAIVE, changes, learned=linear_learner(DECAY), outer=recording())


def linear_task():
    """The loss is linear in θ, with a batch-dependent offset that both signs must share."""
    init = lambda key: ({"x": jax.random.normal(key, (3,))}, {})  # noqa: E731
    return make_task(init, lambda params, stats, batch: (params["x"] @ WEIGHTS + jnp.sum(batch), stats))


def unroll_gradients(kind, unrolls=48):
    """Meta-gradients [unrolls, 3] of whole unrolls at one φ: means over their truncations."""
    setup, task_group = linear_setup(kind), (linear_task(),)

    @jax.jit
    def outer_steps(state):
        def body(state, _):
            state, _ = meta.meta_step(setup, task_group, state)
            return state, state.outer["w"]

        return jax.lax.scan(body, state, length=unrolls * LENGTH // TRUNCATION)[1]

    gradients = outer_steps(meta.meta_init(setup, task_group, jax.random.key(0)))
    return np.asarray(gradients).reshape(unrolls, LENGTH // TRUNCATION, 3).mean(axis=1)


@pytest.mark.parametrize("kind", ["pes", "es"])
def test_outer_steps_estimate_the_exact_gradient(kind):
    exact = np.mean((1 - DECAY ** np.arange(LENGTH)) / (1 - DECAY)) * WEIGHTS
    gradients = unroll_gradients(kind)
    assert agrees(gradients, exact) == (kind != "es")
    assert not agrees(-gradients, exact)


def test_the_last_loss_of_an_unroll_is_credited_to_the_accumulated_direction():
    """Only the first step moves θ, and only the last step's loss sees it: all blame is on the first noise."""

    def optimizer(meta_params):
        def update(grads, count, params):
            return {"x": jnp.where(count == 0, meta_params["w"], 0.0)}, count + 1

        return optax.GradientTransformation(lambda params: jnp.int32(0), update)

    def loss(params, stats, batch):
        last = stats["n"] == 11
        return jnp.where(last, jnp.sum(params["x"]), 0.0), {"n": stats["n"] + 1}

    task = make_task(lambda key: ({"x": jnp.zeros(3)}, {"n": jnp.int32(0)}), loss)
    setup = setup_of(NAIVE, outer=recording())
    setup = setup._replace(learned=linear_learner(1.0)._replace(optimizer=optimizer))
    states = run(setup, (task,), 4).states[1:]  # one unroll of four truncations
    sums = [np.asarray(state.slots[0].estimator["w"]) for state in states]  # [P, 3]
    assert [float(np.abs(s.outer["w"]).max()) for s in states[:3]] == [0.0] * 3

    delta = 2 * sums[0].sum(axis=1)  # x = w ± ε_1 to the end
    steps = setup.estimator.pairs * setup.truncation
    credited = delta @ sums[3] / (2 * setup.estimator.sigma**2 * steps)
    to_newest = delta @ (sums[3] - sums[2]) / (2 * setup.estimator.sigma**2 * steps)
    np.testing.assert_allclose(states[3].outer["w"], credited, rtol=1e-4)
    assert np.abs(states[3].outer["w"] - to_newest).max() > 0.1 * np.abs(credited).max()


SILENT = quadratic(3).train  # other shapes than QUADRATIC's; a loss of 0 has a gradient of 0
SILENT = dataclasses.replace(SILENT, loss=lambda *args, loss=SILENT.loss: (0.0 * loss(*args)[0], args[1]))


@pytest.mark.parametrize("second", ["silent", "bad"])
def test_gradients_of_several_tasks_are_averaged_and_a_bad_one_voids_no_other(second):
    setup = setup_of(NAIVE, outer=recording())
    other = SILENT if second == "silent" else dataclasses.replace(SILENT, data=jnp.full_like(SILENT.data, jnp.nan))
    alone, both = run(setup, QUADRATIC, 3), run(setup, (*QUADRATIC, other), 3)
    for ours, expected in zip(both.states[1:], alone.states[1:], strict=True):
        assert_close(ours.outer, jax.tree.map(lambda g: g / 2, expected.outer), rtol=1e-5)
        assert float(abs(ours.outer["log_learning_rate"])) > 0 and int(ours.bad_steps) == 0
    assert both.metrics[-1].tasks.task_loss.shape == (2,) and both.metrics[-1].tasks.start_step.shape == (2, 3)
    assert both.metrics[-1].tasks.dropped.tolist() == [[0, 0, 0], [int(second == "bad")] * 3]
    first, another = both.states[-1].slots
    assert not same(first.estimator, another.estimator)  # tasks draw their own noise


# --- pairs ----------------------------------------------------------------------------------------------------------


LONG = {"replay.threshold": 0.2, "outer.steps": 200}


@pytest.fixture(scope="module")
def long_run():
    """LOLO over 30 unrolls of four truncations, one per outer step; φ stays where it is."""
    return run(setup_of(LOLO, LONG, outer=recording()), QUADRATIC, 120)


def test_without_noise_both_signs_of_a_pair_are_equal_bit_for_bit(long_run):
    setup = setup_of(LOLO, LONG, outer=recording())

    def silent(key, state):
        return state, state, state  # PES's sum, which starts at zero

    quiet = run(setup._replace(estimator=setup.estimator._replace(sample=silent)), QUADRATIC, 20)
    assert any(int(m.tasks.start_step.max()) > 0 for m in quiet.metrics)  # states were reused
    for t in range(1, 20):  # in the first outer step α = 0 and all follow the expert
        inner_state = quiet.states[t + 1].slots[0].local.inner
        signs = [jax.tree.map(lambda x: x[:, sign], inner_state) for sign in (0, 1)]  # noqa: B023
        assert same(*signs)
        assert float(quiet.metrics[t].tasks.delta_task_rms[0]) == float(quiet.metrics[t].tasks.delta_bc_rms[0]) == 0.0
        with_noise = long_run.states[t + 1].slots[0].local.inner.params["x"]
        assert np.all(np.any(np.asarray(with_noise[:, 0] != with_noise[:, 1]), axis=1))
    # Slots are problems of their own.
    params = np.asarray(quiet.states[-1].slots[0].local.inner.params["x"])
    assert len(np.unique(params[:, 0, 0])) == len(params)


def test_both_signs_see_the_same_batches_and_slots_see_different_ones():
    task = make_task(
        lambda key: ({"x": jnp.ones(2)}, {"batch": jnp.zeros(2)}),
        lambda params, stats, batch: (jnp.sum(params["x"] ** 2) * jnp.mean(batch**2), {"batch": batch}),
    )
    for state in run(setup_of(LOLO), (task,), 6).states[2:]:  # in the first outer step α = 0
        batches, params = np.asarray(state.slots[0].local.inner.stats["batch"]), state.slots[0].local.inner.params["x"]
        np.testing.assert_array_equal(batches[:, 0], batches[:, 1])
        assert not np.array_equal(params[:, 0], params[:, 1])
        assert len(np.unique(batches[:, 0, 0])) > 1


def test_the_snapshot_is_the_state_before_the_step_of_the_push_for_both_signs():
    setup = setup_of(LOLO, {"unroll.truncation": 6})
    phi = setup.learned.init(jax.random.key(0))
    candidates = jax.tree.map(lambda x: jnp.stack([x + 0.1, x - 0.1]), phi)
    learner = setup.learned.optimizer(phi)
    fresh = inner.begin(QUADRATIC[0], learner, setup.expert, jax.random.key(1))
    start = jax.tree.map(lambda x: jnp.stack([x, x]), fresh._replace(step=jnp.int32(30)))
    one_sign = partial(meta.truncated_unroll, setup, QUADRATIC[0])
    unroll = jax.jit(jax.vmap(one_sign, in_axes=(0, None, 0, None, None)))
    args = candidates, jnp.float32(0.5), start, jax.random.key(2)
    train_step = jax.jit(
        lambda phi, held, key: inner.inner_step(
            QUADRATIC[0], setup.learned.optimizer(phi), setup.expert, args[1], held, key
        )
    )
    ends = []
    for offset in range(6):
        end, snapshot, records = unroll(*args, jnp.int32(offset))
        ends.append((end, records))
        np.testing.assert_array_equal(snapshot.step, 30 + offset)
        np.testing.assert_array_equal(end.step, 36)
        if offset == 0:
            assert same(snapshot, start)
        # The snapshot trained on, from the same keys, has the loss that was recorded at that step.
        for sign in (0, 1):
            key = jax.random.fold_in(args[3], offset)
            _, record = train_step(of_slot(candidates, sign), of_slot(snapshot, sign), key)
            np.testing.assert_allclose(record.task, records.task[sign, offset], rtol=1e-5)
    assert all(same(end, ends[0]) for end in ends)  # where the snapshot is taken changes nothing


# --- starts ---------------------------------------------------------------------------------------------------------


def start_many(setup, fresh, starting, pushes=1, slots_count=600):
    """`start_unrolls` on slots at step 77 whose buffers have had states of the steps 5, 6, ... pushed."""
    setup = setup._replace(estimator=setup.estimator._replace(pairs=slots_count), first_lengths=(4,) * slots_count)
    slots = jax.jit(partial(meta.meta_init, setup))(QUADRATIC, jax.random.key(0)).slots[0]

    @jax.jit
    def program(slots, starting, fresh):
        held = jax.tree.map(lambda x: jnp.ones((slots_count, *x.shape[2:]), x.dtype), slots.local.inner)
        buffers = slots.local.replay
        for step in range(5, 5 + pushes):
            buffers = jax.vmap(replay.push)(buffers, held._replace(step=jnp.full(slots_count, step, jnp.int32)))
        at_step_77 = slots.local.inner._replace(step=jnp.full((slots_count, 2), 77, jnp.int32))
        before = meta.LocalSlots(at_step_77, buffers, replay.Drawn(jnp.full(slots_count, -1, jnp.int32)))
        phi, keys = setup.learned.init(jax.random.key(1)), jax.random.split(jax.random.key(2), slots_count)
        length = jnp.full(slots_count, 4, jnp.int32)
        return before, meta.start_unrolls(setup, QUADRATIC[0], phi, before, starting, fresh, keys, length)

    return program(slots, jnp.full(slots_count, starting), jnp.full(slots_count, fresh))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_fresh_starts_have_the_share_of_the_threshold(threshold):
    _, after = start_many(setup_of(LOLO, {"replay.threshold": threshold}), fresh=False, starting=True)
    steps = np.asarray(after.inner.step)
    np.testing.assert_array_equal(steps[:, 0], steps[:, 1])
    assert set(np.unique(steps)) <= {0, 5}
    share, error = np.mean(steps[:, 0] == 0), np.sqrt(threshold * (1 - threshold) / len(steps))
    assert abs(share - threshold) <= 4 * error
    # The states themselves: replayed ones are the buffer's, fresh ones are all different, both signs start alike.
    params = np.asarray(after.inner.params["x"])
    np.testing.assert_array_equal(params[:, 0], params[:, 1])
    np.testing.assert_array_equal(params[steps[:, 0] == 5], 1.0)
    fresh = params[steps[:, 0] == 0, 0]
    assert len(np.unique(fresh[:, 0])) == len(fresh)


def test_an_empty_buffer_and_a_bad_slot_start_fresh_whatever_the_threshold():
    setup = setup_of(LOLO, {"replay.threshold": 0.0})
    for pushes, fresh in ((0, False), (1, True)):
        _, after = start_many(setup, fresh=fresh, starting=True, pushes=pushes, slots_count=50)
        assert np.all(np.asarray(after.inner.step) == 0)


def test_slots_that_do_not_start_stay_as_they_are():
    before, after = start_many(setup_of(LOLO), fresh=False, starting=False, slots_count=20)
    assert same(after, before)


def test_the_push_is_drawn_among_the_truncations_of_the_unroll():
    _, after = start_many(setup_of(LOLO), fresh=False, starting=True)
    counts = np.bincount(after.push.truncation, minlength=4)
    assert len(counts) == 4 and stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("read", replay.READ_RULES)
def test_every_read_rule_starts_unrolls_from_its_state(read):
    setup = setup_of(LOLO, {"replay.read": read, "replay.threshold": 0.3})
    before, after = start_many(setup, fresh=False, starting=True, pushes=6, slots_count=200)  # 7, 8, 9, 10 are held
    steps = np.asarray(after.inner.step[:, 0])
    replayed = steps > 0
    expected = {"oldest": {7}, "newest": {10}, "uniform": {7, 8, 9, 10}, "pop": {7}}[read]
    assert set(steps[replayed].tolist()) == expected and 0 < replayed.mean() < 1
    # `pop` takes the state out where it is used, and only there; the others take nothing.
    np.testing.assert_array_equal(before.replay.size - after.replay.size, replayed if read == "pop" else 0)
    assert same(after.replay.states, before.replay.states)


def test_replayed_unrolls_continue_the_step_count(long_run):
    replayed = 0
    for t, (measured, state) in enumerate(zip(long_run.metrics, long_run.states[1:], strict=True)):
        slots, start = state.slots[0], np.asarray(measured.tasks.start_step[0])
        reached = start + 3 * np.asarray(slots.position)
        np.testing.assert_array_equal(slots.local.inner.step, np.stack([reached, reached], axis=1))
        np.testing.assert_array_equal(measured.tasks.reached[0], reached)
        # The expert's own count is part of the state and goes on with it.
        np.testing.assert_array_equal(slots.local.inner.expert[0].count, slots.local.inner.step)
        np.testing.assert_array_equal((measured.tasks.starts[0] >= 0).sum(0), int(t % 4 == 0))
        replayed += int(np.sum(start > 0)) * (t % 4 == 0)
    assert replayed > 30
    assert max(int(m.tasks.start_step.max()) for m in long_run.metrics) > 12  # further than one unroll reaches


def test_an_unroll_starts_from_the_oldest_state_of_its_own_slot(long_run):
    seen = 0
    for t in range(4, 120, 4):
        before, start = long_run.states[t].slots[0].local.replay, np.asarray(long_run.metrics[t].tasks.start_step[0])
        oldest = [int(replay.at(of_slot(before, p), 0).step) for p in range(3)]
        for p in range(3):
            assert start[p] in (0, oldest[p])
            seen += start[p] > 0
    assert seen > 30


def test_one_state_is_written_per_unroll_and_slot(long_run):
    capacity = 4
    for t in range(0, 120, 4):
        pushes = np.zeros(3, int)
        for before, after in zip(long_run.states[t : t + 4], long_run.states[t + 1 : t + 5], strict=True):
            before, after = before.slots[0].local.replay, after.slots[0].local.replay
            pushed = np.asarray((after.head - before.head) % capacity + after.size - before.size)
            changed = np.any(np.asarray(before.states.params["x"] != after.states.params["x"]), axis=2)  # [P, M]
            # A push at the unroll's first step may write the oldest state where it was.
            assert np.all(changed.sum(axis=1) <= pushed)
            pushes += pushed
        assert pushes.tolist() == [1, 1, 1]
    assert np.all(np.asarray(long_run.states[-1].slots[0].local.replay.size) == capacity)


def uniform_over(samples, bins):
    return stats.chisquare(np.bincount(samples, minlength=bins)).pvalue > 1e-3


def test_the_step_of_the_push_is_uniform_over_the_unroll():
    """N_push in [K, K + N). One slot, because slots share the offset within a truncation; one unroll a step."""
    changes = {"estimator.pairs": 1, "unroll.truncations_per_update": 4, "replay.threshold": 0.5}
    setup = setup_of(LOLO, changes, outer=recording())

    @jax.jit
    def outer_steps(state):
        def body(state, _):
            state, measured = meta.meta_step(setup, QUADRATIC, state)
            newest, _ = replay.newest(jax.tree.map(lambda x: x[0], state.slots[0].local.replay), jax.random.key(0))
            return state, (newest.step - measured.tasks.start_step[0, 0], measured.tasks.start_step[0, 0])

        return jax.lax.scan(body, state, length=1200)[1]

    after_start, starts = map(np.asarray, outer_steps(meta.meta_init(setup, QUADRATIC, jax.random.key(3))))
    assert after_start.min() == 0 and after_start.max() == 11
    assert uniform_over(after_start, 12)
    assert uniform_over(after_start[starts > 0], 12) and (starts > 0).mean() > 0.4
    assert not uniform_over(np.minimum(after_start, 10), 12)  # the test can tell


def test_the_stored_state_is_either_sign(long_run):
    """A state pushed before the first step of its truncation is one of the pair's two states of the step before."""
    signs = []
    for before, after in zip(long_run.states[:-1], long_run.states[1:], strict=True):
        before, after = before.slots[0], after.slots[0]
        for p in range(3):
            newest, _ = replay.newest(of_slot(after.local.replay, p), jax.random.key(0))
            ours = np.asarray(newest.params["x"])
            for sign in (0, 1):
                if np.array_equal(ours, before.local.inner.params["x"][p, sign]) and int(after.position[p]) > 1:
                    signs.append(sign)
    assert {0, 1} == set(signs)


def scripted(losses):
    """A task whose losses are these, whatever trains: inner step n since the random init has losses[n]."""
    script = jnp.asarray(losses, jnp.float32)
    return make_task(
        lambda key: ({"x": jax.random.normal(key, (2,))}, {"n": jnp.int32(0)}),
        lambda params, stats, batch: (script[stats["n"]] + 0 * jnp.sum(params["x"]), {"n": stats["n"] + 1}),
    )


def stored(losses, push, truncations=4):
    """For each truncation of an unroll from a random init: the step of the state that slot 0 stored, or None."""
    setup = setup_of(NAIVE, {"replay.push": push, "estimator.pairs": 2, "replay.capacity": 8})
    found, size = [], 0
    for state in run(setup, (scripted(losses),), truncations).states[1:]:
        buffer = of_slot(state.slots[0].local.replay, 0)
        grew, size = int(buffer.size) > size, int(buffer.size)
        found.append(int(replay.at(buffer, size - 1).step) if grew else None)
    return found


@pytest.mark.slow
def test_struggle_stores_the_first_state_of_a_truncation_in_which_the_loss_rose_and_of_the_last():
    falls = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1]
    assert stored(falls, "struggle") == [None, None, None, 9]
    rises = [9.0, 8.0, 7.0, 6.0, 5.0, 7.0, 6.0, 5.0, 4.0, 3.0, 8.0, 2.0]
    assert stored(rises, "struggle") == [None, 3, None, 9]  # 5 to 7; the last is due whatever its losses
    assert [step for step in stored(rises, "random") if step is not None] != [3, 9]  # one per unroll
    assert len([step for step in stored(rises, "random") if step is not None]) == 1


def test_struggle_stores_nothing_of_a_truncation_with_bad_numbers():
    broken = [9.0, 8.0, 7.0, 6.0, 9.0, np.nan, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert stored(broken, "struggle", 2) == [None, None]
    assert stored([9.0, 8.0, 7.0, 6.0, 9.0, 6.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], "struggle", 2) == [None, 3]


def test_struggle_starts_anew_with_every_unroll_from_the_buffer_too():
    setup = setup_of(LOLO, {"replay.push": "struggle", "replay.threshold": 0.0, "replay.read": "uniform"})
    states = run(setup, (scripted([1.0, 5.0] + 200 * [1.0]),), 9).states
    scores = [np.asarray(state.slots[0].local.push.score) for state in states[1:]]  # [P, 2]
    assert all(np.all(score == 4.0) for score in scores[:4])  # 1 to 5, once
    replayed = np.asarray(states[5].slots[0].local.inner.step[:, 0]) > 3
    assert replayed.any() and np.all(scores[4][replayed] == 0.0)  # the second unroll, from where losses are flat


# --- lengths of unrolls ---------------------------------------------------------------------------------------------


def unroll_lengths(history, pairs):
    """For each slot the lengths in truncations of its finished unrolls, from when unrolls started (J = 1)."""
    started = np.array([(m.tasks.starts[0] >= 0).sum(0) for m in history.metrics])
    return [np.diff(np.flatnonzero(started[:, p])).tolist() for p in range(pairs)]


def test_stagger_shortens_the_first_unrolls_and_no_other():
    changes = {"unroll.stagger": True, "estimator.pairs": 4, "unroll.truncations_per_update": 2}
    setup = setup_of(LOLO, changes)
    assert setup.first_lengths == (1, 2, 3, 4)
    history = run(setup, QUADRATIC, 6)
    started = np.array(
        [(m.tasks.starts[0] >= 0).sum(0) for m in history.metrics]
    )  # [outer steps, P], two truncations each
    starts = ([0, 1, 5, 9], [0, 2, 6, 10], [0, 3, 7, 11], [0, 4, 8])  # in truncations: the first length, then 4 each
    for p, truncations in enumerate(starts):
        assert started[:, p].tolist() == np.bincount(np.array(truncations) // 2, minlength=6).tolist()
    # A shortened unroll writes its one state too: the push is drawn among the truncations that it has.
    for p, truncations in enumerate(starts):
        ends = (truncations[1] + 1) // 2
        assert int(history.states[ends].slots[0].local.replay.size[p]) >= 1
    assert history.states[2].slots[0].local.replay.size[3] == 1


def test_slots_are_in_phase_by_default(long_run):
    assert unroll_lengths(long_run, 3) == [[4] * 29] * 3


def test_unrolls_have_the_lengths_that_were_drawn():
    history = run(setup_of(LOLO, {"unroll.schedule": "uniform"}), QUADRATIC, 40)
    found = unroll_lengths(history, 3)
    assert {length for lengths in found for length in lengths} == {1, 2, 3, 4}
    for p, lengths in enumerate(found):
        starts = np.flatnonzero([int((m.tasks.starts[0, :, p] >= 0).sum()) for m in history.metrics])
        assert [int(history.states[t + 1].slots[0].length[p]) for t in starts[:-1]] == lengths
    for state in history.states[1:]:
        slots = state.slots[0]
        assert np.all(
            (slots.position >= 1) & (slots.position <= slots.length) & (slots.local.push.truncation < slots.length)
        )


def test_an_update_of_n_over_l_truncations_is_a_whole_unroll():
    history = run(setup_of(LOLO, {"unroll.truncations_per_update": 4}), QUADRATIC, 5)
    for measured, state in zip(history.metrics, history.states[1:], strict=True):
        assert (measured.tasks.starts >= 0).sum(1).tolist() == [[1, 1, 1]]
        assert state.slots[0].position.tolist() == state.slots[0].length.tolist() == [4, 4, 4]
        np.testing.assert_array_equal(measured.tasks.reached, measured.tasks.start_step + 12)
    assert np.all(np.asarray(history.states[-1].slots[0].local.replay.size) == 4)  # one state each, five unrolls


def test_every_unroll_that_begins_in_an_update_tells_its_start_step():
    measured = run(setup_of(LOLO, {"unroll.truncations_per_update": 8}), QUADRATIC, 3).metrics
    for m in measured:  # two unrolls each, of four truncations
        begun = np.asarray(m.tasks.starts[0])
        assert np.all((begun >= 0) == np.array([1, 0, 0, 0, 1, 0, 0, 0])[:, None])
        np.testing.assert_array_equal(begun[4], m.tasks.start_step[0])
    assert any((np.asarray(m.tasks.starts[0, 0]) != np.asarray(m.tasks.starts[0, 4])).any() for m in measured)


# --- bad numbers ----------------------------------------------------------------------------------------------------


def rare_nan_task(share=16):
    """One example of `share` is NaN: it spoils the loss of its batch, in one slot."""
    data = jax.random.normal(jax.random.key(5), (share,)).at[0].set(jnp.nan)
    return make_task(
        lambda key: ({"x": jax.random.normal(key, (2,))}, {}),
        lambda params, stats, batch: (jnp.mean((params["x"][:, None] - batch) ** 2), stats),
        data=data,
        size=share,
        batch=1,
    )


def test_a_pair_with_a_bad_number_is_dropped_and_starts_fresh():
    setup = setup_of(LOLO, {"replay.threshold": 0.0, "estimator.pairs": 6})
    history = run(setup, (rare_nan_task(),), 40)
    dropped = np.array([m.tasks.dropped[0] for m in history.metrics])  # [steps, P]
    started = np.array([(m.tasks.starts[0] >= 0).sum(0) for m in history.metrics])
    start_steps = np.array([m.tasks.start_step[0] for m in history.metrics])
    assert 10 < dropped.sum() < 0.5 * dropped.size
    np.testing.assert_array_equal(started[1:][dropped[:-1] == 1], 1)
    np.testing.assert_array_equal(start_steps[1:][dropped[:-1] == 1], 0)
    assert start_steps.max() > 0  # others do start from their buffers
    for measured, state in zip(history.metrics, history.states[1:], strict=True):
        slots = state.slots[0]
        ok = np.isfinite(slots.local.inner.params["x"]).all(axis=(1, 2))
        np.testing.assert_array_equal(slots.fresh, measured.tasks.dropped[0] == 1)
        assert np.all(ok | np.asarray(slots.fresh))
        assert all_finite(slots.local.replay) and all_finite(state.meta_params) and all_finite(measured)
        np.testing.assert_array_equal(np.asarray(measured.tasks.first_bad[0]) == 1, measured.tasks.dropped[0] == 1)
    assert int(history.states[-1].bad_steps) == 0


def test_a_dropped_pair_has_no_weight_in_the_gradient():
    setup = setup_of(NAIVE, {"estimator.pairs": 2})
    directions = {"w": jnp.array([[[1.0], [10.0]]])}
    task = jnp.array([[[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], [[1.0, jnp.nan, 1.0], [0.0, 5.0, 0.0]]]])
    records = inner.StepRecord(task, jnp.zeros_like(task), jnp.ones_like(task))
    whole = jnp.zeros((1, 2), jnp.int32)
    seen = meta.Truncation(records, directions, whole, whole, whole)
    gradients, measured = meta.collect(setup, rare_nan_task(), jnp.float32(1.0), seen)
    np.testing.assert_allclose(gradients.fused["w"], [(1 + 2 + 3) / 3 / (2 * 0.05**2)], rtol=1e-6)
    assert measured.dropped.tolist() == [0, 1] and measured.first_bad.tolist() == [0, 1]
    assert int((measured.dropped == 0).sum()) == 1
    np.testing.assert_allclose(measured.task_loss, 1.0)


def test_a_bad_truncation_voids_the_pair_s_other_truncations_of_the_update():
    setup = setup_of(NAIVE, {"estimator.pairs": 2})
    directions = {"w": jnp.ones((2, 2, 1))}
    task = jnp.ones((2, 2, 2, 3)).at[:, :, 1].set(0.0).at[1, 1, 0, 2].set(jnp.inf)  # the second of two truncations
    records = inner.StepRecord(task, jnp.zeros_like(task), jnp.ones_like(task))
    whole = jnp.zeros((2, 2), jnp.int32)
    gradients, measured = meta.collect(
        setup, rare_nan_task(), jnp.float32(1.0), meta.Truncation(records, directions, whole, whole, whole)
    )
    assert measured.dropped.tolist() == [0, 1] and int((measured.dropped == 0).sum()) == 1
    np.testing.assert_allclose(gradients.fused["w"], [1 / (2 * 0.05**2)], rtol=1e-6)
    clean = records._replace(task=jnp.where(jnp.isinf(task), 1e6, task))
    both, _ = meta.collect(
        setup, rare_nan_task(), jnp.float32(1.0), meta.Truncation(clean, directions, whole, whole, whole)
    )
    assert abs(float(both.fused["w"][0]) - 1 / (2 * 0.05**2)) > 1


def test_an_outer_step_without_a_good_pair_changes_nothing_and_is_counted():
    good = QUADRATIC[0]
    bad = dataclasses.replace(good, data=jnp.full_like(good.data, jnp.nan))
    state, t = None, 0
    for task, bad_steps in ((good, 0), (bad, 1), (bad, 2), (good, 0), (bad, 1)):
        history = run(setup_of(LOLO), (task,), 1, state=state)
        (before, state), (measured,), t = history.states, history.metrics, t + 1
        assert int(state.bad_steps) == bad_steps and int(state.outer_step) == t
        unchanged = same((state.meta_params, state.outer), (before.meta_params, before.outer))
        assert unchanged == (bad_steps > 0)
        assert all_finite((state.meta_params, state.outer, state.slots[0].local.replay, measured))
        assert measured.tasks.dropped.tolist() == [[int(bad_steps > 0)] * 3]


def huge_updates():
    """An optimizer whose update is finite and whose square is not."""
    return optax.stateless(lambda grads, params: jax.tree.map(lambda g: 1e30 + 0 * g, grads))


@pytest.mark.parametrize("what,code", [("nothing", 0), ("loss", 1), ("gradient", 2), ("bc", 3)])
def test_the_first_bad_number_is_named(what, code):
    losses = {
        "loss": lambda params, stats, batch: (jnp.sum(params["x"]) * jnp.nan, stats),
        "gradient": lambda params, stats, batch: (jnp.sum(jnp.sqrt(params["x"])), stats),  # at 0
    }
    loss = losses.get(what, lambda params, stats, batch: (jnp.sum(params["x"]), stats))
    task = make_task(lambda key: ({"x": jnp.zeros(2)}, {}), loss)
    learner = huge_updates() if what == "bc" else optax.sgd(0.1)
    expert = experts.adam(1e-3)
    state = inner.begin(task, learner, expert, jax.random.key(0))
    _, record = inner.inner_step(task, learner, expert, jnp.float32(0.5), state, jax.random.key(1))
    records = jax.tree.map(lambda x: jnp.full((1, 1, 2, 1), x), record)
    assert meta.first_bad(records).tolist() == [code]
    assert bool(jnp.all(meta.finite(records))) == (code == 0)


def test_first_bad_is_the_earliest_of_either_sign_and_truncation():
    """Two truncations of five pairs, four steps each."""
    task, gradient, bc = (np.ones((2, 5, 2, 4), np.float32) for _ in range(3))
    task[0, 0, 0, 3] = gradient[0, 0, 1, 2] = bc[0, 0, 0, 1] = np.nan  # bc at step 1 comes first
    gradient[0, 1, 1, 2] = task[0, 1, 0, 2] = np.inf  # at one step the loss is computed first
    task[0, 2, 1, 3] = bc[1, 2, 0, 0] = np.nan  # the first truncation comes first
    gradient[1, 3, 0, 1] = np.nan  # the first truncation was good
    codes = meta.first_bad(inner.StepRecord(*map(jnp.asarray, (task, bc, gradient))))
    assert codes.tolist() == [3, 1, 1, 2, 0]


def test_the_loss_limit_clips_finite_losses_only():
    setup = setup_of(NAIVE)
    limited = dataclasses.replace(rare_nan_task(), loss_limit=2.0)
    task = jnp.array([[[[5.0, 5.0, 1.5], [1.0, 7.0, 1.0]], [[0.0, 0.0, jnp.inf], [0.0, 0.0, 0.0]], [[0.0] * 3] * 2]])
    records = inner.StepRecord(task, jnp.zeros_like(task), jnp.ones_like(task))
    whole = jnp.zeros((1, 3), jnp.int32)
    seen = meta.Truncation(records, {"w": jnp.ones((1, 3, 1))}, whole, whole, whole)
    gradients, measured = meta.collect(setup, limited, jnp.float32(1.0), seen)
    # min(5, 2) - 1, then 2 - 2, then 1.5 - 1; the pair with the infinite loss is dropped, not clipped.
    np.testing.assert_allclose(gradients.fused["w"], [(1.0 + 0.0 + 0.5) / 6 / (2 * 0.05**2)], rtol=1e-6)
    assert measured.dropped.tolist() == [0, 1, 0]
    unlimited = dataclasses.replace(limited, loss_limit=None)
    gradients, _ = meta.collect(setup, unlimited, jnp.float32(1.0), seen)
    np.testing.assert_allclose(gradients.fused["w"], [(4.0 - 2.0 + 0.5) / 6 / (2 * 0.05**2)], rtol=1e-6)
    np.testing.assert_allclose(measured.task_loss, (5 + 5 + 1.5 + 1 + 7 + 1) / 12, rtol=1e-6)  # as it was


@pytest.mark.parametrize("log_rate", [8.0, 14.0, 20.0, 25.0])
def test_inner_training_that_explodes_is_dropped_before_it_voids_the_step(log_rate):
    """With these rates losses pass through numbers that are finite and whose squares are not."""
    exploding = {"log_learning_rate": jnp.float32(log_rate), "momentum_logit": jnp.float32(0.0)}
    history = run(setup_of(NAIVE), QUADRATIC, 6, meta_params=exploding)
    assert sum(int(m.tasks.dropped.sum()) for m in history.metrics) > 0
    assert all_finite([state.meta_params for state in history.states]) and all_finite(history.metrics)
    for before, after, measured in zip(history.states, history.states[1:], history.metrics, strict=False):
        moved = not same(before.meta_params, after.meta_params)
        assert moved == bool(jnp.any(measured.tasks.dropped == 0)) == (int(after.bad_steps) == 0)


@pytest.mark.parametrize("big", [1e15, 1e30, 3e38])
def test_a_loss_that_is_finite_but_beyond_use_does_not_outweigh_the_other_pairs(big):
    task = jnp.array([[[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]], [[1.0, big, 1.0], [0.0, 5.0, 0.0]]]])
    records = inner.StepRecord(task, jnp.zeros_like(task), jnp.ones_like(task))
    whole = jnp.zeros((1, 2), jnp.int32)
    seen = meta.Truncation(records, {"w": jnp.array([[[1.0], [10.0]]])}, whole, whole, whole)
    gradients, measured = meta.collect(setup_of(NAIVE, {"estimator.pairs": 2}), QUADRATIC[0], jnp.float32(1.0), seen)
    np.testing.assert_allclose(gradients.fused["w"], [(1 + 2 + 3) / 3 / (2 * 0.05**2)], rtol=1e-6)
    assert measured.dropped.tolist() == [0, 1] and all_finite(measured)


# --- the program ----------------------------------------------------------------------------------------------------

M = 7  # a size that nothing else in these programs has


def subprograms(value):
    """The jaxprs among an equation's parameters."""
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif isinstance(value, tuple | list):
        for item in value:
            yield from subprograms(item)


def loop_carries(program, depth=0):
    """(number of loops around it, shapes of its carry) for every scan and while loop of a jaxpr."""
    for equation in program.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            carried = params["jaxpr"].in_avals[params["num_consts"] :][: params["num_carry"]]
        elif name == "while":
            carried = params["body_jaxpr"].in_avals[params["body_nconsts"] :]
        else:
            carried = None
        if carried is not None:
            yield depth, [aval.shape for aval in carried]
        for value in params.values():
            for inside in subprograms(value):
                yield from loop_carries(inside, depth + (carried is not None))


def rings_carried(program):
    """Depths of the loops that carry something of M places."""
    return sorted(depth for depth, shapes in loop_carries(program) if any(M in shape for shape in shapes))


@pytest.mark.parametrize("slots_per_block", [1, 3])
def test_no_inner_loop_carries_the_buffer(slots_per_block):
    changes = {"replay.capacity": M, "unroll.truncations_per_update": 2, "estimator.slots_per_block": slots_per_block}
    setup = setup_of(LOLO, changes)
    state = meta.meta_init(setup, QUADRATIC, jax.random.key(0))
    program = jax.make_jaxpr(partial(meta.meta_step, setup))(QUADRATIC, state).jaxpr
    depths = [depth for depth, _ in loop_carries(program)]
    assert max(depths) >= 2  # truncations, slots, steps: the loops were found
    assert rings_carried(program) == [0]  # the loop over truncations alone; its buffers are the donated state

    def push_inside(buffer, new):  # what must not happen, and is found if it does
        def truncation(buffer, _):
            return jax.lax.fori_loop(0, 3, lambda n, held: replay.push(held, new, n == 1), buffer), None

        return jax.lax.scan(truncation, buffer, length=2)[0]

    one = jax.tree.map(lambda x: x[0, 0], state.slots[0].local.inner)
    assert rings_carried(jax.make_jaxpr(push_inside)(replay.init(one, M), one).jaxpr) == [0, 1]


def test_blocks_change_the_program_and_not_the_result(long_run):
    blocks = run(setup_of(LOLO, LONG | {"estimator.slots_per_block": 3}, outer=recording()), QUADRATIC, 6)
    ours, one_by_one = blocks.states[-1].slots[0], long_run.states[6].slots[0]
    assert_close(ours.local.inner, one_by_one.local.inner, rtol=1e-5, atol=1e-6)
    assert_close(ours.local.replay, one_by_one.local.replay, rtol=1e-5, atol=1e-6)


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not():
    setup = setup_of(LOLO)
    first, again, other = (run(setup, QUADRATIC, 5, seed=seed).states[-1] for seed in (1, 1, 2))
    assert same(first, again) and not same(first.meta_params, other.meta_params)


def test_given_meta_params_are_where_it_starts():
    given = {"log_learning_rate": jnp.float32(-3.0), "momentum_logit": jnp.float32(0.5)}
    assert same(run(setup_of(LOLO), QUADRATIC, 0, meta_params=given).states[0].meta_params, given)
