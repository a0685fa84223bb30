"""Residual add and LayerNorm in one pass: `add_norm`, the seam between the two halves of a transformer block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry

_raw_op = _registry.family("norm")


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``r = x + delta`` and ``y = LayerNorm(r) * weight + bias`` (Ba et al., 2016), each written once.

    Args:
        x: residual stream, [..., D]. delta: what is added to it, same shape, or None for the norm alone.
        weight, bias: [D].
        dtype: of y; by default the autocast dtype where autocast is on (y feeds a matrix product, which would cast it
            anyway), else that of r.

    Returns:
        (r, y): r in the promoted dtype of x and delta (x itself if delta is None). Statistics are computed in float32
        (float64 for float64). Gradients of weight and bias are deterministic.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
    """
    _checks.tensor("x", x)
    if x.ndim < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    _checks.positive("eps", eps)
    weight = _checks.vector("weight", weight, x.shape[-1])
    bias = _checks.vector("bias", bias, x.shape[-1])
    _checks.same_device(x=x, delta=delta, weight=weight, bias=bias)
    kind, stream = x.device.type, x.dtype
    if delta is not None:
        _checks.tensor("delta", delta)
        if delta.shape != x.shape:
            raise ValueError(f"delta must have the shape of x, {tuple(x.shape)}, got {tuple(delta.shape)}")
        if delta.dtype is not stream:
            stream = _checks.promote(x, delta)
            x = x.to(stream)
            if delta.dtype is not stream and not (stream is torch.float32 and delta.dtype.itemsize == 2):
                delta = delta.to(stream)
    if dtype is None:
        autocast = _checks.autocast(kind) if stream is torch.float32 else None
        dtype = stream if autocast is None else autocast
    elif dtype is not stream and not (stream is torch.float32 and (dtype is torch.float16 or dtype is torch.bfloat16)):
        raise TypeError(f"dtype (of y) may be that of the stream, {stream}, or 16 bits beside float32; not {dtype}")
    wide = torch.float64 if stream is torch.float64 else torch.float32
    if weight.dtype is not wide or bias.dtype is not wide:
        weight, bias = weight.to(wide), bias.to(wide)

    name = _dispatch.choose("add_norm", kind, stream, backend)
    if name == "reference":
        return add_norm_reference(x, delta, weight, bias, eps, dtype)
    weight, bias = weight.contiguous(), bias.contiguous()
    residual, y = _autograd.apply(_AddNorm, x.contiguous(), delta, weight, bias, eps, dtype, name)
    return x if delta is None else residual, y


def add_norm_reference(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition, differentiable; weight and bias in float32 (float64)."""
    residual = x if delta is None else x + delta
    y = F.layer_norm(residual.to(weight.dtype), weight.shape, weight, bias, eps)
    return residual, y.to(dtype)


# shift [D] is added to delta: the bias of the linear layer that made it.
@_raw_op(
    "add_norm(Tensor x, Tensor? delta, Tensor weight, Tensor bias, float eps, ScalarType dtype, Tensor? shift=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _add_norm_fake(x, delta, weight, bias, eps, dtype, shift=None):
    statistic = lambda: x.new_empty(x.shape[:1], dtype=weight.dtype)  # noqa: E731
    return x.new_empty((0,) if delta is None else x.shape), x.new_empty(x.shape, dtype=dtype), statistic(), statistic()


# grad_x, [weight, bias, shift], and where asked for (empty else): grad_x in delta's dtype, y once more.
@_raw_op(
    "add_norm_backward(Tensor grad_y, Tensor? grad_residual, Tensor residual, Tensor mean, Tensor rstd,"
    " Tensor weight, bool need_weight, Tensor? bias=None, ScalarType? delta_dtype=None, bool need_shift=False)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
def _add_norm_backward_fake(
    grad_y, grad_residual, residual, mean, rstd, weight, need_weight, bias=None, delta_dtype=None, need_shift=False
):
    rows, width = residual.shape
    narrow = delta_dtype is not None and delta_dtype is not residual.dtype
    return (
        residual.new_empty(residual.shape),
        weight.new_empty((3 if need_shift else 2 if need_weight else 0, weight.shape[0])),
        residual.new_empty((rows if narrow else 0, width), dtype=delta_dtype if narrow else residual.dtype),
        grad_y.new_empty((0 if bias is None else rows, width)),
    )


class _AddNorm(torch.autograd.Function):
    """Takes and returns [..., D]. Views are taken in here, where autograd makes no node of them: on small inputs the
    nodes cost more than the kernel. Outputs come from `_unsafe_view`, which unlike `view` leaves them free to be
    written in place, and the output itself is saved, so that such a write is noticed."""

    @staticmethod
    def forward(ctx, x, delta, weight, bias, eps, dtype, name):
        shape = x.shape
        run = _registry.raw("add_norm", name)
        rows = None if delta is None else delta.reshape(-1, shape[-1]).contiguous()
        residual, y, mean, rstd = run(x.view(-1, shape[-1]), rows, weight, bias, eps, dtype)
        if delta is not None:
            residual = torch.ops.aten._unsafe_view.default(residual, shape)
        if ctx is not None:
            ctx.save_for_backward(x if delta is None else residual, mean, rstd, weight)
            ctx.delta_dtype = None if delta is None else delta.dtype
            ctx.backend = name
            ctx.set_materialize_grads(False)
            if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
                ctx.mark_non_differentiable(residual)  # only the norm has trainable inputs
        return residual, torch.ops.aten._unsafe_view.default(y, shape)

    @staticmethod
    @_autograd.once("add_norm")
    def backward(ctx, grad_residual, grad_y):
        residual, mean, rstd, weight = ctx.saved_tensors
        need_x, need_delta, need_weight, need_bias = ctx.needs_input_grad[:4]
        if ctx.delta_dtype is None:
            grad_residual = None  # the residual output is a stand-in there
        if grad_y is None:
            grad_delta = None if not need_delta or grad_residual is None else grad_residual.to(ctx.delta_dtype)
            return grad_residual, grad_delta, *(None,) * 5
        run = _registry.raw("add_norm_backward", ctx.backend)
        shape, rows = residual.shape, (-1, residual.shape[-1])
        grad_residual = None if grad_residual is None else grad_residual.reshape(rows).contiguous()
        grad_x, grad_tables, grad_delta, _ = run(
            grad_y.reshape(rows).contiguous(),
            grad_residual,
            residual.view(rows),
            mean,
            rstd,
            weight,
            need_weight or need_bias,  # one pass makes both
            None,
            ctx.delta_dtype if need_delta else None,
        )
        if need_delta and ctx.delta_dtype is residual.dtype:
            grad_delta = grad_x
        return (
            grad_x.view(shape) if need_x else None,
            grad_delta.view(shape) if need_delta else None,
            grad_tables[0] if need_weight else None,
            grad_tables[1] if need_bias else None,
            *(None,) * 3,
        )
