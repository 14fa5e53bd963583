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


def test_a_buffer_keeps_dtypes_and_takes_shapes_alone():
    example = {"a": jax.ShapeDtypeStruct((2,), jnp.bfloat16), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    buffer = replay.init(example, 4)
    assert replay.capacity(buffer) == 4
    assert buffer.states["a"].shape == (4, 2) and buffer.states["a"].dtype == jnp.bfloat16
    after = replay.push(buffer, {"a": jnp.ones(2, jnp.bfloat16), "n": jnp.int32(3)})
    assert jax.tree.map(lambda x: x.dtype, after) == jax.tree.map(lambda x: x.dtype, buffer)
