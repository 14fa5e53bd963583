"""Optimizers by name, as `lolo eval` and studies take them: weights with deployment settings, or a rival.

`lolo-small`, `FILE:clock_limit=10000,weight_decay=0.1,schedule=cosine`, `FILE:step_scale=2,freeze_unseen=true`,
`FILE:untrained=true`, `adamw:1e-3`, `adamw-cosine:grid`, `muon-warmup-cosine:1e-3,weight_decay=0.1`; or a function of a
user's file that returns an optax optimizer, `path.py:mine`, `path.py:mine:lr=0.01`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lolo.evaluation import long_runs, rivals, schedules
from lolo.evaluation.long_runs import Candidate
from lolo.evaluation.run_state import RunState
from lolo.files import disk, settings, user_code
from lolo.files.settings import RecipeError, UserCodeError
from lolo.method import experts, meta
from lolo.method.task import Splits
from lolo.optimizers import architecture, pretrained, weights_file
from lolo.optimizers.architecture import LearnerSettings
from lolo.training import recipes

FLAGS = {"true": True, "false": False}
PROBED_STEPS = 1000  # that a user's function is called for once, to see whether it works


@dataclasses.dataclass(frozen=True)
class DeploymentSettings:
    """How weights are deployed: what stands after their name, `WEIGHTS:clock_limit=10000,schedule=cosine`."""

    learner: dict[str, Any]  # settings of the architecture that are others than the weights came with
    step_scale: float = 1.0  # what updates are multiplied by
    schedule: str = "constant"  # and this besides: a name in `schedules.SCHEDULES`
    warmup: float = schedules.WARMUP  # share of the steps in which the schedule rises, if it does
    untrained: bool = False  # the φ that the meta-training began with, in the same frame
    freeze_unseen: bool = False  # whether entries that never had a gradient do not move

    @property
    def words(self) -> str:
        """The settings that were given, for a row's label: " weight_decay=0.1 schedule=cosine"."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        given = self.learner | {name: value for name, value in own.items() if value != defaults[name]}
        return "".join(f" {name}={'true' if value is True else value}" for name, value in given.items())


def parse_deployment(words: str, name: str, learner: LearnerSettings) -> DeploymentSettings:
    """Raises ValueError, which names the weights, the word and what could stand there."""
    row = architecture.of(learner)
    own = row.deployment
    rules: dict[str, Callable[[Any], Any]] = {
        **own,
        "step_scale": functools.partial(settings.number, positive=True),
        "schedule": _schedule_of(name),
        "warmup": _share,
        "untrained": functools.partial(settings.pick, FLAGS, f"{name}: untrained"),
    }
    if row.freeze_unseen is not None:
        rules["freeze_unseen"] = functools.partial(settings.pick, FLAGS, f"{name}: freeze_unseen")
    others = {field for other in architecture.ARCHITECTURES.values() for field in other.deployment} | {"freeze_unseen"}
    given = words.split(",") if words else []
    for field in (word.partition("=")[0] for word in given):
        if field in others - set(rules):
            raise ValueError(f"{name}:{words}: learner {learner.name!r} has no {field}; leave it out.")
    found = _parse_words(given, rules, name)
    inside = {field: found.pop(field) for field in own if field in found}
    return DeploymentSettings(inside, **found)


def _share(word: str) -> float:
    """A number from 0 to 1. Raises ValueError."""
    share = settings.number(word)
    if share > 1:
        raise ValueError("must be a share of the steps, from 0 to 1.")
    return share


class NamedWeights(NamedTuple):
    """Weights as they are deployed, and what their rows are called."""

    label: str
    meta_seed: int | None
    weights: pretrained.Weights  # their learner has the deployment settings
    deployment: DeploymentSettings


class NamedRival(NamedTuple):
    """An optimizer that people use today."""

    name: str  # of `rivals.NAMES`: kind and schedule
    learning_rate: float | str  # a number, or a grid of `rivals.GRIDS`
    weight_decay: float = rivals.WEIGHT_DECAY
    warmup: float = schedules.WARMUP


class NamedFunction(NamedTuple):
    """A user's function that returns an optax optimizer. Equal names stand for equal code."""

    label: str  # file, function and settings: "path.py:mine:lr=0.01"
    sha256: str  # of its file
    make: Callable[..., optax.GradientTransformation]  # steps of the run, is_matrix or None -> the optimizer


Named: TypeAlias = NamedWeights | NamedRival | NamedFunction


