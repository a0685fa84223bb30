"""The raw ops of `cell_norm` and their autograd: two passes over rows each way, arithmetic on [segments, C] between."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.ops import _autograd, _registry, _sync

_raw_op = _registry.family("cell_norm")

ACTIVATIONS = ("none", "relu", "relu6")  # their codes in the raw ops


# Segments of rows: [cu[b] * sites, cu[b + 1] * sites), or all rows without cu; mean, scale, offset and slope are
# [segments, C]. act is an index into ACTIVATIONS.
@_raw_op("segment_stats(Tensor x, Tensor? cu, SymInt sites) -> (Tensor, Tensor)")
def _segment_stats_fake(x, cu, sites):
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    shape = (1 if cu is None else cu.shape[0] - 1, x.shape[1])
    return x.new_empty(shape, dtype=wide), x.new_empty(shape, dtype=wide)


@_raw_op(
    "norm_act(Tensor x, Tensor? residual, Tensor? cu, SymInt sites, Tensor mean, Tensor scale, Tensor bias, int act)"
    " -> Tensor"
)
def _norm_act_fake(x, residual, cu, sites, mean, scale, bias, act):
    return x.new_empty(x.shape)


@_raw_op(
    "norm_act_sums(Tensor grad, Tensor x, Tensor? gate, Tensor? cu, SymInt sites, Tensor mean, Tensor scale,"
    " Tensor bias, int act) -> (Tensor, Tensor)"
)
def _norm_act_sums_fake(grad, x, gate, cu, sites, mean, scale, bias, act):
    return x.new_empty((0,) if gate is None else x.shape), mean.new_empty((2, *mean.shape))


@_raw_op(
    "norm_act_backward(Tensor grad, Tensor x, Tensor? cu, SymInt sites, Tensor mean, Tensor scale, Tensor bias,"
    " Tensor? offset, Tensor? slope, int act) -> Tensor"
)
def _norm_act_backward_fake(grad, x, cu, sites, mean, scale, bias, offset, slope, act):
    return x.new_empty(x.shape)


class NormAct(torch.autograd.Function):
    """``act((x - mean) * rstd * weight + bias + residual)`` where mean and rstd [B, C] are those of x (count: rows of
    each segment, over all ranks) or constants (count None)."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, mean, rstd, count, cu, sites, groups, act, process_group, name):
        residual = None if residual is None else residual.contiguous()
        scale = rstd * weight
        y = _registry.raw("norm_act", name)(x, residual, cu, sites, mean, scale, bias.contiguous(), act)
        if ctx is not None:
            # The activation's gate: from x where nothing was added, from y for relu, from x and residual for relu6.
            gate = None if residual is None or not act else y if ACTIVATIONS[act] == "relu" else residual
            is_tensor = isinstance(count, Tensor)
            ctx.save_for_backward(x, gate, weight, bias, mean, rstd, scale, cu, count if is_tensor else None)
            ctx.count = None if is_tensor else count
            ctx.constant = count is None
            ctx.settings = sites, groups, act, process_group, name
        return y

    @staticmethod
    @_autograd.once("batch_norm_act/group_norm_cells")
    def backward(ctx, grad):
        x, gate, weight, bias, mean, rstd, scale, cu, count = ctx.saved_tensors
        count = ctx.count if count is None else count
        sites, groups, act, process_group, name = ctx.settings
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        grad = grad.contiguous()
        bias = bias.contiguous()
        grad_x = grad_residual = grad_weight = grad_bias = offset = slope = None
        gated = gate is not None
        if gated or need_weight or need_bias or (need_x and not ctx.constant):
            run = _registry.raw("norm_act_sums", name)
            passed, sums = run(grad, x, gate, cu, sites, mean, scale, bias, act)
            if gated:
                grad, act = passed, 0  # the gradient behind the activation
            one = sums.shape[1] == 1
            if need_bias:
                grad_bias = sums[0, 0] if one else sums[0].sum(0)
            if need_weight:
                grad_weight = sums[1] * rstd
                grad_weight = grad_weight[0] if one else grad_weight.sum(0)
            if need_x and not ctx.constant:
                if process_group is not None:
                    sums = _sync.reduce(sums, process_group)
                channels = weight.shape[0]
                if groups == channels:
                    share = scale / count
                    offset, slope = sums[0] * share, sums[1] * (share * rstd * rstd)
                else:
                    parts = (sums * weight).unflatten(2, (groups, -1))
                    parts = parts.sum(3, keepdim=True).expand_as(parts).flatten(2)
                    share = rstd / (count * (channels // groups))
                    offset, slope = parts[0] * share, parts[1] * (share * rstd * rstd)
        if need_residual:
            grad_residual = grad
        if need_x:
            run = _registry.raw("norm_act_backward", name)
            grad_x = run(grad, x, cu, sites, mean, scale, bias, offset, slope, act)
        return grad_x, grad_residual, grad_weight, grad_bias, *(None,) * 9


class Grn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, counts, cu, sites, eps, root_eps, name):
        mean, var = _registry.raw("segment_stats", name)(x, cu, sites)
        response = ((var + mean.square()) * counts + root_eps).sqrt()  # a sum of squares, without cancellation
        divisor = response.mean(1, keepdim=True) + eps
        scale = weight * (response / divisor) + 1
        zeros = torch.zeros_like(mean)
        bias = bias.contiguous()
        y = _registry.raw("norm_act", name)(x, None, cu, sites, zeros, scale, bias, 0)
        if ctx is not None:
            ctx.save_for_backward(x, weight, bias, cu, response, divisor, scale)
            ctx.settings = sites, name
        return y

    @staticmethod
    @_autograd.once("grn")
    def backward(ctx, grad):
        x, weight, bias, cu, response, divisor, scale = ctx.saved_tensors
        sites, name = ctx.settings
        grad = grad.contiguous()
        zeros = torch.zeros_like(scale)
        _, sums = _registry.raw("norm_act_sums", name)(grad, x, None, cu, sites, zeros, scale, bias, 0)
        normed = response / divisor
        grad_normed = weight * sums[1]
        grad_response = (grad_normed - (grad_normed * normed).mean(1, keepdim=True)) / divisor
        slope = torch.where(response > 0, -grad_response / response, zeros)
        run = _registry.raw("norm_act_backward", name)
        grad_x = run(grad, x, cu, sites, zeros, scale, bias, zeros, slope, 0) if ctx.needs_input_grad[0] else None
        return grad_x, (sums[1] * normed).sum(0), sums[0].sum(0), *(None,) * 6


class SegmentSum(torch.autograd.Function):
    """Sums over segments, or (counts None) means."""

    @staticmethod
    def forward(ctx, x, cu, counts, sites, name):
        mean, _ = _registry.raw("segment_stats", name)(x.reshape(-1, x.shape[-1]).contiguous(), cu, sites)
        if ctx is not None:
            ctx.save_for_backward(cu)
            ctx.shape, ctx.dtype, ctx.sites, ctx.mean = x.shape, x.dtype, sites, counts is None
        return mean if counts is None else mean * counts.to(mean.dtype)[:, None]

    @staticmethod
    @_autograd.once("segment_sum")
    def backward(ctx, grad):
        (cu,) = ctx.saved_tensors
        cells = cu.diff()
        if ctx.mean:
            grad = grad / (cells.clamp(min=1) * ctx.sites)[:, None]
        rows = torch.repeat_interleave(grad.to(ctx.dtype), cells.long(), dim=0, output_size=ctx.shape[0])
        return rows.view(ctx.shape[0], *(1,) * (len(ctx.shape) - 2), ctx.shape[-1]).expand(ctx.shape), *(None,) * 4
