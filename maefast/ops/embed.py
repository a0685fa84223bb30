"""From an image to its visible tokens: `patch_embed`, and `gather_tokens` for tokens that exist already."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry
from maefast.ops.linear import linear, linear_reference
from maefast.ops.mask import TokenMask

_raw_op = _registry.family("embed")


def check_plan(plan: object, **tensors: Tensor | None) -> None:
    """`plan` is a TokenMask on the same device as the tensors."""
    if not isinstance(plan, TokenMask):
        raise TypeError(f"plan must be a maefast.ops.TokenMask, got {type(plan).__name__}")
    _checks.same_device(**tensors, plan=plan.slot)


def unpack(rows: Tensor, batch: int, count: int | None, prefix: int) -> Tensor:
    """Packed rows [R, D] as [B, prefix + count, D] where every sample has `count` tokens."""
    return rows if count is None else rows.view(batch, prefix + count, rows.shape[-1])


# --- gather_tokens -----------------------------------------------------------------------------------------


def gather_tokens(
    x: Tensor,
    plan: TokenMask,
    which: str = "visible",
    *,
    prefix: int = 0,
    keep_prefix: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Take the visible (or masked) tokens of each sample, in plan order. An exact copy.

    Args:
        x: [B, prefix + N, D], any floating dtype.
        which: "visible" or "masked".
        prefix: number of tokens (class, registers) that stand before the N tokens and are never masked.
        keep_prefix: copy the prefix tokens of each sample in front of its rows, or leave them out.

    Returns:
        [B, P + count, D] where all samples have as many, else packed [B*P + total, D] with sample b's rows starting at
        ``cu[b] + b*P``; P is `prefix` if kept, else 0. The backward writes each element of grad x once, without
        atomics.

    Raises:
        TypeError, ValueError: shapes or devices do not fit the plan.
    """
    _checks.tensor("x", x, ndim=3)
    check_plan(plan, x=x)
    _checks.one_of("which", which, ("visible", "masked"))
    keep_prefix = _checks.flag("keep_prefix", keep_prefix)
    _checks.integer("prefix", prefix)
    if tuple(x.shape[:2]) != (plan.batch, prefix + plan.num_tokens):
        raise ValueError(
            f"x must be [{plan.batch}, {prefix} prefix + {plan.num_tokens}, D] for this plan, got {tuple(x.shape)}"
        )
    masked = which == "masked"
    index = plan.masked if masked else plan.visible
    cu = plan.cu_masked if masked else plan.cu_visible
    most = plan.max_masked if masked else plan.max_visible
    count = plan.hide if masked else plan.keep

    name = _dispatch.choose("gather_tokens", x.device.type, x.dtype, backend)
    if name == "reference":
        rows = gather_tokens_reference(x, index, cu, prefix, keep_prefix)
    else:
        rows = _autograd.apply(_GatherTokens, x, index, plan.slot, cu, most, prefix, keep_prefix, masked, name)
    return unpack(rows, plan.batch, count, prefix if keep_prefix else 0)


def gather_tokens_reference(x: Tensor, index: Tensor, cu: Tensor, prefix: int, keep_prefix: bool) -> Tensor:
    """The definition, differentiable: rows [T (+ B*prefix), D]; see `gather_tokens`."""
    length = x.shape[1]
    tokens = x[:, prefix:].flatten(0, 1)[index.long()]
    if not keep_prefix or prefix == 0:
        return tokens
    return interleave_prefix(x[:, :prefix], tokens, index, length - prefix)


def packed_rows(index: Tensor, num_tokens: int, prefix: int) -> Tensor:
    """Where each packed token stands once every sample has `prefix` rows in front: int64 [T]."""
    sample = torch.div(index.long(), num_tokens, rounding_mode="floor")
    return torch.arange(index.shape[0], device=index.device) + (sample + 1) * prefix


def prefix_rows(cu: Tensor, prefix: int) -> Tensor:
    """Packed rows of the prefix tokens of each sample: int64 [B, prefix]."""
    start = cu[:-1].long() + torch.arange(cu.shape[0] - 1, device=cu.device) * prefix
    return start[:, None] + torch.arange(prefix, device=cu.device)


