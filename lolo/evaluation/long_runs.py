"""Long runs of any optimizer on a task, and the statistics that compare them.

Every optimizer sees the same inits and the same batches: both derive from the evaluation seed alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from numpy.typing import NDArray

from lolo.evaluation.run_state import Done, RunState
from lolo.evaluation.statistics import Row
from lolo.files import tensors
from lolo.method import inner
from lolo.method.task import Splits, Task
from lolo.runtime import interrupt, parallel
from lolo.tasks.feed import Feed
from lolo.trees import PyTree

WINDOW = 100  # steps that a reported loss is the mean of, and between two scores
EVAL_STREAM = 1  # streams of evaluations: their order is drawn from (this, evaluation seed, epoch)

Make = Callable[[Any], optax.GradientTransformation]
Scored = Callable[[inner.InnerState], PyTree]  # the parameters whose scores count


def params_of(state: inner.InnerState) -> PyTree:
    """The parameters that the optimizer steps from."""
    return state.params


class Curves(NamedTuple):
    """K runs of `steps` inner steps. W points, after each WINDOW steps and after the last: see `curve_steps`."""

    train_loss: NDArray[np.float32]  # [K, W], means over the WINDOW steps before, of the training batches' loss
    held_loss: NDArray[np.float32]  # [K, W], on a fixed subset of the held-out split
    final: dict[str, NDArray[np.float32]]  # [K] each, scores on a whole split after the last step


def score_split(task: Task, params: PyTree, statistics: PyTree, limit: int | None = None) -> dict[str, jax.Array]:
    """Scores over the first `limit` examples of a split (all, if None), in batches of `task.score_batch`."""
    size = task.size if limit is None else min(limit, task.size)
    batch = min(task.score_batch, size)
    whole = size // batch

    def scored(start: jax.Array, count: int) -> dict[str, jax.Array]:
        return task.score(params, statistics, task.examples(task.data, start + jnp.arange(count)))

    parts = jax.lax.map(lambda i: scored(i * batch, batch), jnp.arange(whole))
    total = jax.tree.map(lambda x: jnp.sum(x) * batch, parts)
    if size % batch:
        rest = scored(jnp.int32(whole * batch), size % batch)
        total = jax.tree.map(lambda a, b: a + b * (size % batch), total, rest)
    return jax.tree.map(lambda x: x / size, total)


def seed_key(seed: int) -> jax.Array:
    """The key of an evaluation seed: init and batches follow from it."""
    return jax.random.fold_in(jax.random.key(20_251_124), seed)


@functools.lru_cache(maxsize=64)
def _programs(
    make: Make, devices: int, window: int = WINDOW, scored: Scored = params_of
) -> tuple[Callable, Callable, Callable, Any]:
    """Jitted: begin, one window of steps, final scores; each over K runs spread over devices."""
    over = parallel.mesh(devices, devices)
    spread, everywhere = PartitionSpec(parallel.AXIS), PartitionSpec()

    def begin(task: Task, settings: Any, keys: jax.Array) -> inner.InnerState:
        return jax.lax.map(
            lambda args: inner.begin(task, make(args[0]), None, jax.random.fold_in(args[1], 0)), (settings, keys)
        )

    def advance(task: Task, held: Task, settings: Any, keys: jax.Array, states: inner.InnerState) -> tuple:
        def one(args: tuple) -> tuple:
            setting, key, state = args
            optimizer, key = make(setting), jax.random.fold_in(key, 1)

            def step(state: inner.InnerState, _: None) -> tuple[inner.InnerState, jax.Array]:
                step_key = jax.random.fold_in(key, state.step)
                state, record = inner.inner_step(task, optimizer, None, jnp.ones(()), state, step_key)
                return state, record.task

            state, losses = jax.lax.scan(step, state, length=window)
            score = score_split(held, scored(state), state.stats, held.score_examples)["loss"]
            return state, jnp.mean(losses), score

        return jax.lax.map(one, (settings, keys, states))

    def finish(held: Task, states: inner.InnerState) -> dict[str, jax.Array]:
        return jax.lax.map(lambda state: score_split(held, scored(state), state.stats), states)

    def spread_over(function: Callable, in_specs: tuple, out_specs: Any, donate: tuple[int, ...] = ()) -> Callable:
        mapped = jax.shard_map(function, mesh=over, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate)

    return (
        spread_over(begin, (everywhere, spread, spread), spread),
        spread_over(advance, (everywhere, everywhere, spread, spread, spread), spread, donate=(4,)),
        spread_over(finish, (everywhere, spread), spread),
        over,
    )


def compiled_window(task: Task, held: Task, make: Make, setting: Any, count: int) -> tuple[Any, inner.InnerState]:
    """The program of one window of `count` runs on one device, compiled from shapes, and the shapes of its states."""
    programs: Any = _programs(make, 1)
    begin, advance, *_ = programs
    stacked = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), setting)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count))
    states = jax.eval_shape(begin, task, stacked, keys)
    return advance.lower(task, held, stacked, keys, states).compile(), states


def check_steps(steps: int) -> None:
    """Raise ValueError unless there is a step."""
    if not isinstance(steps, numbers.Integral) or steps < 1:
        raise ValueError(f"steps={steps!r} must be a whole number, at least 1.")


def curve_steps(steps: int, window: int = WINDOW) -> list[int]:
    """After how many steps the points of a run's curves are: 250 -> [100, 200, 250]."""
    return [*range(window, steps, window), steps]


