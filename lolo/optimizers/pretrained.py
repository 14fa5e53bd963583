"""Weights as an optimizer: `lolo.load` and `lolo.save`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lolo.files import disk, settings
from lolo.files.disk import FileError
from lolo.optimizers import architecture, weights_file
from lolo.optimizers.architecture import LearnerSettings
from lolo.optimizers.base import LearnedOptimizer, Mask
from lolo.trees import PyTree

Number: TypeAlias = float | int | np.number | np.ndarray | jax.Array
Schedule: TypeAlias = Callable[[jax.Array], jax.Array]
Make: TypeAlias = Callable[[PyTree], optax.GradientTransformation]  # φ -> its optimizer
SMALLEST_SCALE = 0.02  # of a step_scale that is no mistake
LARGEST_RATE = 0.1  # of a learning rate of norm_fc that is none
SCHEDULED = "weight_decay", "learning_rate"  # settings that may be a schedule


P = ParamSpec("P")
R = TypeVar("R")


def _by_name(method: Callable[P, R]) -> Callable[P, R]:
    """A method that tells who gives it a learning rate in AdamW's place what to do instead."""

    @functools.wraps(method)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if len(args) > 1:
            raise TypeError(
                f"optimizer({args[1]!r}): settings are given by name, for instance learning_rate=1e-3. Weights of "
                "small_fc have no learning rate: leave it out; step_scale is none."
            )
        return method(*args, **kwargs)

    return checked


