"""Models to make tasks of: `lolo.tasks.models` under the name that users import."""

from lolo.tasks.models import GPT_SIZES, GPTSize, Model, char_mlp, cross_entropy, gpt, mlp, resnet18

__all__ = ["GPT_SIZES", "GPTSize", "Model", "char_mlp", "cross_entropy", "gpt", "mlp", "resnet18"]