def interleave_prefix(prefix_tokens: Tensor, tokens: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    """Put [B, P, D] prefix rows in front of each sample's packed rows [T, D]: [T + B*P, D]."""
    batch, prefix, width = prefix_tokens.shape
    sample = torch.div(index.long(), num_tokens, rounding_mode="floor")
    count = torch.zeros(batch, dtype=torch.long, device=index.device).index_add(0, sample, torch.ones_like(sample))
    cu = F.pad(count.cumsum(0), (1, 0))
    out = tokens.new_empty(tokens.shape[0] + batch * prefix, width)
    out = out.index_copy(0, packed_rows(index, num_tokens, prefix), tokens)
    return out.index_copy(0, prefix_rows(cu, prefix).reshape(-1), prefix_tokens.flatten(0, 1))


@_raw_op(
    "gather_tokens(Tensor x, Tensor index, Tensor cu, SymInt max_count, SymInt prefix, bool keep_prefix) -> Tensor"
)
def _gather_tokens_fake(x, index, cu, max_count, prefix, keep_prefix):
    rows = index.shape[0] + (x.shape[0] * prefix if keep_prefix else 0)
    return x.new_empty((rows, x.shape[2]))


@_raw_op(
    "gather_tokens_backward(Tensor grad, Tensor slot, Tensor cu, SymInt prefix, bool keep_prefix, bool masked)"
    " -> Tensor"
)
def _gather_tokens_backward_fake(grad, slot, cu, prefix, keep_prefix, masked):
    batch = cu.shape[0] - 1
    return grad.new_empty((batch, prefix + slot.shape[0] // batch, grad.shape[1]))


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, slot, cu, most, prefix, keep_prefix, masked, name):
        if ctx is not None:
            ctx.save_for_backward(slot, cu)
            ctx.args, ctx.backend = (prefix, keep_prefix, masked), name
        return _registry.raw("gather_tokens", name)(x.contiguous(), index, cu, most, prefix, keep_prefix)

    @staticmethod
    @_autograd.once("gather_tokens")
    def backward(ctx, grad):
        slot, cu = ctx.saved_tensors
        run = _registry.raw("gather_tokens_backward", ctx.backend)
        return run(grad.contiguous(), slot, cu, *ctx.args), *(None,) * 8


# --- patch_embed -------------------------------------------------------------------------------------------


def as_volume(images: Tensor) -> Tensor:
    """[B, C, H, W] as [B, C, 1, H, W]; volumes unchanged."""
    return images.unsqueeze(2) if images.ndim == 4 else images


def patch_grid(images: Tensor, patch: tuple[int, ...]) -> tuple[list[int], tuple[int, ...]]:
    """(patch as [pt, ph, pw], grid (gt, gh, gw)) of images [B, C, (T,) H, W]; raises where they do not fit."""
    if len(patch) != images.ndim - 2:
        raise ValueError(f"a patch of {len(patch)} sizes does not fit images of shape {tuple(images.shape)}")
    if min(patch) < 1:
        raise ValueError(f"patch sizes must be positive, got {tuple(patch)} for images of {tuple(images.shape)}")
    sizes = tuple(images.shape[2:])
    if any(size < p or size % p for size, p in zip(sizes, patch)):
        raise ValueError(f"images: size {sizes} is not a multiple of the patch size {tuple(patch)}")
    grid = tuple(size // p for size, p in zip(sizes, patch))
    lead = (1,) * (3 - len(patch))
    return [*lead, *patch], lead + grid


def patch_embed(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    plan: TokenMask | None = None,
    *,
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Embed the visible patches only: ``(patch . weight + bias) + pos``, after the prefix tokens.

    Equal to a strided convolution over all patches, plus positions, gathered at the visible tokens (the embedding
    of ViT and MAE), but the matrix product runs over visible patches only.

    Args:
        images: [B, C, H, W], or [B, C, T, H, W] for tubelets; spectrograms have C = 1.
        weight: convolution weight [D, C, ph, pw] or [D, C, pt, ph, pw]; its last sizes are the patch.
        bias: [D] or None.
        plan: which tokens are visible; None embeds all. Tokens are row-major over (T/pt, H/ph, W/pw).
        pos: position embedding of the tokens, [N, D] (or [1, N, D]).
        prefix: tokens put in front of every sample, [P, D] (or [1, P, D]), their own position already added.

    Returns:
        [B, P + keep, D], or packed [B*P + T, D] for a ragged plan. Under autocast the product runs in the autocast
        dtype; the result has the dtype of product + pos + prefix, as in eager PyTorch.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit; image size not a multiple of the patch.
    """
    _checks.tensor("images", images, ndim=(4, 5))
    _checks.tensor("weight", weight, ndim=images.ndim)
    if weight.shape[1] != images.shape[1]:
        raise ValueError(f"weight expects {weight.shape[1]} channels, images have {images.shape[1]}")
    if bias is not None:
        _checks.vector("bias", bias, weight.shape[0])
    patch, grid = patch_grid(images, tuple(weight.shape[2:]))
    batch, width, num_tokens = images.shape[0], weight.shape[0], grid[0] * grid[1] * grid[2]
    if plan is None:
        plan = TokenMask.all_visible(batch, num_tokens, images.device)
    check_plan(plan, images=images, weight=weight, bias=bias, pos=pos, prefix=prefix)
    if (plan.batch, plan.num_tokens) != (batch, num_tokens):
        raise ValueError(f"images give {batch} samples of {num_tokens} patches, but the plan is {plan}")
    if pos is not None:
        pos = _checks.table("pos", pos, (num_tokens,), width)
    if prefix is not None:
        _checks.tensor("prefix", prefix)
        prefix = _checks.table("prefix", prefix, prefix.shape[-2:-1], width)

    device = images.device.type
    autocast = _checks.autocast(device)
    if autocast is not None and weight.dtype is not torch.float64:
        dtype = autocast
    elif images.dtype is weight.dtype:
        dtype = weight.dtype
    else:
        raise TypeError(f"images are {images.dtype} but weight is {weight.dtype}: convert one, or use autocast")

    name = _dispatch.choose("patch_rows", device, torch.promote_types(images.dtype, dtype), backend)
    volume = as_volume(images)
    if name == "reference":
        rows = patch_rows_reference(volume, plan.visible, patch).to(dtype)
    else:
        rows = _autograd.apply(_PatchRows, volume, plan.visible, plan.slot, patch, dtype, name)
    product = linear_reference if backend == "reference" else linear
    y = product(rows, weight.flatten(1).to(dtype), None if bias is None else bias.to(dtype))
    return _place(y, plan, pos, prefix, backend)


def _place(y: Tensor, plan: TokenMask, pos: Tensor | None, prefix: Tensor | None, backend: str | None) -> Tensor:
    """Add positions and put the prefix tokens in front: [B, P + keep, D] or packed."""
    count = 0 if prefix is None else prefix.shape[0]
    if pos is None and count == 0:
        return unpack(y, plan.batch, plan.keep, 0)
    dtype = _checks.promote(y, pos, prefix)
    pos = None if pos is None else pos.to(dtype)
    prefix = None if prefix is None else prefix.to(dtype)
    if y.dtype is not dtype and (dtype is torch.float64 or y.dtype is torch.float32):
        y = y.to(dtype)
    name = _dispatch.choose("patch_rows", y.device.type, dtype, backend)
    if name == "reference":
        rows = place_tokens_reference(y, plan.visible, plan.cu_visible, plan.num_tokens, pos, prefix)
    else:
        rows = _autograd.apply(
            _PlaceTokens, y, plan.visible, plan.slot, plan.cu_visible, plan.num_tokens, pos, prefix, name
        )
    return unpack(rows, plan.batch, plan.keep, count)


def patch_rows_reference(images: Tensor, index: Tensor, patch: list[int]) -> Tensor:
    """The definition: rows [R, C*pt*ph*pw] of images [B, C, T, H, W] at tokens `index`, ordered (C, pt, ph, pw)."""
    batch, channels, *sizes = images.shape
    (pt, ph, pw), (gt, gh, gw) = patch, [size // p for size, p in zip(sizes, patch)]
    blocks = images.reshape(batch, channels, gt, pt, gh, ph, gw, pw)
    rows = blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(batch * gt * gh * gw, channels * pt * ph * pw)
    return rows[index.long()]


def place_tokens_reference(
    y: Tensor, visible: Tensor, cu_visible: Tensor, num_tokens: int, pos: Tensor | None, prefix: Tensor | None
) -> Tensor:
    """The definition: y[t] + pos[n], each sample's rows after the prefix tokens."""
    if pos is not None:
        y = y + pos[visible.long() % num_tokens]
    if prefix is None:
        return y
    batch = cu_visible.shape[0] - 1
    return interleave_prefix(prefix.expand(batch, -1, -1), y.to(prefix.dtype), visible, num_tokens)


@_raw_op("patch_rows(Tensor images, Tensor index, SymInt[] patch, ScalarType dtype) -> Tensor")
def _patch_rows_fake(images, index, patch, dtype):
    return images.new_empty((index.shape[0], images.shape[1] * math.prod(patch)), dtype=dtype)


@_raw_op(
    "patch_rows_backward(Tensor grad, Tensor slot, SymInt[] image_shape, SymInt[] patch, ScalarType dtype) -> Tensor"
)
def _patch_rows_backward_fake(grad, slot, image_shape, patch, dtype):
    return grad.new_empty(tuple(image_shape), dtype=dtype)


@_raw_op(
    "place_tokens(Tensor y, Tensor visible, Tensor cu_visible, SymInt num_tokens, Tensor? pos,"
    " Tensor? prefix_tokens) -> Tensor"
)
def _place_tokens_fake(y, visible, cu_visible, num_tokens, pos, prefix_tokens):
    extra = 0 if prefix_tokens is None else prefix_tokens.shape[0] * (cu_visible.shape[0] - 1)
    dtype = (pos if pos is not None else prefix_tokens).dtype
    return y.new_empty((y.shape[0] + extra, y.shape[1]), dtype=dtype)


@_raw_op(
    "place_tokens_backward(Tensor grad, Tensor slot, Tensor cu_visible, SymInt prefix, bool need_pos,"
    " bool need_prefix, ScalarType y_dtype) -> (Tensor, Tensor, Tensor)"
)
def _place_tokens_backward_fake(grad, slot, cu_visible, prefix, need_pos, need_prefix, y_dtype):
    batch, width = cu_visible.shape[0] - 1, grad.shape[1]
    return (
        grad.new_empty((grad.shape[0] - batch * prefix, width), dtype=y_dtype),
        grad.new_empty((slot.shape[0] // batch, width) if need_pos else (0,)),
        grad.new_empty((prefix, width) if need_prefix else (0,)),
    )


class _PatchRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, index, slot, patch, dtype, name):
        if ctx is not None:
            ctx.save_for_backward(slot)
            ctx.args, ctx.backend = (list(images.shape), patch, images.dtype), name
        return _registry.raw("patch_rows", name)(images.contiguous(), index, patch, dtype)

    @staticmethod
    @_autograd.once("patch_embed")
    def backward(ctx, grad):
        run = _registry.raw("patch_rows_backward", ctx.backend)
        return run(grad.contiguous(), *ctx.saved_tensors, *ctx.args), *(None,) * 5


class _PlaceTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, visible, slot, cu_visible, num_tokens, pos, prefix, name):
        if ctx is not None:
            ctx.save_for_backward(slot, cu_visible)
            ctx.prefix = 0 if prefix is None else prefix.shape[0]
            ctx.y_dtype, ctx.backend = y.dtype, name
        pos = None if pos is None else pos.contiguous()
        prefix = None if prefix is None else prefix.contiguous()
        run = _registry.raw("place_tokens", name)
        return run(y.contiguous(), visible, cu_visible, num_tokens, pos, prefix)

    @staticmethod
    @_autograd.once("patch_embed")
    def backward(ctx, grad):
        need_y, *_, need_pos, need_prefix, _ = ctx.needs_input_grad
        run = _registry.raw("place_tokens_backward", ctx.backend)
        grad_y, grad_pos, grad_prefix = run(
            grad.contiguous(), *ctx.saved_tensors, ctx.prefix, need_pos, need_prefix, ctx.y_dtype
        )
        return (
            grad_y if need_y else None,
            *(None,) * 4,
            grad_pos if need_pos else None,
            grad_prefix if need_prefix else None,
            None,
        )
