"""Put visible tokens back among mask tokens: `restore_tokens`, the "un-shuffle" in front of a decoder."""

from __future__ import annotations

import torch
from torch import Tensor

from maefast.ops import _autograd, _checks, _dispatch, _registry
from maefast.ops.embed import check_plan, packed_rows, prefix_rows
from maefast.ops.mask import TokenMask

_raw_op = _registry.family("restore")


def restore_tokens(
    x: Tensor,
    plan: TokenMask,
    mask_token: Tensor,
    *,
    pos: Tensor | None = None,
    pos_on: str = "all",
    prefix: int = 0,
    order: str = "position",
    backend: str | None = None,
) -> Tensor:
    """Full-length sequences from visible tokens: masked positions get the mask token, then positions are added.

    Equal to MAE's repeat of the mask token, concatenation, gather by ``ids_restore`` and addition of the decoder
    position embedding (He et al., 2021), in one pass.

    Args:
        x: visible tokens in plan order after `prefix` tokens: [B, prefix + keep, D], or packed
            [B*prefix + T, D].
        mask_token: D values.
        pos: [N, D] or [prefix + N, D] (a leading 1 is allowed). With N rows the prefix tokens get none.
        pos_on: "all", or "masked" to add `pos` ([N, D]) to masked tokens only, a mask token per position.
        order: "position" gives [prefix | tokens 0..N-1]; "visible_first" gives [prefix | visible | masked],
            each in plan order and each with the position of its own token. Absent tokens have no row, so a plan with
            some of them needs "visible_first".

    Returns:
        [B, prefix + N, D] in the promoted dtype of x, mask_token and pos. Sums in the backward are deterministic.
        Where tokens are absent: [B, prefix + keep + hide, D] if both counts are common to all samples, else packed
        [B*prefix + T + M, D] with sample b's rows starting at ``plan.cu_present[b] + b*prefix``.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit the plan.
    """
    _checks.tensor("x", x, ndim=(2, 3))
    check_plan(plan, x=x, mask_token=mask_token, pos=pos)
    _checks.one_of("order", order, ("position", "visible_first"))
    _checks.one_of("pos_on", pos_on, ("all", "masked"))
    _checks.integer("prefix", prefix)
    width = x.shape[-1]
    rows = plan.total_visible + plan.batch * prefix
    if x.ndim == 3 and (plan.keep is None or tuple(x.shape[:2]) != (plan.batch, prefix + plan.keep)):
        want = "packed rows [R, D]" if plan.keep is None else f"[{plan.batch}, {prefix} + {plan.keep}, D]"
        raise ValueError(f"x must be {want} for this plan, got {tuple(x.shape)}")
    if x.ndim == 2 and x.shape[0] != rows:
        raise ValueError(f"x must have {plan.batch} * {prefix} + {plan.total_visible} = {rows} rows, got {x.shape[0]}")
    if plan.total_absent and order != "visible_first":
        raise ValueError(
            f'order must be "visible_first" for this plan: {plan.total_absent} of its tokens are absent and have no row'
        )
    mask_token = _checks.vector("mask_token", mask_token, width)
    if pos is not None:
        lengths = (plan.num_tokens,) if pos_on == "masked" else (plan.num_tokens, prefix + plan.num_tokens)
        pos = _checks.table("pos", pos, lengths, width)

    dtype = _checks.promote(x, mask_token, pos)
    x = x.reshape(rows, width)
    if x.dtype is not dtype and (dtype is torch.float64 or x.dtype is torch.float32):
        x = x.to(dtype)
    mask_token = mask_token.to(dtype)
    pos = None if pos is None else pos.to(dtype)
    args = (prefix, order == "visible_first", pos_on == "masked")
    absent = (plan.cu_masked, plan.num_tokens) if plan.total_absent else (None, 0)
    name = _dispatch.choose("restore_tokens", x.device.type, dtype, backend)
    if name == "reference":
        lists = plan.visible, plan.masked, plan.cu_visible
        out = restore_tokens_reference(x, *lists, mask_token, pos, *args, *absent)
    else:
        lists = plan.visible, plan.masked, plan.slot, plan.cu_visible
        out = _autograd.apply(_RestoreTokens, x, *lists, mask_token, pos, *args, *absent, name)
    if out.ndim == 2 and plan.keep is not None and plan.hide is not None:
        out = out.view(plan.batch, prefix + plan.keep + plan.hide, width)
    return out


def restore_tokens_reference(
    x: Tensor,
    visible: Tensor,
    masked: Tensor,
    cu_visible: Tensor,
    mask_token: Tensor,
    pos: Tensor | None,
    prefix: int,
    visible_first: bool,
    pos_on_masked: bool,
    cu_masked: Tensor | None = None,
    num_tokens: int = 0,
) -> Tensor:
    """The definition, differentiable: [B, P + N, D]; see `restore_tokens`. With `cu_masked` (and N, visible first) some
    tokens are absent and it is packed rows, [T + M + B*P, D]."""
    batch, width = cu_visible.shape[0] - 1, x.shape[1]
    if cu_masked is None:
        num_tokens = (visible.shape[0] + masked.shape[0]) // batch
    visible, masked = visible.long(), masked.long()
    x = x.to(mask_token.dtype)
    kept, lead = x[packed_rows(visible, num_tokens, prefix)], x[prefix_rows(cu_visible, prefix)]
    fill = mask_token.expand(masked.shape[0], width)
    if pos is not None:
        if pos.shape[0] > num_tokens:
            lead = lead + pos[:prefix]
            pos = pos[prefix:]
        fill = fill + pos[masked % num_tokens]
        if not pos_on_masked:
            kept = kept + pos[visible % num_tokens]
    if cu_masked is not None:
        at = [
            (prefix_rows(cu_visible + cu_masked, prefix), lead.flatten(0, 1)),
            (_packed(visible, cu_masked[:-1], num_tokens, prefix), kept),
            (_packed(masked, cu_visible[1:], num_tokens, prefix), fill),
        ]
        out = x.new_empty(x.shape[0] + masked.shape[0], width)
        for index, value in at:
            out = out.index_copy(0, index.reshape(-1), value)
        return out
    if visible_first:
        # Row of a packed token inside its sample: visible ones from 0, masked ones after the sample's last visible.
        count = cu_visible.diff().long()
        at = _rank(visible, num_tokens, count), _rank(masked, num_tokens, num_tokens - count, count)
    else:
        at = visible, masked
    out = x.new_empty(batch * num_tokens, width).index_copy(0, at[0], kept).index_copy(0, at[1], fill)
    return torch.cat([lead, out.view(batch, num_tokens, width)], 1)


