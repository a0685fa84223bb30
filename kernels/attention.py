"""Attention on Triton: which kernel of `attention_kernel` serves which lengths, with which tile, and its launch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import ceil_div, check_dtypes, guard, power
from .attention_bias_kernel import attention_bias_bwd_kernel
from .attention_kernel import attention_bwd_kernel, attention_bwd_tiled_kernel, attention_fwd_kernel

PROGRAMS = 1024  # fill any GPU of today
LOG2E = math.log2(math.e)


class Tile(NamedTuple):
    """How a launch divides its work."""

    queries: int  # of a block
    keys: int
    warps: int
    one_pass: bool = True  # all keys of a sequence are one block
    stages: int = 1  # 2: the next block is on its way while this one is computed


# Chosen from compiled register and shared-memory counts (sm_80, 90, 100: no spills, many programs resident), not yet
# from timings. To measure first, in this order, by replacing these functions:
# - backward, 65..128 keys, and 129..256 at width 32: one program of 8 warps is all that an SM holds. Against it:
#   Tile(16, 128, 8) with maxnreg=128 (two programs; spills on sm_80 only), and the tiled kernel.
# - backward, 129..256 keys at width 64: tiled (rows are read from L2 three to five times) against
#   Tile(16, 256, 8, True, 2), which compiles without spills from sm_90 on.
# - up to 16 keys: 1, 2 or 4 warps; up to 64: 4 or 8. Moving bytes is the work, so more resident warps should win.
# - forward above 128 keys: Tile(64, 32, 4), Tile(64, 64, 4), Tile(32, 256, 8, True); 1 stage against 2.


def forward_tile(dtype: torch.dtype, block_d: int, max_q: int, max_k: int, placed: bool = False) -> Tile:
    """`placed`: a bias of pairs or a rotation, whose tiles take registers."""
    w = 2 if block_d > 64 else 1
    if dtype is torch.float32:  # no tensor cores: blocks are small, or registers spill
        tiles, rest = (
            (Tile(16, 16, 2 * w), Tile(32, 32, 4 * w), Tile(16, 64, 4 * w), Tile(16, 128, 8)),
            Tile(32, 32, 8, False),
        )
    else:
        tiles = (Tile(16, 16, w), Tile(32, 32, 2 * w), Tile(64, 64, 4), Tile(32, 128, 4 * w))
        rest = Tile(32, 32, 4 * w, False) if placed else Tile(64, 32, 4 * w, False, 2)
        tiles = tiles[:3] if placed else tiles
    return _fit(tiles, rest, max_q, max_k)


def backward_tile(dtype: torch.dtype, block_d: int, max_q: int, max_k: int, extras: bool, placed: bool = False) -> Tile:
    """`extras`: key bias, statistics or causal, whose rows and masks take registers; `placed` as in the forward."""
    w = 2 if block_d > 64 else 1
    if dtype is torch.float32:
        tiles = (Tile(16, 16, 2 * w), Tile(32, 32, 8), Tile(16, 64, 8), Tile(16, 128, 8))
        tiles, rest = tiles[: 5 - w], Tile(32, 32, max(4, block_d // 8), False)
    else:
        tiles = (Tile(16, 16, w), Tile(32, 32, max(2, block_d // 16)))
        if w == 2:
            tiles, rest = (*tiles, Tile(16, 64, 8, stages=2)), Tile(16, 64, 8, False, 2)
        elif placed:
            tiles, rest = (*tiles, Tile(16, 64, 4)), Tile(16, 64, 8, False)
        elif extras:
            tiles, rest = (*tiles, Tile(16, 64, 4), Tile(16, 128, 8, stages=2)), Tile(32, 64, 4, False, 2)
        else:
            tiles, rest = (*tiles, Tile(64, 64, 4), Tile(32, 128, 8, stages=2)), Tile(32, 64, 4, False, 2)
            tiles += (Tile(32, 256, 8, stages=2),) if block_d <= 32 else ()
    if max_q > 1024:  # a program that takes all queries of a sequence would be one of too few
        tiles = ()
    return _fit(tiles, rest, max_q, max_k)


def _fit(tiles: tuple[Tile, ...], rest: Tile, max_q: int, max_k: int) -> Tile:
    """The first that holds all keys, with blocks of no more queries than there are."""
    tile = next((tile for tile in tiles if max_k <= tile.keys), rest)
    return tile._replace(queries=min(tile.queries, max(16, power(max_q))))


def attention(
    q: Tensor,
    kv: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    batch: int,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    marked: Tensor | None,
    stats: bool,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """qkv [T, 3, H, D], or q [Tq, H, D] and kv [Tk, 2, H, D] -> out [Tq, H, D], lse, entropy, mass [Tq, H] or [0].

    One pass moves (Tq + 2 Tk) * H * D elements in, Tq * H * D elements and 4 bytes a query and head out.
    """
    check_dtypes("attention", q, kv)
    rows, heads, width = q.shape[0], q.shape[-2], q.shape[-1]
    row = lambda wanted: torch.empty((rows, heads) if wanted else (0,), dtype=torch.float32, device=q.device)  # noqa: E731
    out = torch.empty((rows, heads, width), dtype=q.dtype, device=q.device)
    lse, entropy, mass = row(True), row(stats), row(stats and marked is not None)
    if out.numel() == 0:
        return out, lse, entropy, mass
    block_d = max(16, power(width))
    placed = bias is not None or cos is not None
    tile = forward_tile(q.dtype, block_d, max_q, max_k, placed)
    blocks = ceil_div(max_q, tile.queries)
    # A sequence's keys stay close (shared memory, L1) while a program goes through its blocks of queries.
    parts = blocks if max_k > 256 else min(blocks, ceil_div(PROGRAMS, batch * heads))
    with guard(q):
        attention_fwd_kernel[(batch * heads * parts,)](
            q,
            q if kv is None else kv,
            cu_q,
            cu_k,
            key_bias,
            marked.view(torch.uint8) if mass.numel() else None,
            bias,
            cos,
            sin,
            out,
            lse,
            entropy if stats else None,
            mass if mass.numel() else None,
            max_q,
            max_k,
            heads,
            1 if bias is None else bias.shape[0],
            parts,
            scale * LOG2E,
            CROSS=kv is not None,
            CAUSAL=bool(causal),
            SHARED=shared(cos, q),
            INTERLEAVED=bool(interleaved),
            ONE_PASS=tile.one_pass,
            ONE_BLOCK=tile.one_pass and blocks == 1,
            D=width,
            BLOCK_D=block_d,
            BLOCK_M=tile.queries,
            BLOCK_N=tile.keys,
            PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )
    return out, lse, entropy, mass


def shared(cos: Tensor | None, q: Tensor) -> bool:
    """Whether the rows of cos and sin are those of every sequence."""
    return cos is not None and cos.shape[0] != q.shape[0]


def attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    grad_entropy: Tensor | None,
    grad_mass: Tensor | None,
    q: Tensor,
    kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    entropy: Tensor,
    mass: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    batch: int,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    key_bias: Tensor | None,
    marked: Tensor | None,
    need_key_bias: bool,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad [Tq, H, D] -> grad_q (like q, interleaved), grad_kv (like kv or [0]), grad_key_bias [Tk, H] or [0],
    grad_bias like bias or [0].

    With all keys in one program it moves (3 Tq + 4 Tk) * H * D elements and 4 bytes a query and head.
    """
    check_dtypes("attention_backward", grad, q, kv)
    if mass.numel() == 0:
        grad_mass = None
    heads, width = q.shape[-2], q.shape[-1]
    new = lambda shape, dtype: torch.empty(shape, dtype=dtype, device=q.device)  # noqa: E731
    grad_q = new(q.shape, q.dtype)
    grad_kv = new((0,) if kv is None else kv.shape, q.dtype)
    grad_key_bias = new(key_bias.shape if need_key_bias else (0,), torch.float32)
    grad_bias = new(bias.shape if need_bias else (0,), torch.float32)
    if q.shape[0] == 0 or (kv is not None and kv.shape[0] == 0):
        return tuple(t.zero_() for t in (grad_q, grad_kv, grad_key_bias, grad_bias))
    block_d = max(16, power(width))
    extras = (
        causal
        or any(x is not None for x in (key_bias, bias, cos))
        or any(g is not None for g in (grad_lse, grad_entropy, grad_mass))
    )
    tile = backward_tile(q.dtype, block_d, max_q, max_k, extras, bias is not None or cos is not None)
    query_blocks, key_blocks = ceil_div(max_q, tile.queries), ceil_div(max_k, tile.keys)
    own = out if q.dtype is torch.float32 else None
    stats = grad_lse, grad_entropy, grad_mass
    saved = lse, None if grad_entropy is None else entropy, None if grad_mass is None else mass
    marks = None if grad_mass is None else marked.view(torch.uint8)
    rows = cu_q, cu_k, key_bias, marks, bias, cos, sin
    grads = grad_q, grad_q if kv is None else grad_kv, grad_key_bias if need_key_bias else None
    options = {
        "CROSS": kv is not None,
        "CAUSAL": bool(causal),
        "SHARED": shared(cos, q),
        "INTERLEAVED": bool(interleaved),
        "D": width,
        "BLOCK_D": block_d,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "PRECISION": "ieee" if q.dtype is torch.float32 else "tf32",
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }
    groups = 1 if bias is None else bias.shape[0]
    inputs, sizes, scales = (q, q if kv is None else kv), (max_q, max_k, heads, groups), (scale, scale * LOG2E)
    with guard(q):
        if tile.one_pass:
            attention_bwd_kernel[(batch * heads,)](
                grad,
                *stats,
                *inputs,
                own,
                *saved,
                *rows,
                *grads,
                *sizes,
                *scales,
                ONE_BLOCK=query_blocks == 1,
                **options,
            )
        else:
            blocks = query_blocks + key_blocks
            attention_bwd_tiled_kernel[(batch * heads * blocks,)](
                grad, *stats, *inputs, out, *saved, *rows, *grads, *sizes, key_blocks, blocks, *scales, **options
            )
        if need_bias:
            # Not yet measured: 32 x 32 keeps every tile of float32 in registers, and fills a GPU from a few windows on.
            options.update(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=1)
            columns = ceil_div(max_k, 32)
            tiles = columns * ceil_div(max_q, 32)
            attention_bias_bwd_kernel[(groups * heads * tiles,)](
                grad, *stats, *inputs, out, *saved, key_bias, marks, bias, cos, sin, grad_bias, *sizes, batch // groups,
                columns, tiles, scale * LOG2E, **options,
            )  # fmt: skip
    return grad_q, grad_kv, grad_key_bias, grad_bias


OPS = {"attention": attention, "attention_backward": attention_backward}