def pieces_of(steps: int, window: int) -> list[list[int]]:
    """The scans of each segment of `window` steps: 250 -> [[100], [50, 50], [50]].

    The last full window is cut where the last `window` steps of the run begin, so that their mean can be taken.
    """
    full, rest = divmod(steps, window)
    pieces = [[window]] * full
    if rest and full:
        pieces[-1] = [rest, window - rest]
    return [*pieces, [rest]] if rest else pieces


def mean_of_last(means: list[tuple[int, NDArray[np.float32]]], window: int) -> NDArray[np.float32]:
    """The mean loss of the last `window` steps; of all, if there were fewer. means: steps of a scan, mean loss [K]."""
    if means[-1][0] == window:
        return means[-1][1]
    chosen: list[tuple[int, NDArray[np.float32]]] = []
    for piece in reversed(means):
        if sum(count for count, _ in chosen) < window:
            chosen.append(piece)
    total = sum(count for count, _ in chosen)
    return np.asarray(sum(count * mean for count, mean in chosen) / total, np.float32)


def run(
    task: Task,
    held: Task,
    make: Make,
    settings: Sequence[Any],
    seeds: Sequence[int],
    steps: int,
    on_steps: Callable[[int], None] = lambda steps: None,
    window: int = WINDOW,
    scored: Scored = params_of,
    final: Task | None = None,
    keep: RunState | None = None,
) -> Curves:
    """K = len(settings) runs: run k trains with `make(settings[k])` from the init and batches of `seeds[k]`.

    Args:
      task: the split to train on; held: the split to score on.
      final: the split that the last parameters are scored on; None: held.
      make: settings -> optimizer, one function for all runs; keep it the same object to compile once.
      settings: trees of numbers or arrays, equal shapes.
      steps: any number; the last window is shorter where it is no multiple of `window`.
      on_steps: called with the number of steps that each window did, all runs together (for progress bars).
      window: steps between two scores, and that a point of the train curve is the mean of.
      scored: the parameters that are scored, from the state; the loss in training is that of the state's own.
      keep: where the runs' state is kept from time to time; what is there of these runs is not done again.
    """
    check_steps(steps)
    if task.stream is not None and len(set(seeds)) > 1:
        return _by_seed(task, held, make, settings, seeds, steps, on_steps, window, scored, final, keep)
    count = len(settings)
    devices = max(min(len(jax.local_devices()), count), 1)
    begin, _, finish, over = _programs(make, devices, window, scored)
    padded = -(-count // devices) * devices
    pad = [min(i, count - 1) for i in range(padded)]
    stacked = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(x[i]) for i in pad]), *settings)
    keys = jnp.stack([seed_key(seeds[i]) for i in pad])
    task, held = parallel.place(task, over), parallel.place(held, over)
    of = "" if keep is None else _digest(stacked, [*seeds, steps, window])
    start = Done(begin(task, stacked, keys), [], [], [], [])
    states, lengths, means, train, scores = (keep and keep.read(of, start.states)) or start
    if lengths:
        on_steps(sum(lengths) * count)
    with contextlib.closing(Feed(task, window, (EVAL_STREAM, seeds[0]), used=len(train))) as feed:
        for pieces in pieces_of(steps, window)[len(train) :]:
            segment = feed.next(lambda data: parallel.place(data, over))
            for length in pieces:
                _, advance, _, _ = _programs(make, devices, length, scored)
                states, loss, score = advance(segment, held, stacked, keys, states)
                lengths.append(length)
                means.append(np.asarray(loss))
            train.append(mean_of_last([*zip(lengths, means, strict=True)], window))
            scores.append(np.asarray(score))
            with _keeping(keep, of, Done(states, lengths, means, train, scores), sum(lengths) == steps):
                on_steps(sum(pieces) * count)
    last = finish(held if final is None else parallel.place(final, over), states)
    last = {name: np.asarray(x)[:count] for name, x in last.items()}
    return Curves(np.stack(train, 1)[:count], np.stack(scores, 1)[:count], last)


