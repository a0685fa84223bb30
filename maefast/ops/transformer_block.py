"""A whole pre-norm transformer block as one op with one backward: `transformer_block`.

Contract and definition; the checks are in `_transformer_block_form`, the autograd node in `_transformer_block`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maefast.ops import _autograd, _checks, _dispatch
from maefast.ops._transformer_block import TransformerBlock, scaled
from maefast.ops._transformer_block_form import Form, form_of, goes_with
from maefast.ops.attention import attention, check_starts
from maefast.ops.embed import gather_tokens
from maefast.ops.gelu import bias_gelu
from maefast.ops.linear import linear, linear_reference
from maefast.ops.mask import TokenMask
from maefast.ops.norm import add_norm
from maefast.ops.positions import Rope, check_bias, check_device, check_rope

Three = tuple[Tensor | None, Tensor | None, Tensor | None]


class BlockWeights(NamedTuple):
    """The parameters of a block. D: width, F: hidden width of the MLP."""

    norm1_weight: Tensor  # [D]
    norm1_bias: Tensor
    qkv_weight: Tensor | Three  # [3 * D, D], rows q, k, v; or three [D, D]
    qkv_bias: Tensor | Three | None  # [3 * D]; or three of [D] or None
    proj_weight: Tensor  # [D, D]
    proj_bias: Tensor | None
    norm2_weight: Tensor
    norm2_bias: Tensor
    fc1_weight: Tensor  # [F, D]
    fc1_bias: Tensor | None
    fc2_weight: Tensor  # [D, F]
    fc2_bias: Tensor | None
    scale1: Tensor | None = None  # [D], layer scale of the attention branch (Touvron et al., 2021)
    scale2: Tensor | None = None  # of the MLP branch


def transformer_block(
    x: Tensor,
    delta: Tensor | None,
    weights: BlockWeights,
    num_heads: int,
    *,
    eps: float | tuple[float, float] = 1e-6,
    scale: float | None = None,
    approximate: str = "none",
    drop1: Tensor | None = None,
    drop2: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    count: int | None = None,
    masked: TokenMask | None = None,
    prefix: int = 0,
    bias: Tensor | None = None,
    rope: Rope | None = None,
    keep: str = "lean",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``x += attention(norm1(x)); x += mlp(norm2(x))`` (Dosovitskiy et al., 2021) from one pending sum to the next.

    With r = x + delta: ``r1 = r + drop1 * scale1 * proj(attention(norm1(r)))`` and ``(r1, drop2 * scale2 *
    fc2(GELU(fc1(norm2(r1)))))`` is returned, whose sum is the output. One autograd node, with a backward by hand.

    Args:
        x: residual stream, [B, S, D] or packed [T, D]. delta: what is to be added to it, same shape, or None.
        weights: `BlockWeights`. num_heads: divides D.
        eps: of the LayerNorms, or a pair. scale: of the scores, by default 1 / sqrt(D / num_heads).
        approximate: of the GELU, "none" (erf) or "tanh".
        drop1, drop2: factors of the two branches for each sample [B] or, packed, for each row [T]: stochastic depth
            (Huang et al., 2016). No gradient.
        cu_seqlens: int32 [sequences + 1], where each packed sequence starts; required for packed input. max_seqlen: the
            longest, if known; otherwise read from `cu_seqlens` (on a GPU a sync).
        count: only the last `count` tokens of each sample are wanted: the others give keys and values, and nothing else
            of them is computed. [B, S, D] input only.
        masked: only the masked tokens of this plan are wanted, packed in its order; x is [B, prefix + N, D].
        prefix: tokens in front of the N of `masked`.
        bias: added to the scores of each pair, [G, H, S, S] or [H, S, S], as `attention` takes it; with `count`
            [G, H, count, S]. Dense tokens only, and not with `masked`.
        rope: `Rope`, by which queries and keys are rotated. Not with `count` or `masked`.
        keep: what is kept for the backward. "lean": residual streams, qkv, the attention's output and log-sum-exp, the
            pre-activation of the GELU; the outputs of norms and GELU come out of the backward's own passes once more.
            "all": those too. "nothing": the input alone, from which the backward runs the forward again. The results
            are the same.

    Returns:
        (r1, delta), each [B, S, D] or packed [T, D]; [B, count, D]; or packed [masked tokens, D]. Under autocast matrix
        products and attention run in its dtype, and gradients of float32 weights come in float32. Deterministic.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or options do not fit.
    """
    if not isinstance(weights, BlockWeights):
        raise TypeError(f"weights must be maefast.ops.BlockWeights, got {type(weights).__name__}")
    flat = _flatten(weights)
    if cu_seqlens is not None:
        _checks.tensor("x", x, ndim=2)
        max_seqlen = check_starts("cu_seqlens", cu_seqlens, x, max_seqlen)
        cu_seqlens = cu_seqlens.contiguous()
    eps = eps if isinstance(eps, tuple) else (eps, eps)
    placed = bias is not None or rope is not None
    options = num_heads, eps, scale, approximate, max_seqlen, count, prefix, keep, placed, backend
    form = form_of(x, delta, flat, options, drop1, drop2, cu_seqlens, masked)
    if form is None:
        options = num_heads, eps, scale, approximate, max_seqlen, count, prefix, backend
        args = x, delta, flat, *options, drop1, drop2, cu_seqlens, masked, bias, rope
        if keep == "nothing" and torch.is_grad_enabled():
            return checkpoint(_composed, *args, use_reentrant=False)
        return _composed(*args)
    x = x if x.dtype is form.stream else x.to(form.stream)
    if delta is not None:
        delta = (delta if goes_with(delta.dtype, form.stream) else delta.to(form.stream)).contiguous()
    if masked is not None:
        starts = tuple(masked_to_all(masked, form.length).values())
    elif cu_seqlens is not None:
        starts = cu_seqlens, None, max_seqlen, max_seqlen
    else:
        starts = None, None, count or form.length, form.length
    places = _places(form, x, bias, rope, cu_seqlens is not None or masked is not None) if placed else NO_PLACES
    args = form, x.contiguous(), delta, *places, drop1, drop2, *starts, masked
    return _autograd.apply(TransformerBlock, *args, *flat)


