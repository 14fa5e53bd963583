"""The replay buffer against a Python list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import same
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scipy import stats

from lolo.method import replay

push = jax.jit(replay.push)
READS = {name: jax.jit(read) for name, read in replay.READ_RULES.items()}
at = jax.jit(replay.at)
KEY = jax.random.key(0)


def state(number):
    """An inner state that is recognised by a number."""
    return {"params": jnp.full((2, 3), number, jnp.float32), "step": jnp.int32(number)}


def number_of(held):
    """The number of a state; both of its leaves must come from the same push."""
    numbers = {float(held["step"]), *np.unique(held["params"]).tolist()}
    assert len(numbers) == 1
    return int(numbers.pop())


def filled(capacity, pushes):
    """A buffer after pushes of the states 1, 2, ..."""
    buffer = replay.init(state(0), capacity)
    for number in range(1, pushes + 1):
        buffer = push(buffer, state(number), True)
    return buffer


class BufferIsAList(RuleBasedStateMachine):
    """Any sequence of operations leaves the buffer with what a list with the first entry dropped would hold."""

    @initialize(capacity=st.sampled_from([1, 2, 4]))
    def begin(self, capacity):
        self.capacity, self.model, self.pushed = capacity, [], 0
        self.buffer = replay.init(state(0), capacity)

    @rule(condition=st.booleans())
    def push_where(self, condition):
        self.pushed += 1
        self.buffer = push(self.buffer, state(self.pushed), condition)
        if condition:
            self.model = [*self.model, self.pushed][-self.capacity :]

    @rule()
    def push_always(self):
        self.push_where(condition=True)

    @rule()
    def pop(self):
        held, self.buffer = READS["pop"](self.buffer, KEY)
        if self.model:
            assert number_of(held) == self.model.pop(0)

    @precondition(lambda self: self.model)
    @rule(name=st.sampled_from(["oldest", "newest", "uniform"]), seed=st.integers(0, 5))
    def peek(self, name, seed):
        held, after = READS[name](self.buffer, jax.random.key(seed))
        allowed = {"oldest": self.model[:1], "newest": self.model[-1:], "uniform": self.model}
        assert number_of(held) in allowed[name]
        assert same(after, self.buffer)

    @invariant()
    def holds_what_the_list_holds(self):
        if not hasattr(self, "buffer"):
            return
        assert int(self.buffer.size) == len(self.model)
        assert 0 <= int(self.buffer.head) < self.capacity
        assert [number_of(at(self.buffer, age)) for age in range(len(self.model))] == self.model


TestBufferIsAList = BufferIsAList.TestCase
TestBufferIsAList.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, derandomize=True, database=None
)


def test_oldest_is_unchanged_until_the_buffer_is_full():
    buffer, seen = replay.init(state(0), 3), []
    for number in range(1, 7):
        buffer = push(buffer, state(number), True)
        seen.append(number_of(READS["oldest"](buffer, KEY)[0]))
    assert seen == [1, 1, 1, 2, 3, 4]
    assert int(buffer.size) == replay.capacity(buffer) == 3


@pytest.mark.parametrize("name", replay.READ_RULES)
@pytest.mark.parametrize("pushes", [1, 3, 4, 7])
def test_every_rule_reads_a_state_that_is_held(name, pushes):
    buffer = filled(4, pushes)
    held, after = READS[name](buffer, KEY)
    assert max(pushes - 3, 1) <= number_of(held) <= pushes
    assert int(after.size) == int(buffer.size) - (name == "pop")
    assert same(after.states, buffer.states)


@pytest.mark.parametrize("name", replay.READ_RULES)
def test_every_rule_leaves_an_empty_buffer_empty(name):
    _, after = READS[name](filled(3, 0), KEY)
    assert int(after.size) == 0 and int(after.head) == 0


@pytest.mark.parametrize("name", replay.READ_RULES)
def test_every_rule_reads_each_slot_by_itself(name):
    buffers = jax.tree.map(lambda *leaves: jnp.stack(leaves), filled(3, 2), filled(3, 3), filled(3, 5))
    keys = jax.random.split(KEY, 3)
    held, after = jax.vmap(replay.READ_RULES[name])(buffers, keys)
    for slot, pushes in enumerate((2, 3, 5)):
        alone = READS[name](filled(3, pushes), keys[slot])
        assert same(jax.tree.map(lambda x: x[slot], (held, after)), alone)  # noqa: B023


def test_pushing_where_nothing_is_due_changes_nothing():
    for pushes in (0, 2, 3, 5):
        buffer = filled(3, pushes)
        assert same(push(buffer, state(99), False), buffer)


def test_a_condition_per_slot_pushes_in_those_slots_only():
    buffers = jax.tree.map(lambda *leaves: jnp.stack(leaves), filled(2, 3), filled(2, 3))
    new = jax.tree.map(lambda x: jnp.stack([x, x]), state(9))
    after = jax.vmap(replay.push)(buffers, new, jnp.array([True, False]))
    first, second = (jax.tree.map(lambda x: x[slot], after) for slot in (0, 1))  # noqa: B023
    assert [number_of(replay.at(first, age)) for age in (0, 1)] == [3, 9]
    assert same(second, filled(2, 3))


def test_a_state_that_is_not_pushed_may_be_nan():
    bad = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, state(1))
    buffer = push(filled(2, 2), bad, False)
    assert np.isfinite(buffer.states["params"]).all()


def test_uniform_reads_are_uniform():
    buffer, draws = filled(5, 8), 2000  # the ring has wrapped: it holds 4 to 8
    held, _ = jax.vmap(replay.uniform, in_axes=(None, 0))(buffer, jax.random.split(KEY, draws))
    counts = np.bincount(held["step"], minlength=9)
    assert counts[:4].sum() == 0
    assert stats.chisquare(counts[4:]).pvalue > 1e-3
    assert stats.chisquare(counts[4:] + [0, 0, 0, 0, 200]).pvalue < 1e-3  # the test can tell


def test_uniform_reads_of_a_partly_filled_buffer_stay_in_it():
    held, _ = jax.vmap(replay.uniform, in_axes=(None, 0))(filled(5, 2), jax.random.split(KEY, 200))
    assert set(np.unique(held["step"]).tolist()) == {1, 2}


# --- push rules -----------------------------------------------------------------------------------------------------

OBSERVE = {name: jax.jit(rule.observe) for name, rule in replay.PUSH_RULES.items()}


def watched(*truncations, rule="struggle", last=None):
    """The states after truncations of losses [2, L], one after the other; `last` is the one that ends the unroll."""
    states = [replay.PUSH_RULES[rule].start(KEY, jnp.int32(len(truncations)))]
    for n, losses in enumerate(truncations):
        losses = jnp.asarray(losses, jnp.float32)
        states.append(OBSERVE[rule](states[-1], losses, jnp.isfinite(losses), jnp.asarray(n == last)))
    return states[1:]


def due(states, rule="struggle"):
    return [bool(replay.PUSH_RULES[rule].due(state, jnp.int32(n))) for n, state in enumerate(states)]


def test_the_score_is_the_worst_rise_above_the_lowest_loss_so_far():
    states = watched([[5, 3, 4], [2, 2, 2]], [[3.5, 9, 1], [1, 3, 2]], [[2, 6, 6], [4, 4, 0]])
    assert [state.lowest.tolist() for state in states] == [[3, 2], [1, 1], [1, 0]]
    assert [state.score.tolist() for state in states] == [[1, 0], [6, 2], [6, 3]]
    # Not the sum of rises, nor the rise above the first loss of the truncation.
    assert states[1].score[0] != 1 + 0.5 + 5.5 and states[1].score[0] != 9 - 3.5


def test_a_state_is_due_where_the_mean_score_of_the_pair_grew():
    flat, falls = [[3, 3], [3, 3]], [[2, 1], [2, 1]]
    up, smaller, larger = [[3, 4], [3, 3]], [[3, 3.5], [3, 3]], [[3, 3], [3, 5]]
    assert due(watched(flat, falls, flat, up, smaller, larger)) == [False, False, True, True, False, True]
    random = watched(flat, falls, flat, up, smaller, larger, rule="random")
    assert sum(due(random, "random")) == 1 and due(random, "random") != due(watched(flat, falls, flat))


def test_a_state_is_due_in_the_truncation_that_ends_the_unroll():
    falls = [[[5 - n, 4 - n], [5 - n, 4 - n]] for n in range(3)]
    assert due(watched(*falls, last=2)) == [False, False, True]
    assert due(watched(*falls)) == [False, False, False]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite_does_not_count(bad):
    ours = watched([[bad, 5, bad, 7], [1, 1, 1, 1]], [[bad] * 4, [2, 1, 1, 1]])
    without = watched([[5, 5, 5, 7], [1, 1, 1, 1]], [[7] * 4, [2, 1, 1, 1]])
    assert same(ours, without) and ours[0].score.tolist() == [2, 0]
    start = replay.STRUGGLE.start(KEY, jnp.int32(1))
    assert same(watched([[bad, bad], [bad, bad]])[0], start)  # as if there had been no truncation
    counted = replay.watch(start, jnp.array([[5.0, bad], [1.0, 1.0]]), jnp.ones((2, 2), bool), jnp.asarray(False))
    assert not np.isfinite([counted.lowest, counted.score]).all()  # else nothing was tested


@pytest.mark.parametrize("losses", [[3, 2, 4, 1, 6, 6], [-3, -5, -1, 0, 2, -9]])
def test_truncations_cut_anywhere_give_one_score(losses):
    pair = np.array([losses, losses[::-1]])
    whole = watched(pair)[-1]
    for cut in range(1, 6):
        apart = watched(pair[:, :cut], pair[:, cut:])[-1]
        assert same(apart._replace(due=whole.due), whole)


def test_struggle_draws_nothing_and_takes_the_first_state_of_a_truncation():
    keys = jax.random.split(KEY, 60)
    starts = [jax.vmap(rule.start, in_axes=(0, None))(keys, jnp.int32(5)) for rule in replay.PUSH_RULES.values()]
    assert set(starts[0].truncation.tolist()) == {0, 1, 2, 3, 4}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(starts[1]))
    offsets = [{int(rule.offset(key, 5)) for key in keys} for rule in replay.PUSH_RULES.values()]
    assert offsets == [{0, 1, 2, 3, 4}, {0}]


def test_a_buffer_keeps_dtypes_and_takes_shapes_alone():
    example = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    buffer = replay.init(example, 4)
    assert replay.capacity(buffer) == 4
    assert buffer.states["a"].shape == (4, 2) and buffer.states["a"].dtype == jnp.bfloat16
    after = replay.push(buffer, {"a": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3)})
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, buffer)
