"""Norms over active sites: `batch_norm_act`, `grn`, `group_norm_cells`, `instance_norm_cells`, `segment_sum`.

All of them are two passes over the rows [R, C] of a level: statistics of each segment of rows (the whole batch, or
one sample), then an affine map that differs by segment and channel. In between stands arithmetic on [segments, C].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry, _sync
from maefast.ops._cell_norm_autograd import ACTIVATIONS, Grn, NormAct, SegmentSum
from maefast.ops.cells import CellMask, check_cells

GRN_SCOPES = ("sample", "batch", "dense")


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: str = "none",
    residual: Tensor | None = None,
    process_group: object | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``act(BatchNorm(x) + residual)``, statistics over every leading dimension (Ioffe & Szegedy, 2015).

    On packed cells these are SparK's sparse statistics (active sites alone); on a channels-last map they are dense.

    Args:
        x: [..., C]. residual: what is added before the activation, same shape, or None.
        weight, bias: [C], or None for 1 and 0. Always used, and their gradients summed, in float32 (float64).
        running_mean, running_var: [C] buffers, or None. In training they are updated in place as `nn.BatchNorm2d`
            does: ``running += momentum * (batch - running)``, the variance unbiased.
        training: normalise by the statistics of x; else by the running ones.
        momentum: of the running buffers. A cumulative average is the caller's 1 / num_batches_tracked.
        act: "none", "relu" or "relu6".
        process_group: a `torch.distributed` group that shares the statistics (SyncBatchNorm). Ranks may hold
            different numbers of rows. Gradients of weight and bias stay local, for DDP to average.

    Returns:
        [..., C] in the promoted dtype of x and residual.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; one row in training; no running buffers in eval.
    """
    _checks.one_of("act", act, ACTIVATIONS)
    if residual is not None:
        _checks.tensor("x", x)
        _checks.tensor("residual", residual)
        _checks.same_device(x=x, residual=residual)
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
        dtype = _checks.promote(x, residual)
        x, residual = x.to(dtype), residual.to(dtype)
    args = running_mean, running_var, training, momentum, eps, process_group
    return BatchNorm(x, weight, bias, *args, backend=backend)(act, residual)


class BatchNorm:
    """The two halves of `batch_norm_act`, whose arguments these are. Made, it has the statistics of x and has moved the
    running ones; called, as often as wanted, it normalises, adds a residual (of x's dtype) and activates."""

    def __init__(
        self, x, weight, bias, running_mean, running_var, training, momentum, eps, process_group=None, *, backend=None
    ) -> None:
        channels = _check_rows(x, eps)
        training = _checks.flag("training", training)
        _sync.check_group(process_group)
        if (running_mean is None) != (running_var is None):
            raise ValueError("running_mean and running_var must be given together")
        if running_mean is not None:
            for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
                _checks.vector(name, buffer, channels)
        elif not training:
            raise ValueError("without training, running_mean and running_var are needed")
        _checks.number("momentum", momentum)
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        _checks.same_device(x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
        self.weight, self.bias = _affine(x, weight, bias)  # in the arithmetic of the sum
        self.group = process_group if training else None
        rows = x.numel() // channels
        if training and rows < 2 and (self.group is None or _sync.size(self.group) < 2):
            raise ValueError(f"batch statistics need more than one row, got {rows}: x of shape {tuple(x.shape)}")
        self.name = _dispatch.choose("norm_act", x.device.type, x.dtype, backend)
        self.shape, self.x = x.shape, x.reshape(-1, channels).contiguous()
        if not training:
            mean, var = (
                buffer.detach().reshape(1, channels).to(self.weight.dtype) for buffer in (running_mean, running_var)
            )
            count = None
        elif self.name == "reference":
            mean, var, count = batch_statistics_reference(self.x.to(self.weight.dtype), self.group)
        else:
            with torch.no_grad():
                mean, var = _registry.raw("segment_stats", self.name)(self.x, None, 1)
                count = rows
                if self.group is not None:
                    mean, var, count = _sync.combine(mean, var, rows, self.group)
        if training and running_mean is not None:
            _update(running_mean, running_var, mean, var, count, momentum)
        self.mean, self.rstd, self.count = mean, (var + eps).rsqrt(), count

    def __call__(self, act: str, residual: Tensor | None) -> Tensor:
        other = None if residual is None else residual.reshape(self.x.shape)
        args = self.x, other, self.weight, self.bias, self.mean, self.rstd
        if self.name == "reference":
            return batch_norm_act_reference(*args, act).view(self.shape)
        more = self.count, None, 1, self.x.shape[1], ACTIVATIONS.index(act), self.group, self.name
        return _autograd.apply(NormAct, *args, *more).view(self.shape)


def batch_norm_act_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, act: str
) -> Tensor:
    """The definition on rows [R, C], differentiable, also by the statistics."""
    y = (x.to(weight.dtype) - mean) * rstd * weight + bias
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = F.relu(y) if act == "relu" else F.relu6(y) if act == "relu6" else y
    return y.to(x.dtype)


