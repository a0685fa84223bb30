"""Triton kernel of the mask family: a plan from scores, one program a row.

Scores become integers that sort as torch.sort does (-0 equals +0, every NaN last and equal), and the index breaks
ties, so no two keys are equal and any sorting network is stable. In score order the keys are sorted; in position
order only the k-th smallest is looked for, bit by bit, and one prefix sum places every token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import OPTIONS, check_dtypes, guard, power

MAX_TOKENS = 16384


@triton.jit
def sort_key(bits, WORD: tl.constexpr, INFINITY: tl.constexpr):
    """Integer order of the floats with these bits, sign extended to int32; `WORD` bits wide."""
    LARGEST: tl.constexpr = (1 << (WORD - 1)) - 1
    magnitude = bits & LARGEST
    key = tl.where(bits < 0, -magnitude - 1, magnitude)
    key = tl.where(magnitude == 0, 0, key)
    return tl.where(magnitude > INFINITY, LARGEST, key)


@triton.constexpr_function
def bit_of(j, registers, warps):
    """Where bit j of an element's place in the sorting network stands in its tensor index.

    Exchanges at distance 1 are the most frequent and at N/2 the rarest, so the low bits of the network are the
    ones inside a thread, then those inside a warp; only the top ones cross warps. In the tensor (one element a
    thread, lanes first, then warps, then registers) the register bits are the highest.
    """
    return j + 5 + warps if j < registers else j - registers


@triton.jit
def compare_exchange(
    key, i, place,
    J: tl.constexpr, MERGE: tl.constexpr, LOG: tl.constexpr, REGISTERS: tl.constexpr, WARPS: tl.constexpr,
    GATHER: tl.constexpr,
):  # fmt: skip
    """One stage of the bitonic network: each element meets the one whose place differs in bit J."""
    STRIDE: tl.constexpr = 1 << bit_of(J, REGISTERS, WARPS)
    if GATHER and J >= REGISTERS + 5:  # across warps: through shared memory, two barriers
        other = tl.gather(key, i ^ STRIDE, 0)
    else:  # a pair's sum less one of them is the other, also when the sum wraps around
        pair = tl.reshape(key, [(1 << LOG) // (2 * STRIDE), 2, STRIDE])
        other = tl.reshape(tl.sum(pair, axis=1, keep_dims=True) - pair, [1 << LOG])
    keep_low = ((place >> J) & 1) == 0
    if MERGE < LOG:
        keep_low = keep_low == (((place >> MERGE) & 1) == 0)
    return tl.where((key > other) == keep_low, other, key)


@triton.jit
def token_mask_sorted_kernel(
    bits, cu_visible, visible, masked, slot, tokens,
    WORD: tl.constexpr, INFINITY: tl.constexpr, LOG: tl.constexpr, REGISTERS: tl.constexpr, WARPS: tl.constexpr,
    GATHER: tl.constexpr,
):  # fmt: skip
    """Both lists in score order. One row a program: reads N scores, writes 2 N int32."""
    row = tl.program_id(0)
    base = row * tokens
    i = tl.arange(0, 1 << LOG)
    key = sort_key(tl.load(bits + base + i, mask=i < tokens, other=0).to(tl.int32), WORD, INFINITY)
    key = tl.where(i < tokens, key, (1 << (WORD - 1)) - 1)  # padding ties with NaN and loses by its index
    key = ((key.to(tl.int64) << 32) if WORD == 32 else (key << 16)) | i

    place = ((i & ((1 << (LOG - REGISTERS)) - 1)) << REGISTERS) | (i >> (LOG - REGISTERS))
    for merge in tl.static_range(1, LOG + 1):
        for j in tl.static_range(0, merge):
            key = compare_exchange(key, i, place, merge - 1 - j, merge, LOG, REGISTERS, WARPS, GATHER)
    flat = base + (key & 0xFFFF).to(tl.int32)

    first = tl.load(cu_visible + row)
    count = tl.load(cu_visible + row + 1) - first
    m = base - first + place - count
    is_visible = place < count
    is_masked = (place >= count) & (place < tokens)
    tl.store(visible + first + place, flat, mask=is_visible)
    tl.store(masked + m, flat, mask=is_masked)
    tl.store(slot + flat, tl.where(is_visible, first + place, -m - 1), mask=place < tokens)


@triton.jit
def token_mask_position_kernel(
    bits, cu_visible, visible, masked, slot, tokens,
    WORD: tl.constexpr, INFINITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Both lists in index order. One row a program: reads N scores, writes 2 N int32."""
    row = tl.program_id(0)
    base = row * tokens
    i = tl.arange(0, BLOCK)
    inside = i < tokens
    key = sort_key(tl.load(bits + base + i, mask=inside, other=0).to(tl.int32), WORD, INFINITY)
    first = tl.load(cu_visible + row)
    count = tl.load(cu_visible + row + 1) - first

    # The k-th smallest key is the largest t that fewer than k keys lie below: fix its bits from the top.
    SIGN: tl.constexpr = 1 << (WORD - 1)
    threshold = tl.full([], -SIGN, tl.int64)
    for step in range(WORD):
        raised = threshold + (tl.full([], SIGN, tl.int64) >> step)
        below = tl.sum((inside & (key < raised.to(tl.int32))).to(tl.int32), axis=0)
        threshold = tl.where(below < count, raised, threshold)
    limit = threshold.to(tl.int32)

    # Of the keys equal to the k-th, the first by index are taken. Two counters travel in one prefix sum.
    both = tl.where(inside & (key <= limit), tl.where(key < limit, 1, 1 << 16), 0)
    ties = count - tl.sum(both & 0xFFFF, axis=0)
    before = tl.cumsum(both, axis=0) - both
    ties_before = before >> 16
    is_visible = (both == 1) | ((both > 1) & (ties_before < ties))
    rank = (before & 0xFFFF) + tl.minimum(ties_before, ties)

    t = first + rank
    m = base - first + i - rank
    tl.store(visible + t, base + i, mask=is_visible)
    tl.store(masked + m, base + i, mask=inside & (is_visible == 0))
    tl.store(slot + base + i, tl.where(is_visible, t, -m - 1), mask=inside)


