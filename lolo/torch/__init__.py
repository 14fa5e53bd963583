"""LoLO for PyTorch: learned optimizers as a `torch.optim.Optimizer`. Needs no JAX."""

from lolo.torch.optimizer import LoLO

__all__ = ["LoLO"]