def batch_statistics_reference(rows: Tensor, process_group: object | None) -> tuple[Tensor, Tensor, int | Tensor]:
    """(mean, biased variance, number of rows) of the definition, differentiable."""
    count = rows.shape[0]
    if process_group is None:
        mean = rows.mean(0)
        return mean, (rows - mean).square().mean(0), count
    count = _sync.sum_over_ranks(rows.new_tensor(float(count)), process_group)
    mean = _sync.sum_over_ranks(rows.sum(0), process_group) / count
    return mean, _sync.sum_over_ranks((rows - mean).square().sum(0), process_group) / count, count


@torch.no_grad()
def _update(running_mean, running_var, mean, var, count, momentum) -> None:
    unbiased = var * (count / (count - 1))
    running_mean.lerp_(mean.view_as(running_mean).to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.view_as(running_var).to(running_var.dtype), momentum)


# --- norms of each sample ----------------------------------------------------------------------------------


def group_norm_cells(
    x: Tensor,
    plan: CellMask | None,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """GroupNorm (Wu & He, 2018) with the statistics of each sample's active sites.

    Args:
        x: packed cells [T, h, w, C] or [T, d, h, w, C]; with plan None, a dense channels-last map of either kind.
        groups: divides C. weight, bias: [C], or None for 1 and 0.

    Returns:
        Like x. A sample's variance is biased, as in `nn.GroupNorm`.

    Raises:
        TypeError, ValueError: x does not fit the plan, groups does not divide C.
    """
    channels = _check_cells(x, plan, eps)
    _checks.integer("groups", groups, 1)
    if channels % groups:
        raise ValueError(f"groups must divide the {channels} channels, got {groups!r}")
    weight, bias = _affine(x, weight, bias)
    name = _dispatch.choose("norm_act", x.device.type, x.dtype, backend)
    if name == "reference":
        return group_norm_cells_reference(x, plan, groups, weight, bias, eps)
    cu, sites, counts = _segments(x, plan)
    rows = x.reshape(-1, channels).contiguous()
    with torch.no_grad():
        mean, var = _registry.raw("segment_stats", name)(rows, cu, sites)
        if groups < channels:  # every channel of a sample counts the same rows
            grouped = mean.unflatten(1, (groups, -1))
            mean = grouped.mean(2, keepdim=True)
            var = var.unflatten(1, (groups, -1)).mean(2, keepdim=True)
            var = var + (grouped - mean).square().mean(2, keepdim=True)
            mean, var = (s.expand_as(grouped).flatten(1).contiguous() for s in (mean, var))
        rstd = (var + eps).rsqrt()
    counts = counts.to(mean.dtype)[:, None]
    args = mean, rstd, counts, cu, sites, groups, 0, None, name
    return _autograd.apply(NormAct, rows, None, weight, bias, *args).view(x.shape)


def group_norm_cells_reference(
    x: Tensor, plan: CellMask | None, groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """The definition, differentiable: `F.group_norm` of each sample's own sites."""
    rows = x.to(weight.dtype).flatten(1, -2)  # [cells, sites, C]
    parts = [rows[b : b + 1] for b in range(x.shape[0])] if plan is None else rows.split(_cell_counts(plan))
    done = [
        F.group_norm(part.reshape(1, -1, x.shape[-1]).mT, groups, weight, bias, eps).mT.reshape(part.shape)
        if part.numel() > groups  # torch refuses a group of one value, which is its own mean
        else (part - part) * weight + bias
        for part in parts
    ]
    return torch.cat(done).view(x.shape).to(x.dtype)


def instance_norm_cells(
    x: Tensor,
    plan: CellMask | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """InstanceNorm with the statistics of each sample's active sites: `group_norm_cells` with one channel a group,
    whose arguments, result and errors these are."""
    channels = _check_cells(x, plan, eps)
    return group_norm_cells(x, plan, channels, weight, bias, eps, backend=backend)


def grn(
    x: Tensor,
    plan: CellMask | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    scope: str = "sample",
    *,
    backend: str | None = None,
) -> Tensor:
    """Global response normalisation (ConvNeXt V2, Woo et al., 2023) over active sites.

    ``G = ||x||_2`` over sites, ``N = G / (mean of G over channels + eps)``, ``y = weight * (x * N) + bias + x``.

    Args:
        x: packed cells [T, h, w, C] or [T, d, h, w, C]; with plan None, a dense channels-last map of either kind.
        weight, bias: C values, e.g. [1, 1, 1, C].
        scope: the three public meanings: "sample", each sample's active sites, ``G = sqrt(sum x^2 + eps)`` (the JAX
            code behind the paper's numbers); "batch", all active sites of the batch, ``G = sqrt(sum x^2)`` (the
            PyTorch code); "dense", each sample, ``G = sqrt(sum x^2)`` (the layer of the dense network).

    Returns:
        Like x.

    Raises:
        TypeError, ValueError: x does not fit the plan, unknown scope.
    """
    _check_cells(x, plan, eps)
    _checks.one_of("scope", scope, GRN_SCOPES)
    weight, bias = _affine(x, weight, bias)
    name = _dispatch.choose("norm_act", x.device.type, x.dtype, backend)
    if name == "reference":
        return grn_reference(x, plan, weight, bias, eps, scope)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    cu, sites, counts = _segments(x, None if scope == "batch" else plan)
    if scope == "batch":
        cu, counts = None, rows.shape[0]
    else:
        counts = counts.to(weight.dtype)[:, None]
    args = counts, cu, sites, eps, eps if scope == "sample" else 0.0, name
    return _autograd.apply(Grn, rows, weight, bias, *args).view(x.shape)


def grn_reference(x: Tensor, plan: CellMask | None, weight: Tensor, bias: Tensor, eps: float, scope: str) -> Tensor:
    """The definition, differentiable."""
    rows = x.to(weight.dtype).flatten(1, -2)
    if scope == "batch":
        parts = [rows]
    else:
        parts = [rows[b : b + 1] for b in range(x.shape[0])] if plan is None else rows.split(_cell_counts(plan))
    done = []
    for part in parts:
        if scope == "sample":
            response = (part.square().sum((0, 1)) + eps).sqrt()
        else:
            response = torch.linalg.vector_norm(part, dim=(0, 1))
        done.append(weight * (part * (response / (response.mean() + eps))) + bias + part)
    return torch.cat(done).view(x.shape).to(x.dtype)


def segment_sum(x: Tensor, plan: CellMask | None, *, backend: str | None = None) -> Tensor:
    """[B, C], the sum over each sample's active sites, in float32 (float64); a sample without any has zero.

    Args:
        x: packed cells [T, h, w, C] or [T, d, h, w, C]; with plan None, a dense channels-last map of either kind.
    """
    _check_cells(x, plan, 1.0)
    name = _dispatch.choose("segment_stats", x.device.type, x.dtype, backend)
    if name == "reference":
        return segment_sum_reference(x, plan)
    cu, sites, counts = _segments(x, plan)
    return _autograd.apply(SegmentSum, x, cu, counts, sites, name)


def segment_mean(x: Tensor, plan: CellMask, *, backend: str | None = None) -> Tensor:
    """`segment_sum` over the number of active sites; zero where there are none."""
    name = _dispatch.choose("segment_stats", x.device.type, x.dtype, backend)
    sites = math.prod(x.shape[1:-1])
    if name == "reference":
        return segment_sum_reference(x, plan) / (plan.cu_cells.diff().clamp(min=1) * sites)[:, None]
    return _autograd.apply(SegmentSum, x, plan.cu_cells, None, sites, name)


def segment_sum_reference(x: Tensor, plan: CellMask | None) -> Tensor:
    """The definition, differentiable."""
    cells = x.to(_wide(x)).flatten(1, -2).sum(1)
    if plan is None:
        return cells
    return torch.stack([part.sum(0) for part in cells.split(_cell_counts(plan))])


# --- helpers ---------------------------------------------------------------------------------------------------


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _check_rows(x: Tensor, eps: float) -> int:
    _checks.tensor("x", x)
    if x.ndim < 2 or x.shape[-1] < 1:
        raise ValueError(f"x must be [..., C] with at least one channel, got shape {tuple(x.shape)}")
    _checks.positive("eps", eps)
    return x.shape[-1]


def _check_cells(x: Tensor, plan: CellMask | None, eps: float) -> int:
    if plan is None:
        _checks.tensor("x", x, ndim=(4, 5))
    else:
        check_cells(plan, x)
    return _check_rows(x, eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both in the arithmetic type of x."""
    wide, channels = _wide(x), x.shape[-1]
    _checks.same_device(x=x, weight=weight, bias=bias)
    if weight is None:
        weight = torch.ones(channels, dtype=wide, device=x.device)
    if bias is None:
        bias = torch.zeros(channels, dtype=wide, device=x.device)
    return (
        _checks.vector("weight", weight, channels).to(wide),
        _checks.vector("bias", bias, channels).to(wide),
    )


def _segments(x: Tensor, plan: CellMask | None) -> tuple[Tensor, int, Tensor]:
    """(cu, sites, counts): sample b's rows are [cu[b] * sites, cu[b+1] * sites), counts [B] of them."""
    sites = math.prod(x.shape[1:-1])
    cu = plan.cu_cells if plan is not None else torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device)
    return cu, sites, cu.diff() * sites


def _cell_counts(plan: CellMask) -> list[int]:
    return plan.cu_cells.diff().tolist()
