"""Architectures by name: the one table of what the package asks of each, and how settings become a learned optimizer.

A new architecture is a settings type, a function that builds it, and a row here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from lolo.files import settings
from lolo.files.settings import Alternative, RecipeError, UserCodeError
from lolo.files.tensors import Arrays
from lolo.optimizers import base, norm_fc, norm_fc_kernel, norm_fc_spec, small_fc, small_fc_spec, weights_file

LearnerSettings: TypeAlias = Alternative  # of any architecture
MOST_NUMBERS = 16_000_000  # of a user's φ; with its description it stays below `weights_file.MAX_WEIGHTS_BYTES`


def _no_checks(learner: Any) -> None:
    """Every value of the settings' types will do."""


class Architecture(NamedTuple):
    """What the package asks of an architecture. `learner` is an instance of its settings type."""

    settings: type[Any]  # a subclass of Alternative: all that a recipe says of the learner
    build: Callable[..., base.LearnedOptimizer]  # (learner, axis_name, sharded_axis, **what no recipe holds)
    shapes: Callable[[Any], dict[str, tuple[int, ...]]]  # learner -> names and shapes of φ
    check: Callable[[Any], None] = _no_checks  # raises RecipeError for a learner that can't be
    check_meta_training: Callable[[Any], None] = _no_checks  # and for one that is for inference alone
    # The settings that may differ at inference, and what reads each, from a value or a word of a command line; it
    # raises ValueError, which says what there must be.
    deployment: Mapping[str, Callable[[Any], Any]] = settings.NONE
    arguments: tuple[str, ...] = ()  # of `build`, which no recipe holds: they are of the user's model
    expert_decay: Callable[[Any], float] = lambda learner: 0.0  # decay per step that its expert must have too
    keeps_adam_moments: Callable[[Any], bool] = lambda learner: False  # so that adam-of-learner can be its expert
    # Of a learner: what its update runs on, which decides the last bits. It starts JAX.
    path: Callable[[Any], str] = lambda learner: "plain"
    fixed_size: bool = False  # whether the size of a step is a setting: there is none to learn from an expert
    # The same optimizer, with its state in the form that users see.
    present: Callable[[optax.GradientTransformation], optax.GradientTransformation] = optax.with_extra_args_support
    # The same optimizer, under which entries that never had a gradient do not move; None: there is none.
    freeze_unseen: Callable[[optax.GradientTransformation], optax.GradientTransformation] | None = None


def _of_settings(make: Callable[..., base.LearnedOptimizer]) -> Callable[..., base.LearnedOptimizer]:
    """`Architecture.build` for a function whose arguments are the fields of the settings type."""

    def build(learner: Any, axis_name: str | None, sharded_axis: int, **more: Any) -> base.LearnedOptimizer:
        arguments: dict[str, Any] = {name: value for name, value in vars(learner).items() if name != "name"} | more
        return make(**arguments, axis_name=axis_name, sharded_axis=sharded_axis)

    return build


_OWN: dict[tuple[str | None, ...], Callable[..., Any]] = {}  # `settings.key_of` a learner's name -> its function


@dataclasses.dataclass(frozen=True)
class OwnLearner(Alternative):
    """A function of a user's file that returns a LearnedOptimizer; its settings stand in the name."""

    name: str = settings.OWN  # path.py:function, path.py:function:width=64, with the file's sha256 behind @


def register(name: str, function: Callable[..., Any]) -> None:
    """Let the name of a user's learner, with a sha256, mean this function. Raises UserCodeError for another name."""
    match = settings.NAME.fullmatch(name)
    if not match or not match["sha256"]:
        raise UserCodeError(f"{name!r} has no sha256; expected path.py:function@sha256.")
    _OWN[settings.key_of(name)] = function


def forget(name: str) -> None:
    """Let the name of a user's learner mean nothing again."""
    _OWN.pop(settings.key_of(name), None)


def _made_by_user(learner: OwnLearner) -> base.LearnedOptimizer:
    """Raises UserCodeError for code that nobody has registered, RecipeError for what it returns."""
    match, function = settings.NAME.fullmatch(learner.name), _code_of(learner)
    name, _, sha256 = learner.name.partition("@")
    if not match or function is None:
        raise UserCodeError(
            f"{name} is a user's code, of a file with sha256 {sha256 or 'unknown'}, and no code is run because a file "
            "names it. If you trust it, give the function, lolo.load(weights, code=function), or its file, "
            "--code path.py."
        )
    made = settings.with_settings(function, match["settings"])()
    if not isinstance(made, base.LearnedOptimizer):
        raise RecipeError(f"{name} returned {type(made).__name__}; expected lolo.LearnedOptimizer.")
    return made