NO_PLACES = (None, None, None, False)


def _places(form: Form, x: Tensor, bias: Tensor | None, rope: Rope | None, packed: bool) -> tuple:
    """(bias, cos, sin, interleaved), as the raw op takes them."""
    check_device(x, bias, rope)
    heads, width = form.heads
    if bias is not None:
        bias = check_bias(bias, form.low, form.batch, heads, form.count or form.length, form.length, packed)
    turn = NO_PLACES[1:] if rope is None else check_rope(rope, form.low, x.shape[:-1], width, form.some)
    return bias, *turn


def _flatten(weights: BlockWeights) -> tuple[Tensor | None, ...]:
    """As `_transformer_block.WEIGHTS` counts them."""
    qkv, bias = weights.qkv_weight, weights.qkv_bias
    qkv = qkv if isinstance(qkv, tuple) else (qkv, None, None)
    bias = bias if isinstance(bias, tuple) else (bias, None, None)
    return *weights[:2], *qkv, *bias, *weights[4:]


# --- the definition, and what torch.compile traces ----------------------------------------------------------


def _composed(
    x,
    delta,
    w,
    num_heads,
    eps,
    scale,
    approximate,
    max_seqlen,
    count,
    prefix,
    backend,
    drop1,
    drop2,
    cu_seqlens,
    masked,
    bias,
    rope,
) -> tuple[Tensor, Tensor]:
    """The block op by op, on `backend`."""
    plain = (backend or _dispatch.forced()) == "reference"
    product = linear_reference if plain else linear
    width = x.shape[-1]
    r, y = add_norm(x, delta, w[0], w[1], eps[0], backend=backend)
    weight, shift = (_side_by_side(w[at : at + 3], width) for at in (2, 5))
    if count is None and masked is None:
        q, kv = product(y, weight, shift).unflatten(-1, (3, num_heads, -1)), None
        where = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max_seqlen}
    else:
        # split, not slices: its backward writes the gradient of the weight once.
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            (None, None) if t is None else t.split([width, 2 * width]) for t in (weight, shift)
        )
        q = product(wanted(y, count, masked, prefix, backend), q_weight, q_bias).unflatten(-1, (num_heads, -1))
        kv = product(y, kv_weight, kv_bias).unflatten(-1, (2, num_heads, -1))
        where = {}
        if masked is not None:
            kv, where = kv.flatten(0, 1), masked_to_all(masked, x.shape[1])
        r = wanted(r, count, masked, prefix, backend)
    a = attention(q, kv, **where, scale=scale, bias=bias, rope=rope, backend=backend).flatten(-2)
    p = scaled(product(a, w[8], w[9]), w[16], drop1)
    r, y = add_norm(r, p, w[10], w[11], eps[1], backend=backend)
    h = bias_gelu(product(y, w[12]), w[13], approximate, backend=backend)
    return r, scaled(product(h, w[14], w[15]), w[17], drop2)


def masked_to_all(masked: TokenMask, length: int) -> dict[str, Tensor | int]:
    """Where sequences start, as `attention` takes it, for the masked tokens as queries to all `length` tokens."""
    return {
        "cu_seqlens_q": masked.cu_masked,
        "cu_seqlens_k": torch.arange(masked.batch + 1, dtype=torch.int32, device=masked.device) * length,
        "max_seqlen_q": masked.max_masked,
        "max_seqlen_k": length,
    }


def wanted(
    tokens: Tensor, count: int | None, masked: TokenMask | None, prefix: int, backend: str | None = None
) -> Tensor:
    """The last `count` tokens [B, count, D], or the masked ones, packed."""
    if masked is None:
        return tokens[:, -count:]
    rows = gather_tokens(tokens, masked, "masked", prefix=prefix, keep_prefix=False, backend=backend)
    return rows.reshape(-1, tokens.shape[-1])


def _side_by_side(parts: tuple[Tensor | None, ...], width: int) -> Tensor | None:
    given = [t for t in parts if t is not None]
    if not given or given[0].shape[0] == 3 * width:
        return given[0] if given else None
    zeros = given[0].new_zeros(given[0].shape)
    return torch.cat([zeros if t is None else t for t in parts])