def _packed(flat: Tensor, before: Tensor, num_tokens: int, prefix: int) -> Tensor:
    """Packed rows of tokens that stand behind `before` [B] rows of the other kind."""
    sample = torch.div(flat, num_tokens, rounding_mode="floor").long()
    return torch.arange(flat.shape[0], device=flat.device) + before[sample] + (sample + 1) * prefix


def masked_rows(plan: TokenMask, prefix: int) -> Tensor:
    """int64 [M]: where the masked tokens stand in the packed rows that `restore_tokens` makes of a plan with absent
    tokens."""
    return _packed(plan.masked, plan.cu_visible[1:], plan.num_tokens, prefix)


def _rank(flat: Tensor, num_tokens: int, count: Tensor, offset: Tensor | int = 0) -> Tensor:
    """Flat destination of packed tokens: sample * N + rank in the sample's list + that sample's offset."""
    sample = torch.div(flat, num_tokens, rounding_mode="floor")
    start = count.cumsum(0) - count
    shift = torch.arange(count.shape[0], device=flat.device) * num_tokens - start + offset
    return torch.arange(flat.shape[0], device=flat.device) + shift[sample]


# With cu_masked (visible first) some tokens are absent, and packed rows [T + M + B*P, D] stand for [B, P + N, D].
@_raw_op(
    "restore_tokens(Tensor x, Tensor visible, Tensor masked, Tensor cu_visible, Tensor mask_token, Tensor? pos,"
    " SymInt prefix, bool visible_first, bool pos_on_masked, Tensor? cu_masked=None, SymInt num_tokens=0) -> Tensor"
)
def _restore_tokens_fake(
    x, visible, masked, cu_visible, mask_token, pos, prefix, visible_first, pos_on_masked, cu_masked=None, num_tokens=0
):
    batch = cu_visible.shape[0] - 1
    if cu_masked is not None:
        return mask_token.new_empty((x.shape[0] + masked.shape[0], x.shape[1]))
    tokens = (visible.shape[0] + masked.shape[0]) // batch
    return mask_token.new_empty((batch, prefix + tokens, x.shape[1]))


@_raw_op(
    "restore_tokens_backward(Tensor grad, Tensor visible, Tensor masked, Tensor slot, Tensor cu_visible,"
    " SymInt pos_rows, SymInt prefix, bool visible_first, bool pos_on_masked, bool need_mask_token,"
    " ScalarType x_dtype, Tensor? cu_masked=None) -> (Tensor, Tensor, Tensor)"
)
def _restore_tokens_backward_fake(
    grad, visible, masked, slot, cu_visible, pos_rows, prefix, visible_first, pos_on_masked, need_mask_token,
    x_dtype, cu_masked=None,
):  # fmt: skip
    batch, width = cu_visible.shape[0] - 1, grad.shape[-1]
    return (
        grad.new_empty((visible.shape[0] + batch * prefix, width), dtype=x_dtype),
        grad.new_empty((width,) if need_mask_token else (0,)),
        grad.new_empty((pos_rows, width) if not isinstance(pos_rows, int) or pos_rows else (0,)),
    )


class _RestoreTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, visible, masked, slot, cu_visible, mask_token, pos, prefix, visible_first, pos_on_masked, cu_masked,
        num_tokens, name,
    ):  # fmt: skip
        args = (prefix, visible_first, pos_on_masked)
        if ctx is not None:
            ctx.save_for_backward(visible, masked, slot, cu_visible, cu_masked)
            ctx.pos_rows = 0 if pos is None else pos.shape[0]
            ctx.args, ctx.x_dtype, ctx.backend = args, x.dtype, name
        pos = None if pos is None else pos.contiguous()
        run = _registry.raw("restore_tokens", name)
        return run(
            x.contiguous(), visible, masked, cu_visible, mask_token.contiguous(), pos, *args, cu_masked, num_tokens
        )

    @staticmethod
    @_autograd.once("restore_tokens")
    def backward(ctx, grad):
        need_x, need_mask_token, need_pos = (ctx.needs_input_grad[i] for i in (0, 5, 6))
        run = _registry.raw("restore_tokens_backward", ctx.backend)
        *lists, cu_masked = ctx.saved_tensors
        grad_x, grad_mask_token, grad_pos = run(
            grad.contiguous(),
            *lists,
            ctx.pos_rows if need_pos else 0,
            *ctx.args,
            need_mask_token,
            ctx.x_dtype,
            cu_masked,
        )
        return (
            grad_x if need_x else None,
            *(None,) * 4,
            grad_mask_token if need_mask_token else None,
            grad_pos if need_pos else None,
            *(None,) * 6,
        )