def token_mask(
    scores: Tensor, cu_visible: Tensor, total_visible: int, by_position: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """scores [B, N] -> visible [T], masked [B*N - T], slot [B*N], int32. N up to 16384.

    Moves 4 (or 2) + 8 bytes a token; the time is the latency of the network (N = 196: 36 stages, 3 of them across
    warps) and of the launch, not memory.
    """
    check_dtypes("token_mask", scores)
    batch, tokens = scores.shape
    if tokens > MAX_TOKENS:
        raise ValueError(f"token_mask: the Triton kernel takes rows of up to {MAX_TOKENS} tokens, got {tokens}")
    new = lambda n: torch.empty(n, dtype=torch.int32, device=scores.device)  # noqa: E731
    visible, masked, slot = new(total_visible), new(batch * tokens - total_visible), new(batch * tokens)
    word = 8 * scores.element_size()
    bits = scores.view(torch.int32 if word == 32 else torch.int16)
    infinity = {torch.float32: 0x7F800000, torch.float16: 0x7C00, torch.bfloat16: 0x7F80}[scores.dtype]
    args = (bits, cu_visible, visible, masked, slot, tokens)
    with guard(scores):
        if by_position:
            block = power(tokens)
            warps = max(1, min(32, block // 256))  # few: each of the `word` steps is a reduction over the block
            token_mask_position_kernel[(batch,)](
                *args, WORD=word, INFINITY=infinity, BLOCK=block, num_warps=warps, **OPTIONS
            )
        else:
            block = max(32, power(tokens))
            warps = 32 if block > 8192 else max(1, min(4, block // 64), min(16, block // 128))  # 2 to 16 keys a thread
            log, log_warps = block.bit_length() - 1, warps.bit_length() - 1
            token_mask_sorted_kernel[(batch,)](
                *args,
                WORD=word,
                INFINITY=infinity,
                LOG=log,
                REGISTERS=log - 5 - log_warps,
                WARPS=log_warps,
                GATHER=block * word <= 8192 * 32,  # up to 64 KiB of shared memory, which every target has
                num_warps=warps,
                **OPTIONS,
            )
    return visible, masked, slot


OPS = {"token_mask": token_mask}
