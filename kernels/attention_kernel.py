"""The Triton kernels behind `attention.py`: forward, backward of short sequences, backward of long ones.

A program reads its rows of interleaved qkv [T, 3, H, D] (or q [T, H, D] and kv [T, 2, H, D]) in place and writes
gradients in the same layout. Dots run on D rounded up to a power of two, the rest filled with zeros, which adds
nothing to a sum: every width is exact. Scores, softmax and sums are float32; what enters a dot has the input's dtype
(float32 dots are IEEE float32). Exponentials are powers of two: scores are scaled by log2(e) once.

No sum crosses a program, so nothing is atomic and runs agree bit for bit. Row numbers are int64.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from .attention_loads import (
    LOG2_E,
    load_bias,
    load_marked,
    load_offset,
    load_rows,
    load_turned,
    matrix,
    sequence,
    store_rows,
    turned_back,
)

LN_2 = tl.constexpr(math.log(2.0))

# --- forward -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["max_q", "max_k", "groups", "parts"])
def attention_fwd_kernel(
    q,
    kv,
    cu_q,
    cu_k,
    key_bias,
    marked,
    bias,
    cos,
    sin,
    out,
    lse,
    entropy,
    mass,
    max_q,
    max_k,
    heads,
    groups,
    parts,
    scale2,
    CROSS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ONE_PASS: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Every parts-th block of BLOCK_M queries of one sequence and head.

    ONE_PASS: all keys are one block, read once for all of the program's queries. ONE_BLOCK: so are all queries.
    """
    pid = tl.program_id(0)
    h = pid % heads
    part = pid // heads % parts
    b = pid // heads // parts
    first_q, len_q = sequence(cu_q, b, max_q)
    first_k, len_k = first_q, len_q
    if CROSS:
        first_k, len_k = sequence(cu_k, b, max_k)
    Q_STRIDE: tl.constexpr = D if CROSS else 3 * D
    KV_STRIDE: tl.constexpr = 2 * D if CROSS else 3 * D
    key = kv + h * D
    if not CROSS:
        key += heads * D
    value = key + heads * D
    n = tl.arange(0, BLOCK_N)
    turn = 0 if SHARED else first_q
    pairs = matrix(bias, b, h, groups, heads, max_q, max_k) if bias is not None else None
    if ONE_PASS:
        k = load_turned(key, first_k, n, len_k, heads * KV_STRIDE, cos, sin, turn, D, BLOCK_D, INTERLEAVED)
        v = load_rows(value, first_k, n, len_k, heads * KV_STRIDE, D, BLOCK_D)
        offset = load_offset(key_bias + h if key_bias is not None else None, first_k, n, len_k, heads)
    if ONE_BLOCK:  # a loop of one constant turn is no loop
        start, stop, step = 0, 1, 1
    else:
        start, stop, step = part, tl.cdiv(len_q, BLOCK_M), parts
    for i in range(start, stop, step):
        row = first_q + i * BLOCK_M
        m = tl.arange(0, BLOCK_M)
        left = len_q - i * BLOCK_M
        at_row = turn + i * BLOCK_M
        x = load_turned(q + h * D, row, m, left, heads * Q_STRIDE, cos, sin, at_row, D, BLOCK_D, INTERLEAVED)
        if ONE_PASS:
            s = tl.dot(x, tl.trans(k), input_precision=PRECISION) * scale2 + offset[None, :]
            if bias is not None:
                s += load_bias(pairs, i * BLOCK_M + m[:, None], n[None, :], len_q, len_k, max_k)
            if CAUSAL:
                s = tl.where(n[None, :] <= i * BLOCK_M + m[:, None], s, float("-inf"))
            top = tl.max(s, axis=1)
            top = tl.where(top == float("-inf"), 0.0, top)  # no key at all
            s -= top[:, None]
            e = tl.exp2(s)
            total = tl.sum(e, axis=1)
            acc = tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
            if entropy is not None:
                spread = tl.sum(e * tl.maximum(s, -200.0), axis=1)  # e is 0 there; 0 * -inf would be NaN
            if mass is not None:
                share = tl.sum(e * load_marked(marked, first_k, n, len_k)[None, :], axis=1)
        else:
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            spread = tl.zeros([BLOCK_M], tl.float32)
            share = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            last = len_k
            if CAUSAL:
                last = tl.minimum(len_k, (i + 1) * BLOCK_M)
            for j in range(0, last, BLOCK_N):
                k = load_turned(
                    key, first_k + j, n, len_k - j, heads * KV_STRIDE, cos, sin, turn + j, D, BLOCK_D, INTERLEAVED
                )
                v = load_rows(value, first_k + j, n, len_k - j, heads * KV_STRIDE, D, BLOCK_D)
                offset = load_offset(key_bias + h if key_bias is not None else None, first_k + j, n, len_k - j, heads)
                s = tl.dot(x, tl.trans(k), input_precision=PRECISION) * scale2 + offset[None, :]
                if bias is not None:
                    s += load_bias(pairs, i * BLOCK_M + m[:, None], j + n[None, :], len_q, len_k, max_k)
                if CAUSAL:
                    s = tl.where(j + n[None, :] <= i * BLOCK_M + m[:, None], s, float("-inf"))
                higher = tl.maximum(top, tl.max(s, axis=1))
                safe = tl.where(higher == float("-inf"), 0.0, higher)
                s -= safe[:, None]
                e = tl.exp2(s)
                shift = top - safe
                fade = tl.exp2(shift)
                if entropy is not None:  # sum of e * s with s from the new top
                    spread = fade * (spread + tl.maximum(shift, -200.0) * total)
                    spread += tl.sum(e * tl.maximum(s, -200.0), axis=1)
                if mass is not None:
                    share = fade * share + tl.sum(e * load_marked(marked, first_k + j, n, len_k - j)[None, :], axis=1)
                total = fade * total + tl.sum(e, axis=1)
                acc = tl.dot(e.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
                top = higher
            top = tl.where(top == float("-inf"), 0.0, top)
        any_key = total != 0
        total = tl.where(any_key, total, 1.0)
        inverse = 1.0 / total
        store_rows(out + h * D, acc * inverse[:, None], row, m, left, heads * D, D, BLOCK_D)
        at = row * heads + m * heads + h
        bits = tl.log2(total)
        tl.store(lse + at, tl.where(any_key, (top + bits) * LN_2, float("-inf")), mask=m < left)
        if entropy is not None:  # two terms >= 0: nothing cancels
            tl.store(entropy + at, (bits - spread * inverse) * LN_2, mask=m < left)
        if mass is not None:
            tl.store(mass + at, share * inverse, mask=m < left)


# --- backward ------------------------------------------------------------------------------------------------


@triton.jit
def load_lse(lse, at, inside):
    """Base-2 log-sum-exp; +inf, which makes every probability 0, for a row outside or without keys."""
    value = tl.load(lse + at, mask=inside, other=float("inf"))
    return tl.where(value == float("-inf"), float("inf"), value) * LOG2_E


@triton.jit
def load_grad(grad, at, inside, lse2):
    """Gradient of a statistic; 0 for a query that sees no key, where it may be infinite and P = 0 times it NaN."""
    return tl.where(lse2 == float("inf"), 0.0, tl.load(grad + at, mask=inside, other=0.0))


@triton.jit
def load_shift(grad_lse, grad_entropy, grad_mass, entropy, mass, at, inside, lse2):
    """What the statistics' gradients subtract from all scores of a query."""
    shift = tl.where(inside, 0.0, 0.0)
    if grad_lse is not None:
        shift -= load_grad(grad_lse, at, inside, lse2)
    if grad_entropy is not None:
        shift += load_grad(grad_entropy, at, inside, lse2) * tl.load(entropy + at, mask=inside, other=0.0)
    if grad_mass is not None:
        shift += load_grad(grad_mass, at, inside, lse2) * tl.load(mass + at, mask=inside, other=0.0)
    return shift


@triton.jit
def probabilities(s, scale2, offset, lse2, m, n, CAUSAL: tl.constexpr):
    """(P, log2 P) from raw products; `offset`, `lse2`, m and n are rows or columns that broadcast to the tile."""
    log_p = s * scale2 + offset - lse2
    if CAUSAL:
        log_p = tl.where(n <= m, log_p, float("-inf"))
    return tl.exp2(log_p), log_p


@triton.jit
def with_stats(dp, log_p, g_entropy, g_mass, mark):
    """dP plus what entropy and mass add to it, where their gradients are given."""
    if g_entropy is not None:
        dp -= g_entropy * (tl.maximum(log_p, -200.0) * LN_2)  # P is 0 below; 0 * -inf would be NaN
    if g_mass is not None:
        dp += g_mass * mark
    return dp


@triton.jit(do_not_specialize=["max_q", "max_k", "groups"])
def attention_bwd_kernel(
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
    cu_q,
    cu_k,
    key_bias,
    marked,
    bias,
    cos,
    sin,
    grad_q,
    grad_kv,
    grad_key_bias,
    max_q,
    max_k,
    heads,
    groups,
    scale,
    scale2,
    CROSS: tl.constexpr,
    CAUSAL: tl.constexpr,
    SHARED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One sequence and head: all keys and their gradients stay in the program, blocks of queries pass by.

    Reads q, k, v and dO once, writes dq, dk and dv once. All keys are here, so delta = sum(P * dP) and the output need
    not be read. `out` is given for float32, where rowsum(dO * O) is exact at scores of any size, while P =
    exp(S - lse) sums to 1 only as well as lse is rounded. Tiles are [keys, queries]: P and dS then enter the products
    for dV and dK as they lie in registers.
    """
    pid = tl.program_id(0)
    h = pid % heads
    b = pid // heads
    first_q, len_q = sequence(cu_q, b, max_q)
    first_k, len_k = first_q, len_q
    if CROSS:
        first_k, len_k = sequence(cu_k, b, max_k)
    q_stride = heads * (D if CROSS else 3 * D)
    kv_stride = heads * (2 * D if CROSS else 3 * D)
    to_key = (h if CROSS else heads + h) * D
    to_value = to_key + heads * D
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    turn = 0 if SHARED else first_q
    pairs = matrix(bias, b, h, groups, heads, max_q, max_k) if bias is not None else None
    k = load_turned(kv + to_key, first_k, n, len_k, kv_stride, cos, sin, turn, D, BLOCK_D, INTERLEAVED)
    v = load_rows(kv + to_value, first_k, n, len_k, kv_stride, D, BLOCK_D)
    offset = load_offset(key_bias + h if key_bias is not None else None, first_k, n, len_k, heads)[:, None]
    mark = load_marked(marked, first_k, n, len_k)[:, None] if grad_mass is not None else None
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if grad_key_bias is not None:
        db = tl.zeros([BLOCK_N], tl.float32)
    blocks = 1 if ONE_BLOCK else tl.cdiv(len_q, BLOCK_M)
    for i in range(0, blocks):
        row = first_q + i * BLOCK_M
        left = len_q - i * BLOCK_M
        inside = m < left
        at_row = turn + i * BLOCK_M
        x = load_turned(q + h * D, row, m, left, q_stride, cos, sin, at_row, D, BLOCK_D, INTERLEAVED)
        do = load_rows(grad + h * D, row, m, left, heads * D, D, BLOCK_D)
        at = row * heads + m * heads + h
        lse2 = load_lse(lse, at, inside)
        shift = load_shift(grad_lse, grad_entropy, grad_mass, entropy, mass, at, inside, lse2)
        g_entropy = load_grad(grad_entropy, at, inside, lse2)[None, :] if grad_entropy is not None else None
        g_mass = load_grad(grad_mass, at, inside, lse2)[None, :] if grad_mass is not None else None
        s = tl.dot(k, tl.trans(x), input_precision=PRECISION)
        added = offset
        if bias is not None:
            added += load_bias(pairs, i * BLOCK_M + m[None, :], n[:, None], len_q, len_k, max_k)
        p, log_p = probabilities(s, scale2, added, lse2[None, :], i * BLOCK_M + m[None, :], n[:, None], CAUSAL)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if out is None:
            shift += tl.sum(p * dp, axis=0)
        else:
            o = load_rows(out + h * D, row, m, left, heads * D, D, BLOCK_D)
            shift += tl.sum(do * o, axis=1)
        ds = p * (with_stats(dp, log_p, g_entropy, g_mass, mark) - shift[None, :])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        small = ds.to(x.dtype)
        dk = tl.dot(small, x, dk, input_precision=PRECISION)
        if BLOCK_N >= 128:  # warps split a chain of dots along the longer side of its last: let that be the keys' side
            dq = tl.trans(tl.dot(tl.trans(k), small, input_precision=PRECISION))
        else:
            dq = tl.dot(tl.trans(small), k, input_precision=PRECISION)
        dq = turned_back(dq * scale, m, left, cos, sin, at_row, D, BLOCK_D, INTERLEAVED)
        store_rows(grad_q + h * D, dq, row, m, left, q_stride, D, BLOCK_D)
        if grad_key_bias is not None:
            db += tl.sum(ds, axis=1)
    dk = turned_back(dk * scale, n, len_k, cos, sin, turn, D, BLOCK_D, INTERLEAVED)
    store_rows(grad_kv + to_key, dk, first_k, n, len_k, kv_stride, D, BLOCK_D)
    store_rows(grad_kv + to_value, dv, first_k, n, len_k, kv_stride, D, BLOCK_D)
    if grad_key_bias is not None:
        tl.store(grad_key_bias + first_k * heads + n * heads + h, db, mask=n < len_k)


@triton.jit(do_not_specialize=["max_q", "max_k", "groups", "key_blocks", "blocks"])
def attention_bwd_tiled_kernel(
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
    cu_q,
    cu_k,
    key_bias,
    marked,
    bias,
    cos,
    sin,
    grad_q,
    grad_kv,
    grad_key_bias,
    max_q,
    max_k,
    heads,
    groups,
    key_blocks,
    blocks,
    scale,
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
    """Two kinds of program for each sequence and head: the first key_blocks own a block of keys and sum dK and dV over
    the queries; the others own a block of queries and sum dQ over the keys, from scores computed anew."""
    pid = tl.program_id(0)
    h = pid % heads
    block = pid // heads % blocks
    b = pid // heads // blocks
    first_q, len_q = sequence(cu_q, b, max_q)
    first_k, len_k = first_q, len_q
    if CROSS:
        first_k, len_k = sequence(cu_k, b, max_k)
    q_stride = heads * (D if CROSS else 3 * D)
    kv_stride = heads * (2 * D if CROSS else 3 * D)
    to_key = (h if CROSS else heads + h) * D
    to_value = to_key + heads * D
    n = tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    turn = 0 if SHARED else first_q
    pairs = matrix(bias, b, h, groups, heads, max_q, max_k) if bias is not None else None
    if block < key_blocks:
        n0 = block * BLOCK_N
        first_k += n0
        keys = len_k - n0
        k = load_turned(kv + to_key, first_k, n, keys, kv_stride, cos, sin, turn + n0, D, BLOCK_D, INTERLEAVED)
        v = load_rows(kv + to_value, first_k, n, keys, kv_stride, D, BLOCK_D)
        offset = load_offset(key_bias + h if key_bias is not None else None, first_k, n, keys, heads)[:, None]
        mark = load_marked(marked, first_k, n, keys)[:, None] if grad_mass is not None else None
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        db = tl.zeros([BLOCK_N], tl.float32)
        m_start = n0 // BLOCK_M * BLOCK_M if CAUSAL else 0
        m_stop = tl.where(keys > 0, len_q, 0)
        for i in range(m_start, m_stop, BLOCK_M):
            row = first_q + i
            inside = m < len_q - i
            x = load_turned(q + h * D, row, m, len_q - i, q_stride, cos, sin, turn + i, D, BLOCK_D, INTERLEAVED)
            do = load_rows(grad + h * D, row, m, len_q - i, heads * D, D, BLOCK_D)
            o = load_rows(out + h * D, row, m, len_q - i, heads * D, D, BLOCK_D)
            at = row * heads + m * heads + h
            lse2 = load_lse(lse, at, inside)
            shift = load_shift(grad_lse, grad_entropy, grad_mass, entropy, mass, at, inside, lse2)
            shift += tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
            g_entropy = load_grad(grad_entropy, at, inside, lse2)[None, :] if grad_entropy is not None else None
            g_mass = load_grad(grad_mass, at, inside, lse2)[None, :] if grad_mass is not None else None
            s = tl.dot(k, tl.trans(x), input_precision=PRECISION)
            added = offset
            if bias is not None:
                added += load_bias(pairs, i + m[None, :], n0 + n[:, None], len_q, len_k, max_k)
            p, log_p = probabilities(s, scale2, added, lse2[None, :], i + m[None, :], n0 + n[:, None], CAUSAL)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (with_stats(dp, log_p, g_entropy, g_mass, mark) - shift[None, :])
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dk = tl.dot(ds.to(x.dtype), x, dk, input_precision=PRECISION)
            if grad_key_bias is not None:
                db += tl.sum(ds, axis=1)
        dk = turned_back(dk * scale, n, keys, cos, sin, turn + n0, D, BLOCK_D, INTERLEAVED)
        store_rows(grad_kv + to_key, dk, first_k, n, keys, kv_stride, D, BLOCK_D)
        store_rows(grad_kv + to_value, dv, first_k, n, keys, kv_stride, D, BLOCK_D)
        if grad_key_bias is not None:
            tl.store(grad_key_bias + first_k * heads + n * heads + h, db, mask=n < keys)
    else:
        m0 = (block - key_blocks) * BLOCK_M
        row = first_q + m0
        left = len_q - m0
        inside = m < left
        x = load_turned(q + h * D, row, m, left, q_stride, cos, sin, turn + m0, D, BLOCK_D, INTERLEAVED)
        do = load_rows(grad + h * D, row, m, left, heads * D, D, BLOCK_D)
        o = load_rows(out + h * D, row, m, left, heads * D, D, BLOCK_D)
        at = row * heads + m * heads + h
        lse2 = load_lse(lse, at, inside)
        shift = load_shift(grad_lse, grad_entropy, grad_mass, entropy, mass, at, inside, lse2)
        shift += tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)
        g_entropy = load_grad(grad_entropy, at, inside, lse2)[:, None] if grad_entropy is not None else None
        g_mass = load_grad(grad_mass, at, inside, lse2)[:, None] if grad_mass is not None else None
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        n_stop = tl.where(left > 0, len_k, 0)
        if CAUSAL:
            n_stop = tl.minimum(n_stop, m0 + BLOCK_M)
        for j in range(0, n_stop, BLOCK_N):
            keys = len_k - j
            k = load_turned(kv + to_key, first_k + j, n, keys, kv_stride, cos, sin, turn + j, D, BLOCK_D, INTERLEAVED)
            v = load_rows(kv + to_value, first_k + j, n, keys, kv_stride, D, BLOCK_D)
            offset = load_offset(key_bias + h if key_bias is not None else None, first_k + j, n, keys, heads)[None, :]
            mark = load_marked(marked, first_k + j, n, keys)[None, :] if grad_mass is not None else None
            s = tl.dot(x, tl.trans(k), input_precision=PRECISION)
            added = offset
            if bias is not None:
                added += load_bias(pairs, m0 + m[:, None], j + n[None, :], len_q, len_k, max_k)
            p, log_p = probabilities(s, scale2, added, lse2[:, None], m0 + m[:, None], j + n[None, :], CAUSAL)
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            ds = p * (with_stats(dp, log_p, g_entropy, g_mass, mark) - shift[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        dq = turned_back(dq * scale, m, left, cos, sin, turn + m0, D, BLOCK_D, INTERLEAVED)
        store_rows(grad_q + h * D, dq, row, m, left, q_stride, D, BLOCK_D)
