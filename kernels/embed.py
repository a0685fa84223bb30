"""Triton kernels of the embed family: rows of visible tokens, rows of visible patches, positions and prefixes.

All but the two sums over the batch are copies that touch each byte once, so a kernel is good when its accesses are
wide and whole: every program moves a tile of rows with 16-byte accesses along the row. Row numbers are int32
(the plan's are), addresses int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import ABSENT, COPY, INT32, batch_splits, ceil_div, check_dtypes, guard, power, row_tile, sum_parts

# --- gather_tokens -----------------------------------------------------------------------------------------


@triton.jit
def gather_tokens_fwd_kernel(
    x, index, cu, out, total, rows, tokens, prefix, width,
    KEEP_PREFIX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Item r < total copies token index[r]; item total + b*prefix + p copies prefix row p of sample b."""
    blocks = tl.cdiv(width, BLOCK)
    item = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    is_token = item < total
    flat = tl.load(index + item, mask=is_token, other=0)
    b = (flat // tokens).to(tl.int64)
    source = flat + (b + 1) * prefix
    target = item
    if KEEP_PREFIX:
        is_prefix = (item >= total) & (item < rows)
        rest = (item - total).to(tl.int32)
        sample = rest // prefix
        p = rest % prefix
        start = tl.load(cu + sample, mask=is_prefix, other=0) + sample.to(tl.int64) * prefix
        source = tl.where(is_token, source, sample.to(tl.int64) * (prefix + tokens) + p)
        target = tl.where(is_token, item + (b + 1) * prefix, start + p)
    mask = (item < rows)[:, None] & (col < width)[None, :]
    value = tl.load(x + source[:, None] * width + col[None, :], mask=mask)
    tl.store(out + target[:, None] * width + col[None, :], value, mask=mask)


@triton.jit
def gather_tokens_bwd_kernel(
    grad, slot, cu, out, rows, tokens, prefix, width,
    KEEP_PREFIX: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One item a row of grad_x: copied from where it went, or zero."""
    blocks = tl.cdiv(width, BLOCK)
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    row = pid // blocks * ROWS + tl.arange(0, ROWS)
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int32)
    inside = row < rows
    length = prefix + tokens
    b = (row // length).to(tl.int32)
    n = (row % length).to(tl.int32) - prefix
    place = tl.load(slot + b * tokens + n, mask=inside & (n >= 0), other=0)
    if MASKED:
        place = tl.where(place == ABSENT, -1, -place - 1)
    present = inside & (n >= 0) & (place >= 0)
    source = place.to(tl.int64)
    if KEEP_PREFIX:
        source += (b + 1).to(tl.int64) * prefix
        start = tl.load(cu + b, mask=inside & (n < 0), other=0)
        source = tl.where(n < 0, start + b.to(tl.int64) * prefix + n + prefix, source)
        present = present | (inside & (n < 0))
    in_row = (col < width)[None, :]
    value = tl.load(grad + source[:, None] * width + col[None, :], mask=present[:, None] & in_row, other=0.0)
    tl.store(out + row.to(tl.int64)[:, None] * width + col[None, :], value, mask=inside[:, None] & in_row)


def gather_tokens(x: Tensor, index: Tensor, cu: Tensor, max_count: int, prefix: int, keep_prefix: bool) -> Tensor:
    """x [B, P+N, D] -> [T (+ B*P), D]. Moves 2 * T * D elements and 4 bytes a row."""
    check_dtypes("gather_tokens", x)
    batch, length, width = x.shape
    total = index.shape[0]
    keep_prefix = bool(keep_prefix and prefix)
    rows = total + (batch * prefix if keep_prefix else 0)
    out = torch.empty((rows, width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tile, block = row_tile(rows, width, x.element_size())
    grid = (ceil_div(rows, tile) * ceil_div(width, block),)
    args = x, index, cu, out, total, rows, length - prefix, prefix, width
    with guard(x):
        gather_tokens_fwd_kernel[grid](*args, KEEP_PREFIX=keep_prefix, ROWS=tile, BLOCK=block, **COPY)
    return out


def gather_tokens_backward(
    grad: Tensor, slot: Tensor, cu: Tensor, prefix: int, keep_prefix: bool, masked: bool
) -> Tensor:
    """grad [T (+ B*P), D] -> grad_x [B, P+N, D]. Moves (T + B*(P+N)) * D elements and 4 bytes a row."""
    check_dtypes("gather_tokens_backward", grad)
    batch, width = cu.shape[0] - 1, grad.shape[1]
    tokens = slot.shape[0] // batch
    rows = batch * (prefix + tokens)
    out = torch.empty((batch, prefix + tokens, width), dtype=grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    tile, block = row_tile(rows, width, grad.element_size())
    grid = (ceil_div(rows, tile) * ceil_div(width, block),)
    args = grad, slot, cu, out, rows, tokens, prefix, width
    flags = {"KEEP_PREFIX": bool(keep_prefix and prefix), "MASKED": bool(masked), "WIDE": rows + tile > INT32}
    with guard(grad):
        gather_tokens_bwd_kernel[grid](*args, **flags, ROWS=tile, BLOCK=block, **COPY)
    return out


# --- patch_rows --------------------------------------------------------------------------------------------
# The unit is a segment: `PW` adjacent pixels of one image line, which are also adjacent in a patch row. A tile is
# [segments, PW rounded up to a power of two], so no lane idles at PW = 16, whatever C * pt * ph is.


@triton.jit
def patch_rows_fwd_kernel(
    images, index, out, segments, channels, frames, height, width,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Segments in output order: row, then (channel, dt, dh). Writes are contiguous, reads 4*PW or 2*PW bytes."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    segment = pid * BLOCK + tl.arange(0, BLOCK)
    inside = segment < segments
    per_row = channels * PT * PH
    flat = tl.load(index + segment // per_row, mask=inside, other=0)
    part = (segment % per_row).to(tl.int32)
    dh = part % PH
    dt = part // PH % PT
    c = part // (PH * PT)
    gw = width // PW
    gh = height // PH
    tokens = frames // PT * gh * gw
    b = flat // tokens
    n = flat % tokens
    plane = (b * channels + c).to(tl.int64) * frames + n // (gh * gw) * PT + dt
    line = plane * height + n // gw % gh * PH + dh
    source = line * width + n % gw * PW
    dw = tl.arange(0, PAD)
    mask = inside[:, None] & (dw < PW)[None, :]
    value = tl.load(images + source[:, None] + dw[None, :], mask=mask)
    target = segment.to(tl.int64) * PW
    tl.store(out + target[:, None] + dw[None, :], value.to(tl.float32).to(out.dtype.element_ty), mask=mask)


@triton.jit
def patch_rows_bwd_kernel(
    grad, slot, out, segments, channels, frames, height, width,
    PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PAD: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Segments in image order, so that writes are contiguous; zero where the token is not visible."""
    pid = tl.program_id(0)
    if WIDE:
        pid = pid.to(tl.int64)
    segment = pid * BLOCK + tl.arange(0, BLOCK)
    inside = segment < segments
    gw = width // PW
    gh = height // PH
    gt = frames // PT
    line = segment // gw
    x = (segment % gw).to(tl.int32)
    y = (line % height).to(tl.int32)
    plane = line // height
    t = (plane % frames).to(tl.int32)
    c = (plane // frames % channels).to(tl.int32)
    b = (plane // frames // channels).to(tl.int32)
    token = ((b * gt + t // PT) * gh + y // PH) * gw + x
    row = tl.load(slot + token, mask=inside, other=-1)
    part = (c * PT + t % PT) * PH + y % PH
    source = (row.to(tl.int64) * (channels * PT * PH) + part) * PW
    dw = tl.arange(0, PAD)
    in_segment = (dw < PW)[None, :]
    value = tl.load(grad + source[:, None] + dw[None, :], mask=(inside & (row >= 0))[:, None] & in_segment, other=0.0)
    target = segment.to(tl.int64) * PW
    mask = inside[:, None] & in_segment
    tl.store(out + target[:, None] + dw[None, :], value.to(tl.float32).to(out.dtype.element_ty), mask=mask)


def _segment_launch(segments: int, patch: list[int]) -> tuple[tuple[int], dict]:
    pt, ph, pw = patch
    pad = power(pw)
    block = max(1, min(2048 // pad, power(segments)))  # 16 elements a thread, four 16-byte reads of float32
    sizes = {"PT": pt, "PH": ph, "PW": pw, "PAD": pad, "BLOCK": block, "WIDE": segments + block > INT32}
    return (ceil_div(segments, block),), {**sizes, **COPY}


def patch_rows(images: Tensor, index: Tensor, patch: list[int], dtype: torch.dtype) -> Tensor:
    """images [B, C, T, H, W] -> [R, C*pt*ph*pw] in `dtype`. Reads and writes each value of a visible patch once."""
    out_values = images.shape[1] * patch[0] * patch[1] * patch[2]
    out = torch.empty((index.shape[0], out_values), dtype=dtype, device=images.device)
    check_dtypes("patch_rows", images, out)
    if out.numel() == 0:
        return out
    segments = out.numel() // patch[2]
    grid, options = _segment_launch(segments, patch)
    with guard(images):
        patch_rows_fwd_kernel[grid](images, index, out, segments, *images.shape[1:], **options)
    return out


def patch_rows_backward(
    grad: Tensor, slot: Tensor, image_shape: list[int], patch: list[int], dtype: torch.dtype
) -> Tensor:
    """grad [R, K] -> grad image [B, C, T, H, W]. Reads R*K values, writes every pixel once."""
    out = torch.empty(tuple(image_shape), dtype=dtype, device=grad.device)
    check_dtypes("patch_rows_backward", grad, out)
    if out.numel() == 0:
        return out
    segments = out.numel() // patch[2]
    grid, options = _segment_launch(segments, patch)
    with guard(grad):
        patch_rows_bwd_kernel[grid](grad, slot, out, segments, *out.shape[1:], **options)
    return out


# --- place_tokens ------------------------------------------------------------------------------------------


@triton.jit
def place_tokens_fwd_kernel(
    y, visible, cu, pos, prefix_tokens, out, total, rows, tokens, prefix, width,
    HAS_POS: tl.constexpr, HAS_PREFIX: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Item t < total writes y[t] + pos[n]; item total + b*prefix + p writes prefix token p of sample b."""
    blocks = tl.cdiv(width, BLOCK)
    item = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    in_row = (col < width)[None, :]
    is_token = item < total
    flat = tl.load(visible + item, mask=is_token, other=0)
    mask = is_token[:, None] & in_row
    value = tl.load(y + item[:, None] * width + col[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_POS:
        n = (flat % tokens).to(tl.int64)
        value += tl.load(pos + n[:, None] * width + col[None, :], mask=mask, other=0.0).to(tl.float32)
    target = item
    if HAS_PREFIX:
        is_prefix = (item >= total) & (item < rows)
        rest = (item - total).to(tl.int32)
        sample = rest // prefix
        p = (rest % prefix).to(tl.int64)
        start = tl.load(cu + sample, mask=is_prefix, other=0) + sample.to(tl.int64) * prefix
        target = tl.where(is_token, item + (flat // tokens + 1).to(tl.int64) * prefix, start + p)
        mask = is_prefix[:, None] & in_row
        lead = tl.load(prefix_tokens + p[:, None] * width + col[None, :], mask=mask, other=0.0)
        value += lead.to(tl.float32)
    mask = (item < rows)[:, None] & in_row
    tl.store(out + target[:, None] * width + col[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def place_tokens_bwd_kernel(
    grad, slot, cu, grad_y, parts, batch, per_split, tokens, prefix, width, first, last,
    NEED_SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS places of the sequence [prefix | tokens], over the samples of one split of the batch.

    Copies the rows of visible tokens to grad_y and sums what stands at each place in [first, last) into
    parts[split, place - first].
    """
    col_blocks = tl.cdiv(width, BLOCK)
    row_blocks = tl.cdiv(prefix + tokens, ROWS)
    pid = tl.program_id(0)
    col = pid % col_blocks * BLOCK + tl.arange(0, BLOCK)
    place = pid // col_blocks % row_blocks * ROWS + tl.arange(0, ROWS)
    split = pid // col_blocks // row_blocks
    n = place - prefix
    is_token = (n >= 0) & (n < tokens)
    in_row = (col < width)[None, :]
    summed = (place >= first) & (place < last)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for b in range(split * per_split, tl.minimum(batch, (split + 1) * per_split)):
        t = tl.load(slot + b * tokens + n, mask=is_token, other=-1)
        kept = is_token & (t >= 0)
        before = (tl.zeros([ROWS], tl.int64) + b) * prefix  # rows of the prefixes of earlier samples
        source = t + before + prefix
        wanted = kept
        if NEED_SUMS:
            source = tl.where(n < 0, tl.load(cu + b) + before + place, source)
            wanted = kept | ((n < 0) & summed)
        value = tl.load(grad + source[:, None] * width + col[None, :], mask=wanted[:, None] & in_row, other=0.0)
        target = t.to(tl.int64)[:, None] * width + col[None, :]
        tl.store(grad_y + target, value.to(tl.float32).to(grad_y.dtype.element_ty), mask=kept[:, None] & in_row)
        if NEED_SUMS:
            total += value.to(tl.float32)
    if NEED_SUMS:
        at = (split * (last - first) + place - first).to(tl.int64)[:, None] * width + col[None, :]
        tl.store(parts + at, total, mask=summed[:, None] & in_row)


def place_tokens(
    y: Tensor, visible: Tensor, cu_visible: Tensor, num_tokens: int, pos: Tensor | None, prefix_tokens: Tensor | None
) -> Tensor:
    """y [T, D] (+ pos [N, D], prefix_tokens [P, D]) -> [T + B*P, D]. Moves 2 * T * D elements; pos stays in L2."""
    check_dtypes("place_tokens", y, pos, prefix_tokens)
    batch, (total, width) = cu_visible.shape[0] - 1, y.shape
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    dtype = (prefix_tokens if pos is None else pos).dtype
    rows = total + batch * prefix
    out = torch.empty((rows, width), dtype=dtype, device=y.device)
    if out.numel() == 0:
        return out
    tile, block = row_tile(rows, width, out.element_size())
    grid = (ceil_div(rows, tile) * ceil_div(width, block),)
    args = y, visible, cu_visible, pos, prefix_tokens, out, total, rows, num_tokens, prefix, width
    flags = {"HAS_POS": pos is not None, "HAS_PREFIX": prefix > 0}
    with guard(y):
        place_tokens_fwd_kernel[grid](*args, **flags, ROWS=tile, BLOCK=block, **COPY)
    return out


def place_tokens_backward(
    grad: Tensor,
    slot: Tensor,
    cu_visible: Tensor,
    prefix: int,
    need_pos: bool,
    need_prefix: bool,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [T + B*P, D] -> grad_y [T, D], grad_pos [N, D] or [0], grad_prefix [P, D] or [0].

    Reads and writes each row once, and 8 bytes * splits * (N + P) * D for the sums over the batch.
    """
    batch, width, device = cu_visible.shape[0] - 1, grad.shape[1], grad.device
    tokens = slot.shape[0] // batch
    grad_y = torch.empty((grad.shape[0] - batch * prefix, width), dtype=y_dtype, device=device)
    check_dtypes("place_tokens_backward", grad, grad_y)
    grad_pos = torch.empty((tokens, width) if need_pos else (0,), dtype=grad.dtype, device=device)
    grad_prefix = torch.empty((prefix, width) if need_prefix else (0,), dtype=grad.dtype, device=device)
    if width == 0:
        return grad_y, grad_pos, grad_prefix
    # Places first..last of the sequence are summed over the batch.
    first, last = 0 if grad_prefix.numel() else prefix, prefix + tokens if need_pos else prefix
    summed = last > first
    tile, block = row_tile(prefix + tokens, width, 4)
    places = ceil_div(prefix + tokens, tile) * ceil_div(width, block)
    splits, each = batch_splits(batch, places, summed)
    parts = torch.empty((splits, last - first, width) if summed else (0,), dtype=torch.float32, device=device)
    args = grad, slot, cu_visible, grad_y, parts, batch, each, tokens, prefix, width, first, last
    with guard(grad):
        place_tokens_bwd_kernel[(places * splits,)](*args, NEED_SUMS=summed, ROWS=tile, BLOCK=block, **COPY)
        if grad_prefix.numel():
            sum_parts(parts, grad_prefix)
        if need_pos:
            sum_parts(parts[:, prefix - first :], grad_pos)
    return grad_y, grad_pos, grad_prefix


OPS = {
    "gather_tokens": gather_tokens,
    "gather_tokens_backward": gather_tokens_backward,
    "patch_rows": patch_rows,
    "patch_rows_backward": patch_rows_backward,
    "place_tokens": place_tokens,
    "place_tokens_backward": place_tokens_backward,
}
