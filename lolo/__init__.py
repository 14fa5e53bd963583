"""LoLO: learned optimizers that keep working past the unroll they were meta-trained on.

    import lolo
    optimizer = lolo.load().optimizer()      # an optax.GradientTransformation

Names are looked up on first use: `import lolo` imports neither JAX nor PyTorch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import Any

_NAMES = {
    "BC_ONLY": "training.recipes",
    "DivergedError": "training.loop",
    "Estimator": "method.estimators",
    "FileError": "files.disk",
    "How": "training.how",
    "LOLO": "training.recipes",
    "LearnedOptimizer": "optimizers.base",
    "NAIVE": "training.recipes",
    "Recipe": "training.recipes",
    "RecipeError": "files.settings",
    "RunError": "training.run_folder",
    "Splits": "method.task",
    "Task": "method.task",
    "TaskError": "method.task",
    "Weights": "optimizers.pretrained",
    "antithetic_gradient": "method.estimators",
    "build": "training.build",
    "classification": "tasks.classification",
    "compare": "notebook",
    "es": "method.estimators",
    "evaluate": "evaluation.long_runs:compare",
    "from_batches": "tasks.batches",
    "learned_sgd": "optimizers.base",
    "load": "optimizers.pretrained",
    "meta_init": "method.meta",
    "meta_step": "method.meta",
    "norm_fc": "optimizers.norm_fc",
    "nres": "method.estimators",
    "pes": "method.estimators",
    "resume": "training.loop",
    "save": "optimizers.pretrained",
    "small_fc": "optimizers.small_fc",
    "train": "notebook",
    "with_field": "files.settings",
}

__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("lolo")
    if name not in _NAMES:
        raise AttributeError(f"module 'lolo' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    try:
        value = getattr(import_module(f"lolo.{module}"), attribute or name)
    except ModuleNotFoundError as error:
        if (error.name or "lolo").partition(".")[0] == "lolo":
            raise
        extra = "jax" if module.partition(".")[0] in ("files", "method", "optimizers") else "train"
        missing = f"lolo.{name} needs {error.name}, which is not installed: pip install 'lolo[{extra}]'"
        raise ModuleNotFoundError(missing, name=error.name) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