def _code_of(learner: LearnerSettings) -> Callable[..., Any] | None:
    """The function that makes a user's learner; None where nobody has registered one, and for the package's own."""
    return _OWN.get(settings.key_of(learner.name)) if isinstance(learner, OwnLearner) else None


def _build_own(learner: OwnLearner, axis_name: str | None, sharded_axis: int, **more: Any) -> base.LearnedOptimizer:
    if axis_name is not None:
        raise ValueError(f"{learner.name} has no axis_name: a user's optimizer takes whole parameters; leave it out.")
    return _made_by_user(learner)


def _shapes_of_own(learner: OwnLearner) -> dict[str, tuple[int, ...]]:
    """Raises UserCodeError where the user's code fails, RecipeError for what a weights file could not hold."""
    made, name = _made_by_user(learner), settings.without_sha256(learner.name)

    def outline(key: jax.Array) -> dict[str, jax.Array]:
        meta_params = made.init(key)
        _check_own_params(meta_params, name)
        optimizer = made.optimizer(meta_params)
        if not isinstance(optimizer, optax.GradientTransformation):
            raise RecipeError(f"{name}: its optimizer is {type(optimizer).__name__}; expected an optax optimizer.")
        return meta_params

    with settings.failures_of(name):
        meta_params = jax.eval_shape(outline, jax.random.key(0))
    return {name: x.shape for name, x in meta_params.items()}


def _check_own_params(meta_params: Any, name: str) -> None:
    """Raise RecipeError unless a weights file can hold φ, and it comes back as it was."""
    if not isinstance(meta_params, dict) or not all(hasattr(x, "shape") for x in meta_params.values()):
        raise RecipeError(f"{name}: its φ is no dict of arrays, which is all that a weights file can hold.")
    for key, x in meta_params.items():
        if not isinstance(key, str) or key == "__metadata__":
            raise RecipeError(f"{name}: its φ has an array {key!r}; a weights file takes words, but __metadata__.")
        if x.dtype != jnp.float32 or not x.size:
            raise RecipeError(f"{name}: array {key!r} of its φ is {x.dtype}{list(x.shape)}; expected float32 numbers.")
    numbers = sum(x.size for x in meta_params.values())
    if numbers > MOST_NUMBERS:
        raise RecipeError(f"{name}: its φ has {numbers:,} numbers; a weights file holds at most {MOST_NUMBERS:,}.")


ARCHITECTURES: dict[str, Architecture] = {
    "small_fc": Architecture(
        settings=small_fc_spec.SmallFcSettings,
        build=_of_settings(small_fc.small_fc),
        shapes=small_fc_spec.shapes_of,
        check=small_fc_spec.check,
        check_meta_training=small_fc_spec.check_meta_training,
        deployment=small_fc_spec.DEPLOYMENT,
        arguments=("mask",),
        expert_decay=small_fc_spec.expert_decay,
        keeps_adam_moments=small_fc_spec.keeps_adam_moments,
        present=small_fc.one_tree_per_moment,
        freeze_unseen=small_fc.freeze_unseen,
    ),
    "norm_fc": Architecture(
        settings=norm_fc_spec.NormFcSettings,
        build=_of_settings(norm_fc.norm_fc),
        shapes=norm_fc_spec.shapes_of,
        check=norm_fc_spec.check,
        deployment=norm_fc_spec.DEPLOYMENT,
        arguments=("mask", "is_matrix", "state_dtype"),
        expert_decay=norm_fc_spec.expert_decay,
        path=lambda learner: norm_fc_kernel.path(learner.kernel),
        fixed_size=True,
    ),
    "sgd": Architecture(
        settings=base.SgdSettings,
        build=lambda learner, axis_name, sharded_axis: base.learned_sgd(),
        shapes=lambda learner: base.SGD_SHAPES,
    ),
}
OF_USER = Architecture(settings=OwnLearner, build=_build_own, shapes=_shapes_of_own)
"""The row of all functions of users. A recipe can be read and checked without their code."""


