"""A batch norm over all processes that also runs on CPUs."""

from __future__ import annotations

from torch import Tensor, nn

from maefast.nn.batch_norm import batch_norm_map, norm_arguments
from maefast.nn.cell_functions import sync_batch_norm
from maefast.nn.cells import Cells


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all processes (of `process_group`; None: every one).

    Parameters, buffers and values are those of `nn.SyncBatchNorm`, which DistributedDataParallel refuses on a CPU. On
    `Cells` the statistics are those of the active sites of all processes. Alone in its process it is a BatchNorm2d.
    """

    process_group = None

    def forward(self, x: Tensor | Cells) -> Tensor | Cells:
        """Maps [B, C, H, W] or Cells -> the same."""
        if isinstance(x, Cells):
            return sync_batch_norm(x, **norm_arguments(self))
        return batch_norm_map(self, x)


def synchronise_(module: nn.Module) -> nn.Module:
    """Make every `nn.BatchNorm2d` in `module` a SyncBatchNorm2d, in place: the same parameters, buffers and hooks."""
    for norm in module.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = SyncBatchNorm2d
    return module
