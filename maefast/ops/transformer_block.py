"""A whole pre-norm transformer block as one op with one backward: `transformer_block`.

Contract, checks and definition; the autograd node is in `_transformer_block`.
"""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from maefast.ops import _attention_table, _autograd, _checks, _dispatch
from maefast.ops._transformer_block import KEEP, Backends, Form, TransformerBlock
from maefast.ops.attention import attention, check_starts
from maefast.ops.embed import check_plan, gather_tokens
from maefast.ops.gelu import bias_gelu
from maefast.ops.linear import linear, linear_reference
from maefast.ops.mask import TokenMask
from maefast.ops.norm import add_norm

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
        _checks.tensor("x", x)
        max_seqlen = check_starts("cu_seqlens", cu_seqlens, x, max_seqlen)
    eps = eps if isinstance(eps, tuple) else (eps, eps)
    options = num_heads, eps, scale, approximate, max_seqlen, count, prefix, keep, backend
    form = _form(x, delta, flat, options, drop1, drop2, cu_seqlens, masked)
    if form is None:
        options = num_heads, eps, scale, approximate, max_seqlen, count, prefix, backend
        args = x, delta, flat, *options, drop1, drop2, cu_seqlens, masked
        if keep == "nothing" and torch.is_grad_enabled():
            return checkpoint(_composed, *args, use_reentrant=False)
        return _composed(*args)
    x = x if x.dtype is form.stream else x.to(form.stream)
    if delta is not None:
        delta = (delta if form.takes(delta.dtype) else delta.to(form.stream)).contiguous()
    if masked is not None:
        cu_k = torch.arange(masked.batch + 1, dtype=torch.int32, device=x.device) * form.length
        starts = masked.cu_masked, cu_k, masked.max_masked, form.length
    elif cu_seqlens is not None:
        starts = cu_seqlens, None, max_seqlen, max_seqlen
    else:
        starts = None, None, count or form.length, form.length
    return _autograd.apply(TransformerBlock, form, x.contiguous(), delta, drop1, drop2, *starts, masked, *flat)


def _flatten(weights: BlockWeights) -> tuple[Tensor | None, ...]:
    """As `_transformer_block.WEIGHTS` counts them."""
    qkv, bias = weights.qkv_weight, weights.qkv_bias
    qkv = qkv if isinstance(qkv, tuple) else (qkv, None, None)
    bias = bias if isinstance(bias, tuple) else (bias, None, None)
    return *weights[:2], *qkv, *bias, *weights[4:]


def transformer_block_reference(x, delta, weights, num_heads, **options) -> tuple[Tensor, Tensor]:
    """The definition, differentiable: `transformer_block` of plain PyTorch ops."""
    return transformer_block(x, delta, weights, num_heads, **options, backend="reference")


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
) -> tuple[Tensor, Tensor]:
    """The block op by op, on `backend`."""
    plain = (backend or _dispatch.forced()) == "reference"
    product = linear_reference if plain else linear
    width = x.shape[-1]
    r, y = add_norm(x, delta, w[0], w[1], eps[0], backend=backend)
    weight, bias = (_side_by_side(w[at : at + 3], width) for at in (2, 5))
    if count is None and masked is None:
        q, kv = product(y, weight, bias).unflatten(-1, (3, num_heads, -1)), None
        where = {"cu_seqlens_q": cu_seqlens, "max_seqlen_q": max_seqlen}
    else:
        # split, not slices: its backward writes the gradient of the weight once.
        (q_weight, kv_weight), (q_bias, kv_bias) = (
            (None, None) if t is None else t.split([width, 2 * width]) for t in (weight, bias)
        )
        q = product(_wanted(y, count, masked, prefix, backend), q_weight, q_bias).unflatten(-1, (num_heads, -1))
        kv = product(y, kv_weight, kv_bias).unflatten(-1, (2, num_heads, -1))
        where = {}
        if masked is not None:
            length = x.shape[1]
            kv = kv.flatten(0, 1)
            where = {
                "cu_seqlens_q": masked.cu_masked,
                "cu_seqlens_k": torch.arange(masked.batch + 1, dtype=torch.int32, device=x.device) * length,
                "max_seqlen_q": masked.max_masked,
                "max_seqlen_k": length,
            }
        r = _wanted(r, count, masked, prefix, backend)
    a = attention(q, kv, **where, scale=scale, backend=backend).flatten(-2)
    p = _scaled(product(a, w[8], w[9]), w[16], drop1)
    r, y = add_norm(r, p, w[10], w[11], eps[1], backend=backend)
    h = bias_gelu(product(y, w[12]), w[13], approximate, backend=backend)
    return r, _scaled(product(h, w[14], w[15]), w[17], drop2)


