"""What SyncBatchNorm sends between ranks: three small vectors forward, two backward."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from maefast.ops import _autograd


def check_group(process_group: object) -> None:
    if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
        raise TypeError(f"process_group must be a torch.distributed group, got {type(process_group).__name__}")


def size(process_group: object) -> int:
    return dist.get_world_size(process_group)


def combine(mean: Tensor, var: Tensor, rows: int, process_group: object) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance [1, C], number of rows) over all ranks, from those of each rank.

    One exchange in float64, so that the count is exact and means that differ between ranks lose nothing.
    """
    channels = mean.shape[1]
    mine = torch.cat([mean[0].double(), var[0].double(), mean.new_full((1,), rows, dtype=torch.float64)])
    every = [torch.empty_like(mine) for _ in range(size(process_group))]
    dist.all_gather(every, mine, group=process_group)
    means, variances, counts = torch.stack(every).split([channels, channels, 1], dim=1)
    total = counts.sum()
    whole = (means * counts).sum(0) / total
    spread = ((variances + (means - whole).square()) * counts).sum(0) / total
    return whole[None].to(mean.dtype), spread[None].to(var.dtype), total.to(mean.dtype)


def reduce(sums: Tensor, process_group: object) -> Tensor:
    """The sum over all ranks."""
    sums = sums.clone()
    dist.all_reduce(sums, group=process_group)
    return sums


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, process_group):
        if ctx is not None:
            ctx.process_group = process_group
        return reduce(x, process_group)

    @staticmethod
    def backward(ctx, grad):
        return sum_over_ranks(grad, ctx.process_group), None  # a Function again: it has every derivative


def sum_over_ranks(x: Tensor, process_group: object) -> Tensor:
    """`reduce` with a gradient: every rank's result depends on every rank's x."""
    return _autograd.apply(_SumOverRanks, x.contiguous(), process_group)