class Weights(NamedTuple):
    """A meta-trained optimizer.

    >>> weights = lolo.load("lolo-norm")
    >>> isinstance(weights, lolo.Weights), weights.learner.name, weights.meta_params["w0"].shape
    (True, 'norm_fc', (30, 8))
    """

    meta_params: dict[str, jax.Array]  #: φ
    learner: LearnerSettings  #: its architecture
    recipe: dict[str, Any]  #: of its meta-training; {} if unknown
    card: dict[str, Any]  #: the model card, with data, results, realised steps and limits

    def __repr__(self) -> str:
        numbers = sum(x.size for x in self.meta_params.values())
        words = [settings.without_sha256(self.learner.name), f"{numbers:,} numbers"]
        if self.recipe:
            tasks = "+".join(map(settings.without_sha256, self.recipe.get("tasks", ()))) or "unknown tasks"
            words.append(f"meta-trained on {tasks}")
            words += [f"T = {self.recipe['outer']['steps']:,}"] if "outer" in self.recipe else []
        return f"Weights({', '.join(words)})"

    @_by_name
    def optimizer(
        self,
        *,
        step_scale: Number | Schedule = 1.0,
        weight_decay: Number | Schedule | None = None,
        mask: Mask = None,
        clock_limit: Number | None = None,
        axis_name: str | None = None,
        sharded_axis: int | None = None,
        step_decay: Number | None = None,
        learning_rate: Number | Schedule | None = None,
        step_rms: str | None = None,
        adam_scale: Number | None = None,
        adam_beta2: Number | None = None,
        is_matrix: Callable[[str, Any], Any] | PyTree = None,
        state_dtype: jax.typing.DTypeLike | None = None,
        freeze_unseen: bool = False,
        kernel: str | None = None,
    ) -> optax.GradientTransformationExtraArgs:
        """The optimizer for optax.

        Args:
          step_scale: multiplies every update; a float, or a schedule step -> float. 1 is the step as meta-trained, and
            no learning rate: AdamW's 1e-3 would be a thousand times too small.
          weight_decay: decoupled, times λ1 (small_fc) or the learning rate (norm_fc); a float or a schedule; None: as
            shipped; 0 switches it off.
          mask: which parameters decay, as in optax.adamw: a tree of bools, the parameters' or a prefix of it, or a
            function of the parameters that returns one. None: all of them.
          clock_limit: the time features see min(t, clock_limit); None: as shipped; inf switches it off.
          axis_name: inside shard_map, the mesh axis over whose devices parameters are cut. Those that are equal on all
            of its devices may stand beside them.
          sharded_axis: the axis along which they are cut, in equal parts; None: the first.
          step_decay: updates are divided by √(1 + t/step_decay); None: as shipped; inf switches it off.
          learning_rate: of norm_fc, a float or a schedule step -> float; None: as shipped.
          step_rms: of norm_fc, "one": a matrix's step has root mean square learning_rate; "adam": learning_rate times
            that of AdamW's step, which wants about eight times the rate; None: as shipped.
          adam_scale: of norm_fc, the learning rate of vectors in units of learning_rate; None: as shipped.
          adam_beta2: of norm_fc, the decay of the second moment in vectors' AdamW; None: as shipped.
          is_matrix: of norm_fc, which parameters the network moves, as `lolo.norm_fc` has it; AdamW moves the others,
            as advised for embeddings and output layers. None: all of two axes or more are matrices.
          state_dtype: of norm_fc, float32 or bfloat16, that of the momenta; None: float32.
          freeze_unseen: of small_fc, entries that never had a gradient do not move, by weight decay neither. Without
            it padding rows, rows never looked up, and masked weights drift: about 0.02 to 0.15 in 1,000 steps.
            Gradients below about 1e-22 count as none, since their squares are 0.
          kernel: of norm_fc, "auto" or "plain", as `lolo.norm_fc` has it; None: auto, whatever meta-training had.

        All numbers may be arrays, traced ones too: optax.inject_hyperparams works. The optimizer's state has no empty
        leaf and no dtype but float32 and int32; its update takes and ignores extra arguments.

        Raises ValueError for a setting that the architecture does not have, and for a value that makes no sense. Its
        init and update raise ValueError for gradients or a mask of another tree than the parameters' and for complex
        parameters, TypeError for leaves that are no arrays of real numbers, and inside shard_map ValueError for
        parameters that are cut over another axis and for gradients that were not averaged. Under jit, whole arrays may
        lie on several devices without a word here. Warns of a step_scale below 0.02, which looks like another
        optimizer's rate.

        >>> schedule = optax.warmup_cosine_decay_schedule(0.0, 1.6e-2, 500, 10_000)
        >>> optimizer = lolo.load().optimizer(learning_rate=schedule, weight_decay=0.1)
        >>> cosine = optax.cosine_decay_schedule(1.0, 10_000)
        >>> optimizer = lolo.load("lolo-anytime").optimizer(step_decay=math.inf, step_scale=cosine)
        """
        check_scale(step_scale)
        requested: dict[str, Any] = {"weight_decay": weight_decay, "clock_limit": clock_limit, "step_decay": step_decay}
        requested |= {"learning_rate": learning_rate, "adam_scale": adam_scale, "adam_beta2": adam_beta2}
        _check_kinds(requested | {"step_scale": step_scale})
        requested["step_rms"] = step_rms
        if not isinstance(freeze_unseen, bool | np.bool_):
            raise ValueError(f"freeze_unseen={freeze_unseen!r}; expected True or False.")
        schedules = {name: requested[name] for name in SCHEDULED if callable(requested[name])}
        architecture.deployed(self.learner, dict.fromkeys(schedules, 1.0))  # whether it has such settings
        requested |= dict.fromkeys(schedules)
        if architecture.of(self.learner).fixed_size:
            warn_of_rate(learning_rate)
        requested["kernel"] = (
            "auto" if kernel is None and "kernel" in architecture.of(self.learner).deployment else kernel
        )
        learner = architecture.deployed(self.learner, requested)
        arrays = {name: jnp.asarray(x, jnp.float32) for name, x in requested.items() if architecture.is_array(x)}
        optional = {"mask": mask, "is_matrix": is_matrix, "state_dtype": state_dtype}
        given = {name: value for name, value in optional.items() if value is not None}
        architecture.check_arguments(learner, given)
        more = arrays | given | schedules
        where = axis_name, sharded_axis or 0
        make = maker(learner, step_scale, *where, presented=True, freeze_unseen=freeze_unseen, more=more)
        return _in_default_numpy(optax.with_extra_args_support(make(self.meta_params)))