def _wanted(tokens: Tensor, count: int | None, masked: TokenMask | None, prefix: int, backend: str | None) -> Tensor:
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


def _scaled(out: Tensor, scale: Tensor | None, drop: Tensor | None) -> Tensor:
    out = out if scale is None else out * scale
    return out if drop is None else out * drop.to(out.dtype).view(-1, *(1,) * (out.ndim - 1))


# --- checks, once for each kind of call ---------------------------------------------------------------------

_FORMS: dict[tuple, Form | None] = {}
_KIND = attrgetter("shape", "dtype", "device")
_MOST_FORMS = 4096  # ragged calls are of another kind at each step


def _form(x, delta, flat, options, drop1, drop2, cu_seqlens, masked) -> Form | None:
    """The form of such calls, or None where the ops run one by one.

    Raises:
        TypeError, ValueError: the call does not fit.
    """
    if torch.compiler.is_compiling():  # traces the ops that the node is made of; nothing is kept of traced sizes
        _checked(x, delta, flat, *options, drop1, drop2, cu_seqlens, masked)
        return None
    try:
        kind = x.device.type
        key = (
            *[t if t is None else _KIND(t) for t in (x, delta, drop1, drop2, cu_seqlens, *flat)],
            *options,
            None
            if masked is None
            else (masked.batch, masked.num_tokens, masked.device, masked.total_masked, masked.max_masked),
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            _dispatch.forced(),
        )
        return _FORMS[key]
    except (AttributeError, TypeError):  # something that is no tensor, or no number: the checks say which
        key = None
    except KeyError:
        pass
    form = _checked(x, delta, flat, *options, drop1, drop2, cu_seqlens, masked)
    if key is not None:
        if len(_FORMS) >= _MOST_FORMS:
            _FORMS.clear()
        _FORMS[key] = form
    return form