def _digest(settings: Any, numbers: Sequence[int]) -> str:
    """What tells one run from another of the same optimizer on the same task."""
    arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(settings))}
    return tensors.digest({**arrays, "numbers": np.asarray(numbers)})


@contextlib.contextmanager
def _keeping(keep: RunState | None, of: str, done: Done, ended: bool) -> Iterator[None]:
    """Write what is done if it is time to, or if the user stops the work in here."""
    if keep is None:
        yield
        return
    if keep.due(ended):
        keep.write(of, done)
    try:
        yield
    except interrupt.Interrupted:
        keep.write(of, done)
        raise


def _by_seed(
    task: Task,
    held: Task,
    make: Make,
    settings: Sequence[Any],
    seeds: Sequence[int],
    steps: int,
    on_steps: Callable[[int], None],
    window: int,
    scored: Scored,
    final: Task | None,
    keep: RunState | None,
) -> Curves:
    """`run` for one seed after the other: the runs of a call share the segments of one stream."""
    groups = {seed: [k for k, other in enumerate(seeds) if other == seed] for seed in seeds}
    parts = []
    for seed, group in groups.items():
        own, mine, part = [settings[k] for k in group], [seed] * len(group), keep and keep.part(seed)
        parts.append(run(task, held, make, own, mine, steps, on_steps, window, scored, final, part))
    places = np.argsort(np.concatenate(list(groups.values())))
    return jax.tree.map(lambda *x: np.concatenate(x)[places], *parts)


class Candidate(NamedTuple):
    """One optimizer in a comparison: a φ, or a rival with its settings."""

    label: str  # rows with the same label are meta-seeds of one method
    meta_seed: int | None  # None for rivals
    make: Make
    setting: Any
    scored: Scored = params_of


def compare(
    name: str,
    splits: Splits,
    candidates: Sequence[Candidate],
    seeds: Sequence[int],
    steps: int,
    held: str = "test",
    on_steps: Callable[[int], None] = lambda steps: None,
    window: int = WINDOW,
    keep: RunState | None = None,
) -> list[Row]:
    """Every candidate on every seed, from the same inits and batches. `held`: which split is scored.

    keep: where the state of candidates of one kind (`make`, `scored`) is kept; a second kind has a part of its own.

    >>> from lolo.evaluation.long_runs import Candidate
    >>> sgd = Candidate("sgd", None, optax.sgd, 0.1)  # the row's name, no meta-seed, and the optimizer optax.sgd(0.1)
    >>> rows = lolo.evaluate("quadratic", tasks.quadratic(), [sgd], seeds=[0, 1], steps=100)
    >>> [(row.optimizer, row.steps) for row in rows]
    [('sgd', 100), ('sgd', 100)]
    """
    rows: list[Row] = []
    by_make: dict[tuple[Make, Scored], list[Candidate]] = {}
    for candidate in candidates:
        by_make.setdefault((candidate.make, candidate.scored), []).append(candidate)
    for number, ((make, scored), group) in enumerate(by_make.items()):
        pairs = [(candidate, seed) for candidate in group for seed in seeds]
        curves = run(
            splits.train,
            getattr(splits, held),
            make,
            [candidate.setting for candidate, _ in pairs],
            [seed for _, seed in pairs],
            steps,
            on_steps,
            window,
            scored,
            keep=keep and (keep.part(number) if number else keep),
        )
        for k, (candidate, seed) in enumerate(pairs):
            rows.append(_row(name, splits.train, candidate, seed, steps, curves, k))
    return rows


def _row(name: str, task: Task, candidate: Candidate, seed: int, steps: int, curves: Curves, k: int) -> Row:
    def number(x: Any) -> float:
        return round(float(x), 6)

    final = {key: number(values[k]) for key, values in curves.final.items()}
    diverged = not (math.isfinite(curves.train_loss[k, -1]) and math.isfinite(final["loss"]))
    limit = task.loss_limit if task.loss_limit is not None else math.inf
    return Row(
        task=name,
        optimizer=candidate.label,
        meta_seed=candidate.meta_seed,
        seed=seed,
        steps=steps,
        train_loss=limit if diverged else number(curves.train_loss[k, -1]),
        train_minimum=number(np.nanmin(np.where(np.isfinite(curves.train_loss[k]), curves.train_loss[k], np.inf))),
        held_loss=limit if diverged else final["loss"],
        held=final,
        diverged=diverged,
        train_curve=[number(x) for x in curves.train_loss[k]],
        held_curve=[number(x) for x in curves.held_loss[k]],
    )