def check_scale(step_scale: Any) -> None:
    """Raise ValueError for a step_scale that is no number of 0 or more; warn of some other optimizer's learning rate.

    What comes from a schedule or is traced is not looked at; JAX arrays get no warning.
    """
    if callable(step_scale) or isinstance(step_scale, jax.core.Tracer):
        return
    wrong = f"step_scale={step_scale!r} must be 0 or a positive number, or a schedule; 1 is as shipped."
    if isinstance(step_scale, bool) or not isinstance(step_scale, int | float | np.number | np.ndarray | jax.Array):
        raise ValueError(wrong)
    if isinstance(step_scale, jax.Array) and not architecture.is_known(step_scale):
        return
    try:
        number = settings.number(jax.device_get(step_scale))
    except (TypeError, ValueError) as error:
        raise ValueError(wrong) from error
    # optax.inject_hyperparams makes a JAX array of each value of a schedule, which may be small.
    if 0 < number < SMALLEST_SCALE and not isinstance(step_scale, jax.Array):
        warnings.warn(
            f"step_scale={number:g} is no learning rate: it multiplies the step that the weights were meta-trained "
            f"with, and 1 is as shipped. Training will be {1 / number:,.0f} times slower; leave it out.",
            stacklevel=4,
        )


def _check_kinds(requested: Mapping[str, Any]) -> None:
    """Raise ValueError for True, False, a word, or several numbers where a number belongs."""
    for name, value in requested.items():
        if isinstance(value, bool | np.bool_ | str):
            raise ValueError(f"{name}={value!r} must be a number.")
        if getattr(value, "shape", ()) != ():
            raise ValueError(f"{name} has shape {value.shape}; it must be one number.")


def warn_of_rate(learning_rate: Any) -> None:
    """Warn of a learning rate of norm_fc that looks like a multiple of the shipped step, as small_fc has it."""
    if isinstance(learning_rate, int | float | np.number) and learning_rate > LARGEST_RATE:
        warnings.warn(
            f"learning_rate={learning_rate:g} is no multiple of the shipped rate, but a rate itself, as AdamW's and "
            "Muon's: 1e-4 to 3e-2 are usual. Leave it out for the weights' own.",
            stacklevel=4,
        )


def maker(
    learner: LearnerSettings,
    step_scale: Number | Schedule = 1.0,
    axis_name: str | None = None,
    sharded_axis: int = 0,
    *,
    presented: bool = False,
    freeze_unseen: bool = False,
    more: Mapping[str, Any] = settings.NONE,
) -> Make:
    """φ -> the optimizer of these settings, updates multiplied by `step_scale`, a number or a schedule.

    `presented`: with its state in the form that users see. Otherwise, and with a scale of 1, one object for equal
    settings. `more`: see `architecture.build_learner`. `freeze_unseen`: see `Weights.optimizer`. Raises ValueError
    where the architecture has no such form.
    """
    row = architecture.of(learner)
    make = architecture.build_learner(learner, axis_name, sharded_axis, more).optimizer
    if freeze_unseen:
        if row.freeze_unseen is None:
            raise ValueError(f"learner {learner.name!r} has no freeze_unseen; leave it out.")
        make = _then(make, row.freeze_unseen)
    if presented:
        make = _then(make, row.present)
    if isinstance(step_scale, int | float) and step_scale == 1.0:
        return make
    return _then(make, lambda optimizer: optax.chain(optimizer, _scale(step_scale)))


