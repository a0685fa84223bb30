"""maefast: a custom-kernel engine for masked autoencoders in PyTorch.

Three ways in: functional ops (`maefast.ops`), modules and models (`maefast.nn`, `maefast.models`) and, later,
a drop-in for existing models (`maefast.accelerate`). Submodules are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_SUBMODULES = ("ops", "nn", "models", "masking", "kernels", "doctor")
__all__ = ["__version__", "backend", "doctor", "kernels", "masking", "models", "nn", "ops"]

if TYPE_CHECKING:
    from . import doctor, kernels, masking, models, nn, ops
    from .ops import backend


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name == "backend":
        return importlib.import_module(f"{__name__}.ops").backend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
