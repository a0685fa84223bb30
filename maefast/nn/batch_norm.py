"""`nn.BatchNorm2d` and SyncBatchNorm (of two kinds) through `maefast.ops.batch_norm_act`: buffers as torch's."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from maefast import ops

Norm = nn.BatchNorm2d | nn.SyncBatchNorm


def norm_arguments(norm: Norm) -> dict:
    """What `batch_norm_act` needs to do as the module would now; counts the batch, as the module does."""
    momentum = norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    kept = not norm.training or norm.track_running_stats
    sync = hasattr(norm, "process_group") and norm.training and dist.is_available() and dist.is_initialized()
    return {
        "weight": norm.weight,
        "bias": norm.bias,
        "running_mean": norm.running_mean if kept else None,
        "running_var": norm.running_var if kept else None,
        "training": norm.training or norm.running_mean is None,
        "momentum": momentum or 0.0,
        "eps": norm.eps,
        "process_group": (norm.process_group or dist.group.WORLD) if sync else None,
    }


def batch_norm_map(norm: Norm, x: Tensor, act: str = "none", residual: Tensor | None = None) -> Tensor:
    """``act(norm(x) + residual)`` of maps [B, C, H, W]; channels-last in, channels-last out."""
    rows = x.permute(0, 2, 3, 1)
    if residual is not None:
        residual = residual.permute(0, 2, 3, 1)
    return ops.batch_norm_act(rows, act=act, residual=residual, **norm_arguments(norm)).permute(0, 3, 1, 2)