def _in_default_numpy(optimizer: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, traced under the promotions that it was written for, whatever the process has set."""

    def init(params: PyTree) -> Any:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return optimizer.init(params)

    def update(grads: PyTree, state: Any, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, Any]:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return optimizer.update(grads, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def _then(make: Make, change: Callable[[optax.GradientTransformation], optax.GradientTransformation]) -> Make:
    return lambda meta_params: change(make(meta_params))


def _scale(by: Number | Schedule) -> optax.GradientTransformation:
    if callable(by):
        return optax.scale_by_schedule(by)
    if isinstance(by, int | float):
        return optax.scale(by)
    # An array has a dtype of its own, which must not become that of the updates.
    return optax.stateless(lambda updates, params: jax.tree.map(lambda u: (by * u).astype(u.dtype), updates))


def load(
    name_or_path: str | Path = weights_file.DEFAULT_WEIGHTS, *, code: Callable[..., LearnedOptimizer] | None = None
) -> Weights:
    """Weights by name, from a file, or from the Hugging Face Hub. Runs no code but the caller's own `code`.

    Args:
      name_or_path: the name of shipped ones (`lolo weights` lists them), a path, or, with the extra `hub`,
        `"user/repo"`, `"user/repo/file.safetensors"` or `"user/repo@revision/file.safetensors"`.
      code: of weights whose architecture is a function of a user's own file, that function. Its file must be the one
        that the weights were meta-trained with, by sha256. Such weights are refused without it.

    Raises disk.FileError, a ValueError, for anything that is not a complete weights file of a known version.

    >>> weights = lolo.load()
    >>> weights
    Weights(norm_fc, 329 numbers, meta-trained on fashion-mlp+books-mlp, T = 1,000)
    >>> optimizer = weights.optimizer()
    >>> params = {"weight": jnp.ones((3, 2))}
    >>> updates, state = optimizer.update(params, optimizer.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    """
    file, source = weights_file.read_weights(name_or_path), str(name_or_path)
    name = str(file.learner.get("name"))
    given = code if settings.is_own(name) else None
    if given is not None:
        check_code(name, given, source)
        architecture.register(name, given)
    try:
        learner = architecture.check_weights(file.meta_params, file.learner, source)
    except FileError:
        if given is not None:
            architecture.forget(name)  # else it would be taken the next time, when nobody gives it
        raise
    return Weights({name: jnp.asarray(x) for name, x in file.meta_params.items()}, learner, file.recipe, file.card)


def check_code(name: str, code: Any, source: str) -> None:
    """Raise FileError for what is no function, and one whose file is not that, by its sha256, of a learner's name.

    A function without a file, of an interactive session, is taken as it is.
    """
    if not callable(code):
        raise FileError(f"{source}: code={code!r} is no function; give the one that {name.partition('@')[0]} names.")
    try:
        function = inspect.unwrap(code)  # of a decorated one, the user's
        file = inspect.getsourcefile(function.func if isinstance(function, functools.partial) else function)
    except TypeError:
        file = None
    wanted = name.partition("@")[2]
    if file and Path(file).is_file() and disk.sha256_of(Path(file)) != wanted:
        found = disk.sha256_of(Path(file))
        raise FileError(f"{source}: {file} has changed since the meta-training: its sha256 is {found}, not {wanted}.")


def save(path: Path | str, weights: Weights) -> None:
    """Write weights as one safetensors file with architecture, recipe and card in its metadata.

    A limit of inf is written as None, which means the same.

    >>> lolo.save("mine.safetensors", lolo.load("lolo-small"))
    >>> lolo.load("mine.safetensors")
    Weights(small_fc, 2,402 numbers, meta-trained on fashion-mlp, T = 1,000)
    """
    learner = {name: None if x == math.inf else x for name, x in dataclasses.asdict(weights.learner).items()}
    weights_file.write_weights(
        path,
        {name: np.asarray(x) for name, x in weights.meta_params.items()},
        learner=learner,
        recipe=weights.recipe,
        card=weights.card,
    )
