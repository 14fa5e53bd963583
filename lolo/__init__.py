"""LoLO: learned optimizers that keep working past the unroll they were meta-trained on.

    import lolo
    optimizer = lolo.load().optimizer()      # an optax.GradientTransformation

Names are looked up on first use: `import lolo` imports neither JAX nor PyTorch.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "BC_ONLY": "recipes",
    "DivergedError": "training",
    "Estimator": "estimators",
    "FileError": "files",
    "LOLO": "recipes",
    "LearnedOptimizer": "learned",
    "NAIVE": "recipes",
    "Recipe": "recipes",
    "RecipeError": "recipes",
    "RunError": "training",
    "Splits": "problem",
    "Task": "problem",
    "TaskError": "problem",
    "Weights": "pretrained",
    "antithetic_gradient": "estimators",
    "build": "recipes",
    "classification": "problem",
    "es": "estimators",
    "evaluate": "evaluation:compare",
    "learned_sgd": "learned",
    "load": "pretrained",
    "meta_init": "meta",
    "meta_step": "meta",
    "nres": "estimators",
    "pes": "estimators",
    "resume": "training",
    "save": "pretrained",
    "small_fc": "learned",
    "train": "training",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'lolo' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    value = getattr(import_module(f"lolo.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
