"""LoLO for PyTorch: learned optimizers as a `torch.optim.Optimizer`. Needs no JAX."""

try:
    from lolo.torch.optimizer import LoLO
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        "lolo.torch needs torch, which is not installed: pip install 'lolo[torch]'", name="torch"
    ) from error

__all__ = ["LoLO"]
