"""Eq. 1-5 on numbers that can be checked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lolo.method import imitation, inner, meta
from lolo.method.imitation import Losses, normalize_second_moment


def test_mixing_weighs_the_learned_update_by_alpha():
    learned, expert = (
        {"a": jnp.array([4.0, -2.0]), "b": jnp.array(1.0)},
        {"a": jnp.array([8.0, 2.0]), "b": jnp.array(3.0)},
    )
    mixed = imitation.mix_updates(jnp.float32(0.25), learned, expert)
    np.testing.assert_array_equal(mixed["a"], [7.0, 1.0])
    np.testing.assert_array_equal(mixed["b"], 2.5)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_an_update_of_weight_zero_is_not_added(bad):
    good, bad = {"a": jnp.array([1.5, -0.1])}, {"a": jnp.array([bad, bad])}
    follows_expert = imitation.mix_updates(jnp.float32(0.0), bad, good)
    follows_learner = imitation.mix_updates(jnp.float32(1.0), good, bad)
    np.testing.assert_array_equal(follows_expert["a"], good["a"])
    np.testing.assert_array_equal(follows_learner["a"], good["a"])
    assert not np.isfinite(imitation.mix_updates(jnp.float32(0.5), bad, good)["a"]).any()  # else nothing was tested


def test_mixing_keeps_the_dtype_of_the_learned_update():
    mixed = imitation.mix_updates(jnp.float32(0.5), {"a": jnp.ones(2, jnp.bfloat16)}, {"a": jnp.zeros(2, jnp.bfloat16)})
    assert mixed["a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(mixed["a"], np.float32), 0.5)


def test_distance_sums_squares_over_all_parameters():
    learned, expert = (
        {"a": jnp.array([1.0, 2.0]), "b": jnp.array([[3.0]])},
        {"a": jnp.zeros(2), "b": jnp.array([[1.0]])},
    )
    assert imitation.squared_distance(learned, expert) == 1 + 4 + 4
    assert imitation.squared_distance(learned, learned) == 0


# Δ of J = 2 truncations, P = 2 slots, L = 2 steps.
BC = jnp.array([[[3.0, 4.0], [1.0, 1.0]], [[0.0, 5.0], [1.0, 1.0]]])
TASK = jnp.array([[[2.0, -2.0], [0.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]]])
ALL = jnp.ones((2, 2, 2), bool)


def test_fusing_without_normalisation_is_equation_3():
    fused = imitation.fuse(jnp.float32(0.25), Losses(task=TASK, bc=BC), ALL, imitation.raw)
    np.testing.assert_allclose(fused[0, 0], [0.75 * 3 + 0.25 * 2, 0.75 * 4 - 0.25 * 2])
    np.testing.assert_allclose(fused[1, 0], [0.25 * 2, 0.75 * 5 + 0.25 * 2])


def test_fusing_normalised_differences_is_equation_4():
    fused = imitation.fuse(jnp.float32(0.25), Losses(task=TASK, bc=BC), ALL, imitation.per_slot)
    root = np.sqrt((9 + 16 + 0 + 25) / 4)  # of slot 0, over both truncations
    np.testing.assert_allclose(fused[0, 0], [0.75 * 3 / root + 0.25, 0.75 * 4 / root - 0.25], rtol=1e-6)
    np.testing.assert_allclose(fused[1, 0], [0.25, 0.75 * 5 / root + 0.25], rtol=1e-6)
    np.testing.assert_allclose(fused[:, 1], 0.75, rtol=1e-6)  # Δ^task of slot 1 is 0 everywhere: ψ gives 0, not NaN


def test_alpha_chooses_which_difference_teaches():
    deltas = Losses(task=TASK, bc=BC)
    np.testing.assert_array_equal(imitation.fuse(jnp.float32(0), deltas, ALL, imitation.raw), BC)
    np.testing.assert_array_equal(imitation.fuse(jnp.float32(1), deltas, ALL, imitation.raw), TASK)


def second_moment(x):
    return np.mean(np.asarray(x, np.float64) ** 2, axis=(0, 2))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-6, 1.0, 1e6, 1e30])
def test_psi_gives_unit_second_moment_at_any_scale(scale):
    x = scale * jax.random.normal(jax.random.key(0), (2, 5, 40)) * jnp.logspace(-3, 3, 5)[:, None]
    valid = jnp.ones(x.shape, bool)
    np.testing.assert_allclose(second_moment(normalize_second_moment(x, valid)), 1.0, rtol=1e-5)


def test_psi_with_an_epsilon_of_usual_size_would_not():
    x = 1e-6 * jax.random.normal(jax.random.key(0), (1, 1, 40))
    with_epsilon = x / jnp.sqrt(jnp.mean(x**2) + 1e-8)
    assert second_moment(with_epsilon)[0] < 1e-3


def test_psi_of_zero_is_zero():
    zeros = jnp.zeros((2, 3, 4))
    for normalize in imitation.NORMALIZERS.values():
        np.testing.assert_array_equal(normalize(zeros, jnp.ones(zeros.shape, bool)), 0.0)
        np.testing.assert_array_equal(normalize(zeros, jnp.zeros(zeros.shape, bool)), 0.0)


@pytest.mark.parametrize("name", imitation.NORMALIZERS)
@pytest.mark.parametrize("junk", [1e30, np.inf, np.nan])
def test_invalid_steps_are_zero_and_change_nothing(name, junk):
    normalize = imitation.NORMALIZERS[name]
    x = jax.random.normal(jax.random.key(1), (2, 3, 4))
    valid = jnp.ones(x.shape, bool).at[0, 1].set(False).at[1, 2, 3].set(False)
    clean, dirty = normalize(jnp.where(valid, x, 0.0), valid), normalize(jnp.where(valid, x, junk), valid)
    np.testing.assert_array_equal(clean, dirty)
    np.testing.assert_array_equal(np.asarray(dirty)[~np.asarray(valid)], 0.0)


def test_psi_averages_over_valid_steps_only():
    x = jnp.array([[[2.0, 2.0, 7.0, 7.0]]])
    valid = jnp.array([[[True, True, False, False]]])
    np.testing.assert_allclose(normalize_second_moment(x, valid)[0, 0], [1, 1, 0, 0], rtol=1e-6)


def test_psi_is_taken_per_slot_or_jointly():
    x = jnp.broadcast_to(jnp.array([1.0, 3.0])[:, None], (2, 2, 4))
    valid = jnp.ones(x.shape, bool)
    np.testing.assert_allclose(imitation.per_slot(x, valid), 1.0, rtol=1e-6)
    in_one = imitation.joint(x, valid)
    np.testing.assert_allclose(in_one[:, 0], 1 / np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(in_one[:, 1], 3 / np.sqrt(5), rtol=1e-6)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3), min_size=6, max_size=6),
    st.integers(-20, 20),
)
def test_psi_ignores_scale_and_keeps_signs(numbers, exponent):
    x = jnp.array(numbers, jnp.float32).reshape(1, 1, 6)
    valid = jnp.ones(x.shape, bool)
    plain = normalize_second_moment(x, valid)
    np.testing.assert_allclose(normalize_second_moment(x * 2.0**exponent, valid), plain, rtol=1e-6)
    np.testing.assert_array_equal(jnp.sign(plain), jnp.sign(x))
    np.testing.assert_allclose(normalize_second_moment(-x, valid), -plain, rtol=1e-6)


def test_alpha_grows_linearly_from_0_to_1():
    alphas = [float(imitation.linear(jnp.int32(t), 5)) for t in range(5)]
    assert alphas == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_a_run_of_one_step_has_alpha_0():
    assert float(imitation.linear(jnp.int32(0), 1)) == 0.0


@pytest.mark.parametrize("name", imitation.ALPHA_SCHEDULES)
@pytest.mark.parametrize("total", [1, 2, 7])
def test_alpha_is_a_float32_weight(name, total):
    for t in range(total):
        alpha = jax.jit(lambda t: imitation.ALPHA_SCHEDULES[name](t, total))(jnp.int32(t))  # noqa: B023
        assert alpha.dtype == jnp.float32 and alpha.shape == () and 0.0 <= float(alpha) <= 1.0


def test_constant_schedules_do_not_move():
    assert {float(imitation.zero(jnp.int32(t), 9)) for t in range(9)} == {0.0}
    assert {float(imitation.one(jnp.int32(t), 9)) for t in range(9)} == {1.0}


def test_alpha_may_leave_0_late_and_reach_1_early():
    alphas = [float(imitation.linear(jnp.int32(t), 11, 0.2, 0.6)) for t in range(11)]
    np.testing.assert_allclose(alphas, [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1], atol=1e-6)
    paper = [float(imitation.linear(jnp.int32(t), 11)) for t in range(11)]
    assert paper == [np.float32(t) / np.float32(10) for t in range(11)]  # to the bit


def test_a_floor_keeps_imitation_after_the_hand_over_and_changes_nothing_before():
    deltas = Losses(task=TASK, bc=BC)
    fuse = lambda alpha, floor: imitation.fuse(jnp.float32(alpha), deltas, ALL, imitation.raw, floor)  # noqa: E731
    np.testing.assert_allclose(fuse(1.0, 0.25), 0.25 * BC + TASK)
    np.testing.assert_array_equal(fuse(0.5, 0.25), fuse(0.5, 0.0))
    assert not np.array_equal(fuse(0.9, 0.25), fuse(0.9, 0.0))


LEARNED = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]])}
EXPERT = {"a": jnp.array([0.0, 2.0]), "b": jnp.array([[1.0]])}


def test_direction_is_one_minus_the_cosine_over_all_tensors_together():
    found = imitation.direction_distance(LEARNED, EXPERT)
    np.testing.assert_allclose(found, 1 - 4 / (5 * np.sqrt(5)), rtol=1e-6)
    apart = np.mean([1 - 0, 1 - 1])  # tensor by tensor it would be another number
    assert abs(float(found) - apart) > 0.1
    opposite = jax.tree.map(jnp.negative, LEARNED)
    np.testing.assert_allclose(imitation.direction_distance(LEARNED, opposite), 2.0, rtol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, LEARNED)
    assert float(imitation.direction_distance(LEARNED, zero)) == float(imitation.direction_distance(zero, zero)) == 1.0


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 7.0, 1e8])
def test_direction_ignores_size_and_the_squared_distance_does_not(scale):
    larger = jax.tree.map(lambda x: scale * x, LEARNED)
    direction, squared = imitation.direction_distance, imitation.squared_distance
    np.testing.assert_allclose(direction(larger, EXPERT), direction(LEARNED, EXPERT), rtol=1e-5)
    assert abs(float(squared(larger, EXPERT) / squared(LEARNED, EXPERT)) - 1) > 0.1


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_direction_of_an_update_that_is_not_finite_is_seen(bad):
    broken = LEARNED | {"b": jnp.array([[bad]])}
    assert np.isnan(imitation.direction_distance(broken, EXPERT))


def test_magnitude_is_the_difference_of_the_norms_over_all_tensors_together():
    found = imitation.magnitude_distance(LEARNED, EXPERT)
    np.testing.assert_allclose(found, 5 - np.sqrt(5), rtol=1e-6)
    np.testing.assert_allclose(imitation.magnitude_distance(EXPERT, LEARNED), found)
    apart = abs(3 - 2) + abs(4 - 1)  # tensor by tensor it would be another number
    assert abs(float(found) - apart) > 0.1
    opposite = jax.tree.map(jnp.negative, LEARNED)
    assert float(imitation.magnitude_distance(LEARNED, opposite)) == 0.0  # the direction does not enter


def both(magnitude):
    return imitation.IMITATION_LOSSES["direction-magnitude"](magnitude)


def test_direction_and_magnitude_are_scaled_by_psi_before_they_are_weighed():
    loss, units = both(0.3), jnp.array([1.0, 1e-5])  # of direction and magnitude: far apart, as they are
    parts = imitation.DirectionMagnitude(units[0] * BC, units[1] * BC[:, :, ::-1])
    fused = imitation.fuse(jnp.float32(0.25), Losses(task=TASK, bc=parts), ALL, imitation.per_slot, loss=loss)
    psi = imitation.per_slot
    expected = 0.75 * (0.7 * psi(BC, ALL) + 0.3 * psi(BC[:, :, ::-1], ALL)) + 0.25 * psi(TASK, ALL)
    np.testing.assert_allclose(fused, expected, rtol=1e-6)
    summed = imitation.total(loss, parts)  # weighed first, the magnitude would be lost
    late = imitation.fuse(jnp.float32(0.25), Losses(task=TASK, bc=summed), ALL, imitation.per_slot)
    assert float(jnp.max(jnp.abs(late - fused))) > 0.1


@pytest.mark.parametrize("magnitude,alone", [(0.0, "direction"), (1.0, "magnitude")])
def test_a_share_of_0_or_1_leaves_one_part(magnitude, alone):
    parts = imitation.DirectionMagnitude(BC, BC[:, :, ::-1])
    fused = imitation.fuse(jnp.float32(0.0), Losses(TASK, parts), ALL, imitation.per_slot, loss=both(magnitude))
    one = imitation.fuse(jnp.float32(0.0), Losses(TASK, getattr(parts, alone)), ALL, imitation.per_slot)
    np.testing.assert_array_equal(fused, one)


@pytest.mark.parametrize("name", imitation.IMITATION_LOSSES)
def test_parts_and_weights_of_every_imitation_loss_have_one_structure(name):
    loss = imitation.IMITATION_LOSSES[name](0.3)
    parts = loss.parts(LEARNED, EXPERT)
    assert jax.tree.structure(parts) == jax.tree.structure(loss.weights)
    np.testing.assert_allclose(sum(jax.tree.leaves(loss.weights)), 1.0)
    assert imitation.total(loss, parts).shape == ()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_part_that_is_not_finite_is_seen_whatever_its_weight(bad):
    parts = both(0.0).parts(LEARNED, EXPERT)
    for broken in (parts._replace(magnitude=jnp.float32(bad)), parts._replace(direction=jnp.float32(bad))):
        record = inner.StepRecord(jnp.float32(1.0), broken, jnp.float32(1.0))
        assert not bool(meta.finite(record))
    assert bool(meta.finite(inner.StepRecord(jnp.float32(1.0), parts, jnp.float32(1.0))))