def _checked(
    x, delta, w, num_heads, eps, scale, approximate, max_seqlen, count, prefix, keep, backend, drop1, drop2, cu, masked
) -> Form | None:
    _checks.tensor("x", x, ndim=(2, 3))
    packed, width = x.ndim == 2, x.shape[-1]
    if delta is not None:
        _checks.tensor("delta", delta)
        if delta.shape != x.shape:
            raise ValueError(f"delta must have the shape of x, {tuple(x.shape)}, got {tuple(delta.shape)}")
    _check_numbers(width, num_heads, eps, scale, approximate, keep)
    if packed != (cu is not None):
        raise ValueError(
            "packed input needs cu_seqlens"
            if packed
            else "cu_seqlens go with packed input; this one has a batch dimension"
        )
    _check_wanted(x, count, masked, prefix)
    _check_weights(w, width)
    for name, drop in (("drop1", drop1), ("drop2", drop2)):
        if drop is not None:
            _checks.tensor(name, drop, ndim=1)
            if masked is not None or len(drop) != len(x):
                what = "does not go with `masked`" if masked is not None else f"must hold {len(x)} factors"
                raise ValueError(f"{name} {what}, got shape {tuple(drop.shape)}")
    names = [name for name in BlockWeights._fields for _ in range(3 if name.startswith("qkv") else 1)]
    for name, t in [("delta", delta), ("drop1", drop1), ("drop2", drop2), *zip(names, w)]:
        _checks.same_device(x=x, **{name: t})

    kind, stream = x.device.type, _checks.promote(x, delta)
    wide = torch.float64 if stream is torch.float64 else torch.float32
    autocast = torch.is_autocast_enabled(kind) and stream is not torch.float64
    low = torch.get_autocast_dtype(kind) if autocast else stream
    for name, t in zip(names, w):
        if not autocast and t is not None and name[:3] in ("qkv", "pro", "fc1", "fc2") and t.dtype is not stream:
            raise TypeError(f"{name} is {t.dtype} but the tokens are {stream}")
    if not x.numel() or (masked is not None and not masked.total_masked):
        return None
    branch = [low if t is None else torch.promote_types(low, t.dtype) for t in w[-2:]]
    if any(dtype is not stream and not (wide is stream and dtype.itemsize == 2) for dtype in (low, *branch)):
        return None
    longest = max_seqlen if packed else x.shape[1]
    call = _attention_table.Call(
        device=kind,
        dtype=low,
        head_dim=width // num_heads,
        max_q=masked.max_masked if masked is not None else count or longest,
        max_k=longest,
        packed=packed or masked is not None,
        cross=masked is not None or count is not None,
        causal=False,
        extras=False,
        scaled=scale is not None and scale != (width // num_heads) ** -0.5,
    )
    backends = Backends(
        norm=_dispatch.choose("add_norm", kind, stream, backend),
        gelu=_dispatch.choose("bias_gelu", kind, low, backend),
        attention=_attention_table.choose(call, backend),
        gather=None if masked is None else _dispatch.choose("gather_tokens", kind, low, backend),
    )
    if "reference" in backends:
        return None
    return Form(
        x=x,
        stream=stream,
        low=low,
        wide=wide,
        heads=num_heads,
        hidden=w[12].shape[0],
        eps=eps,
        scale=(width // num_heads) ** -0.5 if scale is None else float(scale),
        tanh=approximate == "tanh",
        count=count,
        masked=masked,
        prefix=prefix,
        keep=keep,
        sequences=cu.shape[0] - 1 if packed else None,
        backends=backends,
    )


def _check_numbers(width, num_heads, eps, scale, approximate, keep) -> None:
    if not isinstance(num_heads, int) or num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(f"num_heads must be a whole number that divides the width {width}, got {num_heads!r}")
    if len(eps) != 2 or not all(isinstance(value, (int, float)) and value > 0 for value in eps):
        raise ValueError(f"eps must be positive, or a pair of such numbers, got {eps!r}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    _checks.one_of("approximate", approximate, ("none", "tanh"))
    _checks.one_of("keep", keep, KEEP)


def _check_wanted(x: Tensor, count, masked, prefix) -> None:
    if count is not None:
        if masked is not None:
            raise ValueError("give count or masked, not both")
        if x.ndim != 3 or not isinstance(count, int) or not 1 <= count <= x.shape[1]:
            raise ValueError(
                f"count must lie in [1, {x.shape[1]}] (the number of tokens) of x [B, S, D], got {count!r}"
            )
    if masked is not None:
        check_plan(masked, x=x)
        if x.ndim != 3 or prefix < 0 or tuple(x.shape[:2]) != (masked.batch, prefix + masked.num_tokens):
            want = f"[{masked.batch}, {prefix} prefix + {masked.num_tokens}, D]"
            raise ValueError(f"x must be {want} for this plan, got {tuple(x.shape)}")


def _check_weights(w: tuple, width: int) -> None:
    """Shapes of the flattened weights."""

    def check(name: str, t: object, *shape: int) -> None:
        _checks.tensor(name, t)
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(t.shape)}")

    fc1 = w[12]
    _checks.tensor("fc1_weight", fc1, ndim=2)
    hidden = fc1.shape[0]
    joint = w[3] is None and w[4] is None
    for at in range(2, 5):
        if not joint or at == 2:
            check("qkv_weight", w[at], 3 * width if joint else width, width)
    for t in w[5:8]:
        if t is not None:
            check("qkv_bias", t, 3 * width if w[6] is None and w[7] is None and t.shape[0] != width else width)
    for at, name, *shape in (
        (0, "norm1_weight", width),
        (1, "norm1_bias", width),
        (8, "proj_weight", width, width),
        (10, "norm2_weight", width),
        (11, "norm2_bias", width),
        (12, "fc1_weight", hidden, width),
        (14, "fc2_weight", width, hidden),
    ):
        check(name, w[at], *shape)
    for at, name, size in (
        (9, "proj_bias", width),
        (13, "fc1_bias", hidden),
        (15, "fc2_bias", width),
        (16, "scale1", width),
        (17, "scale2", width),
    ):
        if w[at] is not None:
            check(name, w[at], size)
