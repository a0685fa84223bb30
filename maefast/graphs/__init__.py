"""A whole training step as one launch: forward, backward, clipping and optimiser in one CUDA graph.

    step = maefast.graphed_step(model, optimizer, clip=1.0, autocast=torch.bfloat16)
    for images in loader:
        loss = step(images)

See `graphed_step`.
"""

from .capture import GraphCaptureError
from .state import recording
from .step import GraphedStep, graphed_step

__all__ = ["GraphCaptureError", "GraphedStep", "graphed_step", "recording"]
