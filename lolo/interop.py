"""Weights of other libraries: `lolo.optimizers.interop` under the name that users import."""

from lolo.optimizers.interop import (
    export_celo2,
    export_learned_optimization,
    export_pylo,
    import_celo2,
    import_learned_optimization,
    import_pylo,
)

__all__ = [
    "export_celo2",
    "export_learned_optimization",
    "export_pylo",
    "import_celo2",
    "import_learned_optimization",
    "import_pylo",
]
