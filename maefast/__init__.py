"""maefast: a custom-kernel engine for masked autoencoders in PyTorch.

Three ways in: functional ops (`maefast.ops`), modules and models (`maefast.nn`, `maefast.models`), and a
drop-in for existing models (`maefast.accelerate`). The import loads torch and the native kernels, and warns once
where those are missing; every other submodule is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import ops
from .ops import backend

__version__ = "0.1.0"

_LAZY = ("doctor", "graphs", "integrations", "kernels", "masking", "models", "nn", "optim", "profiling", "recipes")
_FROM = {
    "Cells": "nn",
    "sparsify": "nn",
    "accelerate": "integrations",
    "GraphCaptureError": "graphs",
    "graphed_step": "graphs",
    "report": "integrations",
    "restore": "integrations",
}
__all__ = [
    "Cells",
    "GraphCaptureError",
    "__version__",
    "accelerate",
    "backend",
    "doctor",
    "graphed_step",
    "graphs",
    "integrations",
    "kernels",
    "masking",
    "models",
    "nn",
    "ops",
    "optim",
    "profiling",
    "recipes",
    "report",
    "restore",
    "sparsify",
]

if TYPE_CHECKING:
    from . import doctor, graphs, integrations, kernels, masking, models, nn, optim, profiling, recipes
    from .graphs import GraphCaptureError, graphed_step
    from .integrations import accelerate, report, restore
    from .nn import Cells, sparsify


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FROM:
        return getattr(importlib.import_module(f"{__name__}.{_FROM[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
