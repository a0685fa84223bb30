"""`sparsify`: a plain convnet learns to run on the active cells of a masked image."""

from __future__ import annotations

from torch import Tensor, nn

from maefast.nn.batch_norm import norm_arguments
from maefast.nn.cell_functions import sync_batch_norm
from maefast.nn.cells import Cells, UnknownSparseOp

# Modules of torch.nn whose meaning on packed cells is known: `cell_functions` serves what they call.
KNOWN = (
    nn.Conv2d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.ReLU,
    nn.ReLU6,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Dropout,
    nn.Identity,
)
# These only ever see what is no map any more (pooled features), or hold other modules.
HARMLESS = (
    nn.Flatten,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softmax,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)


class SparseSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm whose statistics are those of the active sites of all processes."""

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        if not isinstance(x, Cells):
            return super().forward(x)
        return sync_batch_norm(x, **norm_arguments(self))


def sparsify(model: nn.Module) -> nn.Module:
    """Check that `model` can run on packed cells, and make it ready; its parameters and their names stay as they are.

    Args:
        model: a convnet of plain torch modules (a timm or torchvision ResNet, ConvNeXt, MobileNet, EfficientNet, or
            your own). Modules that are not torch's are looked at when they run: every torch function that they call
            on the cells must be known.

    Returns:
        The same object. Given `Cells` it computes the active cells only, exactly as if every convolution and pooling
        were followed by a multiplication with the mask and every norm took its statistics over the visible sites
        (SparK, Tian et al., 2023). Given a tensor it is the dense network that it was.

    Raises:
        UnknownSparseOp: naming the module, for one of torch.nn that packed cells do not know.
    """
    for name, module in model.named_modules():
        problem = _problem(module)
        if problem:
            raise UnknownSparseOp(f"{name or 'the model'} ({type(module).__name__}): {problem}")
    for module in model.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = SparseSyncBatchNorm  # keeps parameters, buffers and hooks
    return model


def _problem(module: nn.Module) -> str | None:
    kind = type(module)
    if kind not in (*KNOWN, *HARMLESS):
        if kind.__module__.startswith("torch.nn."):
            return "not known on packed cells; see maefast.nn.sparsify.KNOWN for what is"
        return None  # what it calls is checked when it runs
    if kind is nn.Conv2d and module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r}: masked sites are zeros, so only zero padding has a meaning"
    if kind is nn.MaxPool2d and (module.ceil_mode or module.return_indices):
        return "ceil_mode and return_indices are not known on packed cells"
    if kind is nn.InstanceNorm2d and module.track_running_stats:
        return "running statistics of an instance norm are not known on packed cells"
    if kind is nn.AdaptiveAvgPool2d and module.output_size not in (1, (1, 1)):
        return f"pooling to {module.output_size}: packed cells are pooled to one value a channel"
    return None