def read(
    names: Sequence[str | Path], methods: Mapping[str, str] = settings.NONE, code: Sequence[Path] = ()
) -> dict[str, Named]:
    """What optimizers' names mean, by name, in their order; weights are read here and nowhere else.

    A name that says the same as one before it, as adamw:0.001 after adamw:1e-3, is left out.

    Args:
      methods: what rows of these weights files are called, where their recipe's imitation and replay do not tell.
      code: files that may be run, of weights whose architecture is a user's function.

    Raises ValueError, FileError.
    """
    found: dict[str, Named] = {}
    # First what is no weights: reading those takes longer.
    by_hand = {name: function_of(name) or rival(name) for name in map(str, names)}
    loaded: dict[str, pretrained.Weights] = {}  # by path: weights may be deployed in several ways
    kinds: dict[str, Any] = {}
    for name, named in by_hand.items():
        if named is None:
            found[name] = _named_weights(name, methods, loaded, kinds, found, code)
        elif named not in found.values():
            found[name] = named
    return found


def function_of(name: str) -> NamedFunction | None:
    """What `path.py:function` names; None for another name. Runs the file's code. Raises ValueError."""
    own = user_code.parse(name, "optimizer")
    if own is None:
        return None
    sha256, folder = user_code.checked_sha256(own), own.path.absolute().parent
    with user_code.neighbours(folder):
        function = user_code.function_of(own, "optimizer", "an optax optimizer")
    given = settings.parse_settings(own.settings, settings.defaults_of(function), own.function)
    parameters = inspect.signature(function).parameters

    def make(steps: int, is_matrix: experts.IsMatrix | None = None) -> optax.GradientTransformation:
        known: dict[str, Any] = {"steps": steps, "is_matrix": is_matrix or experts.has_two_axes}
        of_the_run = {name: value for name, value in known.items() if name in parameters}
        try:
            with user_code.neighbours(folder):
                optimizer = function(**of_the_run | given)
        except Exception as error:
            raise ValueError(f"{name} failed with {type(error).__name__}: {error}.") from error
        if not isinstance(optimizer, optax.GradientTransformation):
            raise ValueError(f"{name} returned {type(optimizer).__name__}; expected an optax optimizer.")
        return optimizer._replace(
            init=_guarded(optimizer.init, f"init of {name}"),
            update=_guarded(optimizer.update, f"update of {name}", _check_update),
        )

    make(PROBED_STEPS)  # what is wrong is said before the first run
    return NamedFunction(f"{own.path.name}:{own.function}:{own.settings}".rstrip(":"), sha256, make)


def _check_update(found: Any, what: str, grads: Any, state: Any, *others: Any) -> None:
    """Raise ValueError unless an update gives updates like the gradients, and a state like the one before."""
    if not (isinstance(found, tuple) and len(found) == 2):
        raise ValueError(f"{what} returned {type(found).__name__}; expected (updates, state).")

    def form(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(jnp.shape(x), getattr(x, "dtype", None) or jnp.result_type(x)) for x in leaves]

    try:
        (updates, grads_, after, before) = map(form, (found[0], grads, found[1], state))
    except TypeError as error:
        raise ValueError(f"{what}: its state or its updates hold what is no number or array: {error}.") from error
    if (updates[0], [shape for shape, _ in updates[1]]) != (grads_[0], [shape for shape, _ in grads_[1]]):
        raise ValueError(f"{what} returned updates of another tree, or of other shapes, than the gradients have.")
    if after != before:
        raise ValueError(f"{what} returned a state of another tree, or of other shapes or dtypes, than it was given.")


def _guarded(
    call: Callable[..., Any], what: str, check: Callable[..., None] = lambda found, *args: None
) -> Callable[..., Any]:
    """A user's init or update, which says what it is where it fails. check: of what it returns, as `_check_update`."""

    @functools.wraps(call)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            found = call(*args, **kwargs)
        except Exception as error:
            raise ValueError(f"{what} failed with {type(error).__name__}: {error}.") from error
        check(found, what, *args)
        return found

    return guarded


def with_settings(name: str, words: str) -> str:
    """An optimizer's name with further settings behind it.

    >>> with_settings("lolo-small", "schedule=cosine"), with_settings("mine.py:f:lr=1", "momentum=0.9")
    ('lolo-small:schedule=cosine', 'mine.py:f:lr=1,momentum=0.9')
    """
    return f"{name}{',' if ':' in name.rpartition('.py:')[2] else ':'}{words}"