def of(learner: LearnerSettings) -> Architecture:
    """The row of the architecture that these settings are of. Raises RecipeError."""
    if isinstance(learner, OwnLearner):
        return OF_USER
    row: Architecture = settings.pick(ARCHITECTURES, "learner.name", learner.name)
    if type(learner) is not row.settings:
        raise RecipeError(
            f"learner.name={learner.name!r} is of {row.settings.__name__}, and these settings are "
            f"{type(learner).__name__}: leave the name as it is, or say {row.settings.__name__}(...)."
        )
    return row


def settings_types() -> dict[str, type[LearnerSettings]]:
    """What a recipe's section `learner` may hold, by its field `name`."""
    return {name: row.settings for name, row in {**ARCHITECTURES, settings.OWN: OF_USER}.items()}


def learner_from_dict(data: Any, source: str) -> LearnerSettings:
    """The architecture stored with weights or a recipe. Raises RecipeError, which names `source`."""
    try:
        return settings.parse_alternative(settings_types(), data, "learner")
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from error


def check_weights(meta_params: Arrays, data: dict[str, Any], source: str) -> LearnerSettings:
    """The architecture stored with weights. Raises FileError unless it can be, and φ fits it."""
    return weights_file.check_learner(meta_params, data, {**ARCHITECTURES, settings.OWN: OF_USER}, source)


def deployed(learner: LearnerSettings, requested: Mapping[str, Any]) -> LearnerSettings:
    """A learner with other deployment settings; None or an array: as it is.

    Raises ValueError for a setting that the learner lacks, and for a number that can't be, in an array too.
    """
    rules, changes = of(learner).deployment, dict[str, Any]()
    for name, value in requested.items():
        if value is None:
            continue
        if name not in rules:
            raise ValueError(f"learner {learner.name!r} has no {name}; leave it out.")
        try:
            if not is_array(value):
                changes[name] = rules[name](value)
            elif is_known(value):
                rules[name](float(jax.device_get(value)))  # checked alone: as an array it goes another way
        except ValueError as error:
            raise ValueError(f"{name}={value!r} {error}") from error
    return dataclasses.replace(learner, **changes)


def path_of(learner: LearnerSettings) -> str:
    """What a learner's update runs on, "plain" or a form of the CPU kernel. It decides the last bits; it starts JAX."""
    return of(learner).path(learner)


def check_arguments(learner: LearnerSettings, names: Iterable[str]) -> None:
    """Raise ValueError for the name of an argument that the architecture does not take."""
    for name in names:
        if name not in of(learner).arguments:
            raise ValueError(f"learner {learner.name!r} has no {name}; leave it out.")


def is_array(value: Any) -> bool:
    """Whether a setting comes as an array, as `optax.inject_hyperparams` has it; its value is not looked at."""
    return isinstance(value, jax.Array)


def takes_arrays(learner: LearnerSettings) -> bool:
    """Whether the architecture's deployment settings may be arrays, traced ones too: whether `build` takes them."""
    kinds = [parameter.kind for parameter in inspect.signature(of(learner).build).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def is_known(value: jax.Array) -> bool:
    """Whether an array is one number that can be looked at: not while it is traced."""
    return not isinstance(value, jax.core.Tracer) and value.shape == () and value.is_fully_addressable


def build_learner(
    learner: LearnerSettings,
    axis_name: str | None = None,
    sharded_axis: int = 0,
    more: Mapping[str, Any] = settings.NONE,
) -> base.LearnedOptimizer:
    """The architecture that a recipe names; inside shard_map, for parameters cut over `axis_name` (see small_fc).

    One object for equal arguments: what is compiled for it is found again. `more`: what no recipe holds and has no
    equals, deployment settings that are arrays, which may be traced, and `Architecture.arguments`.
    """
    if more:
        return of(learner).build(learner, axis_name, sharded_axis, **more)
    return _built(learner, axis_name, sharded_axis, _code_of(learner))


@functools.lru_cache(maxsize=64)
def _built(
    learner: LearnerSettings, axis_name: str | None, sharded_axis: int, code: Callable[..., Any] | None
) -> base.LearnedOptimizer:
    return of(learner).build(learner, axis_name, sharded_axis)
