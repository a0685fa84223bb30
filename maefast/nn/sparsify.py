"""`sparsify`: a plain convnet learns to run on the active cells of a masked image or volume."""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from maefast.nn import cell_channels, cell_fused, cell_groups, cell_reductions  # noqa: F401  (their handlers)
from maefast.nn.batch_norm import norm_arguments
from maefast.nn.cell_functions import sync_batch_norm
from maefast.nn.cells import ELEMENTWISE, HANDLERS, Cells, UnknownSparseOp, complete

# Modules of torch.nn whose meaning on packed cells is known, beside every elementwise activation (`activations`).
KNOWN = (
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool2d,
    nn.AdaptiveMaxPool3d,
    nn.Dropout,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.ChannelShuffle,
    nn.ZeroPad2d,
    nn.ZeroPad3d,
    nn.ConstantPad2d,
    nn.ConstantPad3d,
    nn.Softmax2d,
    nn.Identity,
)
# These only ever see what is no map any more (pooled features), go along its channels, or hold other modules.
HARMLESS = (
    nn.Flatten,
    nn.Conv1d,  # efficient channel attention: over the channels of what was pooled
    nn.Softmax,
    nn.LogSoftmax,
    nn.Sequential,
    nn.ModuleList,
    nn.ModuleDict,
    nn.ParameterList,
    nn.ParameterDict,
)

ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d)


@functools.cache
def activations() -> frozenset[type[nn.Module]]:
    """Those of torch.nn whose function of the same name is known on cells: nn.LeakyReLU, F.leaky_relu."""
    complete()
    known = {name.replace("_", "") for name in dir(F) if _is_known(getattr(F, name))}
    classes = (getattr(nn.modules.activation, name) for name in nn.modules.activation.__all__)
    return frozenset(kind for kind in classes if kind.__name__.lower() in known)


def _is_known(function: object) -> bool:
    return callable(function) and (function in HANDLERS or function in ELEMENTWISE)


class SparseSyncBatchNorm(nn.SyncBatchNorm):
    """SyncBatchNorm whose statistics are those of the active sites of all processes."""

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        if not isinstance(x, Cells):
            return super().forward(x)
        return sync_batch_norm(x, **norm_arguments(self))


def sparsify(model: nn.Module) -> nn.Module:
    """Check that `model` can run on packed cells, and make it ready; its parameters and their names stay as they are.

    Args:
        model: a convnet of plain torch modules: your own, timm's (docs/convnets.md lists which run), or one in the
            manner of torchvision's ResNet, RegNet, MobileNet, EfficientNet, DenseNet, ShuffleNet, SqueezeNet, ConvNeXt.
            Modules that are not torch's are looked at when they run. What they call on the cells may be elementwise,
            or go along channels, or be a convolution, norm or pooling; what mixes sites otherwise is refused.

    Returns:
        The same object. Given `Cells` it computes the active cells only, exactly as if every convolution and pooling
        were followed by a multiplication with the mask and every norm took its statistics over the visible sites
        (SparK, Tian et al., 2023). Given a tensor it is the dense network that it was.

    Raises:
        UnknownSparseOp: naming the module, for one of torch.nn that packed cells do not know; the network itself
            raises it, naming the module that calls, for a function without a sparse meaning.
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
    if kind not in (*KNOWN, *HARMLESS) and kind not in activations():
        if kind.__module__.startswith("torch.nn."):
            return "not known on packed cells; docs/convnets.md says what is"
        return None  # what it calls is checked when it runs
    if kind in (nn.Conv2d, nn.Conv3d) and module.padding_mode != "zeros":
        return f"padding_mode {module.padding_mode!r}: masked sites are zeros, so only zero padding has a meaning"
    if kind in (nn.MaxPool2d, nn.MaxPool3d) and module.return_indices:
        return "return_indices is not known on packed cells"
    if kind in (nn.InstanceNorm2d, nn.InstanceNorm3d) and module.track_running_stats:
        return "running statistics of an instance norm are not known on packed cells"
    if kind in ADAPTIVE and module.output_size not in (1, (1,) * (2 if kind in ADAPTIVE[:2] else 3)):
        return f"pooling to {module.output_size}: packed cells are pooled to one value a channel"
    return None