def rival(name: str) -> NamedRival | None:
    """What "adamw:1e-3" or "muon-cosine:grid" names; None for weights. Raises ValueError, RecipeError."""
    kind, separator, words = name.partition(":")
    if kind in rivals.NAMES and (separator or not Path(name).exists()):
        rate, *others = words.split(",")
        rules: dict[str, Callable[[Any], Any]] = {"weight_decay": settings.number, "warmup": _share}
        rules |= {"schedule": _schedule_of(name)} if kind in rivals.RIVALS else {}
        found = _parse_words(others, rules, name)
        kind = f"{kind}-{falling}" if (falling := found.pop("schedule", "constant")) != "constant" else kind
        return NamedRival(kind, _learning_rate(name, kind, rate), **found)
    weights = kind in weights_file.shipped_weights() or Path(name.rpartition(":")[0]).is_file()
    if separator and "=" not in words and not weights and not Path(name).exists():
        raise settings.unknown("optimizer", kind, rivals.NAMES)
    return None


def _learning_rate(name: str, kind: str, word: str) -> float | str:
    if word in rivals.GRIDS:
        return word
    try:
        rate = float(word)
    except ValueError:
        grids = " or ".join(f"{kind}:{grid}" for grid in rivals.GRIDS)
        raise ValueError(f"{name}: give a learning rate ({kind}:1e-3), or {grids}.") from None
    if not 0 < rate < float("inf"):
        raise ValueError(f"{name}: the learning rate must be a positive number.")
    return rate


def _schedule_of(name: str) -> Callable[[Any], Any]:
    return functools.partial(settings.pick, {word: word for word in schedules.SCHEDULES}, f"{name}: schedule")


def _parse_words(words: Iterable[str], rules: Mapping[str, Callable[[Any], Any]], name: str) -> dict[str, Any]:
    """Settings by name from words such as weight_decay=0.1. Raises ValueError, which names what is wrong."""
    found = dict[str, Any]()
    for word in words:
        field, _, value = word.partition("=")
        if field not in rules:
            raise settings.unknown(f"setting of {name}", field, rules)
        if field in found:
            raise ValueError(f"{name}: {field} is given twice; leave one out.")
        try:
            found[field] = rules[field](value)
        except RecipeError:  # a sentence by itself
            raise
        except ValueError as error:
            raise ValueError(f"{name}: {field}={value!r} {error}") from error
    return found


def _named_weights(
    name: str,
    methods: Mapping[str, str],
    loaded: dict[str, pretrained.Weights],
    kinds: dict[str, Any],
    before: Mapping[str, Named],
    code: Sequence[Path],
) -> NamedWeights:
    """Weights by name, deployed as it says. `kinds`: as `_label` has it."""
    path, separator, words = name.rpartition(":")
    if not separator or Path(name).exists():
        path, words = name, ""
    if path not in loaded:
        loaded[path] = pretrained.load(path, code=_code_of(path, code))
    weights = loaded[path]
    deployment = parse_deployment(words, path, weights.learner)
    pretrained.check_scale(deployment.step_scale)  # warns of another optimizer's learning rate
    taken = {(other.label, other.meta_seed) for other in before.values() if isinstance(other, NamedWeights)}
    label, seed = _label(weights, deployment, path, methods.get(path), kinds, taken)
    weights = weights._replace(learner=architecture.deployed(weights.learner, deployment.learner))
    if deployment.untrained:
        learned, key = architecture.build_learner(weights.learner), jax.random.key(seed or 0)
        weights = weights._replace(meta_params=meta.first_params(learned, key))
    return NamedWeights(label, seed, weights, deployment)


def _code_of(weights: str, files: Sequence[Path]) -> Callable[..., Any] | None:
    """The function that weights are of, from the file that may be run and has its sha256; None for our architectures.

    Raises UserCodeError where no file has it.
    """
    for file in files:
        if not file.is_file():
            raise UserCodeError(f"--code {file} does not exist; give the path of a Python file.")
    name = str(weights_file.read_weights(weights).learner.get("name")) if files else ""
    match = settings.NAME.fullmatch(name)
    if match is None or match["path"] is None or match["sha256"] is None:
        return None
    wanted = match["sha256"]
    fitting = [file for file in files if disk.sha256_of(file) == wanted]
    if not fitting:
        same = [file for file in files if file.name == Path(match["path"]).name]
        words = f"{same[0]} has changed" if same else f"--code {' '.join(map(str, files))} is another"
        raise UserCodeError(f"{weights}: its code is {match['path']} with sha256 {wanted}; {words}.")
    pinned = user_code.load(f"{fitting[0]}:{match['function']}@{wanted}", "learner.name", "a lolo.LearnedOptimizer")
    return user_code.loaded(pinned)


