"""Triton kernels of the restore family: full-length sequences from visible tokens and mask tokens, and back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import ABSENT, COPY, INT32, batch_splits, ceil_div, check_dtypes, guard, row_tile, sum_parts


@triton.jit
def restore_tokens_fwd_kernel(
    x, visible, masked, cu, cu_masked, mask_token, pos, out, rows, total, hidden, tokens, prefix, pos_prefix, width,
    HAS_POS: tl.constexpr, VISIBLE_FIRST: tl.constexpr, POS_ON_MASKED: tl.constexpr, ABSENTS: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One item a row of the output, counted [prefix | visible | masked] in each sample, which the plan's two lists
    give without an inverse; in position order the item's row is written where its token stands.

    ABSENTS: samples have rows of any number, so items are counted [all visible | all masked | all prefixes], and each
    row is written at its place in its sample.
    """
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    item = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside = item < rows
    if ABSENTS:
        is_visible = item < total
        is_masked = (item >= total) & (item < total + hidden)
        is_prefix = (item >= total + hidden) & inside
        flat = tl.load(visible + item, mask=is_visible, other=0)
        flat += tl.load(masked + (item - total), mask=is_masked, other=0)
        lead = (item - total - hidden).to(tl.int32)
        b = flat // tokens
        b = tl.where(is_prefix, lead // tl.maximum(prefix, 1), b)
        start = tl.load(cu + b, mask=inside, other=0)
        count = tl.load(cu + b + 1, mask=inside, other=0) - start
        skipped = tl.load(cu_masked + b, mask=inside, other=0)  # masked tokens of earlier samples
        j = tl.where(is_visible, item - start, count + item - total - skipped).to(tl.int32) + prefix
        j = tl.where(is_prefix, lead - b * prefix, j)
        from_x = is_visible | is_prefix
        target = (start + skipped + j).to(tl.int64) + b.to(tl.int64) * prefix
    else:
        length = prefix + tokens
        b = (item // length).to(tl.int32)
        j = (item % length).to(tl.int32)
        start = tl.load(cu + b, mask=inside, other=0)
        count = tl.load(cu + b + 1, mask=inside, other=0) - start
        from_x = inside & (j < prefix + count)
        is_visible = from_x & (j >= prefix)
        is_masked = inside & (j >= prefix + count)
        flat = tl.load(visible + (start + j - prefix), mask=is_visible, other=0)
        flat += tl.load(masked + (b * tokens - start + j - prefix - count), mask=is_masked, other=0)
        target = item.to(tl.int64)
    n = flat - b * tokens

    in_row = (col < width)[None, :]
    source = (start + j).to(tl.int64) + b.to(tl.int64) * prefix
    value = tl.load(x + source[:, None] * width + col[None, :], mask=from_x[:, None] & in_row, other=0.0)
    fill = tl.load(mask_token + col, mask=col < width, other=0.0).to(tl.float32)
    value = tl.where(is_masked[:, None], fill[None, :], value.to(tl.float32))
    if HAS_POS:
        has_pos = is_masked
        if not POS_ON_MASKED:
            has_pos = has_pos | is_visible | (inside & (j < pos_prefix))
        at = tl.where(j < prefix, j, pos_prefix + n).to(tl.int64)
        mask = has_pos[:, None] & in_row
        value += tl.load(pos + at[:, None] * width + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if not VISIBLE_FIRST:
        target += tl.where(j < prefix, 0, prefix + n - j)
    mask = inside[:, None] & in_row
    tl.store(out + target[:, None] * width + col[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def restore_tokens_bwd_kernel(
    grad, slot, cu, cu_masked, grad_x, pos_parts, mask_parts, batch, per_split, tokens, prefix, pos_prefix, width,
    NEED_POS: tl.constexpr, NEED_MASK_TOKEN: tl.constexpr, VISIBLE_FIRST: tl.constexpr, POS_ON_MASKED: tl.constexpr,
    ABSENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS places of the sequence [prefix | tokens by position], over the samples of one split of the batch.

    Reads each row of grad once: rows of prefix and visible tokens go to grad_x, every place is summed for grad_pos
    and all masked rows for grad_mask_token. ABSENTS: some places of a sample have no row.
    """
    col_blocks = tl.cdiv(width, BLOCK)
    row_blocks = tl.cdiv(prefix + tokens, ROWS)
    pid = tl.program_id(0)
    col = pid % col_blocks * BLOCK + tl.arange(0, BLOCK)
    block = pid // col_blocks
    place = block % row_blocks * ROWS + tl.arange(0, ROWS)
    split = block // row_blocks
    n = place - prefix
    is_token = (n >= 0) & (n < tokens)
    in_row = (col < width)[None, :]
    pos_total = tl.zeros([ROWS, BLOCK], tl.float32)
    mask_total = tl.zeros([ROWS, BLOCK], tl.float32)
    for b in range(split * per_split, tl.minimum(batch, (split + 1) * per_split)):
        sample = tl.zeros([ROWS], tl.int64) + b
        start = tl.load(cu + b)
        s = tl.load(slot + b * tokens + n, mask=is_token, other=0)
        is_masked = is_token & (s < 0)
        kept = (is_token & (s >= 0)) | (n < 0)
        row = place
        base = sample * (prefix + tokens)
        if ABSENTS:
            is_masked = is_masked & (s != ABSENT)
            skipped = tl.load(cu_masked + b)
            end = tl.load(cu + b + 1)
            row = tl.where(is_token, prefix + tl.where(s >= 0, s - start, end - start - s - 1 - skipped), place)
            base = sample * prefix + start + skipped
        elif VISIBLE_FIRST:
            # A masked token ~m stands after the sample's `count` visible ones: count + m - (b*N - start), and
            # count = end - start, so start cancels.
            end = tl.load(cu + b + 1)
            row = tl.where(is_token, prefix + tl.where(s >= 0, s - start, end - s - 1 - b * tokens), place)
        wanted = (is_masked | kept) if NEED_POS or NEED_MASK_TOKEN else kept
        source = (base + row)[:, None] * width + col[None, :]
        value = tl.load(grad + source, mask=wanted[:, None] & in_row, other=0.0).to(tl.float32)
        target = sample * prefix + tl.where(n < 0, start + place, s + prefix)
        target = target[:, None] * width + col[None, :]
        tl.store(grad_x + target, value.to(grad_x.dtype.element_ty), mask=kept[:, None] & in_row)
        if NEED_POS:
            if POS_ON_MASKED:
                pos_total += tl.where(is_masked[:, None], value, 0.0)
            else:
                pos_total += value
        if NEED_MASK_TOKEN:
            mask_total += tl.where(is_masked[:, None], value, 0.0)
    if NEED_POS:
        row = place - prefix + pos_prefix
        summed = (row >= 0) & (place < prefix + tokens)
        at = (row + split * (pos_prefix + tokens)).to(tl.int64)[:, None] * width + col[None, :]
        tl.store(pos_parts + at, pos_total, mask=summed[:, None] & in_row)
    if NEED_MASK_TOKEN:
        tl.store(mask_parts + block.to(tl.int64) * width + col, tl.sum(mask_total, axis=0), mask=col < width)


def restore_tokens(
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
    """x [T + B*P, D] -> [B, P+N, D], or [T + M + B*P, D] with cu_masked. Moves x and the output once; the tables stay
    in L2."""
    check_dtypes("restore_tokens", x, mask_token, pos)
    batch, width = cu_visible.shape[0] - 1, x.shape[1]
    total, hidden = visible.shape[0], masked.shape[0]
    rows = total + hidden + batch * prefix
    tokens = (total + hidden) // batch if cu_masked is None else num_tokens
    shape = (batch, prefix + tokens, width) if cu_masked is None else (rows, width)
    out = torch.empty(shape, dtype=mask_token.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile, block = row_tile(rows, width, out.element_size())
    grid = (ceil_div(rows, tile) * ceil_div(width, block),)
    pos_prefix = 0 if pos is None else pos.shape[0] - tokens
    lists = x, visible, masked, cu_visible, cu_masked, mask_token, pos, out
    args = *lists, rows, total, hidden, tokens, prefix, pos_prefix, width
    flags = {
        "ABSENTS": cu_masked is not None,
        "HAS_POS": pos is not None,
        "VISIBLE_FIRST": bool(visible_first),
        "POS_ON_MASKED": bool(pos_on_masked),
        "WIDE": rows + tile > INT32,
    }
    with guard(x):
        restore_tokens_fwd_kernel[grid](*args, **flags, ROWS=tile, BLOCK=block, **COPY)
    return out


def restore_tokens_backward(
    grad: Tensor,
    visible: Tensor,
    masked: Tensor,
    slot: Tensor,
    cu_visible: Tensor,
    pos_rows: int,
    prefix: int,
    visible_first: bool,
    pos_on_masked: bool,
    need_mask_token: bool,
    x_dtype: torch.dtype,
    cu_masked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad like the forward's output -> grad_x [T + B*P, D], grad_mask_token [D] or [0], grad_pos [pos_rows, D] or [0].

    Reads grad once (only the rows of x if no sum is needed) and writes grad_x; the partial sums of pos cost
    8 bytes * splits * pos_rows * D more, at most a quarter of grad's 16-bit bytes.
    """
    batch, width, device = cu_visible.shape[0] - 1, grad.shape[-1], grad.device
    tokens = slot.shape[0] // batch
    length = prefix + tokens
    grad_x = torch.empty((visible.shape[0] + batch * prefix, width), dtype=x_dtype, device=device)
    check_dtypes("restore_tokens_backward", grad, grad_x)
    grad_mask = torch.empty((width,) if need_mask_token else (0,), dtype=grad.dtype, device=device)
    grad_pos = torch.empty((pos_rows, width) if pos_rows else (0,), dtype=grad.dtype, device=device)
    if grad.numel() == 0:
        return grad_x, grad_mask.zero_(), grad_pos.zero_()
    tile, block = row_tile(length, width, 4)
    row_blocks = ceil_div(length, tile)
    places = row_blocks * ceil_div(width, block)
    splits, each = batch_splits(batch, places, pos_rows > 0)
    part = {"dtype": torch.float32, "device": device}
    pos_parts = torch.empty((splits, pos_rows, width) if pos_rows else (0,), **part)
    mask_parts = torch.empty((splits * row_blocks, width) if need_mask_token else (0,), **part)
    pos_prefix = pos_rows - tokens if pos_rows else 0
    lists = grad, slot, cu_visible, cu_masked, grad_x, pos_parts, mask_parts
    args = *lists, batch, each, tokens, prefix, pos_prefix, width
    flags = {
        "ABSENTS": cu_masked is not None,
        "NEED_POS": pos_rows > 0,
        "NEED_MASK_TOKEN": bool(need_mask_token),
        "VISIBLE_FIRST": bool(visible_first),
        "POS_ON_MASKED": bool(pos_on_masked),
    }
    with guard(grad):
        restore_tokens_bwd_kernel[(places * splits,)](*args, **flags, ROWS=tile, BLOCK=block, **COPY)
        if need_mask_token:
            sum_parts(mask_parts, grad_mask)
        if pos_rows:
            sum_parts(pos_parts, grad_pos)
    return grad_x, grad_mask, grad_pos


OPS = {"restore_tokens": restore_tokens, "restore_tokens_backward": restore_tokens_backward}
