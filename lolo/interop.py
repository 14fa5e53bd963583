"""Weights of other libraries: `lolo.optimizers.interop` under the name that users import."""

from lolo.optimizers.interop import export_learned_optimization, export_pylo, import_learned_optimization, import_pylo

__all__ = ["export_learned_optimization", "export_pylo", "import_learned_optimization", "import_pylo"]
