"""Gradient of the bias of pairs: a program owns a tile of one group's and head's matrix and sums over the sequences of
the group in order. A kernel of its own: the others own the sums of a sequence."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernel import load_grad, load_lse, load_shift, probabilities, with_stats
from .attention_loads import load_bias, load_marked, load_offset, load_rows, load_turned, matrix


@triton.jit(do_not_specialize=["max_q", "max_k", "groups", "turns", "columns", "tiles"])
def attention_bias_bwd_kernel(
    grad,
    grad_lse,
    grad_entropy,
    grad_mass,
    q,
    kv,
    out,
    lse,
    entropy,
    mass,
    key_bias,
    marked,
    bias,
    cos,
    sin,
    grad_bias,
    max_q,
    max_k,
    heads,
    groups,
    turns,
    columns,
    tiles,
    scale2,
    CROSS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """turns: sequences of a group. columns, tiles: tiles across a matrix, and of all of it."""
    pid = tl.program_id(0)
    h = pid % heads
    tile = pid // heads % tiles
    group = pid // heads // tiles
    m0 = tile // columns * BLOCK_M
    n0 = tile % columns * BLOCK_N
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    inside = m < max_q - m0
    keys = max_k - n0
    q_stride = heads * (D if CROSS else 3 * D)
    kv_stride = heads * (2 * D if CROSS else 3 * D)
    to_key = (h if CROSS else heads + h) * D
    to_value = to_key + heads * D
    pairs = matrix(bias, group, h, groups, heads, max_q, max_k)
    added = load_bias(pairs, m0 + m[:, None], n0 + n[None, :], max_q, max_k, max_k)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i in range(0, turns):
        b = (i * groups + group).to(tl.int64)
        row = b * max_q + m0
        first_k = b * max_k + n0
        turn = 0 if SHARED else b * max_q
        x = load_turned(q + h * D, row, m, max_q - m0, q_stride, cos, sin, turn + m0, D, BLOCK_D, INTERLEAVED)
        k = load_turned(kv + to_key, first_k, n, keys, kv_stride, cos, sin, turn + n0, D, BLOCK_D, INTERLEAVED)
        v = load_rows(kv + to_value, first_k, n, keys, kv_stride, D, BLOCK_D)
        do = load_rows(grad + h * D, row, m, max_q - m0, heads * D, D, BLOCK_D)
        o = load_rows(out + h * D, row, m, max_q - m0, heads * D, D, BLOCK_D)
        at = row * heads + m * heads + h
        lse2 = load_lse(lse, at, inside)
        shift = load_shift(grad_lse, grad_entropy, grad_mass, entropy, mass, at, inside, lse2)
        shift += tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
        g_entropy = load_grad(grad_entropy, at, inside, lse2)[:, None] if grad_entropy is not None else None
        g_mass = load_grad(grad_mass, at, inside, lse2)[:, None] if grad_mass is not None else None
        offset = load_offset(key_bias + h if key_bias is not None else None, first_k, n, keys, heads)[None, :]
        mark = load_marked(marked, first_k, n, keys)[None, :] if grad_mass is not None else None
        s = tl.dot(x, tl.trans(k), input_precision=PRECISION)
        p, log_p = probabilities(s, scale2, offset + added, lse2[:, None], m0 + m[:, None], n0 + n[None, :], CAUSAL)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        total += p * (with_stats(dp, log_p, g_entropy, g_mass, mark) - shift[:, None])
    place = matrix(grad_bias, group, h, groups, heads, max_q, max_k)
    place += (m0 + m[:, None]).to(tl.int64) * max_k + n0 + n[None, :]
    tl.store(place, total, mask=inside[:, None] & (n < keys)[None, :])