def _label(
    weights: pretrained.Weights,
    deployment: DeploymentSettings,
    name: str,
    method: str | None,
    kinds: dict[str, Any],
    taken: set[tuple[str, int | None]],
) -> tuple[str, int | None]:
    """Method and meta-seed of weights as they came, from their recipe, else the file's name; and how they are deployed.

    `kinds` holds what each label stands for. Rows of one label are meta-seeds of one recipe: weights that differ from
    those before them in more than the seed, or came with other settings than in meta-training, get a row of their own.
    """
    kind: Any = (None, weights.learner)
    label, seed = Path(name).stem, None
    if weights.recipe:
        try:
            recipe = recipes.from_dict(weights.recipe)
        except RecipeError as error:
            raise RecipeError(f"{name}: the recipe in its metadata can't be read: {error}") from error
        # slots_per_block is chosen for a machine: `lolo train --measure-blocks` may store another for each meta-seed.
        plain = settings.with_field(dataclasses.replace(recipe, seed=0), "estimator.slots_per_block", 1)
        seed, kind = recipe.seed, (plain, weights.learner)
        if weights.learner == recipe.learner:
            label = method or recipes.method_of(recipe) or label
    words = deployment.words
    another = kinds.setdefault(label + words, kind) != kind or (label + words, seed) in taken
    return ((name if another else label) + words, seed)


@functools.lru_cache(maxsize=64)
def _make(
    learner: LearnerSettings,
    numbers: frozenset[str],
    schedule: str,
    steps: int,
    freeze_unseen: bool,
    is_matrix: experts.IsMatrix | None,
) -> long_runs.Make:
    """(φ, numbers by name) -> optimizer, one object for equal arguments: what is compiled for it is found again."""
    taken = is_matrix is not None and "is_matrix" in architecture.of(learner).arguments
    more = {"is_matrix": is_matrix} if taken else {}

    def make(setting: tuple[dict[str, jax.Array], dict[str, rivals.Number]]) -> optax.GradientTransformation:
        meta_params, given = setting
        scale: Any = given.get("step_scale", 1.0)
        if schedule != "constant":
            factor, scaled = schedules.SCHEDULES[schedule], scale
            scale = lambda count: scaled * factor(count, steps, given["warmup"] * steps)  # noqa: E731
        own = {name: given[name] for name in numbers - {"step_scale", "warmup"}}
        return pretrained.maker(learner, scale, freeze_unseen=freeze_unseen, more=more | own)(meta_params)

    return make


def _weights(named: NamedWeights, steps: int, is_matrix: experts.IsMatrix | None) -> Candidate:
    """Weights as a candidate. Deployments that differ in numbers alone share a compiled program."""
    label, seed, weights, deployed = named
    inside: dict[str, Any] = {}
    if architecture.takes_arrays(weights.learner):
        inside = {name: x for name, x in deployed.learner.items() if type(x) in (int, float)}
    numbers = dict(inside)
    if deployed.step_scale != 1.0:
        numbers["step_scale"] = deployed.step_scale
    if deployed.schedule != "constant":
        numbers["warmup"] = deployed.warmup
    # Numbers are given with each setting: the learner, by which programs are told apart, has its type's.
    defaults: dict[str, Any] = {x.name: x.default for x in dataclasses.fields(weights.learner) if x.name in inside}
    learner = dataclasses.replace(weights.learner, **defaults)
    horizon = 0 if deployed.schedule == "constant" else steps
    make = _make(learner, frozenset(numbers), deployed.schedule, horizon, deployed.freeze_unseen, is_matrix)
    return Candidate(label, seed, make, (weights.meta_params, numbers))


def candidate(
    named: Named,
    splits: Splits,
    steps: int,
    on_steps: Callable[[int], None] = lambda count: None,
    is_matrix: experts.IsMatrix | None = None,
    keep: RunState | None = None,
) -> Candidate:
    """What `long_runs.compare` takes. The best of a grid is found here; on_steps gets the number of steps done.

    is_matrix: of the task's parameters, those that optimizers which tell matrices apart move as such; for a user's
    function with an argument of this name too. None: all of two axes or more. A grid's best is found without it.
    keep: where the state of a grid's runs is kept.
    """
    if isinstance(named, NamedWeights):
        return _weights(named, steps, is_matrix)
    if isinstance(named, NamedFunction):
        optimizer = named.make(steps, is_matrix)
        return Candidate(named.label, None, lambda setting: optimizer, 0.0)
    name, rate, weight_decay, warmup = named
    if isinstance(rate, str):
        return rivals.best_of_grid(splits, name, steps, rate, on_steps, keep)
    return rivals.rival(name, rate, steps, weight_decay, warmup, is_matrix)
